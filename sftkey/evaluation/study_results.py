"""What a study found, as `results.json` holds it: figures and flags, no row of the data, no path.

Every figure has its n beside it. Shares run from 0 to 1, differences from -1 to 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sftkey.errors import Problem, RunError
from sftkey.evaluation.grading import shortened
from sftkey.evaluation.judge import JudgeFigures
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

    `shown`: the interval is clear of 0, and the Holm-corrected p is below 0.05.
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


class Bucket(Figures):
    """A quarter of the questions, by a measure of their reference.

    `gain` is the difference to the control on them.
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
    seeds: tuple[SeedFigures, ...]


class Detectable(Figures):
    """The difference that four of five such studies would show, and what that supposes."""

    task: str
    num_questions: int
    num_seeds: int
    num_arms: int
    difference: float
    differing: float
    by_question: float
    between_seeds: float


class StudyResults(Figures):
    """A whole study."""

    tasks: tuple[str, ...]
    control: str
    detectable_difference: tuple[Detectable, ...]
    arms: tuple[ArmFigures, ...]
    commit: str
    hardware: str
    versions: dict[str, str]
    command: str


def write_results(folder: Path, results: StudyResults) -> Path:
    """Write `results.json`; under that name it is always whole."""
    file = folder / RESULTS
    data = results.model_dump(mode="json")
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return file


def find_results(path: Path) -> Path | None:
    """Give the results that a path names: the file itself, or that of a study's folder."""
    if path.is_file():
        return path
    return path / RESULTS if (path / RESULTS).is_file() else None


def read_results_file(file: Path) -> StudyResults:
    """Read what `write_results` wrote.

    Raises:
        RunError: The file holds something else.
    """
    try:
        return StudyResults.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problems = [
            Problem(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()
        ]
        hint = "`sftkey study` on the study's file writes its results anew"
        raise RunError(str(file), shortened(problems), hint) from None
