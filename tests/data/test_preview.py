import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from rich.console import Console

from sftkey.data.prepare import Prepared, prepare
from sftkey.data.preview import (
    preview_rows,
    rendered_rows,
    rendered_statistics,
    statistics,
    token_texts,
)
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.tokenization import Row, tokenize
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe, ResponseSection
from tests.support.tokenizers import CHATML, KINDS, TEXT, made

ROWS = [{"prompt": f"Q{n}", "thinking": "1 + 1 = 2", "answer": str(n)} for n in range(6)]
ROWS[1]["answer"] = "<|im_end|>"
STAGES = [
    {"name": "completion", "loss_on": "completion"},
    {"name": "weighted", "loss_on": {"thinking": 0.1, "key": 1.0}},
    {"name": "key", "loss_on": "key"},
]


@pytest.fixture
def made_recipe(
    tiny_recipe: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> Callable[..., tuple[Recipe, Prepared]]:
    """Return what prepares a recipe of three stages over six rows, one of them refused."""

    def make(**data: Any) -> tuple[Recipe, Prepared]:
        for name in ("six", "test"):
            lines = (json.dumps(row) + "\n" for row in ROWS)
            (tmp_path / f"{name}.jsonl").write_text("".join(lines).replace("Q", name))
        section = {"source": str(tmp_path / "six.jsonl"), **data}
        recipe = load_recipe(tiny_recipe(data=section, stages=STAGES), ["data.unsplit_rows=drop"])
        return recipe, prepare(recipe, tiny_tokenizer)

    return make


def test_rows_come_in_source_order_with_their_split(made_recipe: Any) -> None:
    """Splits that were taken out of train, and refused rows, stand where the source has them."""
    rows = preview_rows(*made_recipe(validation=1, test=1), num_rows=100)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 5]
    splits = [row["split"] for row in rows]
    assert (splits.count("train"), splits.count("validation"), splits.count("test")) == (4, 1, 1)
    reason = "the answer holds the text of the special token '<|im_end|>'"
    for row in rows:
        assert ("tokens" in row) != ("refused" in row)
        assert row.get("refused") == (reason if row["index"] == 1 else None)


def test_split_of_its_own_source_follows(made_recipe: Any, tmp_path: Path) -> None:
    """Row numbers count in each source: the test file's rows come after all of train's."""
    rows = preview_rows(*made_recipe(test=str(tmp_path / "test.jsonl")), num_rows=100)
    assert [(row["index"], row["split"]) for row in rows] == [
        *((index, "train") for index in range(6)),
        *((index, "test") for index in range(6)),
    ]


def test_number_of_rows(made_recipe: Any) -> None:
    """Only so many rows are shown."""
    recipe, prepared = made_recipe()
    assert [row["index"] for row in preview_rows(recipe, prepared, 2)] == [0, 1]
    assert preview_rows(recipe, prepared, 0) == []


def test_tokens_say_what_each_stage_trains(made_recipe: Any, tiny_tokenizer: Any) -> None:
    """Ids, texts and segments are the row's; the weights are each stage's, 0 where untrained."""
    recipe, prepared = made_recipe()
    first = preview_rows(recipe, prepared, 1)[0]
    tokens = first["tokens"]
    assert json.loads(json.dumps(first)) == first
    assert [token["id"] for token in tokens] == prepared.train[0]["input_ids"]
    text = "".join(token["text"] for token in tokens)
    assert text == tiny_tokenizer.decode(prepared.train[0]["input_ids"])
    weights = {
        "PROMPT": {"completion": 0.0, "weighted": 0.0, "key": 0.0},
        "THINKING": {"completion": 1.0, "weighted": 0.1, "key": 0.0},
    }
    trained = {"completion": 1.0, "weighted": 1.0, "key": 1.0}
    for token in tokens:
        assert set(token) == {"id", "text", "segment", "trained"}
        assert token["trained"] == weights.get(token["segment"], trained)
    assert tokens[-1]["segment"] == "END"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(prompt=TEXT, answer=TEXT)
def test_token_texts_join_to_the_row(kind: str, prompt: str, answer: str) -> None:
    """No character is lost, doubled or broken, though some have several tokens."""
    renderer = Renderer.read(made(kind, CHATML), ResponseSection())
    (row,) = tokenize([Example(f"Q{prompt}", "", answer, 0)], renderer)
    if not isinstance(row, Row):  # the response's tags stand inside the answer
        assert row.code == "not-returned"
        return
    texts = token_texts(renderer.tokenizer, row.input_ids)
    assert len(texts) == len(row.input_ids)
    assert "".join(texts) == renderer.tokenizer.decode(row.input_ids)


