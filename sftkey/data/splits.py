"""Train, validation and test, by count, share, split or file; no prompt stands in two of them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftkey.activity import activity
from sftkey.data.examples import USUAL, Loaded, RowOptions, Unsplit
from sftkey.data.refused import NUM_SHOWN, OTHERS, UNSPLIT, numbered
from sftkey.data.response import Example
from sftkey.data.sources import MADE, has_splits, load_examples, with_defaults
from sftkey.errors import DataError, Problem
from sftkey.recipe.schema import DataSection

NUM_LISTED = 5  # lines in an error
MOST_EMPTY = 0.01  # share of rows whose thinking may be empty without a word in the recipe
Amount = int | float | str | None


@dataclass(frozen=True)
class Splits:
    """The examples of each split, in source order, and what was dropped.

    `counts` is JSON: `rows` (by split) and `dropped`, a list of
    `{split, reason, code, num_rows, rows}`, where `rows` holds the first 20 row numbers, from 0,
    and `code` names the kind of reason. `empty_thinking`, where there are such rows, has the row
    numbers by split of those that are kept.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    counts: dict[str, Any]

    def dropped(self) -> dict[str, Any]:
        """Return what was dropped by "split: reason", with `count`, the first `rows` and `code`."""
        return {
            f"{item['split']}: {item['reason']}": {
                "count": item["num_rows"],
                "rows": item["rows"],
                "code": item["code"],
            }
            for item in self.counts["dropped"]
        }


@activity("reading the rows")
def load_splits(
    data: DataSection,
    seed: int,
    need_test: bool = True,
    options: RowOptions = USUAL,
) -> Splits:
    """Load the splits that the recipe names.

    Args:
        data: The recipe's section on data.
        seed: What the choice of rows, and made rows, depend on.
        need_test: Whether a recipe without test rows is refused.
        options: What else the recipe says of its rows.

    Raises:
        DataError: A split is missing, empty or too large, a row can't be used, or a prompt
            stands in two splits.
    """
    data = with_defaults(data)
    amounts = _amounts(data)
    if need_test and amounts["test"] is None:
        raise DataError(
            data.source,
            "data.test: expected a count, a share, a split or a file; got none",
            hint="`data.test: 200` keeps 200 rows of train for the test",
        )
    dropped: list[dict[str, Any]] = []
    empty: dict[str, list[int]] = {}

    def load(name: str, split: str) -> list[Example]:
        loaded = load_examples(data, seed, split, options)
        dropped.extend(_check_unsplit(loaded, data, name))
        if not options.reasoning:
            return loaded.examples
        kept, left_out = _without_empty_thinking(loaded.examples, data, name)
        dropped.extend(left_out)
        empty[name] = [each.index for each in kept if not each.thinking.strip()]
        return kept

    train = _sampled(load("train", data.train), data, seed)
    named = {
        name: load(name, amount) for name, amount in amounts.items() if isinstance(amount, str)
    }
    splits = _take(train, amounts, seed, data.source) | named
    splits, repeated = _without_overlap(splits, data)
    for name, examples in splits.items():
        if not examples and (name == "train" or amounts.get(name)):
            raise DataError(data.source, f"no rows are left in {name}", hint=_hint(repeated))
    counts: dict[str, Any] = {"rows": {name: len(examples) for name, examples in splits.items()}}
    if any(empty.values()):
        counts["empty_thinking"] = {name: rows for name, rows in empty.items() if rows}
    return Splits(**splits, counts={**counts, "dropped": dropped + repeated})


