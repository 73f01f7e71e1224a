"""What a person sees of a run while it trains: one bar, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class RunProgress:
    """Follows all stages of a run on stderr.

    Args:
        num_steps: The stages that are still to be trained, and how many steps of each.
        console: Where to write; tests hand in their own.
        quiet: Write nothing (every process but the main one).
    """

    def __init__(
        self, num_steps: Mapping[str, int], console: Console | None = None, quiet: bool = False
    ) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self._num_steps, self.steps_done = dict(num_steps), 0
        self.training_seconds = 0.0
        self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("run", total=self.num_steps, figures="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Write one line."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @property
    def num_steps(self) -> int:
        """Steps of all stages that are trained from here on, those that are done included."""
        return sum(self._num_steps.values())

    def begin(self, stage: str, num_steps: int) -> None:
        """Start the clock of a stage's steps.

        How many they are is known only now: a checkpoint has some done already, and the model's own
        thinkings aren't all kept.
        """
        self._num_steps[stage] = num_steps
        self._bar.update(self._task, description=stage, total=self.num_steps)
        self._last = time.monotonic()

    def step(self) -> None:
        """Count one finished step."""
        now = time.monotonic()
        self.training_seconds += now - self._last
        self._last = now
        self.steps_done += 1
        self._bar.update(self._task, advance=1)

    def pause(self) -> None:
        """Leave out of the clock what was no training: validation, checkpoints."""
        self._last = time.monotonic()

    @property
    def seconds_left(self) -> float:
        """Seconds of training that the remaining steps take at the pace so far."""
        pace = self.training_seconds / max(self.steps_done, 1)
        return pace * (self.num_steps - self.steps_done)

    def answers(self, stage: str, num_done: int, num_all: int) -> None:
        """Show how many questions a stage has answered; without a terminal, the first and last."""
        self._bar.update(self._task, description=stage, figures=f"answers {num_done}/{num_all}")
        if self._bar.disable and num_done in (0, num_all):
            self.note(f"{stage}: {num_done} of {num_all} questions answered")

    def log(self, stage: str, step: int, max_steps: int, line: dict[str, object]) -> None:
        """Show the figures of one log line."""
        segments = line["segments"]
        assert isinstance(segments, dict)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in segments.items())
        minutes, seconds = divmod(round(self.seconds_left), 60)
        figures = (
            f"loss {line['loss']:.4f} ({shown})  "
            f"{line['tokens_per_second']:.0f} tokens/s  {minutes}:{seconds:02d} left"
        )
        self._bar.update(self._task, figures=figures)
        if self._bar.disable:
            self.note(f"{stage} {step}/{max_steps}  {figures}")
