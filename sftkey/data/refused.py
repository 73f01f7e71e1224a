"""Which rows that are left out refuse a recipe: one answer for reading rows and for the gate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftkey.errors import DataError, Problem
from sftkey.recipe.schema import DataSection

NUM_SHOWN = 20  # row numbers in counts and messages


@dataclass(frozen=True)
class Allowed:
    """What allows rows to be left out."""

    key: str  # of the `data` section; with the value `error` such rows refuse the recipe
    hint: str | None  # what to do about them then; None where they are only counted


# By the code of the rows' refusal; `unsplit_rows` decides on all others.
DROP = "data.unsplit_rows: drop leaves them out"
UNSPLIT = Allowed("unsplit_rows", f"rows count from 0; mend these rows; {DROP}")
OTHERS = {
    "empty-thinking": Allowed(
        "empty_thinking",
        "what is trained behind an empty thinking stops reading it: give these rows a reasoning, "
        "or leave data.thinking out and write `thinking: own` in every stage, so that the model "
        "writes it; data.empty_thinking: drop leaves these rows out",
    ),
    "not-trained": Allowed("unsplit_rows", None),
    "not-returned": Allowed(
        "unsplit_rows", f"choose other tags as response.thinking and response.answer; {DROP}"
    ),
    "template": Allowed(
        "unsplit_rows", f"mend these messages, or choose another model.chat_template; {DROP}"
    ),
    "overlap": Allowed("overlap", "rows count from 0; data.overlap: drop leaves these rows out"),
    "too-long": Allowed(
        "too_long",
        "raise data.max_length; data.too_long: drop leaves these rows out, trim_thinking shortens "
        "their thinking",
    ),
}


@dataclass(frozen=True)
class LeftOut:
    """Rows of one split that are left out for one reason."""

    code: str  # names the reason, for programs
    rows: tuple[int, ...]  # the first row numbers, from 0
    split: str  # the one that they were meant for
    what: str  # the reason, how many rows there are, and the first numbers
    hint: str | None  # what to do about them; None where the recipe allows it


def left_out(data: DataSection, dropped: Mapping[str, Any]) -> Iterator[LeftOut]:
    """Tell for each reason which rows are left out, and whether the recipe allows it."""
    for where, counted in dropped.items():
        split, _, reason = where.partition(": ")
        allowed = OTHERS.get(counted["code"], UNSPLIT)
        hint = allowed.hint if getattr(data, allowed.key) == "error" else None
        what = f"{reason}: {numbered(counted['rows'], counted['count'])}"
        yield LeftOut(counted["code"], tuple(counted["rows"]), split, what, hint)


def count_row(
    counted: dict[str, Any], where: str, index: int, code: str | None = None
) -> dict[str, Any]:
    """Count a row under "split: reason", with the first row numbers, and return the entry."""
    entry: dict[str, Any] = counted.setdefault(where, {"count": 0, "rows": []})
    entry["count"] += 1
    if len(entry["rows"]) < NUM_SHOWN:
        entry["rows"].append(index)
    if code is not None:
        entry["code"] = code
    return entry


def refuse_none_left(data: DataSection, split: str, dropped: Mapping[str, Any]) -> None:
    """Refuse a split of which all rows are left out, with all reasons, the most frequent first."""
    found = {where: each for where, each in dropped.items() if where.startswith(f"{split}: ")}
    total = sum(each["count"] for each in found.values())
    listed = "; ".join(
        f"{where.partition(': ')[2]} ({each['count']} of {total})"
        for where, each in sorted(found.items(), key=lambda item: -item[1]["count"])
    )
    too_long = any(each["code"] == "too-long" for each in found.values())
    hint = "raise data.max_length" if too_long else None
    what = f"no rows are left in {split}: {listed}"
    raise DataError(data.source, what.removesuffix(": "), hint)


def refuse_left_out(data: DataSection, dropped: Mapping[str, Any]) -> None:
    """Refuse rows that the recipe doesn't allow to be left out, if there are any."""
    refused = [each for each in left_out(data, dropped) if each.hint]
    if refused:
        problems = [Problem(each.split, each.what) for each in refused]
        hints = dict.fromkeys(each.hint for each in refused if each.hint)
        raise DataError(data.source, problems, "; ".join(hints))


def numbered(rows: Sequence[int], count: int | None = None) -> str:
    """Count rows and name the first: `25 rows, 0, 1, …`."""
    count = len(rows) if count is None else count
    names = [str(row) for row in rows[:NUM_SHOWN]] + ["…"] * (count > len(rows[:NUM_SHOWN]))
    return ", ".join([f"{count} row" + "s" * (count != 1), *names])
