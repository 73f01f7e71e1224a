"""What a run says while it trains: progress on stderr, a log file for each stage, trackers."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import rewrite_logs

from sftkey.activity import tell
from sftkey.errors import SMALLER_STEPS, DivergedError
from sftkey.files import write_text
from sftkey.training.made_from import rounded_by
from sftkey.training.run_folder import Ledger
from sftkey.training.soundness import check_behind_cache, check_handoff, keep_losses, not_finite


class RunProgress:
    """Follows all stages of a run on stderr, by the steps of those that are still to be trained.

    It writes nothing where it is `quiet`, as in every process but the main one.
    """

    def __init__(
        self, num_steps: Mapping[str, int], console: Console | None = None, quiet: bool = False
    ) -> None:
        self.console, self.quiet = console or Console(stderr=True), quiet
        self.planned = dict(num_steps)  # a stage that begins knows better: see `begin`
        self._num_steps, self.steps_done = dict(num_steps), 0
        self.training_seconds = 0.0
        self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=40)),
            BarColumn(bar_width=None),  # what is left of the line
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("steps, {task.fields[left]}", table_column=Column(no_wrap=True)),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("run", total=self.num_steps, left="? left")
        self._head = ""  # of the losses above the bar

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Write one line."""
        if not self.quiet:
            whole = not self.console.is_terminal  # a pipe gets each line unbroken
            self.console.print(text, highlight=False, soft_wrap=whole, markup=False)

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
        self._head = ""
        self._last = time.monotonic()

    def leave_out(self, stage: str, num_steps: int) -> None:
        """Expect so many steps less: the stage has ended before them."""
        self._num_steps[stage] -= num_steps
        self._bar.update(self._task, total=self.num_steps)

    def step(self) -> None:
        """Count one finished step."""
        now = time.monotonic()
        self.training_seconds += now - self._last
        self._last = now
        self.steps_done += 1
        self._bar.update(self._task, advance=1, left=f"{clock(self.seconds_left)} left")

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
        self._bar.update(self._task, description=f"{stage}: answers {num_done}/{num_all}")
        if self._bar.disable and num_done in (0, num_all):
            self.note(f"{stage}: {num_done} of {num_all} questions answered")

    def validating(self, stage: str, num_done: int, num_all: int) -> None:
        """Show how many batches of the rows are read that losses are measured on."""
        how_far = f"measuring {num_done}/{num_all}"
        tell(how_far)
        shown = stage if num_done == num_all else f"{stage}: {how_far}"
        self._bar.update(self._task, description=shown)

    def log(self, stage: str, step: int, max_steps: int, line: dict[str, Any]) -> None:
        """Write the figures of one log line: below a head on a terminal, else all in one line."""
        pace, left = f"{line['tokens_per_second']:.0f}", clock(self.seconds_left)
        segments: dict[str, float] = line["segments"]
        if self._bar.disable:
            shown = ", ".join(f"{name} {loss:.4f}" for name, loss in segments.items())
            figures = f"loss {line['loss']:.4f} ({shown})  {pace} tokens/s  {left} left"
            self.note(f"{stage} {step}/{max_steps}  {figures}")
            return
        cells = {"step": f"{step}/{max_steps}", "loss": f"{line['loss']:.4f}"}
        cells |= {name: f"{loss:.4f}" for name, loss in segments.items()}
        cells |= {"tokens/s": pace, "left": left}
        widths = {name: max(len(name), 10 if name == "step" else 6) for name in cells}
        head = " ".join(f"{name:>{width}}" for name, width in widths.items())
        if head != self._head:
            self._head = head
            self.note(f"{stage}, loss by segment in nats a token\n{head}")
        self.note(" ".join(f"{cells[name]:>{width}}" for name, width in widths.items()))


def clock(seconds: float | None) -> str:
    """Write a time as `m:ss`, or `h:mm:ss`; one that nobody knows as `unknown`.

    >>> clock(59.6), clock(3600)
    ('1:00', '1:00:00')
    """
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read the logged steps up to `last_step`, without a line that a kill has torn."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if line["step"] <= (math.inf if last_step is None else last_step):
                lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):  # also of bytes that are no text
            continue
    return lines


# How far a stage's first losses may lie from the last ones before it, nats a token.
TOLERANCE, TOLERANCE_OF_HALF = 1e-4, 1e-3


