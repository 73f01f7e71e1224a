"""What a stage did to the thinking: is it the same, how long, is it right, and at which loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sftkey.evaluation.conversations import difference_with_interval, one_sided_p, two_sided_p
from sftkey.evaluation.judge import judge_sentence
from sftkey.evaluation.results import Question, StageResult, read_results
from sftkey.evaluation.statistics import discordant, holm
from sftkey.evaluation.thinking_form import ValidChange, form_table, valid_change

MOST_LOSS = 0.02  # nats a token by which the thinking's validation loss may rise
CHANCE = 0.05  # p below which a difference, or more turned wrong than right, isn't chance
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
    before: str | None = None
    num_questions: int = 0
    num_identical: int | None = None
    mean_lengths: tuple[float | None, float | None] = (None, None)
    unit: str = "tokens"
    turned: Turned | None = None
    valid: ValidChange | None = None

    def harms(self) -> list[str]:
        """Say what got worse by more than it may.

        In almost every stage a few right thinkings turn wrong and a few wrong ones right: their
        numbers are always shown. Harm is what McNemar's exact test, asked about this side alone,
        doesn't take for chance. The losses have no such chance: rows and tokens are the same.
        """
        found = []
        if self.loss and self.loss[1] - self.loss[0] > MOST_LOSS:
            rise = self.loss[1] - self.loss[0]
            found.append(
                f"its validation loss rose by {rise:.4f} nats a token (more than {MOST_LOSS})"
            )
        if self.turned and self.turned.p < CHANCE:
            p = "p<0.001" if self.turned.p < 0.001 else f"p {self.turned.p:.3f}"
            found.append(f"{_shown(self.turned)} (one-sided {p})")
        if self.valid and self.valid.p < CHANCE:
            found.append(self.valid.text())
        return found

    def warnings(self) -> list[str]:
        """Say with the remedy that a stage harmed the thinking, if it did."""
        harms = self.harms()
        return [f"{self.after} harmed the thinking: {'; '.join(harms)}. {REMEDY}"] if harms else []

    def line(self) -> str:
        """Give all that is known in one line, for the log."""
        figures = []
        if self.num_identical is not None:
            figures.append(f"{self.num_identical} of {self.num_questions} identical")
        if self.before is not None:
            old, new = ("none" if mean is None else f"{mean:.1f}" for mean in self.mean_lengths)
            figures.append(f"mean length {old} -> {new} {self.unit}")
        if turned := self.turned:
            right = f"right {turned.num_right_before} -> {turned.num_right_after}"
            figures.append(f"{right} of {turned.num_judged} ({_shown(turned)})")
        if self.valid and min(self.valid.num_before, self.valid.num_after) < self.num_questions:
            figures.append(self.valid.text())
        if self.loss:
            figures.append("validation loss {:.4f} -> {:.4f}".format(*self.loss))
        since = f" against {self.before}" if self.before is not None else ""
        return f"{self.after}: thinking{since}: {', '.join(figures) or 'nothing is known'}"

    def as_json(self) -> dict[str, Any]:
        """Give the figures as plain data."""
        return {**asdict(self), "harms": self.harms()}


def thinking_change(
    before: StageResult | None, after: StageResult, names: tuple[str, str] | None = None
) -> ThinkingChange:
    """Pair the thinkings of two stages by their questions.

    Args:
        before: The result of the stage before; None if there is none.
        after: The stage.
        names: What to call the two; default their stages.
    """
    old_name, new_name = names or (before.stage if before else "", after.stage)
    if before is None or before.questions_sha256 != after.questions_sha256:
        return ThinkingChange(new_name, after.thinking_loss)
    pairs = list(zip(before.questions, after.questions, strict=True))
    hashes = [(old.thinking_hash, new.thinking_hash) for old, new in pairs]
    known = all(old and new for old, new in hashes)
    return ThinkingChange(
        after=new_name,
        loss=after.thinking_loss,
        before=old_name,
        num_questions=len(pairs),
        num_identical=sum(old == new for old, new in hashes) if known else None,
        mean_lengths=(before.mean_thinking_length, after.mean_thinking_length),
        unit=after.thinking_unit,
        turned=_turned(pairs),
        valid=valid_change(pairs),
    )


def thinking_table(rows: Iterable[tuple[str, StageResult, ThinkingChange]]) -> Table:
    """Give the table of what the stages did to the thinking, a row for each named result.

    Whether answers follow from their thinking is a column where a rule can tell it of any.
    """
    rows = list(rows)
    told = any(result.num_judged_following for _, result, _ in rows)
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    grid.add_column("thinking\nafter", overflow="fold")
    for header in [
        "identical\nto before",
        "right",
        "turned\nwrong",
        "turned\nright",
        "validation loss,\nnats a token",
        *(["answer\nfollows"] if told else []),
    ]:
        grid.add_column(header, justify="right", no_wrap=True)
    for name, result, change in rows:
        cells = [name, *_change_cells(result, change)]
        if told:
            judged = result.num_judged_following
            cells.append(f"{result.num_following}/{judged}" if judged else "?")
        grid.add_row(*map(Text, cells))
    return grid


def _turned(pairs: Iterable[tuple[Question, Question]]) -> Turned | None:
    judged = [
        (old.thinking_right, new.thinking_right, old.index)
        for old, new in pairs
        if old.thinking_right is not None and new.thinking_right is not None
    ]
    if not judged:
        return None
    before, after, rows = (list(each) for each in zip(*judged, strict=True))
    gains, losses = discordant(before, after)
    p = one_sided_p(before, after, rows)
    return Turned(len(judged), sum(before), sum(after), losses, gains, p)


def _shown(turned: Turned) -> str:
    return f"{turned.num_made_wrong} right ones turned wrong, {turned.num_made_right} wrong right"


def _change_cells(result: StageResult, change: ThinkingChange) -> list[str]:
    judged, identical, turned = result.num_thinking_judged, change.num_identical, change.turned
    return [
        "" if identical is None else f"{identical}/{change.num_questions}",
        f"{result.num_thinking_right}/{judged}" if judged else "?",
        str(turned.num_made_wrong) if turned else "",
        str(turned.num_made_right) if turned else "",
        "{:.4f} -> {:.4f}".format(*change.loss) if change.loss else "",
    ]


@dataclass(frozen=True)
class Difference:
    """How much more of the same questions `after` has right than `before`.

    `difference` and its 95% interval are shares of the questions; `p` is the smallest alpha whose
    interval excludes 0, `p_holm` is corrected for the number of such differences. They go over
    conversations where some have several questions, whose p is that of swapping whole ones; their
    number is None where none has.
    """

    before: str
    after: str
    num_questions: int
    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    num_conversations: int | None = None

    def points(self) -> str:
        """Give the interval in percentage points."""
        return "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in self.interval))


@dataclass(frozen=True)
class StageRow:
    """One stage of one run.

    `difference` and `thinking` are against the stage before, on the same questions.
    """

    run: str
    name: str
    result: StageResult
    alpha: float
    difference: Difference | None
    thinking: ThinkingChange

    @property
    def score(self) -> float:
        """Score with the comparison's alpha, not always the one of the evaluation."""
        return self.result.score_at(self.alpha)


