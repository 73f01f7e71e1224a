"""What a run says while it trains: progress on stderr, and a log file for each stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sftkey.errors import DivergedError, RunError
from sftkey.files import write_text
from sftkey.training.run_folder import Ledger


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


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read the logged steps up to `last_step`, without a line that a kill has torn."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if last_step is None or line["step"] <= last_step]


def cut_log(path: Path, last_step: int) -> None:
    """Drop what was logged after `last_step`: those steps will be taken again."""
    kept = read_log(path, last_step)
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def check_handoff(
    end: dict[str, float], start: dict[str, float], tolerance: float, where: str
) -> None:
    """Compare a stage's first validation losses with the last ones of the stage before.

    Args:
        end: Loss by segment where the previous stage ended, nats a token.
        start: The same where this stage starts, on the same rows.
        tolerance: The largest difference, nats a token.
        where: The stage, for the message.

    Raises:
        RunError: The stage doesn't start from what the previous one wrote.
    """
    gaps = {name: abs(start[name] - end[name]) for name in end if name in start}
    worst = max(gaps, key=lambda name: gaps[name])
    if not gaps[worst] <= tolerance:
        raise RunError(
            where,
            f"expected to start where the previous stage ended; the {worst} loss was "
            f"{end[worst]:.6f} then and is {start[worst]:.6f} now (nats a token)",
            "was the previous stage's adapter folder changed? `--fresh` begins anew",
        )


class StageLog(TrainerCallback):
    """Writes down what a stage does, as it does it.

    Args:
        ledger: The run's ledger.
        number: The stage's number from 0.
        progress: What the person sees.
        tolerance: The largest hand-off difference, nats a token.
    """

    def __init__(
        self, ledger: Ledger, number: int, progress: RunProgress, tolerance: float
    ) -> None:
        self.ledger, self.number, self.progress = ledger, number, progress
        self.record = ledger.stages[number]
        self.path = ledger.stage_folder(number) / "log.jsonl"
        self.tolerance = tolerance
        self._since = time.monotonic()

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop log lines of steps that will be taken again."""
        self.record.num_steps = state.max_steps
        if state.is_world_process_zero:
            cut_log(self.path, state.global_step)
        self.progress.begin(self.record.name, state.max_steps - state.global_step)
        self._since = time.monotonic()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.progress.step()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line to `log.jsonl`."""
        if not logs or "loss" not in logs:
            return
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        line = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "segments": segments_of(logs, "loss_"),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "trained_tokens": logs["trained_tokens"],
            "tokens": logs["tokens"],
            "seconds": round(seconds, 3),
            "tokens_per_second": round(logs["tokens"] / seconds, 1),
        }
        if not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"{self.record.name}, step {state.global_step}",
                f"expected a finite loss; got {logs['loss']}",
                "lower trainer.learning_rate, or train in bfloat16 or float32 (model.dtype); "
                "the checkpoints before this step are kept",
            )
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.progress.log(self.record.name, state.global_step, state.max_steps, line)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the validation losses; at the first step compare them with the stage before."""
        losses = segments_of(kwargs["metrics"], "eval_loss_")
        at = {0: "start", state.max_steps: "end"}.get(state.global_step, str(state.global_step))
        self.record.validation[at] = losses
        self.ledger.save()
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.progress.note(f"{self.record.name} at {at}: validation loss {shown}")
        if at == "start" and self.number > 0:
            end = self.ledger.stages[self.number - 1].validation["end"]
            where = str(self.ledger.stage_folder(self.number))
            check_handoff(end, losses, self.tolerance, where)
        self._since = time.monotonic()
        self.progress.pause()

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the writing of a checkpoint out of the pace."""
        self._since = time.monotonic()
        self.progress.pause()


def segments_of(figures: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the figures whose key begins with `prefix`, under the rest of it."""
    return {
        key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)
    }