class StageLog(TrainerCallback):
    """Writes down what the stage at `number` does, as it does it.

    The losses before and after it are called `loss_name`; `row_losses` returns those of the last
    validation, row by row.
    """

    def __init__(
        self,
        ledger: Ledger,
        number: int,
        progress: RunProgress,
        loss_name: str,
        row_losses: Callable[[], list[float]],
    ) -> None:
        self.ledger, self.number, self.progress = ledger, number, progress
        self.record, self.path = ledger.stages[number], ledger.log(number)
        self.loss_name, self.row_losses = loss_name, row_losses
        unquantized = ledger.recipe.model.quantization == "none"
        exact = unquantized and ledger.facts["compute_dtype"] == "float32"
        self.tolerance = TOLERANCE if exact else TOLERANCE_OF_HALF
        self._num_read = 0  # batches of the validation that goes on
        self._ended = False  # maybe before its last step
        self._since = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drop log lines of steps that will be taken again."""
        self.record.num_steps, self._ended = state.max_steps, False
        if state.is_world_process_zero:
            kept = read_log(self.path, state.global_step)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.progress.begin(self.record.name, state.max_steps - state.global_step)
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave out the steps that weren't taken."""
        self.record.num_steps, self._ended = state.global_step, True
        self.progress.leave_out(self.record.name, state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.step()
        tell(f"step {state.global_step} of {state.max_steps}")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Show how far a validation is."""
        self._num_read += 1
        num_all = len(kwargs["eval_dataloader"])
        self.progress.validating(self.record.name, self._num_read, num_all)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
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
        if "kl" in logs:
            line["kl"] = logs["kl"]
        if not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"{self.record.name}, step {state.global_step}",
                f"expected a finite loss; got {logs['loss']}",
                SMALLER_STEPS,
            )
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.progress.log(self.record.name, state.global_step, state.max_steps, line)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the losses by segment; at the first step compare them with the stage before."""
        self._num_read, metrics = 0, kwargs["metrics"]
        losses = segments_of(metrics, "eval_loss_")
        at = {0: "start", state.max_steps: "end"}.get(state.global_step, str(state.global_step))
        at = "end" if self._ended else at
        self.record.validation[at] = losses
        self.record.read_as = rounded_by(self.ledger.facts, args.eval_batch_size)
        self.ledger.save()
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.progress.note(f"{self.record.name} at {at}: {self.loss_name} {shown}")
        if unsound := not_finite(losses):
            self.progress.note(
                f"{self.record.name} at {at}: the {self.loss_name} of {unsound} is "
                "not finite; no checkpoint is chosen by it"
            )
        folder = self.ledger.stage_folder(self.number)
        if at in ("start", "end") and self.ledger.main:
            keep_losses(folder, at, self.row_losses())
        if at == "start":
            self._compare_with_before(metrics, losses, str(folder))
        self._pause()

    def _compare_with_before(
        self, metrics: dict[str, float], losses: dict[str, float], where: str
    ) -> None:
        """Refuse losses at the start that are another model's; say how a frozen stage's compare."""
        if behind := segments_of(metrics, "eval_behind_"):
            behind["bound"] = max(behind["bound"], self.tolerance)
            self.record.behind_cache = behind
            self.ledger.save()
            self.progress.note(
                f"{self.record.name} at start: key loss {behind['loss']:.4f} behind the cache, "
                f"{behind['full_pass']:.4f} in a full pass (may differ by {behind['bound']:.4f})"
            )
            check_behind_cache(behind, self.tolerance, where)
        if self.number > 0:
            before = self.ledger.stages[self.number - 1]
            # One pass of both stages: a frozen one's own losses of the key are another's.
            same_pass = segments_of(metrics, "eval_full_") or losses
            alike = before.read_as in (None, self.record.read_as)
            tokens = {} if alike else segments_of(metrics, "eval_tokens_")
            check_handoff(before.validation["end"], same_pass, self.tolerance, where, tokens)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the writing of a checkpoint out of the pace."""
        self._pause()

    def _pause(self) -> None:
        self._since = time.monotonic()
        self.progress.pause()


def segments_of(figures: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the figures whose key begins with `prefix`, under the rest of it."""
    return {
        key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)
    }


# Transformers opens these anew, or logs over the stage before, with each trainer; others are left
# to its own callbacks.
KINDS = {"wandb": WandBTracker, "trackio": TrackioTracker}
TRACKERS = ("tensorboard", *KINDS)


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
        self.names = [name for name in told if name in TRACKERS]

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
        """Log figures by their names."""
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
        step, said = state.global_step, (logs or {}).items()
        if step == 0 and self.stage > 1:  # what the stage before ended with, at the same step:
            return  # wandb holds one row for both, which would say that it is of this stage
        numbers = {key: value for key, value in said if isinstance(value, int | float)}
        self.trackers.log(rewrite_logs(numbers), self.stage if step else 0, step)
