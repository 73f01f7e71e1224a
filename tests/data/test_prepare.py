import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftkey.data.prepare import Prepared, prepare
from sftkey.data.response import Segment
from sftkey.errors import DataError
from sftkey.recipe.load import load_recipe
from tests.support.model_folders import write_rows

Write = Callable[..., Prepared]
ROWS = [
    {"prompt": f"Q{n}", "thinking": "1 + 1 = 2\n" * (n + 1), "answer": str(n)} for n in range(9)
]


@pytest.fixture
def prepared(tiny_recipe: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path) -> Write:
    """Return a function that writes rows and a recipe over them, and prepares it."""

    def write(rows: list[dict[str, str]], *overrides: str) -> Prepared:
        source = write_rows(tmp_path / "these.jsonl", rows)
        recipe = tiny_recipe(data={"source": source})
        return prepare(load_recipe(recipe, overrides), tiny_tokenizer)

    return write


def test_rows_of_each_split(prepared: Write) -> None:
    """Train and validation become tokens, test stays examples; counts add up, and are JSON."""
    done = prepared(ROWS, "data.validation=2", "data.test=3")
    assert done.validation is not None
    assert (done.train.num_rows, done.validation.num_rows, len(done.test)) == (4, 2, 3)
    assert done.train.column_names == ["input_ids", "segment_ids", "index"]
    indexes = [*done.train["index"], *done.validation["index"], *(row.index for row in done.test)]
    assert sorted(indexes) == list(range(9))
    assert done.train["index"] == sorted(done.train["index"])
    counts = json.loads(json.dumps(done.counts))
    assert {name: counts[name] for name in ("train", "validation", "test")} == {
        "train": 4,
        "validation": 2,
        "test": 3,
    }
    assert counts["dropped"] == counts["trimmed"] == {}
    for name, dataset in (("train", done.train), ("validation", done.validation)):
        segments = [segment for row in dataset["segment_ids"] for segment in row]
        assert counts["tokens"][name] == {s.name: segments.count(s) for s in Segment}


def test_questions_are_drawn_by_the_seed(prepared: Write, tiny_recipe: Callable[..., Path]) -> None:
    """A recipe asks the same test rows again, in their order; another seed draws others."""
    done = prepared(ROWS, "data.validation=1", "data.test=7")

    def asked(seed: int) -> list[int]:
        recipe = load_recipe(tiny_recipe(), [f"seed={seed}", "eval.num_questions=3"])
        return [done.test.index(example) for example in done.questions(recipe)]

    drawn = [asked(seed) for seed in range(8)]
    assert drawn == [asked(seed) for seed in range(8)]
    assert all(len(places) == 3 and places == sorted(places) for places in drawn)
    assert len(set(map(tuple, drawn))) > 4
    assert {place for places in drawn for place in places} == set(range(7))


def test_validation_may_be_missing(prepared: Write) -> None:
    """Without a validation split there is none, rather than an empty one."""
    done = prepared(ROWS)
    assert done.validation is None
    assert done.counts["validation"] == 0
    assert done.counts["tokens"]["validation"] == {s.name: 0 for s in Segment}


def test_refused_rows_are_counted_by_reason(prepared: Write) -> None:
    """What can't be a row is dropped with its reason and number, and all the rest is trained."""
    odd = {"prompt": "Q", "thinking": "a <|im_end|>", "answer": "7"}
    done = prepared([odd, *ROWS[:3], odd | {"prompt": "R"}], "data.unsplit_rows=drop")
    reason = "train: the thinking holds the text of the special token '<|im_end|>'"
    assert done.counts["dropped"] == {
        reason: {"count": 2, "rows": [0, 4], "code": "special-token-text"}
    }
    assert [(row.index, row.split) for row in done.refusals] == [(0, "train"), (4, "train")]
    assert done.train["index"] == [1, 2, 3]


def test_counts_show_twenty_rows(prepared: Write) -> None:
    """The count is whole, the list of numbers short."""
    odd = [{"prompt": f"R{n}", "thinking": "<|im_end|>", "answer": "7"} for n in range(25)]
    (entry,) = prepared([*odd, *ROWS], "data.unsplit_rows=drop").counts["dropped"].values()
    assert entry == {"count": 25, "rows": list(range(20)), "code": "special-token-text"}


