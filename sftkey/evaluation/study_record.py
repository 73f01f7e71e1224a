"""What is kept of a finished cell: figures and flags, no row of the data and no path."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.evaluation.results import StageResult, read_result
from sftkey.evaluation.study_cells import Cell
from sftkey.recipe.schema import Recipe
from sftkey.training.log import read_log
from sftkey.training.run import BASE, Run

KEY_SEGMENTS = (Segment.ANSWER_TAG, Segment.ANSWER, Segment.END)


def recipe_hash(recipe: Recipe) -> str:
    """Hash a resolved recipe as its run folder holds it."""
    return sha256(recipe.to_yaml().encode()).hexdigest()


def cell_record(run: Run, cell: Cell, command: str, wall_seconds: float) -> dict[str, Any]:
    """Gather what a finished cell found.

    Args:
        run: Its run, trained and graded.
        cell: What it is.
        command: The command that ran it.
        wall_seconds: What this command took for it, with loading, validation and answers.
    """
    folder = run.ledger.folder / "evaluation"
    last, base = (read_result(folder / f"{name}.json") for name in (cell.last, BASE))
    lengths = reference_lengths(run)
    records = run.ledger.stages
    logs = {
        record.name: read_log(run.ledger.stage_folder(number) / "log.jsonl")
        for number, record in enumerate(records)
    }
    return {
        "task": cell.task,
        "arm": cell.arm,
        "seed": cell.seed,
        "stages": [record.name for record in records],
        **_figures(last),
        "base": _figures(base),
        "reference_tokens": lengths,
        "segment_tokens": segment_tokens(run),
        "validation": {record.name: record.validation for record in records},
        "gradient_norm": {
            record.name: record.gradient_norm for record in records if record.gradient_norm
        },
        "steps": {record.name: record.num_steps for record in records},
        "trained_tokens": {
            name: sum(line["trained_tokens"] for line in log) for name, log in logs.items()
        },
        "tokens": {name: sum(line["tokens"] for line in log) for name, log in logs.items()},
        "seconds": {record.name: record.seconds for record in records},
        "wall_seconds": round(wall_seconds, 3),
        "shared_from": {record.name: record.shared_from for record in records},
        "chosen": cell.chosen,
        "recipe_sha256": recipe_hash(cell.recipe),
        "questions_sha256": last.questions_sha256,
        "commit": commit(),
        "versions": {**run.ledger.facts["versions"], "python": platform.python_version()},
        "hardware": hardware(run),
        "command": command,
    }


def _figures(result: StageResult) -> dict[str, Any]:
    kept = ("acc", "fmt", "num_unparsed", "num_never_stopped", "mean_thinking_length")
    questions = []
    for question in result.questions:
        flags = question.model_dump()
        flags["thinking_sha256"] = flags.pop("thinking_hash")
        questions.append(flags)
    return {**{name: getattr(result, name) for name in kept}, "questions": questions}


def reference_lengths(run: Run) -> dict[str, list[int]]:
    """Count the tokens of each question's reference thinking and key, in the order of index."""
    examples: list[Example] = sorted(run.answers.questions, key=lambda example: example.index)
    lengths: dict[str, list[int]] = {"thinking": [], "key": []}
    for row in tokenize(examples, run.prepared.frame):
        counted = Counter(row.segment_ids) if isinstance(row, Row) else Counter()
        lengths["thinking"].append(counted[Segment.THINKING])
        lengths["key"].append(sum(counted[segment] for segment in KEY_SEGMENTS))
    return lengths


def segment_tokens(run: Run) -> dict[str, int]:
    """Count the tokens of each segment in the rows that the validation losses are means over."""
    counts: Counter[str] = Counter()
    for segment_ids in run.validation["segment_ids"]:
        counts.update(Segment(number).name.lower() for number in segment_ids)
    return dict(counts)


def hardware(run: Run) -> str:
    """Name what computed."""
    if run.device.kind == "cuda":
        return torch.cuda.get_device_name(run.device.torch_device)
    threads = torch.get_num_threads()
    kind = "CPU" if run.device.kind == "cpu" else run.device.kind
    return f"{kind}, {threads} thread{'s' * (threads != 1)}, {platform.machine()}"


def commit() -> str:
    """Give the commit of the sources, marked where they were changed; else the version."""
    arguments = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        done = subprocess.run(
            arguments, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return f"sftkey {version('sftkey')}"
    return done.stdout.strip()
