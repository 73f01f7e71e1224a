"""Train, validation and test, by count, share, split or file; no prompt stands in two of them."""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any

from sftkey.activity import activity
from sftkey.data.examples import USUAL, RowOptions
from sftkey.data.refused import OTHERS, count_row, refuse_left_out, refuse_none_left
from sftkey.data.response import Example
from sftkey.data.sources import MADE, has_splits, load_examples, with_defaults
from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection

MOST_EMPTY = 0.01  # share of rows whose thinking may be empty without a word in the recipe
Amount = int | float | str | None


@dataclass(frozen=True)
class Splits:
    """The examples of each split, in source order, and what was dropped.

    `dropped` is JSON: by "split: reason" the `count`, the first 20 `rows`, from 0, and `code`,
    which names the kind of reason.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    dropped: dict[str, Any]
    empty_thinking: dict[str, list[int]]  # by split the rows that are kept without a thinking


@activity("reading the rows")
def load_splits(data: DataSection, seed: int, options: RowOptions = USUAL) -> Splits:
    """Load the splits that the recipe names; the choice of rows, and made rows, depend on the seed.

    Raises:
        DataError: A split is missing, empty or too large, a row can't be used, or a prompt
            stands in two splits.
    """
    data = with_defaults(data)
    amounts = _amounts(data)
    dropped: dict[str, Any] = {}
    empty: dict[str, list[int]] = {}

    def load(name: str, split: str) -> list[Example]:
        loaded = load_examples(data, seed, split, options)
        unsplit: dict[str, Any] = {}
        for row in loaded.unsplit:
            count_row(unsplit, f"{name}: {row.reason}", row.index, row.code)
        if not loaded.examples:
            refuse_none_left(data, name, unsplit)
        refuse_left_out(data, unsplit)
        dropped.update(unsplit)
        if not options.reasoning:
            return loaded.examples
        kept = _without_empty_thinking(loaded.examples, data, name, dropped)
        if rows := [each.index for each in kept if not each.has_thinking]:
            empty[name] = rows
        return kept

    train = _sampled(load("train", data.train), data, seed)
    named = {
        name: load(name, amount) for name, amount in amounts.items() if isinstance(amount, str)
    }
    splits = _without_overlap(_take(train, amounts, seed, data.source) | named, data, dropped)
    for name, examples in splits.items():
        if not examples and (name == "train" or amounts.get(name)):
            refuse_none_left(data, name, dropped)
    return Splits(**splits, dropped=dropped, empty_thinking=empty)


def _without_empty_thinking(
    examples: list[Example], data: DataSection, split: str, dropped: dict[str, Any]
) -> list[Example]:
    """Leave out the rows whose thinking is empty, if they are many or the recipe says so."""
    rows = [example.index for example in examples if not example.has_thinking]
    few = data.empty_thinking == "error" and len(rows) <= MOST_EMPTY * len(examples)
    if not rows or few or data.empty_thinking == "keep":
        return examples
    where = f"{split}: the thinking is empty in {len(rows) / len(examples):.0%} of the rows"
    if len(rows) == len(examples):
        raise DataError(data.source, where, OTHERS["empty-thinking"].hint)
    for row in rows:
        count_row(dropped, where, row, "empty-thinking")
    return [example for example in examples if example.has_thinking]


def _amounts(data: DataSection) -> dict[str, Amount]:
    """Return what the recipe says of test and validation, or the defaults with splits."""
    given: dict[str, Amount] = {"test": data.test, "validation": data.validation}
    defaults: dict[str, Amount] = {"test": "test", "validation": 200} if has_splits(data) else {}
    return {name: defaults.get(name) if it is None else it for name, it in given.items()}


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
    splits: dict[str, list[Example]], data: DataSection, dropped: dict[str, Any]
) -> dict[str, list[Example]]:
    """Refuse prompts that stand in two splits, or drop them: the test keeps all of its rows."""
    kept: dict[str, list[Example]] = {}
    owners: dict[object, str] = {}
    repeated: dict[str, Any] = {}
    for name in ("test", "validation", "train"):
        keys = [_same(example.prompt) for example in splits[name]]
        kept[name] = []
        for example, key in zip(splits[name], keys, strict=True):
            if key in owners:
                where = f"{name}: prompt also in {owners[key]}"
                count_row(repeated, where, example.index, "overlap")
            else:
                kept[name].append(example)
        owners |= {key: owners.get(key, name) for key in keys}
    refuse_left_out(data, repeated)
    dropped.update(repeated)
    return {name: kept[name] for name in splits}