def test_splits_own_drops_are_counted_too(prepared: Write) -> None:
    """Rows without a key that the recipe allows to be dropped stand beside the others."""
    empty = {"prompt": "E", "thinking": "a", "answer": ""}
    done = prepared([*ROWS, empty], "data.unsplit_rows=drop")
    assert done.counts["dropped"] == {
        "train: the answer is empty": {"count": 1, "rows": [9], "code": "no-key"}
    }


def test_rows_without_a_key_are_refused(prepared: Write) -> None:
    """An empty answer is an error that names the rows, unless the recipe drops such rows."""
    empty = {"prompt": "E", "thinking": "a", "answer": " "}
    with pytest.raises(DataError) as raised:
        prepared([*ROWS, empty])
    assert str(raised.value).partition("these.jsonl: ")[2] == (
        "1 problem\n"
        "  train: the answer is empty: 1 row, 9\n"
        "hint: rows count from 0; mend these rows; data.unsplit_rows: drop leaves them out"
    )


def test_long_rows_are_dropped_or_trimmed(prepared: Write) -> None:
    """Both are counted; trimming keeps the row."""
    whole = prepared(ROWS)
    length = sorted(len(ids) for ids in whole.train["input_ids"])[6]
    entry = {"count": 2, "rows": [7, 8]}
    reason = f"train: longer than {length} tokens"
    dropped = prepared(ROWS, f"data.max_length={length}")
    assert dropped.counts["dropped"] == {reason: entry | {"code": "too-long"}}
    assert dropped.train.num_rows == 7
    trimmed = prepared(ROWS, f"data.max_length={length}", "data.too_long=trim_thinking")
    assert trimmed.counts["trimmed"] == {reason: entry}
    assert trimmed.counts["dropped"] == {}
    assert max(len(ids) for ids in trimmed.train["input_ids"]) <= length
    key = ("ANSWER_TAG", "ANSWER", "END")
    for name in key:
        assert trimmed.counts["tokens"]["train"][name] == whole.counts["tokens"]["train"][name]


def test_long_rows_may_be_an_error(prepared: Write) -> None:
    """Every long row is named at once, the first 20 of them by number."""
    rows = [{**ROWS[8], "prompt": f"Q{number}"} for number in range(25)]
    longest = max(len(ids) for ids in prepared(rows).train["input_ids"])
    with pytest.raises(DataError) as raised:
        prepared(rows, "data.max_length=20", "data.too_long=error")
    assert str(raised.value) == (
        f"data.max_length: expected rows of at most 20 tokens; got some of up to {longest}: "
        f"25 rows, {', '.join(map(str, range(20)))}, …\n"
        "hint: rows count from 0; raise data.max_length, "
        "or choose data.too_long: drop or trim_thinking"
    )


def test_all_rows_too_long_is_an_error(prepared: Write) -> None:
    """Nothing would be trained: the message says why, and how many."""
    with pytest.raises(DataError) as raised:
        prepared(ROWS, "data.max_length=8")
    assert str(raised.value).partition("these.jsonl: ")[2] == (
        "no rows are left in train: longer than 8 tokens (9 of 9)\nhint: raise data.max_length"
    )


def test_all_rows_refused_is_an_error(prepared: Write) -> None:
    """Every reason is named."""
    rows = [{"prompt": "Q", "thinking": "<|im_end|>", "answer": "7"}]
    rows += [{"prompt": f"R{n}", "thinking": "a", "answer": "<|im_start|>"} for n in range(2)]
    with pytest.raises(DataError) as raised:
        prepared(rows)
    assert str(raised.value).partition("these.jsonl: ")[2] == (
        "no rows are left in train: "
        "the answer holds the text of the special token '<|im_start|>' (2 of 3); "
        "the thinking holds the text of the special token '<|im_end|>' (1 of 3)"
    )


def test_stage_without_tokens_is_an_error(prepared: Write) -> None:
    """With empty answer tags, a loss on the tags alone would train nothing."""
    with pytest.raises(DataError) as raised:
        prepared(ROWS, 'response.answer=["", ""]', "stages.key.loss_on={answer_tag: 1.0}")
    assert str(raised.value).partition("these.jsonl: ")[2] == (
        "1 problem\n"
        "  stages.key.loss_on: no row of train has a token of these segments\n"
        "hint: see `sftkey show` for the segments"
    )
