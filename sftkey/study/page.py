"""`report.html` of a study: its tables, pictures and the verdict of every answer in one file."""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.data.response import QuestionKey
from sftkey.errors import RunError
from sftkey.evaluation.answers import read_answers
from sftkey.evaluation.page import render
from sftkey.evaluation.results import Question
from sftkey.files import write_text
from sftkey.recipe.stages import BASE
from sftkey.study import report
from sftkey.study.results import FinishedCell, StudyResults
from sftkey.study.tasks import StudyFolder, run_name

MOST_QUESTIONS = 6000  # on a page, which then has some megabytes


def write_page(
    folder: Path,
    results: StudyResults,
    cells: Sequence[FinishedCell],
    pictures: Sequence[str],
    title: str,
) -> Path:
    """Write `report.html` beside `report.md` in a study's folder, and return it.

    The results are of the cells, the pictures files in the folder. Where the study's runs still lie
    there, too, the questions have their texts.
    """
    most = MOST_QUESTIONS // len(results.tasks)
    tasks = [_task(folder, results, cells, name, most) for name in results.tasks]
    names = dict.fromkeys(arm.name for arm in results.arms)
    page = folder / "report.html"
    text = render(
        "study/page.html.jinja",
        title=title,
        results=results,
        tasks=tasks,
        num_shown=sum(len(task["questions"]) for task in tasks),
        texts=any(asked.text for task in tasks for asked in task["questions"]),
        others=[name for name in names if name not in (BASE, results.control)],
        pictures={
            Path(name).stem: b64encode((folder / name).read_bytes()).decode() for name in pictures
        },
        alone=report.ALONE,
        where=report.where(results),
        notes=report.NOTES,
    )
    write_text(page, text)
    return page


def _task(
    folder: Path, results: StudyResults, cells: Sequence[FinishedCell], task: str, most: int
) -> dict[str, Any]:
    """Gather what the page shows of a task; of more than `most` questions the first ones."""
    here = [cell for cell in cells if cell.task == task]
    arms = [arm.name for arm in results.of(task)]
    questions = list(_questions(folder, here, arms, results.control))
    questions.sort(key=lambda asked: "differs" not in asked.traits)
    equal = report.equal_arms(results, task)
    return {
        "name": task,
        "arms": arms,
        "rows": report.rows(results, task),
        "said": report.said(results, task),
        "equals": {head: report.rows(results, task, arms=arms) for head, arms in equal.items()},
        "lists": {head: found(results, task) for head, found in report.LISTS.items()},
        "questions": questions[:most],
        "num_questions": len(questions),
    }


@dataclass(frozen=True)
class Verdict:
    """What an arm's seeds answered to a question."""

    num_right: int
    num_asked: int
    num_unparsed: int

    @property
    def word(self) -> str:
        """`right`, `wrong` or `unparsed` where all seeds agree, else nothing."""
        num_wrong = self.num_asked - self.num_right - self.num_unparsed
        counts = {"right": self.num_right, "unparsed": self.num_unparsed, "wrong": num_wrong}
        agreed = (word for word, count in counts.items() if count == self.num_asked)
        return next(agreed, "") if self.num_asked else ""

    @property
    def text(self) -> str:
        """The word of one seed, or how many of several were right."""
        return f"{self.num_right} of {self.num_asked}" if self.num_asked > 1 else self.word


@dataclass(frozen=True)
class QuestionVerdicts:
    """A question, and by arm what was answered."""

    name: str
    text: str
    verdicts: Mapping[str, Verdict]
    control: str

    @property
    def traits(self) -> list[str]:
        """By what the page finds it: `differs`, and the arms that are better or worse."""
        shares = {
            arm: verdict.num_right / verdict.num_asked
            for arm, verdict in self.verdicts.items()
            if verdict.num_asked and arm != BASE
        }
        found = ["differs"] if len(set(shares.values())) > 1 else []
        at = shares.get(self.control)
        for arm, share in shares.items():
            if at is not None and share != at:
                found.append(f"{'better' if share > at else 'worse'}-{arm}")
        return found


def _questions(
    folder: Path, cells: Sequence[FinishedCell], arms: Sequence[str], control: str
) -> Iterator[QuestionVerdicts]:
    """Yield a task's questions; seeds that answered the same ones stand in one row."""
    sets: dict[str | None, list[FinishedCell]] = defaultdict(list)
    for cell in cells:
        sets[cell.questions_sha256].append(cell)
    for group in sets.values():
        seeds = sorted({cell.seed for cell in group})
        of_seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
        asked: dict[QuestionKey, dict[str, list[Question]]]  # and by arm
        asked = defaultdict(lambda: defaultdict(list))
        based = next((cell.base.questions for cell in group if cell.base), ())
        for arm, questions in [*((cell.arm, cell.questions) for cell in group), (BASE, based)]:
            for question in questions:
                asked[question.key][arm].append(question)
        texts = _texts(folder, group)
        for key, by_arm in asked.items():
            yield QuestionVerdicts(
                f"{of_seeds if len(sets) > 1 else ''}{key}",
                texts.get(key, ""),
                {arm: _verdict(by_arm[arm]) for arm in arms},
                control,
            )


def _verdict(asked: Sequence[Question]) -> Verdict:
    unparsed = sum(not (question.parsed or question.correct) for question in asked)
    return Verdict(sum(question.correct for question in asked), len(asked), unparsed)


def _texts(folder: Path, cells: Sequence[FinishedCell]) -> dict[QuestionKey, str]:
    """Return the questions, from the first of the cells' runs that has them."""
    for cell in cells:
        run = StudyFolder(folder).runs(cell.task) / run_name(cell.arm, cell.seed)
        try:
            answers = read_answers(run, cell.stages[-1])
        except RunError:  # a copied folder has cells alone
            continue
        return {each.key: each.question for each in answers}
    return {}
