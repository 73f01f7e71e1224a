"""One run in each experiment tracker, in which the stages follow one another."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import rewrite_logs

from sftkey.training.run_folder import Ledger

# Transformers opens these anew, or logs over the stage before, with each trainer; others are left
# to its own callbacks.
KINDS = {"wandb": WandBTracker, "trackio": TrackioTracker}
NAMES = ("tensorboard", *KINDS)


def reported_to(settings: Mapping[str, Any]) -> list[str]:
    """Return the trackers that a trainer's settings name."""
    told = settings.get("report_to") or "none"
    return [name for name in ([told] if isinstance(told, str) else told) if name != "none"]


class Trackers:
    """The trackers of a run that `trainer.report_to` names, opened when something is logged.

    Only the main process logs. A run that goes on after a stop goes on in its trackers, too. Its
    recipe is the configuration that each of them shows.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.recipe = ledger, ledger.recipe
        settings = map(self.recipe.stage_trainer, self.recipe.stages)
        told = dict.fromkeys(name for each in settings for name in reported_to(each))
        self.names = [name for name in told if name in NAMES]

    @cached_property
    def _open(self) -> list[GeneralTracker]:
        return [self._opened(name) for name in self.names]

    def _opened(self, name: str) -> GeneralTracker:
        folder = str(self.ledger.folder)
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", folder)
            tracker.start()
            tracker.log({"recipe": f"```yaml\n{self.recipe.to_yaml()}```"}, step=0)
            return tracker
        settings = self.recipe.trainer
        known = self.ledger.facts.setdefault("tracked_as", uuid.uuid4().hex[:8])
        self.ledger.save()
        shown = settings.get("run_name") or f"{self.recipe.name}-{known}"
        about: dict[str, Any] = {"name": shown, "resume": "allow"}
        if name == "wandb":
            about |= {"id": known, "dir": folder}
        elif space := settings.get("trackio_space_id"):
            about["space_id"] = space
        tracker = KINDS[name](settings.get("project") or "sftkey", **about)
        tracker.start()
        tracker.store_init_configuration(self.recipe.model_dump(mode="json"))
        return tracker

    def log(self, values: Mapping[str, float], stage: int, step: int) -> None:
        """Log figures by their names.

        Args:
            values: The figures.
            stage: Whose they are, the first being 1; 0 is the base model.
            step: Of this stage; those of the stages before it are added.
        """
        if not self.ledger.main or not self.names:
            return
        before = sum(record.num_steps for record in self.ledger.stages[: max(stage - 1, 0)])
        for tracker in self._open:
            tracker.log({**values, "stage": stage}, step=before + step)

    def finish(self) -> None:
        """Close what was opened."""
        for tracker in self.__dict__.pop("_open", []):
            tracker.finish()


class TrackStage(TrainerCallback):
    """Logs what a stage's trainer logs (the first being 1): losses by segment."""

    def __init__(self, trackers: Trackers, stage: int) -> None:
        self.trackers, self.stage = trackers, stage

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Log the numbers of one log line, named as transformers names them."""
        said = (logs or {}).items()
        numbers = {key: value for key, value in said if isinstance(value, int | float)}
        self.trackers.log(rewrite_logs(numbers), self.stage, state.global_step)
