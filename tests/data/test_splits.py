"""How rows are shared out between train, validation and test."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftkey.data.examples import RowOptions
from sftkey.data.response import Example
from sftkey.data.splits import Splits, _normalized, _same, _take, load_splits
from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection

HELD_OUT = ("validation", "test")


def rows(count: int, word: str = "row") -> list[dict[str, str]]:
    """Make rows with prompts that differ."""
    return [{"prompt": f"{word} {i}", "thinking": "t", "answer": str(i)} for i in range(count)]


def jsonl(file: Path, items: list[dict[str, Any]]) -> Path:
    """Write rows into a file, a line each."""
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


def load(source: object, seed: int = 7, **fields: Any) -> Splits:
    """Load the splits of a source that may be a path."""
    options = RowOptions(fields.pop("turns", "last"))
    data = DataSection.model_validate({"source": str(source), **fields})
    return load_splits(data, seed, options)


def message_of(source: object, **fields: Any) -> str:
    """Return the whole text of the error."""
    with pytest.raises(DataError) as caught:
        load(source, **fields)
    return str(caught.value)


def indices(splits: Splits) -> dict[str, list[int]]:
    """Return the row numbers of each split."""
    names = ("train", *HELD_OUT)
    return {name: [example.index for example in getattr(splits, name)] for name in names}


def sizes(splits: Splits) -> dict[str, int]:
    """Count the examples of each split."""
    return {name: len(rows) for name, rows in indices(splits).items()}


@given(
    count=st.integers(3, 60),
    test=st.one_of(st.none(), st.integers(1, 20), st.floats(0.01, 0.4)),
    validation=st.one_of(st.none(), st.integers(1, 20), st.floats(0.01, 0.4)),
    seed=st.integers(0, 5),
)
def test_counted_splits_share_out_all_rows(
    count: int, test: int | float | None, validation: int | float | None, seed: int
) -> None:
    """Each row lands in one split, in source order, or the amounts are refused."""
    examples = [Example(str(index), "", "a", index) for index in range(count)]
    try:
        taken = _take(examples, {"test": test, "validation": validation}, seed, "rows")
    except DataError:
        return
    everything = [example for name in taken for example in taken[name]]
    assert sorted(everything, key=lambda example: example.index) == examples
    for name, amount in (("test", test), ("validation", validation)):
        order = [example.index for example in taken[name]]
        assert order == sorted(order)
        expected = amount if isinstance(amount, int) else max(1, round((amount or 0) * count))
        assert len(order) == (expected if amount is not None else 0)
    assert taken["train"]


def test_counts_and_shares_are_seeded_and_stable(tmp_path: Path) -> None:
    """The seed decides; a split doesn't depend on a later one's size, nor on other rows."""
    file = jsonl(tmp_path / "rows.jsonl", rows(40))
    first = indices(load(file, test=5, validation=0.1))
    assert first == indices(load(file, test=0.125, validation=4))
    assert {name: len(numbers) for name, numbers in first.items()} == {
        "train": 31,
        "validation": 4,
        "test": 5,
    }
    assert first["test"] != indices(load(file, seed=8, test=5))["test"]
    assert first["test"] == indices(load(file, test=5, validation=20))["test"]
    assert set(first["validation"]) < set(indices(load(file, test=5, validation=9))["validation"])
    gone = next(index for index in range(40) if index in first["train"])
    broken = rows(40)
    broken[gone]["answer"] = ""
    file = jsonl(tmp_path / "broken.jsonl", broken)
    kept = indices(load(file, test=5, validation=4, unsplit_rows="drop"))
    assert (kept["test"], kept["validation"]) == (first["test"], first["validation"])


def test_the_choice_is_the_same_everywhere(tmp_path: Path) -> None:
    """A run on another machine, years later, holds out the same rows."""
    file = jsonl(tmp_path / "rows.jsonl", rows(20))
    splits = load(file, seed=42, test=3, validation=3)
    assert (indices(splits)["test"], indices(splits)["validation"]) == ([1, 11, 13], [0, 6, 17])


def test_splits_may_be_names_or_files(tmp_path: Path) -> None:
    """A folder's splits go by name, files stand for any split, each with its own row numbers."""
    jsonl(tmp_path / "train.jsonl", rows(4))
    jsonl(tmp_path / "dev.jsonl", rows(2, "dev"))
    other = jsonl(tmp_path / "other.jsonl", rows(3, "other"))
    splits = load(tmp_path, validation="dev", test=str(other))
    assert indices(splits) == {"train": [0, 1, 2, 3], "validation": [0, 1], "test": [0, 1, 2]}
    assert splits.test[0].prompt == "other 0"
    swapped = load(tmp_path, train=str(other), validation=1, test="dev")
    assert swapped.dropped == {}
    assert sizes(swapped) == {"train": 2, "validation": 1, "test": 2}


