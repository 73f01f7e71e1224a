"""Grade what a stage of a run answered, and say what the stage did to the thinking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.evaluation.answers import (
    grade_texts,
    graded_answers,
    read_generations,
    write_answers,
)
from sftkey.evaluation.judge import Judge, open_client
from sftkey.evaluation.results import (
    VALIDATION_LOSS,
    Question,
    StageResult,
    read_result,
    result_file,
    score,
    write_result,
)
from sftkey.evaluation.statistics import CHANCE, flipped, p_text
from sftkey.evaluation.thinking import PassedChange, ValidChange, passed_change, valid_change
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE, stage_names
from sftkey.tables import FittedTable

if TYPE_CHECKING:
    from sftkey.training.run import Run

MOST_LOSS = 0.02  # nats a token by which the thinking's loss may rise
REMEDY = (
    "In a key stage `loss_on: {thinking: 0.1, key: 1.0}` holds the thinking, and `context: frozen` "
    "can't change it."
)


@dataclass(frozen=True)
class Turned:
    """Right and wrong of the thinkings that a rule could judge in both stages.

    `p` is one-sided: how likely chance alone turns so many more wrong than right.
    """

    num_judged: int
    num_right_before: int
    num_right_after: int
    num_made_wrong: int
    num_made_right: int
    p: float


@dataclass(frozen=True)
class ThinkingChange:
    """What a stage did to the thinking.

    `before` names the stage before it on the same questions; without one only the losses can be
    known. `num_identical` and `turned` are None of results that were written without them.
    """

    after: str
    loss: tuple[float, float] | None = None
    loss_name: str = VALIDATION_LOSS
    before: str | None = None
    num_questions: int = 0
    num_identical: int | None = None
    mean_lengths: tuple[float | None, float | None] = (None, None)
    unit: str = "tokens"
    turned: Turned | None = None
    valid: ValidChange | None = None
    passed: PassedChange | None = None

    def harms(self) -> list[str]:
        """Say what got worse by more than it may.

        In almost every stage a few right thinkings turn wrong and a few wrong ones right: their
        numbers are always shown. Harm is what McNemar's exact test, asked about this side alone,
        doesn't take for chance. The losses have no such chance: rows and tokens are the same.
        """
        found = []
        if self.loss and (rise := self.loss[1] - self.loss[0]) > MOST_LOSS:
            rose = f"rose by {rise:.4f} nats a token (more than {MOST_LOSS})"
            found.append(f"its {self.loss_name} {rose}")
        if self.turned and self.turned.p < CHANCE:
            found.append(f"{_shown(self.turned)} (one-sided {p_text(self.turned.p)})")
        if self.valid and self.valid.p < CHANCE:
            found.append(self.valid.text())
        return found

    def warnings(self) -> list[str]:
        """Say with the remedy that a stage harmed the thinking, if it did."""
        harms = self.harms()
        return [f"{self.after} harmed the thinking: {'; '.join(harms)}. {REMEDY}"] if harms else []

    def line(self) -> str:
        """Return all that is known in one line, for the log."""
        figures = []
        if self.num_identical is not None:
            figures.append(f"{self.num_identical} of {self.num_questions} identical")
        if self.before is not None:
            old, new = ("none" if mean is None else f"{mean:.1f}" for mean in self.mean_lengths)
            figures.append(f"mean length {old} -> {new} {self.unit}")
        if told := self.turned:
            right = f"right {told.num_right_before} -> {told.num_right_after}"
            figures.append(f"{right} of {told.num_judged} ({_shown(told)})")
        if self.valid and min(self.valid.num_before, self.valid.num_after) < self.num_questions:
            figures.append(self.valid.text())
        if self.loss:
            figures.append("{} {:.4f} -> {:.4f}".format(self.loss_name, *self.loss))
        since = f" against {self.before}" if self.before is not None else ""
        return f"{self.after}: thinking{since}: {', '.join(figures) or 'nothing is known'}"

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {**asdict(self), "harms": self.harms()}


def thinking_change(
    before: StageResult | None, after: StageResult, names: tuple[str, str] | None = None
) -> ThinkingChange:
    """Pair the thinkings of two stages, if there is one before, by their questions.

    `names` are what to call the two; default their stages.
    """
    old_name, new_name = names or (before.stage if before else "", after.stage)
    if before is None or before.questions_sha256 != after.questions_sha256:
        return ThinkingChange(new_name, after.thinking_loss, after.loss_name)
    pairs = list(zip(before.questions, after.questions, strict=True))
    hashes = [(old.thinking_hash, new.thinking_hash) for old, new in pairs]
    known = all(old and new for old, new in hashes)
    return ThinkingChange(
        after=new_name,
        loss=after.thinking_loss,
        loss_name=after.loss_name,
        before=old_name,
        num_questions=len(pairs),
        num_identical=sum(old == new for old, new in hashes) if known else None,
        mean_lengths=(before.mean_thinking_length, after.mean_thinking_length),
        unit=after.thinking_unit,
        turned=turned(pairs),
        valid=valid_change(pairs),
        passed=passed_change(pairs),
    )


def thinking_table(rows: Iterable[tuple[str, StageResult, ThinkingChange]]) -> FittedTable:
    """Return the table of what the stages did to the thinking, a row for each named result.

    Whether answers follow from their thinking is a column where a rule can tell it of any.
    """
    rows = list(rows)
    told = any(result.num_judged_following for _, result, _ in rows)
    names = {change.loss_name for _, _, change in rows if change.loss} or {VALIDATION_LOSS}
    headers = [
        "identical\nto before",
        "right",
        "turned\nwrong",
        "turned\nright",
        f"{names.pop() if len(names) == 1 else 'loss'},\nnats a token",
        *(["answer\nfollows"] if told else []),
    ]
    grid = FittedTable("thinking\nafter", headers)
    for name, result, change in rows:
        judged, identical, flips = result.num_thinking_judged, change.num_identical, change.turned
        cells = [
            name,
            "" if identical is None else f"{identical}/{change.num_questions}",
            f"{result.num_thinking_right}/{judged}" if judged else "?",
            str(flips.num_made_wrong) if flips else "",
            str(flips.num_made_right) if flips else "",
            "{:.4f} -> {:.4f}".format(*change.loss) if change.loss else "",
        ]
        if told:
            judged = result.num_judged_following
            cells.append(f"{result.num_following}/{judged}" if judged else "?")
        grid.add(cells)
    return grid


def turned(pairs: Iterable[tuple[Question, Question]]) -> Turned | None:
    """Count the thinkings that turned right or wrong; None where no rule could judge any."""
    judged = [
        (old.thinking_right, new.thinking_right, old.index)
        for old, new in pairs
        if old.thinking_right is not None and new.thinking_right is not None
    ]
    if not judged:
        return None
    before, after, rows = (list(each) for each in zip(*judged, strict=True))
    return Turned(len(judged), *flipped(before, after, rows))


def _shown(told: Turned) -> str:
    return f"{told.num_made_wrong} right ones turned wrong, {told.num_made_right} wrong right"


def grade_stage(run: Run, stage: str, generations: Path | None = None) -> None:
    """Grade the answers of one stage, and write what was found (main process only).

    `evaluation/<stage>.json` has the figures, `<stage>.graded.jsonl` each answer and its verdict.
    The answers are those of `generations`, by default what the run itself wrote, if it did.

    Raises:
        JudgeError: The judge can't be asked. The file lies there nevertheless, with the rule's
            grades and what was judged; graded again, only what is left is asked.
    """
    file = generations or run.ledger.generations(stage)
    wanted = generations or file.exists()  # an absent file that was named is an error
    if not run.ledger.main or not wanted or not run.answers.questions:
        return
    questions, renderer = run.answers.questions, run.prepared.renderer
    section = run.recipe.eval.judge
    judge = Judge(section, lambda text: run.progress.note(f"{stage}: {text}")) if section else None
    written = read_generations(file, [example.key for example in questions])
    texts = grade_texts(run.recipe, renderer, written, questions)
    result = score(
        run.recipe,
        renderer,
        stage,
        texts,
        settings={"judge": judge.section.model} if judge else None,
        thinking_loss=thinking_losses(run, stage),
        loss_name=run.prepared.loss_name,
        judge=judge.flags if judge else None,
    )
    folder = result_file(run.ledger.folder, stage).parent
    answers = graded_answers(texts)
    run.ledger.finish(write_result(folder, result), write_answers(folder, stage, answers))
    if judge and judge.failure:
        raise judge.failure


def _result(run: Run, stage: str) -> StageResult | None:
    """Return the figures of a stage; None where it isn't graded."""
    file = result_file(run.ledger.folder, stage)
    return read_result(file) if file.exists() else None


