"""A stage that ends by its answers to validation questions: which epoch it keeps, and when."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sftkey.errors import RecipeError
from sftkey.recipe.load import load_recipe
from sftkey.training import callbacks
from sftkey.training.callbacks import verdict
from sftkey.training.run import Run
from tests.support.tiny import write_recipe
from tests.training.test_run import Killed, adapter_of, done

MakeRecipe = Callable[..., Path]
STEPS = 2  # an epoch


def asked(*right: int) -> list[dict[str, float]]:
    """Return epochs of two steps and ten seconds each."""
    return [{"step": 2 * n, "right": r, "seconds": 10.0 * n} for n, r in enumerate(right, 1)]


@pytest.mark.parametrize(
    ("right", "patience", "limit", "kept", "ends"),
    [
        ([5], 1, None, 1, False),
        ([5, 5], 1, None, 1, True),  # of equal ones the first
        ([5, 6, 6], 2, None, 2, False),
        ([5, 6, 6, 4], 2, None, 2, True),
        ([5, 6, 6, 4, 9], 2, None, 2, True),  # what a resumed stage asked after its end
        ([5, 6, 7], 2, 40.0, 3, False),
        ([5, 6, 7], 2, 39.0, 3, True),  # a fourth epoch wouldn't fit
        ([5, 6, 7, 8], 2, 39.0, 3, True),
        ([0, 0], 5, 15.0, 1, True),
    ],
)
def test_the_epoch_with_the_most_right_answers_is_kept(
    right: list[int], patience: int, limit: float | None, kept: int, ends: bool
) -> None:
    """A stage ends where patience or time does."""
    best, stops = verdict(asked(*right), patience, limit)
    assert (best["step"], stops) == (2 * kept, ends)


def recipe_of(folder: Path, model: Path, **fields: Any) -> Path:
    """Write a recipe of a frozen stage of up to six epochs, after one of a single step."""
    key = {
        "name": "key",
        "loss_on": "key",
        "context": "frozen",
        "early_stop": {"patience": 1, "num_questions": 3},
        "trainer": {"num_train_epochs": 6, "max_steps": -1, "learning_rate": 1e-2},
        **fields,
    }
    stages = [{"name": "completion", "loss_on": "completion", "trainer": {"max_steps": 1}}, key]
    data = {"source": str(folder / "rows.jsonl"), "validation": 4, "max_length": 512}
    return write_recipe(folder, model, rows=12, stages=stages, data=data)


def answering(patch: pytest.MonkeyPatch, *right: int | None) -> list[int]:
    """Let so many answers be right, epoch by epoch; None stands for a kill. Count the written."""
    left, written = list(right), []

    def count(renderer: Any, examples: Any, answers: Any, grader: str, grade: Any) -> int:
        written.append(len(answers))
        found = left.pop(0)
        if found is None:
            raise Killed
        return found

    patch.setattr(callbacks, "count_right", count)
    return written


def kept(run: Run, step: int) -> bool:
    """Tell whether the stage has written the weights of a checkpoint."""
    checkpoint = run.ledger.stage_folder(1) / "checkpoints" / f"checkpoint-{step}"
    saved = {name.partition("/")[2]: x for name, x in load_file(next(
        checkpoint.glob("*adapter*.safetensors"))).items()}  # fmt: skip
    written = adapter_of(run, 1)
    return saved.keys() == written.keys() and all(
        torch.equal(saved[name], written[name]) for name in saved
    )


def test_a_stage_ends_by_its_answers(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three of six epochs are trained, the second is written, and a kill changes nothing."""
    recipe = recipe_of(tmp_path, tiny_folder)
    with monkeypatch.context() as patch:
        assert answering(patch, 1, 3, 3) is not None
        whole = done(recipe, tmp_path / "whole")
    record = whole.ledger.stages[1]
    found = [(each["step"], each["right"]) for each in record.answers or []]
    assert found == [(STEPS, 1), (2 * STEPS, 3), (3 * STEPS, 3)]
    assert record.num_steps == 3 * STEPS
    assert kept(whole, 2 * STEPS)
    assert not kept(whole, 3 * STEPS)
    assert "key: kept epoch 2 of 3 (3 validation answers right)" in capsys.readouterr().err
    assert record.validation["end"]["answer_tag"] < record.validation["start"]["answer_tag"]
    with monkeypatch.context() as patch:
        answering(patch, 1, None)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "killed")
        written = answering(patch, 3, 3)
        resumed = done(recipe, tmp_path / "killed")
    assert written == [3, 3]  # questions; the first epoch's answers stand in the ledger
    expected, got = adapter_of(whole, 1), adapter_of(resumed, 1)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_stage_ends_by_an_earlier_ones_time(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no second epoch where that wouldn't fit; the answers themselves are asked."""
    stop = {"num_questions": 2, "as_long_as": "completion", "times": 1e-6}
    recipe = recipe_of(tmp_path, tiny_folder, early_stop=stop, context="exact")
    run = done(recipe, tmp_path / "runs")
    assert run.ledger.stages[1].num_steps == STEPS
    assert kept_name(run) == [f"answers-{STEPS}.part0of1.jsonl"]


def kept_name(run: Run) -> list[str]:
    """Name the files of answers in the stage's folder."""
    return sorted(file.name for file in run.ledger.stage_folder(1).glob("answers-*"))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"early_stop": {"as_long_as": "two"}}, "stages[1].early_stop.as_long_as: expected an "
         "earlier stage; got 'two'"),
        ({"early_stop": {}, "context": "frozen", "grid": {"r": [1, 2]}}, "stages[1].early_stop: "
         "not with `grid`, which chooses by losses; write one value of each"),
        ({"early_stop": {}, "trainer": {"load_best_model_at_end": True}}, "stages[1].trainer."
         "load_best_model_at_end: `early_stop` keeps the epoch with the most right answers; leave "
         "this out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], problem: str, tiny_recipe: MakeRecipe
) -> None:
    """With its place in the recipe."""
    stages = [{"name": "one", "loss_on": "key"}, {"name": "two", "loss_on": "key", **fields}]
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(stages=stages))
    assert [f"{each.where}: {each.what}" for each in caught.value.problems] == [problem]


def test_validation_rows_are_needed(tiny_folder: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    recipe = recipe_of(tmp_path, tiny_folder)
    with pytest.raises(RecipeError, match="early_stop: it asks validation rows; got none"):
        done(recipe, tmp_path / "runs", "data.validation=null")
    assert not (tmp_path / "runs").exists()
