"""What happens to a stage between its steps: checkpoints, an early end, a signal that stops it."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sftkey.data.prepare import Prepared
from sftkey.errors import ProcessLost, RunError, RunStopped
from sftkey.files import (
    file_hash,
    files_below,
    free_name,
    no_room,
    read_json,
    remove,
    write_json,
)
from sftkey.generation.key_switch import find_switch
from sftkey.recipe.schema import Recipe
from sftkey.training.log import StageLog, read_log
from sftkey.training.own_thinking import Grader, Writer, count_right
from sftkey.training.trainer import KeyTrainer

SEAL = "whole.json"


def seal(checkpoint: Path) -> None:
    """Record the sizes and hashes of a finished checkpoint's files; what differs later is torn.

    A power cut may leave a file of the right size without its content.
    """
    files = {
        file.relative_to(checkpoint).as_posix(): [file.stat().st_size, file_hash(file)]
        for file in files_below(checkpoint)
        if file.name != SEAL
    }
    write_json(checkpoint / SEAL, files)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file stands as it was when the checkpoint was finished."""
    try:
        sealed = read_json(checkpoint / SEAL).items()
        return all(_is_same(checkpoint / name, known) for name, known in sealed)
    except (RunError, OSError, ValueError):
        return False


def _is_same(file: Path, known: Any) -> bool:
    """Compare a file with its seal; one of before there were hashes has the size alone."""
    size, digest = known if isinstance(known, list) else (known, None)
    return file.stat().st_size == size and digest in (None, file_hash(file))


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder; the main process renames torn ones `torn-…`.

    The processes wait for one another before and behind it.
    """
    processes, found = PartialState(), []
    processes.wait_for_everyone()
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
        if not step:
            continue
        if is_whole(checkpoint):
            found.append((int(step[1]), checkpoint))
        elif processes.is_main_process:
            checkpoint.rename(free_name(folder / f"torn-{checkpoint.name}"))
    processes.wait_for_everyone()
    return max(found)[1] if found else None


@contextmanager
def no_half_checkpoint(folder: Path) -> Iterator[None]:
    """Remove the checkpoint that a full disk has cut short: its space is needed now."""
    try:
        yield
    except Exception as error:
        if no_room(error):
            for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if not (checkpoint / SEAL).exists():
                    remove(checkpoint)
        raise


def kept_checkpoint(state: TrainerState, loads_best: bool) -> str | None:
    """Say which checkpoint a stage ends with; None where it ends with its last step anyway."""
    if not loads_best:
        return None
    if state.best_model_checkpoint is None:
        return "kept the last step: no checkpoint has a finite validation loss to choose by"
    best = Path(state.best_model_checkpoint).name
    last = "" if best == f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" else "not "
    return f"kept {best} (validation loss {state.best_metric:.4f}), {last}the last"


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint when all processes have written theirs, and logs up to it.

    A log line at every checkpoint lets a resumed stage log each step exactly once.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint follows, and at the stage's last step."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    on_epoch_end = on_step_end  # where `save_strategy: epoch` saves

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = _checkpoint(args, state.global_step)
            if not checkpoint.is_dir():
                raise RunError(str(checkpoint), "expected the checkpoint just written; it is gone")
            seal(checkpoint)


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

    What was answered stands in the ledger, so that a resumed stage goes on with it. `ask` returns
    after a step how many answers are right; `verdict` has the two limits.
    """

    def __init__(
        self, ask: Callable[[int], int], log: StageLog, patience: int, limit: float | None
    ) -> None:
        self.ask, self.log, self.patience, self.limit = ask, log, patience, limit
        self.asked: list[Asked] = log.record.answers or []
        self._epoch_ends = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget what came after the checkpoint; ask where a kill came before the answers."""
        self.asked = [each for each in self.asked if each["step"] <= state.global_step]
        missing = not self.asked or self.asked[-1]["step"] < state.global_step
        if state.global_step and float(state.epoch or 0).is_integer() and missing:
            self._ask(state)
        self._tell(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, unless the stage has ended and a resumed one learns it now."""
        self._epoch_ends = not control.should_training_stop
        control.should_save |= self._epoch_ends

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the model answer, where an epoch ends here."""
        if self._epoch_ends:
            self._epoch_ends = False
            self._ask(state)
            self._tell(args, state, control)

    def _ask(self, state: TrainerState) -> None:
        seconds = sum(line["seconds"] for line in read_log(self.log.path, state.global_step))
        right = self.ask(state.global_step)
        self.asked.append({"step": state.global_step, "right": right, "seconds": seconds})
        self.log.record.answers = self.asked
        self.log.ledger.save()
        name, place = self.log.record.name, f"epoch {len(self.asked)}"
        self.log.progress.note(f"{name} after {place}: {right} validation answers right")

    def _tell(self, args: Any, state: TrainerState, control: TrainerControl) -> None:
        """Keep the best epoch's checkpoint, and end the stage where it is time."""
        if self.asked:
            best, control.should_training_stop = verdict(self.asked, self.patience, self.limit)
            kept = _checkpoint(args, int(best["step"]))
            state.best_model_checkpoint = str(kept)  # others may be removed

    def load_best(self, trainer: KeyTrainer) -> None:
        """Put the weights of the epoch back that the stage keeps."""
        best, _ = verdict(self.asked, self.patience, self.limit)
        trainer.state.best_model_checkpoint = str(_checkpoint(trainer.args, int(best["step"])))
        trainer._load_best_model()
        epoch = self.asked.index(best) + 1
        self.log.progress.note(
            f"{self.log.record.name}: kept epoch {epoch} of {len(self.asked)} "
            f"({best['right']:.0f} validation answers right)"
        )


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def stop_by_answers(
    recipe: Recipe, prepared: Prepared, log: StageLog, trainer: KeyTrainer, grade: Grader
) -> StopByAnswers | None:
    """Return what ends a stage by its answers to validation questions; None where nothing does.

    The answers are kept in the stage's folder, a file an epoch.
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


NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has the first two alone


class StopRequest:
    """What a signal asks of a run; `note` says a line to the person."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self.note = folder, note
        self.number: int | None = None
        self.in_training = False

    def receive(self, number: int, frame: Any) -> None:
        """Take a signal: while a stage trains it waits for the step, else it ends the run here.

        Answers are kept row by row, so nothing is lost. A second Ctrl-C waits for nothing.

        Raises:
            RunStopped: The run ends here.
        """
        again = self.number is not None
        if again and number != signal.SIGINT:
            return  # launchers pass a signal on that the process has had already
        if _in_destructor(frame):  # where Python drops what is raised
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            return
        self.number = number
        if again or not self.in_training:
            raise self.stopped()
        name = signal.Signals(number).name
        self.note(f"{name}: a checkpoint is written after this step; Ctrl-C ends the run at once")

    def stopped(self) -> RunStopped:
        """Return the error that ends the run."""
        assert self.number is not None
        return RunStopped(
            str(self.folder),
            f"stopped by {signal.Signals(self.number).name}; what was reached is kept",
            f"the same command goes on, or: sftkey train {self.folder / 'recipe.yaml'}",
            self.number,
        )


