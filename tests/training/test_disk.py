"""What the stages will write is said before training, and refused where it has no room."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftkey.errors import DiskError
from sftkey.files import num_bytes_below
from sftkey.recipe.load import load_recipe
from sftkey.training import machine
from sftkey.training.machine import num_saves, plan_disk, require_disk
from sftkey.training.run_folder import Ledger
from tests.training.test_run import done

MakeRecipe = Callable[..., Path]
STEPS = {"completion": 4, "key": 4}


@pytest.mark.parametrize(
    ("trainer", "saves"),
    [
        ({}, 1),  # upstream's 500 steps: the last one alone
        ({"save_steps": 3}, 2),
        ({"save_steps": 0.25}, 4),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
    ],
)
def test_checkpoints_are_counted(trainer: dict[str, Any], saves: int) -> None:
    """As the trainer writes them."""
    assert num_saves(trainer, 4) == saves


@pytest.mark.parametrize("lora", ["lora.r=4", "lora=null"])
def test_the_plan_is_what_the_files_take(
    lora: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Of an adapter and of a whole model: what is planned is enough, and not twice too much."""
    stages = [{"name": "completion", "loss_on": "completion"}]
    recipe = tiny_recipe(stages=stages, eval={"num_questions": 1, "max_new_tokens": 1})
    run = done(recipe, tmp_path / "runs", lora)
    planned = plan_disk(run.recipe, {"completion": 4})
    assert planned is not None
    stage, folder = planned["completion"], run.ledger.stage_folder(0)
    assert (stage.num_kept, stage.num_at_once) == (2, 2)
    found = num_bytes_below(folder / "checkpoints" / "checkpoint-4")
    tokenizer = machine.MANY
    assert stage.checkpoint - machine.A_FEW < found < stage.checkpoint + tokenizer
    weights = num_bytes_below(run.ledger.adapter(0))
    assert stage.result - tokenizer < weights < stage.result
    assert require_disk(run.ledger, {"completion": 4}) is None  # nothing is left to be trained


@pytest.mark.fault("disk full")
def test_a_disk_without_room_is_refused_before_the_first_step(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes, and what would keep fewer."""
    recipe = load_recipe(tiny_recipe())
    planned = plan_disk(recipe, STEPS)
    assert planned is not None
    needed = sum(each.left_bytes for each in planned.values())
    ledger = Ledger(tmp_path / "tiny", recipe)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: needed)
    said = require_disk(ledger, STEPS)
    assert said is not None
    told = "on disk: checkpoints and results will take 2.5 MiB, the results 2.0 MiB of them; "
    assert said == f"{told}2.5 MiB are free"
    monkeypatch.setattr(machine, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(DiskError) as error:
        require_disk(ledger, STEPS)
    assert str(error.value) == (
        f"{tmp_path / 'tiny'}: the disk can't hold what the stages will write: {needed:,} bytes "
        f"are needed; {needed - 1:,} are free\n"
        "hint: free some space, or run on another disk; a lower trainer.save_total_limit keeps "
        f"fewer checkpoints, each of {planned['key'].checkpoint:,} bytes"
    )
    written = ledger.stage_folder(0) / "checkpoints" / "checkpoint-2"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_bytes(b"1")
    assert require_disk(ledger, STEPS) is not None  # what is there already isn't needed again


@pytest.mark.fault("disk full")
def test_a_run_asks_its_disk_before_it_trains(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are loaded, and no question is answered."""
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1)
    monkeypatch.setattr("sftkey.training.run.load_stage", lambda *args: pytest.fail("loaded"))
    with pytest.raises(DiskError, match="the disk can't hold what the stages will write"):
        done(tiny_recipe(), tmp_path / "runs")


def test_what_is_not_counted_is_no_reason_to_refuse(tiny_recipe: MakeRecipe) -> None:
    """Modules that are saved whole, say."""
    recipe = load_recipe(tiny_recipe(), ["lora.modules_to_save=[lm_head]"])
    assert plan_disk(recipe, STEPS) is None
