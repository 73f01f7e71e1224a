"""What a study's cell has found, as its file holds it, and the stages that cells share."""

import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sftkey.data.labels import KEY
from sftkey.data.prepare import Prepared
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import SFTKeyError
from sftkey.evaluation.results import StageResult, read_result, result_file
from sftkey.files import appearing, value_hash
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE, prefix_key
from sftkey.study.tasks import Cell
from sftkey.training.log import read_log
from sftkey.training.made_from import TRAINS, fingerprints, made_from
from sftkey.training.run import Run
from sftkey.training.run_folder import RECIPE, Ledger

CHECKPOINTS = "checkpoints"


def take_over(ledger: Ledger, prepared: Prepared) -> None:
    """Take over the stages that a run beside this one has trained already, with their answers.

    The files are linked, not copied, where the file system can; nobody writes into them again. A
    stage that was trained on others than the `prepared` rows isn't taken over.
    """
    rows = fingerprints(made_from(ledger.recipe, prepared))
    for number, record in enumerate(ledger.stages):
        if record.status != "open":
            continue
        giver = _giver(ledger, number, rows)
        if giver is None:
            return
        theirs = giver.stages[number]
        ignore = shutil.ignore_patterns(CHECKPOINTS, ".*")
        with appearing(ledger.stage_folder(number)) as making:
            shutil.copytree(giver.stage_folder(number), making, copy_function=link, ignore=ignore)
        answers, own = giver.generations(theirs.name), ledger.generations(record.name)
        asked_alike = giver.recipe.eval == ledger.recipe.eval and _same(giver, rows, ["test"])
        if answers.exists() and not own.exists() and asked_alike:
            link(answers, own)
        by = theirs.shared_from or giver.folder.name
        ledger.stages[number] = replace(theirs, name=record.name, shared_from=by)
        ledger.finish(ledger.adapter(number), ledger.log(number), own)


def _same(giver: Ledger, rows: Mapping[str, str], splits: Collection[str]) -> bool:
    """Tell whether another run has these rows; one of a time that noted none is believed."""
    return all(giver.rows.get(name, rows[name]) == rows[name] for name in splits)


def _giver(ledger: Ledger, number: int, rows: Mapping[str, str]) -> Ledger | None:
    """Find a run of this study that has trained an identical stage at this place.

    One that has answered the questions after it comes first.
    """
    wanted = prefix_key(ledger.recipe, number + 1)
    found = [
        other
        for other in _others(ledger.folder)
        if len(other.stages) > number
        and other.stages[number].status == "trained"
        and prefix_key(other.recipe, number + 1) == wanted
        and _same(other, rows, TRAINS)
    ]
    answered = [other for other in found if other.generations(other.stages[number].name).exists()]
    return next(iter(answered or found), None)


def _others(folder: Path) -> Iterator[Ledger]:
    for file in sorted(folder.parent.glob("*/ledger.json")):
        if file.parent != folder:
            with suppress(SFTKeyError):  # a broken run gives nothing, and stops nothing
                recipe = _recipe((file.parent / RECIPE).resolve())
                yield Ledger(file.parent, recipe, main=False)


@lru_cache(maxsize=256)
def _recipe(file: Path) -> Recipe:
    return load_recipe(file)


def link(source: str | Path, target: str | Path) -> None:
    """Link a file that nobody will change; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        with appearing(Path(target)) as copy:
            shutil.copyfile(source, copy)


def remove_checkpoints(folder: Path) -> None:
    """Free what only an unfinished stage needs."""
    for checkpoints in folder.glob(f"stages/*/{CHECKPOINTS}"):
        shutil.rmtree(checkpoints)


def recipe_hash(recipe: Recipe) -> str:
    """Hash what a recipe says beside defaults, so that a key which is new to a cell changes none.

    How many answers are written at a time is no part of it: it depends on the machine's memory.
    """
    left_out = {"eval": {"batch_size"}}
    return value_hash(recipe.model_dump(mode="json", exclude_defaults=True, exclude=left_out))


def cell_record(run: Run, cell: Cell, command: str, wall_seconds: float) -> dict[str, Any]:
    """Gather what a cell, its run trained and graded, found.

    `wall_seconds` is what `command` took for it, with loading, validation and answers.
    """
    folder = run.ledger.folder
    last, base = (read_result(result_file(folder, name)) for name in (cell.last, BASE))
    records = run.ledger.stages
    logs = {record.name: read_log(run.ledger.log(number)) for number, record in enumerate(records)}

    def logged(count: str) -> dict[str, int]:
        return {name: sum(line[count] for line in log) for name, log in logs.items()}

    return {
        "task": cell.task,
        "arm": cell.arm,
        "seed": cell.seed,
        "stages": [record.name for record in records],
        **_figures(last),
        "base": _figures(base),
        "reference_tokens": reference_lengths(run),
        "segment_tokens": segment_tokens(run),
        "validation": {record.name: record.validation for record in records},
        "gradient_norm": {
            record.name: record.gradient_norm for record in records if record.gradient_norm
        },
        "steps": {record.name: record.num_steps for record in records},
        "trained_tokens": logged("trained_tokens"),
        "tokens": logged("tokens"),
        "seconds": {record.name: record.seconds for record in records},
        "wall_seconds": round(wall_seconds, 3),
        "shared_from": {record.name: record.shared_from for record in records},
        "chosen": cell.chosen,
        "own_losses": run.ledger.facts["own_losses"],
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
    """Count the tokens of each question's reference thinking and key, in the results' order."""
    examples: list[Example] = sorted(run.answers.questions, key=lambda example: example.key)
    lengths: dict[str, list[int]] = {"thinking": [], "key": []}
    for row in tokenize(examples, run.prepared.renderer):
        counted = Counter(row.segment_ids) if isinstance(row, Row) else Counter()
        lengths["thinking"].append(counted[Segment.THINKING])
        lengths["key"].append(sum(counted[segment] for segment in KEY))
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
    """Return the commit of the sources, marked where they were changed; else the version."""
    arguments = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        done = subprocess.run(
            arguments, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return f"sftkey {version('sftkey')}"
    return done.stdout.strip()