def test_a_source_with_splits_has_defaults(tmp_path: Path) -> None:
    """A folder's `test` is the test, 200 rows of train the validation; a file has neither."""
    jsonl(tmp_path / "train.jsonl", rows(201))
    jsonl(tmp_path / "test.jsonl", rows(2, "test"))
    assert sizes(load(tmp_path)) == {"train": 1, "validation": 200, "test": 2}
    file = tmp_path / "train.jsonl"
    assert sizes(load(file)) == {"train": 201, "validation": 0, "test": 0}


def test_more_rows_than_there_are_is_an_error(tmp_path: Path) -> None:
    """Counts must leave rows to train on."""
    file = jsonl(tmp_path / "rows.jsonl", rows(10))
    assert message_of(file, test=10) == (
        f"{file}: data.test: expected fewer than the 10 rows of train; got 10"
    )
    assert message_of(file, test=6, validation=0.5) == (
        f"{file}: data.validation: expected fewer than the 4 rows that data.test leaves; got 5"
    )


def test_turns_of_one_conversation_stay_in_one_split(tmp_path: Path) -> None:
    """Splits are counted in rows, whatever number of examples a row gives."""
    answer = {"role": "assistant", "content": "a", "reasoning_content": "t"}
    talks = [
        [
            {"role": "user", "content": f"first {i}"},
            answer,
            {"role": "user", "content": "more"},
            answer,
        ]
        for i in range(10)
    ]
    file = jsonl(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    splits = load(file, test=3, validation=2, turns="all")
    found = indices(splits)
    assert {name: len(numbers) for name, numbers in found.items()} == {
        "train": 10,
        "validation": 4,
        "test": 6,
    }
    assert all(numbers.count(number) == 2 for numbers in found.values() for number in numbers)


def test_rows_that_cannot_be_split_are_refused_or_counted(tmp_path: Path) -> None:
    """The error has all reasons with the first rows of each; `drop` counts them likewise."""
    items: list[dict[str, Any]] = rows(40)
    for number in range(0, 25):
        items[number]["answer"] = None if number % 2 else ""
    file = jsonl(tmp_path / "rows.jsonl", items)
    assert message_of(file, test=2) == (
        f"{file}: 2 problems\n"
        "  train: the answer is empty: 13 rows, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24\n"
        "  train: `answer` is null: 12 rows, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23\n"
        "hint: rows count from 0; mend these rows; data.unsplit_rows: drop leaves them out"
    )
    splits = load(file, test=2, unsplit_rows="drop")
    assert len(splits.train) == 13
    assert json.loads(json.dumps(splits.dropped)) == {
        "train: the answer is empty": {
            "count": 13,
            "rows": list(range(0, 25, 2)),
            "code": "no-key",
        },
        "train: `answer` is null": {
            "count": 12,
            "rows": list(range(1, 25, 2)),
            "code": "unusable",
        },
    }


def test_a_set_without_one_usable_row_is_an_error(tmp_path: Path) -> None:
    """Dropping may not leave nothing."""
    file = jsonl(tmp_path / "rows.jsonl", [{**rows(1)[0], "answer": ""}])
    assert message_of(file, test=1, unsplit_rows="drop") == (
        f"{file}: no rows are left in train: the answer is empty (1 of 1)"
    )


def test_prompts_in_two_splits_are_refused_or_dropped(tmp_path: Path) -> None:
    """The test keeps its rows; validation and train lose what stands there, counted."""
    train = jsonl(tmp_path / "train.jsonl", [*rows(4), {**rows(1)[0], "prompt": " ROW\u00a01 \n"}])
    dev = jsonl(tmp_path / "dev.jsonl", [*rows(2, "dev"), rows(1)[0]])
    test = jsonl(tmp_path / "test.jsonl", [*rows(1, "DEV"), rows(2)[1]])
    named = {"validation": str(dev), "test": str(test)}
    assert message_of(train, **named) == (
        f"{train}: 3 problems\n"
        "  validation: prompt also in test: 1 row, 0\n"
        "  train: prompt also in validation: 1 row, 0\n"
        "  train: prompt also in test: 2 rows, 1, 4\n"
        "hint: rows count from 0; data.overlap: drop leaves these rows out"
    )
    splits = load(train, overlap="drop", **named)
    assert indices(splits) == {"train": [2, 3], "validation": [1, 2], "test": [0, 1]}
    overlap = {"code": "overlap"}
    assert splits.dropped == {
        "validation: prompt also in test": {"count": 1, "rows": [0]} | overlap,
        "train: prompt also in validation": {"count": 1, "rows": [0]} | overlap,
        "train: prompt also in test": {"count": 2, "rows": [1, 4]} | overlap,
    }


def test_a_split_that_overlap_empties_is_an_error(tmp_path: Path) -> None:
    """If every row of train stands in the test, nothing is left to train on."""
    file = jsonl(tmp_path / "train.jsonl", rows(3))
    test = jsonl(tmp_path / "test.jsonl", rows(3))
    assert message_of(file, test=str(test), overlap="drop") == (
        f"{file}: no rows are left in train: prompt also in test (3 of 3)"
    )


def test_long_lists_of_rows_are_cut(tmp_path: Path) -> None:
    """An error names the first twenty row numbers."""
    file = jsonl(tmp_path / "train.jsonl", rows(30))
    test = jsonl(tmp_path / "test.jsonl", rows(25))
    numbers = ", ".join(str(number) for number in range(20))
    assert message_of(file, test=str(test)) == (
        f"{file}: 1 problem\n  train: prompt also in test: 25 rows, {numbers}, …\n"
        "hint: rows count from 0; data.overlap: drop leaves these rows out"
    )


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    """The normal form is one, and case, width and white space don't tell prompts apart."""
    assert _normalized(_normalized(text)) == _normalized(text)
    assert _normalized(f"  {text}\n") == _normalized(text)


def test_messages_and_text_of_one_question_are_the_same_prompt() -> None:
    """A question is the same as text and as a message; a turn before it makes it another."""
    question = {"role": "user", "content": "Two  plus \uff12?"}
    assert _same((question,)) == _same("two plus 2?")
    assert _same(({"role": "system", "content": "x"}, question)) != _same("two plus 2?")


def test_so_many_rows_are_kept_by_the_seed(tmp_path: Path) -> None:
    """Another seed keeps others, and more rows keep these; what a split's own file has stays."""
    file, other = jsonl(tmp_path / "a.jsonl", rows(40)), jsonl(tmp_path / "b.jsonl", rows(9, "b"))
    fields = {"validation": 4, "test": str(other)}
    kept, again, shifted = (load(file, seed, num_rows=12, **fields) for seed in (7, 7, 8))
    sizes = {name: len(of) for name, of in indices(kept).items()}
    assert sizes == {"train": 8, "validation": 4, "test": 9}
    assert indices(kept) == indices(again) != indices(shifted)
    assert kept.train == sorted(kept.train, key=lambda example: example.index)
    more = indices(load(file, num_rows=20, **fields))
    assert more["validation"] == indices(kept)["validation"]
    assert set(more["train"]) > set(indices(kept)["train"])
    assert message_of(file, num_rows=41, **fields) == (
        f"{file}: data.num_rows: expected at most the 40 of train; got 41"
    )