def test_statistics(made_recipe: Any) -> None:
    """Rows, drops and tokens are the preparation's; the shares of each stage add up to 1."""
    recipe, prepared = made_recipe(validation=1)
    numbers = statistics(recipe, prepared)
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["rows"] == {"train": 4, "validation": 1, "test": 0}
    assert list(numbers["dropped"].values()) == [
        {"count": 1, "rows": [1], "code": "special-token-text"}
    ]
    tokens = numbers["tokens"]["train"]
    key = tokens["ANSWER_TAG"] + tokens["ANSWER"] + tokens["END"]
    shares = numbers["loss_share"]
    assert list(shares) == ["completion", "weighted", "key"]
    for share in shares.values():
        assert sum(share.values()) == pytest.approx(1)
        assert share["PROMPT"] == 0
    assert shares["completion"]["THINKING"] == tokens["THINKING"] / (tokens["THINKING"] + key)
    thinking = 0.1 * tokens["THINKING"]
    assert shares["weighted"]["THINKING"] == pytest.approx(thinking / (thinking + key))
    assert shares["key"] == {
        "PROMPT": 0,
        "THINKING": 0,
        "ANSWER_TAG": tokens["ANSWER_TAG"] / key,
        "ANSWER": tokens["ANSWER"] / key,
        "END": tokens["END"] / key,
    }


def printed(renderable: Any, **options: Any) -> str:
    """Return what a console of 100 columns prints."""
    console = Console(width=100, **options)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_terminal_marks_what_is_trained(made_recipe: Any) -> None:
    """Each stage has its text: brackets around what it trains, weights in them."""
    recipe, prepared = made_recipe()
    text = printed(rendered_rows(preview_rows(recipe, prepared, 2)), no_color=True)
    assert text == (
        "PROMPT THINKING ANSWER_TAG ANSWER END \n"
        "\n"
        "row 0 (train)\n"
        "stage completion:\n"
        "<|im_start|>user⏎\nQ0<|im_end|>⏎\n<|im_start|>assistant⏎\n"
        "⟦<Thinking>⏎\n1 + 1 = 2⏎\n</Thinking>⏎\n<Answer>⏎\n0⏎\n</Answer><|im_end|>⟧\n"
        "stage weighted:\n"
        "<|im_start|>user⏎\nQ0<|im_end|>⏎\n<|im_start|>assistant⏎\n"
        "⟦0.1·<Thinking>⏎\n1 + 1 = 2⏎\n</Thinking>⟧⟦⏎\n<Answer>⏎\n0⏎\n</Answer><|im_end|>⟧\n"
        "stage key:\n"
        "<|im_start|>user⏎\nQ0<|im_end|>⏎\n<|im_start|>assistant⏎\n"
        "<Thinking>⏎\n1 + 1 = 2⏎\n</Thinking>⟦⏎\n<Answer>⏎\n0⏎\n</Answer><|im_end|>⟧\n"
        "\n"
        "row 1 (train)\n"
        "refused: the answer holds the text of the special token '<|im_end|>'\n"
    ).replace("Q0", "six0")


def test_terminal_colours_by_segment(made_recipe: Any) -> None:
    """Untrained tokens are dim, trained ones bold, in the segment's colour."""
    recipe, prepared = made_recipe()
    row = preview_rows(recipe, prepared, 1)
    text = printed(rendered_rows(row), force_terminal=True, color_system="standard")
    last = text.rpartition("stage key:")[2]
    assert "\x1b[1;31m<|im_end|>" in last
    assert "\x1b[2;33mThinking" in last or "\x1b[2;33m<" in last


def test_terminal_statistics(made_recipe: Any) -> None:
    """Rows, drops with their numbers, and the table of tokens and shares."""
    recipe, prepared = made_recipe(validation=1)
    text = printed(rendered_statistics(statistics(recipe, prepared)), no_color=True)
    assert text.startswith(
        "rows: train 4, validation 1, test 0\n"
        "train: 1 row dropped (1): "
        "the answer holds the text of the special token '<|im_end|>'\n"
    )
    lines = text.splitlines()
    for start in ("train ", "validation ", "loss of completion ", "loss of key "):
        assert any(line.startswith(start) for line in lines)
