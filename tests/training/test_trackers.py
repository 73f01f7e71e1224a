"""A run is one run in each tracker: its stages follow one another, with losses and grades."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.models.device import Device
from sftkey.pipeline import train_recipe
from sftkey.recipe.load import load_recipe
from sftkey.training import log
from sftkey.training.log import Trackers
from sftkey.training.run_folder import Ledger
from sftkey.training.stage import stage_arguments


class Recorder:
    """Stands for a tracker's client, and keeps what it is told."""

    opened: list[Recorder] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, project: str, **about: Any) -> None:
        self.project, self.about = project, about
        self.config: dict[str, Any] = {}
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def start(self) -> None:
        """Be opened."""
        self.opened.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration."""
        self.config = values

    def log(self, values: dict[str, Any], step: int) -> None:
        """Keep a line."""
        assert not self.finished
        self.lines.append((step, values))

    def finish(self) -> None:
        """Be closed."""
        self.finished = True


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Put a recorder in the place of wandb's and trackio's."""
    monkeypatch.setattr(log, "KINDS", {"wandb": Recorder, "trackio": Recorder})
    monkeypatch.setattr(Recorder, "opened", [])
    return Recorder.opened


def test_two_stages_are_one_run(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go on from stage to stage; segment losses and grades with intervals are logged.

    Read back from the only TensorBoard log that the run wrote.
    """
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": "tensorboard"}
    train_recipe(load_recipe(tiny_recipe(trainer=settings)))
    logs = list(tmp_path.rglob("events.out.tfevents.*"))
    assert [file.parent for file in logs] == [tmp_path / "runs" / "tiny" / "tensorboard"]
    found = EventAccumulator(str(logs[0].parent)).Reload()

    def steps(tag: str) -> list[int]:
        return [event.step for event in found.Scalars(tag)]

    assert steps("train/loss") == steps("train/loss_answer") == [1, 2, 3, 4]
    assert steps("train/loss_thinking") == [1, 2]  # the key stage has none
    assert steps("eval/loss_thinking") == [0, 2, 4]
    for tag in ("test/acc", "test/acc_low", "test/acc_high", "test/fmt"):
        assert steps(tag) == [0, 2, 4]
    stages = {(event.step, event.value) for event in found.Scalars("stage")}
    assert stages == {(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)}  # a step is of one stage
    (recipe,) = found.Tensors("recipe/text_summary")
    assert b"name: tiny" in recipe.tensor_proto.string_val[0]


def test_a_run_that_goes_on_goes_on_in_its_trackers(
    tiny_recipe: Callable[..., Path], recorders: list[Recorder], tmp_path: Path
) -> None:
    """The same name and id, the recipe as configuration; steps of earlier stages are added."""
    recipe = load_recipe(tiny_recipe(trainer={"report_to": ["wandb", "trackio"], "project": "p"}))
    ledger = Ledger(tmp_path, recipe)
    ledger.stages[0].num_steps = 30
    tracked = Trackers(ledger)
    tracked.log({"train/loss": 2.0}, stage=1, step=5)
    tracked.log({"train/loss": 1.0}, stage=2, step=5)
    tracked.finish()
    again = Trackers(Ledger(tmp_path, recipe))
    again.log({"test/acc": 0.5}, stage=0, step=0)
    assert [each.finished for each in recorders] == [True, True, False, False]
    wandb, trackio, *later = recorders
    assert [each.about for each in later] == [wandb.about, trackio.about]
    assert wandb.about["id"] in wandb.about["name"]
    assert {each.project for each in recorders} == {"p"}
    assert wandb.config == trackio.config == recipe.model_dump(mode="json")
    assert wandb.lines == [
        (5, {"train/loss": 2.0, "stage": 1}),
        (35, {"train/loss": 1.0, "stage": 2}),
    ]
    assert later[0].lines == [(0, {"test/acc": 0.5, "stage": 0})]


def test_nothing_is_opened_without_a_tracker_or_beside_the_main_process(
    tiny_recipe: Callable[..., Path], recorders: list[Recorder], tmp_path: Path
) -> None:
    """And what was never opened is closed without an error."""
    file = tiny_recipe()
    for overrides, main in ([], True), (["trainer.report_to=wandb"], False):
        recipe = load_recipe(file, overrides)
        tracked = Trackers(Ledger(tmp_path, recipe, main=main))
        tracked.log({"train/loss": 2.0}, stage=1, step=5)
        tracked.finish()
    assert recorders == []


@pytest.mark.parametrize(
    ("told", "left"),
    [("none", []), ("wandb", []), (["tensorboard", "mlflow"], ["mlflow"]), ("mlflow", ["mlflow"])],
)
def test_transformers_keeps_the_other_trackers(
    told: Any, left: list[str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A trainer opens no tracker that the run has opened."""
    recipe = load_recipe(tiny_recipe(trainer={"report_to": told}))
    cpu = Device("cpu", 0, torch.float32)
    arguments = stage_arguments(recipe, recipe.stages[0], cpu, tmp_path, on_start=True)
    assert arguments.report_to == left
