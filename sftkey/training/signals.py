"""Signals: a run that is told to end finishes its step, writes a checkpoint, and says what goes on.

SIGUSR1 is what Slurm sends ahead of a time limit (`--signal=USR1@120`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState

from sftkey.errors import RunStopped

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has the first two alone


class StopRequest:
    """What a signal asks of a run.

    Args:
        folder: The run's, whose recipe is in the command that goes on.
        note: Says a line to the person.
    """

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
        self.number = number
        if again or not self.in_training:
            raise self.stopped()
        self.note(
            f"{signal.Signals(number).name}: a checkpoint is written after this step; "
            "Ctrl-C ends the run at once"
        )

    def stopped(self) -> RunStopped:
        """Return the error that ends the run."""
        assert self.number is not None
        return RunStopped(
            str(self.folder),
            f"stopped by {signal.Signals(self.number).name}; what was reached is kept",
            f"the same command goes on, or: sftkey train {self.folder / 'recipe.yaml'}",
            self.number,
        )


@contextmanager
def stopping_on_signals(folder: Path, note: Callable[[str], None]) -> Iterator[StopRequest]:
    """Yield what signals ask of a run; the handlers are as before afterwards.

    Only the main thread of a process is told of signals; in another one nothing is changed.
    """
    request, before = StopRequest(folder, note), {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
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

    Args:
        request: This process's.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._processes: Any = None  # of several processes, those that are asked

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let signals wait for the step."""
        if PartialState().num_processes > 1 and self._processes is None:
            patience = timedelta(seconds=args.ddp_timeout)
            self._processes = torch.distributed.new_group(backend="gloo", timeout=patience)
        self.request.in_training = True

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and log where a signal has come."""
        number = self._of_any_process()
        if number:
            self.request.number = number
            control.should_save = control.should_log = True
        return control

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run where a signal has come: the checkpoint is written and sealed.

        Raises:
            RunStopped: One has come.
        """
        number = self._of_any_process()
        if number:
            self.request.number, self.request.in_training = number, False
            raise self.request.stopped()

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