@dataclass(frozen=True)
class Comparison:
    """All rows, the differences between the last stages of runs, and what stands in the way."""

    rows: tuple[StageRow, ...]
    between_runs: tuple[Difference, ...]
    warnings: tuple[str, ...]


def compare(runs: Mapping[str, Sequence[StageResult]], alpha: float | None = None) -> Comparison:
    """Lay the stages of runs side by side.

    Args:
        runs: Each run's results by its name, in the order of its stages, the base model first.
        alpha: Weight of Acc in Score; by default each result's own.
    """
    rows: list[StageRow] = []
    lasts: list[StageRow] = []
    warnings: list[str] = []
    for run, results in runs.items():
        before: StageRow | None = None
        for result in results:
            name = result.stage if len(runs) == 1 else f"{run} {result.stage}"
            difference = _difference(before, result, name) if before else None
            old, names = (before.result, (before.name, name)) if before else (None, ("", name))
            thinking = thinking_change(old, result, names)
            own_alpha = result.alpha if alpha is None else alpha
            row = StageRow(run, name, result, own_alpha, difference, thinking)
            if before and not difference:
                warnings.append(_unpaired(before, row))
            warnings += thinking.warnings()
            rows.append(row)
            before = row
        lasts += rows[-1:]
    between = []
    for row in lasts[1:]:
        if difference := _difference(lasts[0], row.result, row.name):
            between.append(difference)
        else:
            warnings.append(_unpaired(lasts[0], row))
    within = _corrected(row.difference for row in rows)
    rows = [replace(row, difference=each) for row, each in zip(rows, within, strict=True)]
    told = tuple(each for each in _corrected(between) if each)
    return Comparison(tuple(rows), told, (*warnings, *_unlike(rows)))


