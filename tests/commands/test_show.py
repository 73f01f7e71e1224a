"""`sftkey show` prints what the collator makes of a recipe's rows, data on stdout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sftkey.checks.gate import check_recipe
from sftkey.commands.check import diagnose
from sftkey.commands.recipes import prompts, show
from sftkey.commands.train import train
from sftkey.errors import CheckError, DataError, RecipeError
from sftkey.recipe.load import load_recipe
from sftkey.training.run import read_rows
from tests.support.model_folders import write_rows


@pytest.fixture
def weightless(tmp_path: Path, tiny_folder: Path, tiny_recipe: Callable[..., Path]) -> Path:
    """Make a recipe whose model folder holds a tokenizer and a config, but no weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return tiny_recipe(model={"name_or_path": str(folder), "quantization": "none"})


def test_json_is_one_object_a_row(weightless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 1 trains all but the prompt, stage 2 what follows the thinking; END ends each row."""
    show(weightless, num_rows=5, as_json=True)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert set(row) == {"index", "split", "tokens"}
        for token in row["tokens"]:
            trained = (token["trained"]["completion"], token["trained"]["key"])
            key = token["segment"] in ("ANSWER_TAG", "ANSWER", "END")
            assert trained == (token["segment"] != "PROMPT", key)
        assert row["tokens"][-1]["segment"] == "END"
        assert row["tokens"][-1]["text"] == "<|im_end|>"
    assert "rows: train 24, validation 8, test 8" in captured.err


def test_the_table_is_for_people(weightless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the rows and the statistics are stdout's, each row once for each stage."""
    show(weightless, num_rows=1)
    out = capsys.readouterr().out
    assert out.count("stage completion:") == out.count("stage key:") == 1
    assert "</Thinking>⟦⏎" in out
    assert "rows: train 24, validation 8, test 8" in out


def test_overrides_count(weightless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is shown is what the recipe with its overrides would train."""
    show(weightless, ["stages.key.loss_on={answer: 0.5}"], num_rows=1, as_json=True)
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    weights = {token["segment"]: token["trained"]["key"] for token in row["tokens"]}
    assert weights == {"PROMPT": 0, "THINKING": 0, "ANSWER_TAG": 0, "ANSWER": 0.5, "END": 0}


def test_a_stop_that_nobody_published_is_said(
    weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a generation config the rows are shown all the same, with a note on stderr."""
    show(weightless, num_rows=1, as_json=True)
    assert "stop not verified" not in capsys.readouterr().err
    (tmp_path / "weightless" / "generation_config.json").unlink()
    show(weightless, num_rows=1, as_json=True)
    assert capsys.readouterr().err.endswith(
        f"note: {tmp_path}/weightless: stop not verified: no generation config says whether "
        "'<|im_end|>' (2) stops generation\n    hint: other engines need eos_token_id: 2\n"
    )


@pytest.fixture
def with_special(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """Make a recipe over four rows, of which the second holds a special token."""
    rows = [{"prompt": f"Q{n}", "thinking": "a", "answer": str(n)} for n in range(4)]
    rows[1]["answer"] = "<|im_end|>"
    source = write_rows(tmp_path / "these.jsonl", rows)
    return tiny_recipe(data={"source": source})


def test_every_command_refuses_the_rows_that_training_refuses(
    with_special: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What check says of a row, train, show, diagnose and evaluate say in the same words."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(with_special)
    (finding,) = check_recipe(recipe).refusals
    assert finding.message == (
        "train: the answer holds the text of the special token '<|im_end|>': 1 row, 1"
    )
    with pytest.raises(CheckError) as caught:
        train(with_special)
    assert str(caught.value) == f"tiny: 1 problem\n  special-token-text: {finding}"
    readers: list[Callable[[], object]] = [
        lambda: show(with_special),
        lambda: diagnose(str(with_special)),
        lambda: read_rows(recipe),  # evaluate's
    ]
    for read in readers:
        with pytest.raises(DataError) as refused:
            read()
        assert str(refused.value) == (
            f"{recipe.data.source}: 1 problem\n  {finding.message}\nhint: {finding.hint}"
        )


def test_what_is_to_be_decided_is_no_text_of_a_row(weightless: Path) -> None:
    """A mark may hold a column in braces, as a template does; no command reads it as one."""
    asks = ["data.thinking='DECIDE: the reasoning: {answer}'"]
    for read in (show, prompts, lambda recipe, changes: diagnose(str(recipe), changes)):
        with pytest.raises(RecipeError) as refused:
            read(weightless, asks)
        assert str(refused.value) == (
            "tiny: 1 problem\n  data.thinking: to be decided: the reasoning: {answer}\n"
            "hint: write a value in the place of `DECIDE: …`"
        )


def test_rows_that_may_drop_are_the_same_everywhere(
    with_special: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the recipe lets the row drop, show says why, and the gate hands on the others."""
    drop = ["data.unsplit_rows=drop"]
    show(with_special, drop, num_rows=9, as_json=True)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reason = "the answer holds the text of the special token '<|im_end|>'"
    assert [row.get("refused") for row in shown] == [None, reason, None, None]
    recipe = load_recipe(with_special, drop)
    gated = check_recipe(recipe).prepared
    assert gated is not None
    assert gated.train.to_dict() == read_rows(recipe).train.to_dict()
    assert gated.train["index"] == [0, 2, 3]


def test_a_turn_that_is_not_to_be_trained_is_only_counted(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command refuses it, as check doesn't; a row of nothing else is a row without examples."""
    asked = {"role": "user", "content": "1 + 1?"}
    turn = {"role": "assistant", "reasoning_content": "Two ones.", "content": "2"}
    rows = [
        {"messages": [asked, turn | {"train": False}, asked, turn]},
        {"messages": [asked, turn]},
    ]
    source = write_rows(tmp_path / "these.jsonl", rows)
    recipe = tiny_recipe(data={"source": source}, response={"turns": "all"})
    show(recipe, num_rows=9, as_json=True)
    assert "1 row dropped (0): a turn that isn't to be trained" in capsys.readouterr().err
    assert read_rows(load_recipe(recipe)).train["index"] == [0, 1]
