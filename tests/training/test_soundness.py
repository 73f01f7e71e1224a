"""A stage that makes its model worse says so, and one that destroys it saves nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftkey.commands import train as train_command
from sftkey.errors import DivergedError
from sftkey.training.soundness import change_of, keep_losses, kept_losses, refuse_destroyed
from tests.training.test_run import done
from tests.training.test_trainer import made_rows, made_trainer

NAN = math.nan


def test_a_loss_that_rose_in_most_rows_is_worse_and_one_that_rose_by_chance_is_not() -> None:
    """The interval is that of the paired differences; rows without a loss don't count."""
    worse = change_of([1.0, 2.0, 3.0, 4.0, NAN], [1.2, 2.1, 3.3, 4.2, 9.0])
    assert worse is not None
    assert worse.is_worse
    assert worse.num_rows == 4
    assert worse.said("loss on training rows").startswith("its loss on training rows ended above ")
    assert worse.said("validation loss") == (
        "its validation loss ended above its start, by more than chance: 2.5000 -> 2.7000 nats a "
        f"token, +0.2000 [{worse.low:.4f}, {worse.high:.4f}] over 4 rows"
    )
    assert (worse.low, worse.high) == pytest.approx((0.2 - 3.18245 * 0.0408248, 0.32992), abs=1e-4)
    by_chance = change_of([1.0, 2.0, 3.0], [2.0, 1.5, 3.1])
    assert by_chance is not None
    assert not by_chance.is_worse
    assert change_of([1.0], [9.0]) is None
    assert change_of([], [1.0, 2.0]) is None
    same = change_of([1.0, 2.0], [2.0, 3.0])
    assert same is not None
    assert same.low == same.high == 1.0


GUESS = math.log(100)


@pytest.mark.parametrize(
    ("start", "end", "refused"),
    [
        ([1.0, 1.2, 1.1], [GUESS, GUESS, GUESS], True),  # every token as likely as any other
        ([4.7, 4.5, 4.6], [GUESS, GUESS, NAN], True),  # untrained before: no better, no worse
        ([GUESS, GUESS], [GUESS, GUESS], False),  # it began so
        ([1.0, 1.2, 1.1], [1e7, 2e7, 1.5e7], True),  # sure of wrong tokens
        ([1.0, 1.2, 1.1], [2.0, 2.4, 2.1], False),  # worse, and still a model
        ([4.7, 4.5, 4.6], [4.8, 4.4, 4.7], False),  # untrained, and moved by chance
        ([4.7, 4.5, 4.6], [4.71, 4.51, 4.61], False),  # untrained, and a little worse
    ],
)
@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_a_model_that_a_guess_would_beat_is_refused(
    start: list[float], end: list[float], refused: bool
) -> None:
    """Unless it began like that."""
    if not refused:
        refuse_destroyed(start, end, 100, "stage")
        return
    with pytest.raises(DivergedError, match=r"below a guess among all 100 tokens, 4\.6052 nats"):
        refuse_destroyed(start, end, 100, "stage")


def test_the_rows_losses_outlive_the_process(tmp_path: Path) -> None:
    """A resumed stage compares with the start that another process measured."""
    keep_losses(tmp_path, "start", [1.0, NAN])
    keep_losses(tmp_path, "end", [2.0, 3.0])
    kept = kept_losses(tmp_path)
    assert kept["end"] == [2.0, 3.0]
    assert kept["start"][0] == 1.0
    assert math.isnan(kept["start"][1])
    for broken in ("", "[1]", '{"start": [[]]}', "\x00"):
        (tmp_path / "validation.json").write_text(broken)
        assert kept_losses(tmp_path) == {}


@pytest.mark.usefixtures("in_float64")
def test_the_losses_of_rows_stand_in_the_rows_order(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """In any batch size they are those of each row alone."""
    rows = made_rows(len(tiny_tokenizer)).select(range(5))
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        trainer = made_trainer(tiny_model, tiny_tokenizer, folder, per_device_eval_batch_size=size)
        trainer.eval_dataset = rows
        whole = trainer.evaluate()["eval_loss"]
        found.append(trainer.row_losses)
    assert found[0] == pytest.approx(found[1])
    trainer.eval_dataset = rows.select([3])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[0][3])
    assert min(found[0]) < whole < max(found[0])


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_a_gradient_that_is_no_number_between_two_log_lines_ends_the_stage(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is finite, and the norm of the step that is logged is, too."""
    trainer = made_trainer(tiny_model, tiny_tokenizer, tmp_path, logging_steps=3)
    norms = iter([1.0, math.inf, 1.0])
    monkeypatch.setattr(trainer, "_clip_grad_norm", lambda model: torch.tensor(next(norms)))
    with pytest.raises(DivergedError, match="step 3: expected finite gradient norms up to it; got"):
        trainer.train()


@pytest.mark.parametrize("context", ["exact", "frozen"])
@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_a_last_stage_whose_only_step_is_far_too_large_ends_with_an_error(
    context: str, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Every loss that was measured is finite; nothing counts as trained, and nothing is saved."""
    stages = [{"name": "key", "loss_on": "key", "context": context}]
    trainer = {"max_steps": 1, "learning_rate": 1e8 if context == "exact" else 1e18}
    recipe = tiny_recipe(stages=stages, trainer=trainer, eval={"num_questions": 1})
    with pytest.raises(DivergedError, match="expected a loss below a guess"):
        done(recipe, tmp_path / "runs", "eval.max_new_tokens=1")
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "stages/1-key/adapter").exists()
    assert json.loads((folder / "ledger.json").read_text())["stages"][0]["status"] == "open"


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_a_stage_that_ended_worse_is_said_behind_the_table(
    tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Below the table, before what comes next."""
    stages = {"one": SimpleNamespace(name="one", worse=None), "two": SimpleNamespace(name="two")}
    stages["two"].worse = "its validation loss ended above its start"
    run = SimpleNamespace(stages=stages)
    monkeypatch.setattr("sftkey.pipeline.train_recipe", lambda *args, **kwargs: run)
    monkeypatch.setattr("sftkey.commands.train.print_table", lambda run: None)
    monkeypatch.setattr(train_command, "what_next", lambda run: [])
    train_command.train(tiny_recipe())
    said = capsys.readouterr().err.splitlines()
    assert said == ["WARNING: two: its validation loss ended above its start"]