def _in_destructor(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def stopping_on_signals(folder: Path, note: Callable[[str], None]) -> Iterator[StopRequest]:
    """Yield what signals ask of a run; the handlers are as before afterwards.

    Only the main thread of a process is told of signals; in another one nothing is changed. One
    that was told, and then lost another process that ended at once, ends as it was told.
    """
    request, before = StopRequest(folder, note), {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    except ProcessLost as error:
        if request.number is None:
            raise
        raise request.stopped() from error
    finally:
        with suppress(ValueError):  # a generator may be closed in another thread
            for number, handler in before.items():
                signal.signal(number, handler)


class StopAfterStep(TrainerCallback):
    """Ends a stage's training after the step in which a signal came to any process.

    It stands behind what seals checkpoints, and tells no trainer to stop: one that stops removes
    all checkpoints but the best.

    With several processes each step asks all of them. They ask each other on their CPUs: no GPU
    waits for it, and nothing that is queued there is waited for.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._processes: Any = None  # of several processes, those that are asked

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let signals wait for the step."""
        if PartialState().num_processes > 1 and self._processes is None:
            patience = timedelta(seconds=args.ddp_timeout)
            self._processes = torch.distributed.new_group(backend="gloo", timeout=patience)
        self.request.in_training = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save and log where a signal has come."""
        if number := self._of_any_process():
            self.request.number = number
            control.should_save = control.should_log = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the run where a signal has come: the checkpoint is written and sealed."""
        if number := self._of_any_process():
            self.request.number, self.request.in_training = number, False
            raise self.request.stopped()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let signals end the run at once again."""
        self.request.in_training = False

    def _of_any_process(self) -> int:
        """Return the highest number of a signal that any process has had, 0 where none has."""
        number = self.request.number or 0
        if self._processes is None:
            return number
        highest = torch.tensor(number)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self._processes)
        return int(highest)