def _corrected(differences: Iterable[Difference | None]) -> list[Difference | None]:
    """Correct the p of all differences of one kind, from stage to stage or from run to run."""
    found = list(differences)
    ps = holm({str(place): each.p for place, each in enumerate(found) if each})
    return [
        replace(each, p_holm=ps[str(place)]) if each else None for place, each in enumerate(found)
    ]


def compare_runs(folders: Iterable[Path], alpha: float | None = None) -> Comparison:
    """Compare run folders.

    Raises:
        RunError: A folder holds no results, or files that aren't results.
    """
    return compare({str(folder): read_results(folder) for folder in folders}, alpha)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Give a comparison as plain data; differences and shares run from -1 to 1."""
    return {
        "stages": [
            {
                "run": row.run,
                **row.result.model_dump(mode="json", exclude={"questions"}),
                "alpha": row.alpha,
                "score": row.score,
                "difference": row.difference and asdict(row.difference),
                "thinking_change": row.thinking.as_json(),
            }
            for row in comparison.rows
        ],
        "between_runs": [asdict(difference) for difference in comparison.between_runs],
        "warnings": list(comparison.warnings),
        "conclusions": sentences(comparison),
    }


def render(comparison: Comparison) -> Group:
    """Give the tables and their sentences, for a rich console."""
    rows = [(row.name, row.result, row.thinking) for row in comparison.rows]
    told = any(result.num_thinking_judged is not None for _, result, _ in rows)
    second: list[Table | Text] = [Text(), thinking_table(rows), Text()] if told else []
    forms = form_table((name, result.rates, change.valid) for name, result, change in rows)
    second += [] if forms is None else [*([] if second else [Text()]), forms, Text()]
    return Group(table(comparison), *second, *map(Text, sentences(comparison)))


def table(comparison: Comparison) -> Table:
    """Give the table: a row for each stage, intervals below their figures."""
    several = len({row.run for row in comparison.rows}) > 1
    units = {row.result.thinking_unit for row in comparison.rows}
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for header in [*(["run"] if several else []), "stage"]:
        grid.add_column(header, overflow="fold")  # the only ones that a narrow terminal breaks
    headers = ["n", "Acc\n[95%]", "Fmt", "Score", "un-\nparsed", "never\nstopped"]
    headers += [
        "think.\n" + ("tokens" if units == {"tokens"} else "chars"),
        "points more, p\n[95%]",
    ]
    for header in headers:
        grid.add_column(header, justify="right", no_wrap=True)
    for row in comparison.rows:
        grid.add_row(*([Text(row.run)] if several else []), *map(Text, _cells(row)))
    return grid


def sentences(comparison: Comparison) -> list[str]:
    """Say what each difference shows, what a judge finds, and what is in the way."""
    within = [row.difference for row in comparison.rows if row.difference]
    said = [_sentence(difference, "this run doesn't") for difference in within]
    said += [_sentence(difference, "these runs don't") for difference in comparison.between_runs]
    if said:
        said.append(
            "An interval counts the chance in the questions; another seed, or other data, may give "
            "another difference."
        )
    said += _judged(comparison.rows)
    said += _clustered(comparison.rows)
    if len(comparison.rows) == 1:
        (row,) = comparison.rows
        said.append(f"{row.name} is the only one evaluated: there is nothing to compare it with.")
    return [*said, *comparison.warnings]


def _clustered(rows: Iterable[StageRow]) -> Iterator[str]:
    asked = {_asked(row.result) for row in rows if row.result.num_conversations is not None}
    for each in sorted(asked):
        yield f"There are {each}: intervals and p take a conversation as one."


def _judged(rows: Iterable[StageRow]) -> Iterator[str]:
    for row in rows:
        result, model = row.result, str(row.result.settings.get("judge"))
        if result.num_unclear is not None:
            num, unclear = result.num_questions, result.num_unclear
            yield judge_sentence(row.name, model, result.judge, num, unclear)


def _sentence(difference: Difference, unshown: str) -> str:
    before, after = difference.before, difference.after
    low, high = difference.interval
    head = (
        f"The difference between {before} and {after} is {100 * difference.difference:+.1f} points "
        f"{difference.points()} on {_asked(difference)}: the interval "
    )
    if low <= 0 <= high:
        return f"{head}includes 0, so {unshown} show that {after} answers better or worse."
    if difference.p_holm >= CHANCE:
        return (
            f"{head}is clear of 0, but among so many differences chance alone gives such a one "
            f"(corrected p {difference.p_holm:.3f}), so {unshown} show that {after} answers better "
            "or worse."
        )
    better = "better" if low > 0 else "worse"
    return (
        f"{head}is clear of 0, so on questions like these {after} answers {better} than {before}."
    )


def _asked(asked: Difference | StageResult) -> str:
    conversations = asked.num_conversations
    of = "" if conversations is None else f" of {conversations} conversations"
    return f"{asked.num_questions} questions{of}"


def _difference(before: StageRow, result: StageResult, name: str) -> Difference | None:
    """Pair two results by their questions; None where these aren't the same ones."""
    if before.result.questions_sha256 != result.questions_sha256:
        return None
    old = [question.correct for question in before.result.questions]
    new = [question.correct for question in result.questions]
    difference, low, high = difference_with_interval(old, new, result.rows)
    p = two_sided_p(old, new, result.rows)
    num = result.num_conversations
    return Difference(before.name, name, len(old), difference, (low, high), p, p, num)