def track_grades(run: Run, stage: str) -> None:
    """Log Acc and Fmt with their intervals to the run's trackers, where the stage ends."""
    result = _result(run, stage) if run.ledger.main else None
    if result is None:
        return
    values: dict[str, float] = {}
    for name in ("acc", "fmt"):
        low, high = getattr(result, f"{name}_interval")
        values |= {f"test/{name}": getattr(result, name)}
        values |= {f"test/{name}_low": low, f"test/{name}_high": high}
    number = result.position
    num_steps = run.ledger.stages[number - 1].num_steps if number else 0
    run.trackers.log(values, number, num_steps)


def refuse_unready_judge(recipe: Recipe) -> None:
    """Refuse a judge whose package or key is missing, before anything else is done."""
    if recipe.eval.judge is not None:
        open_client(recipe.eval.judge).close()


def thinking_losses(run: Run, stage: str) -> tuple[float, float] | None:
    """Return the thinking's loss before and after a stage; None of the base model."""
    for record in run.ledger.stages:
        start, end = (record.validation.get(at, {}).get("thinking") for at in ("start", "end"))
        if record.name == stage and start is not None and end is not None:
            return start, end
    return None


def note_thinking(run: Run, stage: str) -> None:
    """Say in the log what a stage did to the thinking, and how to mend what it harmed."""
    if stage == BASE or not run.ledger.main:
        return
    names = stage_names(run.recipe)
    if after := _result(run, stage):
        change = thinking_change(_result(run, names[names.index(stage) - 1]), after)
    else:  # nothing was asked, or will be later
        change = ThinkingChange(stage, thinking_losses(run, stage), run.prepared.loss_name)
    for line in (change.line(), *change.warnings()):
        run.progress.note(line)
