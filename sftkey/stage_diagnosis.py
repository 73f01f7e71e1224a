"""The diagnosis of each stage inside a run: few rows, a report that refuses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.errors import RunError
from sftkey.files import write_json

if TYPE_CHECKING:
    from sftkey.training.run import Run

NUM_ROWS = 32  # validation rows: half a minute of the demo on two cores


@dataclass(frozen=True)
class StageDiagnosis:
    """Writes `diagnosis/<stage>.json` of a run after each stage, once."""

    run: Run

    def missing(self, name: str) -> bool:
        """Tell whether a stage is still to be diagnosed; no run without validation rows is."""
        from accelerate import PartialState

        from sftkey.training.answers import sharded

        if self.run.prepared.validation is None or sharded():
            return False
        missing = not _file(self.run.ledger.folder, name).exists()
        PartialState().wait_for_everyone()  # before the main process may write it
        return missing

    def write(self, name: str, model: Any) -> None:
        """Ask the model and say what follows; the main process does, the others wait for it."""
        from accelerate import PartialState

        if self.run.ledger.main:
            self._write(name, model)
        PartialState().wait_for_everyone()

    def _write(self, name: str, model: Any) -> None:
        from sftkey.diagnose import look, validation_subject
        from sftkey.evaluation.diagnosis_table import as_json

        run, start = self.run, time.monotonic()
        folder = str(run.ledger.folder)
        subject = validation_subject(folder, name, model, run.recipe, run.prepared, NUM_ROWS)
        figures, recommendation = look(subject)
        seconds = round(time.monotonic() - start, 1)
        file = _file(run.ledger.folder, name)
        file.parent.mkdir(exist_ok=True)
        found = {"stage": name, "seconds": seconds} | as_json(figures, recommendation)
        write_json(file, found)
        run.progress.note(_line(found))


def diagnosed(run: Run) -> list[str]:
    """Give the sentences of the stages that are diagnosed, in their order."""
    files = [_file(run.ledger.folder, stage.name) for stage in run.recipe.stages]
    return [_line(json.loads(file.read_text())) for file in files if file.exists()]


def refuse_empty_thinking(run: Run, stage: str) -> None:
    """Refuse to go on to a stage over own thinking that shows no use, before it has begun.

    Args:
        run: What has been trained so far is kept.
        stage: The one that has just been diagnosed.

    Raises:
        RunError: The next stage would teach the key not to read the thinking.
    """
    names = [each.name for each in run.recipe.stages]
    following = run.recipe.stages[names.index(stage) + 1 :][:1] if stage in names else ()
    file = _file(run.ledger.folder, stage)
    begun = any(run.ledger.stages[names.index(each.name)].status != "open" for each in following)
    if begun or not file.exists() or not any(each.thinking == "own" for each in following):
        return
    found = json.loads(file.read_text())
    if found["own_thinking_is_empty"]:
        raise RunError(
            f"stages.{following[0].name}",
            f"thinking: own asks for thinkings that carry something; by {found['num_rows']} "
            f"validation rows after {stage}, the answers are no better for them",
            f"`sftkey train` with --yes goes on; {file} has the figures",
        )


def _line(found: dict[str, Any]) -> str:
    recommended = found["recommendation"]["sentence"]
    return f"After {found['stage']}, by {found['num_rows']} validation rows: {recommended}"


def _file(folder: Path, name: str) -> Path:
    return folder / "diagnosis" / f"{name}.json"
