"""Ends a stage when its answers to validation questions no longer get better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sftkey.data.prepare import Prepared
from sftkey.generation.key_switch import find_switch
from sftkey.recipe.schema import Recipe
from sftkey.training.log import StageLog, read_log
from sftkey.training.own_thinking import Grader, Writer, count_right
from sftkey.training.trainer import KeyTrainer

Asked = dict[str, float]  # after an epoch: step, right (how many answers), seconds trained so far


def verdict(asked: Sequence[Asked], patience: int, limit: float | None) -> tuple[Asked, bool]:
    """Return the epoch to keep, and whether the stage ends; what came after its end is left out.

    Args:
        asked: By epoch, at least one.
        patience: So many epochs in a row without more right answers end the stage.
        limit: Seconds of training; another epoch like the last one must fit.

    >>> asked = [{"step": 5 * n, "right": n % 3, "seconds": 2.0 * n} for n in (1, 2, 3, 4, 5)]
    >>> verdict(asked, patience=2, limit=None)
    ({'step': 10, 'right': 2, 'seconds': 4.0}, True)
    >>> verdict(asked[:1], patience=2, limit=3.5)
    ({'step': 5, 'right': 1, 'seconds': 2.0}, True)
    """
    best, waited, before = asked[0], 0, 0.0
    for number, each in enumerate(asked):
        better = number == 0 or each["right"] > best["right"]
        best, waited = (each, 0) if better else (best, waited + 1)
        late = limit is not None and 2 * each["seconds"] - before > limit
        if waited >= patience or late:
            return best, True
        before = each["seconds"]
    return best, False


class StopByAnswers(TrainerCallback):
    """Lets the model answer after each epoch, and ends the stage when that pays no longer.

    What was answered stands in the ledger, so that a resumed stage goes on with it.

    Args:
        ask: Of the step's number: how many answers are right.
        log: The stage's.
        patience: As in `verdict`.
        limit: As in `verdict`.
    """

    def __init__(
        self, ask: Callable[[int], int], log: StageLog, patience: int, limit: float | None
    ) -> None:
        self.ask, self.log, self.patience, self.limit = ask, log, patience, limit
        self.asked: list[Asked] = log.record.answers or []
        self._epoch_ends = False

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Forget what came after the checkpoint; ask where a kill came before the answers."""
        self.asked = [each for each in self.asked if each["step"] <= state.global_step]
        missing = not self.asked or self.asked[-1]["step"] < state.global_step
        if state.global_step and float(state.epoch or 0).is_integer() and missing:
            self._ask(state)
        return self._told(args, state, control)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint, unless the stage has ended and a resumed one learns it now."""
        self._epoch_ends = not control.should_training_stop
        control.should_save |= self._epoch_ends
        return control

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Let the model answer, where an epoch ends here."""
        if not self._epoch_ends:
            return control
        self._epoch_ends = False
        self._ask(state)
        return self._told(args, state, control)

    def _ask(self, state: TrainerState) -> None:
        seconds = sum(line["seconds"] for line in read_log(self.log.path, state.global_step))
        right = self.ask(state.global_step)
        self.asked.append({"step": state.global_step, "right": right, "seconds": seconds})
        self.log.record.answers = self.asked
        self.log.ledger.save()
        name, place = self.log.record.name, f"epoch {len(self.asked)}"
        self.log.progress.note(f"{name} after {place}: {right} validation answers right")

    def _told(self, args: Any, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Keep the best epoch's checkpoint, and end the stage where it is time."""
        if self.asked:
            best, control.should_training_stop = verdict(self.asked, self.patience, self.limit)
            state.best_model_checkpoint = str(_checkpoint(args, best))  # others may be removed
        return control

    def load_best(self, trainer: KeyTrainer) -> None:
        """Put the weights of the epoch back that the stage keeps."""
        best, _ = verdict(self.asked, self.patience, self.limit)
        trainer.state.best_model_checkpoint = str(_checkpoint(trainer.args, best))
        trainer._load_best_model()
        epoch = self.asked.index(best) + 1
        self.log.progress.note(
            f"{self.log.record.name}: kept epoch {epoch} of {len(self.asked)} "
            f"({best['right']:.0f} validation answers right)"
        )


def _checkpoint(args: Any, asked: Asked) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{asked['step']:.0f}"


def stop_by_answers(
    recipe: Recipe, prepared: Prepared, log: StageLog, trainer: KeyTrainer, grade: Grader
) -> StopByAnswers | None:
    """Return what ends a stage by its answers to validation questions; None where nothing does.

    The answers are kept in the stage's folder, a file an epoch.

    Args:
        recipe: The run's.
        prepared: Its rows.
        log: The stage's.
        trainer: The stage's.
        grade: Tells whether an answer is right.
    """
    settings = recipe.stages[log.number].early_stop
    if settings is None:
        return None
    asked = (prepared.validation_examples or [])[: settings.num_questions]
    model: Any = trainer.model
    renderer, options, ledger = prepared.renderer, recipe.eval, log.ledger

    def ask(step: int) -> int:
        place = ledger.stage_folder(log.number), log.progress, log.record.name
        switch = find_switch(model, renderer)
        writer = Writer(recipe, renderer, model, *place, "validation", switch)
        written = writer.write(f"answers-{step}", asked, 1, options.temperature)
        return count_right(renderer, asked, written, options.grader, grade)

    earlier = [each for each in ledger.stages if each.name == settings.as_long_as]
    limit = earlier[0].seconds * settings.times if earlier else None
    return StopByAnswers(ask, log, settings.patience, limit)