def _unpaired(before: StageRow, after: StageRow) -> str:
    return (
        f"{after.name} answered other questions than {before.name}, so they can't be paired: "
        "compare their intervals alone."
    )


def _unlike(rows: Sequence[StageRow]) -> list[str]:
    """Say what rows differ in beside the model."""
    unlike = []
    for key in ("grader", "max_new_tokens", "temperature", "response"):
        values = list(dict.fromkeys(str(row.result.settings.get(key)) for row in rows))
        if len(values) > 1:
            unlike.append(f"The rows differ in {key} too: {', '.join(values)}.")
    return unlike


def _cells(row: StageRow) -> list[str]:
    result, difference = row.result, row.difference
    unstopped, thinking = result.num_never_stopped, result.mean_thinking_length
    return [
        result.stage,
        str(result.num_questions),
        "{:.3f}\n[{:.3f}, {:.3f}]".format(result.acc, *result.acc_interval),
        f"{result.fmt:.3f}",
        f"{row.score:.3f}",
        str(result.num_unparsed),
        "?" if unstopped is None else str(unstopped),
        "-" if thinking is None else f"{thinking:.1f}",
        "" if difference is None else _difference_cell(difference),
    ]


def _difference_cell(difference: Difference) -> str:
    p = "p<0.001" if difference.p < 0.001 else f"p {difference.p:.3f}"
    return f"{100 * difference.difference:+.1f}, {p}\n{difference.points()}"