def _without_empty_thinking(
    examples: list[Example], data: DataSection, split: str
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Leave out the rows whose thinking is empty, if they are many or the recipe says so.

    Raises:
        DataError: No row has a thinking.
    """
    rows = [example.index for example in examples if not example.thinking.strip()]
    few = data.empty_thinking == "error" and len(rows) <= MOST_EMPTY * len(examples)
    if not rows or few or data.empty_thinking == "keep":
        return examples, []
    reason = f"the thinking is empty in {len(rows) / len(examples):.0%} of the rows"
    if len(rows) == len(examples):
        what = f"{split}: {reason}"
        raise DataError(data.source, what, OTHERS["empty-thinking"].hint)
    kept = [example for example in examples if example.thinking.strip()]
    return kept, [_dropped(split, reason, "empty-thinking", rows)]


def _amounts(data: DataSection) -> dict[str, Amount]:
    """Return what the recipe says of test and validation, or the defaults with splits."""
    given: dict[str, Amount] = {"test": data.test, "validation": data.validation}
    defaults: dict[str, Amount] = {"test": "test", "validation": 200} if has_splits(data) else {}
    return {name: defaults.get(name) if it is None else it for name, it in given.items()}


def _check_unsplit(loaded: Loaded, data: DataSection, split: str) -> list[dict[str, Any]]:
    """Refuse what can't be split, or count it by reason."""
    refused = loaded.unsplit
    if loaded.examples:  # a turn that isn't to be trained is only counted
        refused = [row for row in refused if OTHERS.get(row.code, UNSPLIT).hint]
    if refused and (data.unsplit_rows == "error" or not loaded.examples):
        raise DataError(
            data.source,
            f"{_rows(len(refused))} of {split} can't be used:{_listed(refused)}",
            hint="rows count from 0; `data.unsplit_rows: drop` leaves these out"
            if loaded.examples
            else "no row can be used; rows count from 0",
        )
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in loaded.unsplit:
        reasons.setdefault((row.reason, row.code), []).append(row.index)
    return [_dropped(split, reason, code, rows) for (reason, code), rows in reasons.items()]


def _listed(unsplit: Sequence[Unsplit]) -> str:
    """List the first rows with their reasons, a line each."""
    lines = [f"\n  row {row.index}: {row.reason}" for row in unsplit[:NUM_LISTED]]
    if len(unsplit) > NUM_LISTED:
        lines.append(f"\n  and {len(unsplit) - NUM_LISTED} more")
    return "".join(lines)


def _dropped(split: str, reason: str, code: str, rows: Sequence[int]) -> dict[str, Any]:
    return {
        "split": split,
        "reason": reason,
        "code": code,
        "num_rows": len(rows),
        "rows": list(rows[:NUM_SHOWN]),
    }


def _sampled(train: list[Example], data: DataSection, seed: int) -> list[Example]:
    """Keep `data.num_rows` rows of what isn't made, chosen by the seed; in source order."""
    if data.num_rows is None or data.source in MADE:
        return train
    rows = _in_order(train, seed)
    if data.num_rows > len(rows):
        what = f"data.num_rows: expected at most the {len(rows)} of train; got {data.num_rows}"
        raise DataError(data.source, what)
    kept = set(rows[: data.num_rows])
    return [example for example in train if example.index in kept]


def _take(
    train: list[Example], amounts: dict[str, Amount], seed: int, source: str
) -> dict[str, list[Example]]:
    """Take counted splits out of train, one after another; turns of one row stay together."""
    rows = _in_order(train, seed)
    chosen = dict.fromkeys(rows, "train")
    start, rest = 0, f"{len(rows)} rows of train"
    for name, amount in amounts.items():
        if amount is None or isinstance(amount, str):
            continue
        count = max(1, round(amount * len(rows))) if isinstance(amount, float) else amount
        if start + count >= len(rows):
            raise DataError(source, f"data.{name}: expected fewer than the {rest}; got {count}")
        chosen.update(dict.fromkeys(rows[start : start + count], name))
        start, rest = start + count, f"{len(rows) - start - count} rows that data.{name} leaves"
    taken: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in train:
        taken[chosen[example.index]].append(example)
    return taken


def _in_order(examples: list[Example], seed: int) -> list[int]:
    """Return the numbers of the rows in the order in which they are chosen.

    A row's place depends on the seed and its number alone, so other rows that come or go don't
    change which of two rows comes first.
    """

    def place(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{index}".encode()).digest()

    return sorted({example.index for example in examples}, key=place)


def _normalized(text: str) -> str:
    """Return what two texts must share to be the same: NFKC, case folded, white space collapsed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _same(prompt: str | tuple[dict[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return a key that equal prompts share; a text is a user's message."""
    if isinstance(prompt, str):
        return (("user", _normalized(prompt)),)
    return tuple((message["role"], _normalized(message["content"])) for message in prompt)


def _without_overlap(
    splits: dict[str, list[Example]], data: DataSection
) -> tuple[dict[str, list[Example]], list[dict[str, Any]]]:
    """Refuse prompts that stand in two splits, or drop them: the test keeps all of its rows."""
    kept: dict[str, list[Example]] = {}
    owners: dict[object, str] = {}
    repeated: list[dict[str, Any]] = []
    for name in ("test", "validation", "train"):
        keys = [_same(example.prompt) for example in splits[name]]
        also: dict[str, list[int]] = {}
        kept[name] = []
        for example, key in zip(splits[name], keys, strict=True):
            if key in owners:
                also.setdefault(owners[key], []).append(example.index)
            else:
                kept[name].append(example)
        owners |= {key: owners.get(key, name) for key in keys}
        repeated += [
            _dropped(name, f"prompt also in {owner}", "overlap", rows)
            for owner, rows in also.items()
        ]
    if repeated and data.overlap == "error":
        problems = [
            Problem(item["split"], f"{item['reason']}: {numbered(item['rows'], item['num_rows'])}")
            for item in repeated
        ]
        raise DataError(
            data.source, problems, hint="rows count from 0; `data.overlap: drop` drops these rows"
        )
    return {name: kept[name] for name in splits}, repeated


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


def _hint(repeated: Sequence[dict[str, Any]]) -> str | None:
    lines = [f"{_rows(item['num_rows'])} of {item['split']}: {item['reason']}" for item in repeated]
    return "; ".join(lines) or None
