"""The diagnosis of each stage inside a run: few rows, a report that refuses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.files import write_json

if TYPE_CHECKING:
    from sftkey.training.stages import Run

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
        found = {"stage": name, "seconds": seconds, **as_json(figures, recommendation)}
        write_json(file, found)
        run.progress.note(_line(found))


def diagnosed(run: Run) -> list[str]:
    """Give the sentences of the stages that are diagnosed, in their order."""
    files = [_file(run.ledger.folder, stage.name) for stage in run.recipe.stages]
    return [_line(json.loads(file.read_text())) for file in files if file.exists()]


def _line(found: dict[str, Any]) -> str:
    recommended = found["recommendation"]["sentence"]
    return f"After {found['stage']}, by {found['num_rows']} validation rows: {recommended}"


def _file(folder: Path, name: str) -> Path:
    return folder / "diagnosis" / f"{name}.json"
