"""What a study found, as `results.json` holds it: figures and flags, no row of the data, no path.

Every figure has its n beside it. Shares run from 0 to 1, differences from -1 to 1.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict

from sftkey.errors import RunError
from sftkey.evaluation.judge import JudgeFigures
from sftkey.evaluation.results import Question, each_once, read_model
from sftkey.evaluation.thinking import Rate, ValidChange
from sftkey.files import write_text

RESULTS = "results.json"
Interval = tuple[float, float]


class Figures(BaseModel):
    """A part of the results; what a later version adds is left out in reading."""

    model_config = ConfigDict(frozen=True)


class SeedFigures(Figures):
    """One seed of one arm; `correct` and `strict` are its flags, a digit a question."""

    seed: int | None = None
    num_questions: int
    acc: float
    acc_interval: Interval  # Wilson's
    fmt: float
    fmt_interval: Interval
    num_unparsed: int
    num_never_stopped: int | None
    steps: dict[str, int] = {}
    trained_tokens: dict[str, int] = {}
    seconds: dict[str, float] = {}
    correct: str
    strict: str


class DifferenceToControl(Figures):
    """How much more an arm has right than the control, paired by seed and question.

    `p` is the smallest alpha whose interval excludes 0, `p_holm` is corrected for the number of
    arms. `shown`: that one is below 0.05, of two seeds or more.
    """

    control: str
    num_seeds: int
    num_questions: int
    difference: float
    interval: Interval
    p: float
    p_holm: float
    shown: bool


class ThinkingFigures(Figures):
    """What the arm's last stage did to the thinking, all seeds together.

    `before` is the arm that ended one stage earlier; `num_made_wrong` and `num_made_right` are of
    the thinkings that a rule could judge in both. `loss` is the validation loss at the stage's
    start and end, the mean over seeds, in nats a token.
    """

    num_questions: int
    num_judged: int
    num_right: int
    mean_length: float | None
    before: str | None = None
    num_compared: int = 0
    num_identical: int = 0
    num_made_wrong: int = 0
    num_made_right: int = 0
    loss: tuple[float, float] | None = None
    num_judged_following: int = 0
    num_following: int = 0  # answers that are what the thinking arrives at
    valid: ValidChange | None = None  # against `before`


class Bucket(Figures):
    """About a quarter of the questions, by a measure of their reference.

    `num_questions` are those of a seed, the mean where seeds differ. `gain` is the difference to
    the control on them.
    """

    low: float
    high: float
    num_questions: int
    num_seeds: int
    acc: float
    acc_interval: Interval
    gain: float | None = None
    gain_interval: Interval | None = None


class ArmFigures(Figures):
    """One arm on one task; `base` is the model before all stages."""

    name: str
    task: str
    stages: tuple[str, ...]
    num_seeds: int
    num_questions: int
    num_conversations: int | None = None  # where some have several questions
    same_questions: bool
    acc: float
    acc_interval: Interval
    fmt: float
    fmt_interval: Interval
    steps: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None  # mean over the seeds on the first one's hardware
    difference_to_control: DifferenceToControl | None = None
    thinking: ThinkingFigures | None = None
    by_thinking_length: tuple[Bucket, ...] = ()
    by_ratio: tuple[Bucket, ...] = ()
    loss_share: dict[str, dict[str, float]] = {}
    gradient_share: dict[str, dict[str, float]] = {}
    chosen: dict[str, dict[str, float]] = {}
    judge: JudgeFigures | None = None
    rates: dict[str, Rate] = {}  # of the thinking's forms, where all questions have one
    seeds: tuple[SeedFigures, ...]


class Detectable(Figures):
    """The difference that four of five such studies would show, and what that supposes.

    `difference` is None with one seed, which shows none; `estimated`: what is supposed was
    estimated from finished cells.
    """

    task: str
    num_questions: int
    num_seeds: int
    num_arms: int
    difference: float | None
    differing: float
    by_question: float
    between_seeds: float
    estimated: bool = False


class StudyResults(Figures):
    """A whole study."""

    tasks: tuple[str, ...]
    control: str
    primary: str | None = None
    detectable_difference: tuple[Detectable, ...]
    arms: tuple[ArmFigures, ...]
    commit: str
    hardware: str
    versions: dict[str, str]
    command: str

    def of(self, task: str) -> list[ArmFigures]:
        """Return the arms on one task."""
        return [arm for arm in self.arms if arm.task == task]


def write_results(folder: Path, results: StudyResults) -> Path:
    """Write `results.json`; under that name it is always whole."""
    file = folder / RESULTS
    data = results.model_dump(mode="json")
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return file


def find_results(path: Path) -> Path | None:
    """Return the results that a path names: the file itself, or that of a study's folder."""
    if path.is_file():
        return path
    return path / RESULTS if (path / RESULTS).is_file() else None


def read_results_file(file: Path) -> StudyResults:
    """Read what `write_results` wrote."""
    hint = "`sftkey study` on the study's file writes its results anew"
    return read_model(StudyResults, file, hint)


class Answered(BaseModel):
    """Answers to all questions."""

    model_config = ConfigDict(frozen=True)

    questions: Annotated[tuple[Question, ...], AfterValidator(each_once)]
    mean_thinking_length: float | None = None

    @property
    def rows(self) -> list[int]:
        """The conversation of each question."""
        return [question.index for question in self.questions]

    def flags(self, name: str) -> list[bool]:
        """Return one kind of flag that every question has."""
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
    """Read the finished cells of a study's folder, by task, arm and seed."""
    hint = "move the file aside; `sftkey study` on its file runs the cell again"
    files = (folder / "cells").glob("*/*/seed-*.json")
    cells = [read_model(FinishedCell, file, hint) for file in files]
    if not cells:
        raise RunError(
            str(folder),
            "expected cells/<task>/<arm>/seed-<seed>.json; got none",
            "`sftkey study` on its file runs the cells",
        )
    return sorted(cells, key=lambda cell: (cell.task, cell.arm, cell.seed))


def table_of(answered: Iterable[Answered], name: str) -> Any:
    """Return one kind of flag as an array `(S, Q)`."""
    return np.array([each.flags(name) for each in answered], dtype=bool)


def same_questions(cells: Sequence[FinishedCell]) -> bool:
    """Tell whether the seeds of an arm answered the same questions."""
    return len({cell.questions_sha256 for cell in cells}) == 1


def paired(
    arm: Sequence[FinishedCell], control: Sequence[FinishedCell]
) -> list[tuple[FinishedCell, FinishedCell]]:
    """Pair the seeds that both have, on the same questions."""
    others = {cell.seed: cell for cell in control}
    pairs = [(cell, others[cell.seed]) for cell in arm if cell.seed in others]
    for cell, other in pairs:
        asked = [[each.key for each in side.questions] for side in (cell, other)]
        if asked[0] != asked[1] or cell.questions_sha256 != other.questions_sha256:
            raise RunError(
                f"{cell.task}, seed {cell.seed}",
                f"{cell.arm} answered other questions than {other.arm}, so they can't be paired",
                "arms of one study share a recipe's test rows; run both cells again",
            )
    return pairs
