"""The finished cells of a study as they lie on disk, read without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sftkey.errors import Problem, RunError
from sftkey.evaluation.grading import shortened


class CellQuestion(BaseModel):
    """The flags of one question; None is what no rule could say, or nobody asked."""

    model_config = ConfigDict(frozen=True)

    index: int
    correct: bool
    strict: bool
    parsed: bool
    stopped: bool | None = None
    thinking_right: bool | None = None
    thinking_sha256: str | None = None
    follows: bool | None = None
    judged: bool | None = None


class Answered(BaseModel):
    """Answers to all questions."""

    model_config = ConfigDict(frozen=True)

    questions: tuple[CellQuestion, ...]
    mean_thinking_length: float | None = None

    def flags(self, name: str) -> list[bool]:
        """Give one kind of flag that every question has."""
        return [getattr(question, name) for question in self.questions]


class FinishedCell(Answered):
    """One arm on one task with one seed: `cells/<task>/<arm>/seed-<seed>.json`.

    `reference_tokens` has the lengths of reference thinking and key in the questions' order;
    `segment_tokens` the validation rows' tokens by segment, and `gradient_norm` by stage the norm
    of the gradient that each segment's loss gives: both may be left out.
    """

    task: str
    arm: str
    seed: int
    stages: tuple[str, ...]
    base: Answered | None = None
    reference_tokens: dict[str, list[int]] = {}
    validation: dict[str, dict[str, dict[str, float]]] = {}
    segment_tokens: dict[str, float] = {}
    gradient_norm: dict[str, dict[str, float]] = {}
    steps: dict[str, int] = {}
    trained_tokens: dict[str, int] = {}
    seconds: dict[str, float] = {}
    chosen: dict[str, dict[str, float]] = {}
    questions_sha256: str | None = None
    commit: str = ""
    hardware: str = ""
    versions: dict[str, str] = {}
    command: str = ""


def read_cells(folder: Path) -> list[FinishedCell]:
    """Read the finished cells of a study's folder, by task, arm and seed.

    Raises:
        RunError: There is none, or a file that is no cell.
    """
    cells = [_read(file) for file in (folder / "cells").glob("*/*/seed-*.json")]
    if not cells:
        raise RunError(
            str(folder),
            "expected cells/<task>/<arm>/seed-<seed>.json; got none",
            "`sftkey study` on its file runs the cells",
        )
    return sorted(cells, key=lambda cell: (cell.task, cell.arm, cell.seed))


def _read(file: Path) -> FinishedCell:
    try:
        return FinishedCell.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problems = [
            Problem(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()
        ]
        hint = "move the file aside; `sftkey study` on its file runs the cell again"
        raise RunError(str(file), shortened(problems), hint) from None


def table_of(answered: Iterable[Answered], name: str) -> Any:
    """Give one kind of flag as an array `(S, Q)`."""
    return np.array([each.flags(name) for each in answered], dtype=bool)


def same_questions(cells: Sequence[FinishedCell]) -> bool:
    """Tell whether the seeds of an arm answered the same questions."""
    return len({cell.questions_sha256 for cell in cells}) == 1


def paired(
    arm: Sequence[FinishedCell], control: Sequence[FinishedCell]
) -> list[tuple[FinishedCell, FinishedCell]]:
    """Pair the seeds that both have, on the same questions.

    Raises:
        RunError: The two of one seed answered other questions.
    """
    others = {cell.seed: cell for cell in control}
    pairs = [(cell, others[cell.seed]) for cell in arm if cell.seed in others]
    for cell, other in pairs:
        asked = [
            (each.questions_sha256, [question.index for question in each.questions])
            for each in (cell, other)
        ]
        if asked[0] != asked[1]:
            raise RunError(
                f"{cell.task}, seed {cell.seed}",
                f"{cell.arm} answered other questions than {other.arm}, so they can't be paired",
                "arms of one study share a recipe's test rows; run both cells again",
            )
    return pairs
