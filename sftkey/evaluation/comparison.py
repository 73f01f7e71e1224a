"""Stages, and runs, compared on the questions that they share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from sftkey.evaluation.judge import judge_sentence
from sftkey.evaluation.results import StageResult, read_results
from sftkey.evaluation.stage import ThinkingChange, thinking_change, thinking_table
from sftkey.evaluation.statistics import (
    CHANCE,
    difference_with_interval,
    gain_text,
    holm,
    p_text,
    points_text,
    score_of,
    two_sided_p,
)
from sftkey.evaluation.thinking import form_table
from sftkey.tables import FittedTable

MOST_UNREAD = 0.05  # of the base's answers: with more, a difference may be that of the tags alone


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
        return score_of(self.result.acc, self.result.fmt, self.alpha)


@dataclass(frozen=True)
class Comparison:
    """All rows, the differences between the last stages of runs, and what stands in the way."""

    rows: tuple[StageRow, ...]
    between_runs: tuple[Difference, ...]
    warnings: tuple[str, ...]


def compare(runs: Mapping[str, Sequence[StageResult]], alpha: float | None = None) -> Comparison:
    """Lay the stages of runs side by side.

    `alpha` is the weight of Acc in Score; by default each result's own.
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
    found = {str(place): each for place, each in enumerate(differences)}
    ps = holm({place: each.p for place, each in found.items() if each})
    return [each and replace(each, p_holm=ps[place]) for place, each in found.items()]


def compare_runs(folders: Iterable[Path], alpha: float | None = None) -> Comparison:
    """Compare run folders."""
    return compare({str(folder): read_results(folder) for folder in folders}, alpha)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data; differences and shares run from -1 to 1."""
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
    """Return the tables and their sentences, for a rich console."""
    rows = [(row.name, row.result, row.thinking) for row in comparison.rows]
    told = any(result.num_thinking_judged is not None for _, result, _ in rows)
    second: list[FittedTable | Text] = [Text(), thinking_table(rows), Text()] if told else []
    forms = form_table((name, result.rates, change.valid) for name, result, change in rows)
    second += [] if forms is None else [*([] if second else [Text()]), forms, Text()]
    return Group(table(comparison), *second, *map(Text, sentences(comparison)))


def table(comparison: Comparison) -> FittedTable:
    """Return the table: a row for each stage, intervals below their figures."""
    several = len({row.run for row in comparison.rows}) > 1
    units = {row.result.thinking_unit for row in comparison.rows}
    unit = "tokens" if units == {"tokens"} else "chars"
    headers = ["n", "Acc\n[95%]", "Fmt", "Score", "un-\nparsed", "never\nstopped"]
    headers += [f"think.\n{unit}", "points more, p\n[95%]"]
    grid = FittedTable("run, stage" if several else "stage", headers)
    for row in comparison.rows:
        result, gain = row.result, ""
        unstopped, thinking = result.num_never_stopped, result.mean_thinking_length
        if found := row.difference:
            points = f"{100 * found.difference:+.1f}, {p_text(found.p)}"
            gain = f"{points}\n{points_text(found.interval)}"
        cells = [
            row.name,
            str(result.num_questions),
            "{:.3f}\n[{:.3f}, {:.3f}]".format(result.acc, *result.acc_interval),
            f"{result.fmt:.3f}",
            f"{row.score:.3f}",
            str(result.num_unparsed),
            "?" if unstopped is None else str(unstopped),
            "-" if thinking is None else f"{thinking:.1f}",
            gain,
        ]
        grid.add(cells)
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
    rows = comparison.rows
    for about in (_untagged, _passed, _judged):
        said += about(rows)
    clustered = {_asked(row.result) for row in rows if row.result.num_conversations is not None}
    for asked in sorted(clustered):
        said.append(f"There are {asked}: intervals and p take a conversation as one.")
    if len(rows) == 1:
        name = rows[0].name
        said.append(f"{name} is the only one evaluated: there is nothing to compare it with.")
    return [*said, *comparison.warnings]


def _passed(rows: Iterable[StageRow]) -> Iterator[str]:
    """Say the difference in Rpass@1 where it isn't the one in Acc."""
    for row in rows:
        passed, answers = row.thinking.passed, row.difference
        if passed and answers and passed.interval != answers.interval:
            yield (
                f"Right behind a valid thinking (Rpass@1) is {row.name} against {answers.before}: "
                f"{passed.text()}."
            )


def _judged(rows: Iterable[StageRow]) -> Iterator[str]:
    for row in rows:
        result = row.result
        if result.num_unclear is not None:
            model, num = str(result.settings.get("judge")), result.num_questions
            yield judge_sentence(row.name, model, result.judge, num, result.num_unclear)


def _sentence(difference: Difference, unshown: str) -> str:
    before, after = difference.before, difference.after
    low, high = difference.interval
    neither = f"so {unshown} show that {after} answers better or worse."
    if low <= 0 <= high:
        interval = f"includes 0, {neither}"
    elif difference.p_holm >= CHANCE:
        interval = "is clear of 0, but among so many differences chance alone gives such a one "
        interval += f"(corrected p {difference.p_holm:.3f}), {neither}"
    else:
        better = f"{after} answers {'better' if low > 0 else 'worse'} than {before}"
        interval = f"is clear of 0, so on questions like these {better}."
    return (
        f"The difference between {before} and {after} is "
        f"{gain_text(difference.difference, difference.interval)} on {_asked(difference)}: the "
        f"interval {interval}"
    )


def _asked(asked: Difference | StageResult) -> str:
    count = asked.num_conversations
    return f"{asked.num_questions} questions" + (f" of {count} conversations" if count else "")


def _difference(before: StageRow, result: StageResult, name: str) -> Difference | None:
    """Pair two results by their questions; None where these aren't the same ones, or aren't read.

    An answer that the base wrote without the tags counts as it reads.
    """
    if before.result.questions_sha256 != result.questions_sha256:
        return None
    if _mostly_unread(before.result) or _mostly_unread(result):
        return None
    old = [question.likely_right for question in before.result.questions]
    new = [question.likely_right for question in result.questions]
    gain, low, high = difference_with_interval(old, new, result.rows)
    p, num = two_sided_p(old, new, result.rows), result.num_conversations
    return Difference(before.name, name, len(old), gain, (low, high), p, p, num)


def _mostly_unread(result: StageResult) -> bool:
    unread = [question.untagged == "unread" for question in result.questions]
    return sum(unread) > MOST_UNREAD * len(unread)


def _untagged(rows: Iterable[StageRow]) -> Iterator[str]:
    """Say how the base's answers without tags were read."""
    for row in rows:
        read = [each.untagged for each in row.result.questions if each.untagged]
        if read:
            counted = "" if _mostly_unread(row.result) else "; differences count these"
            yield (
                f"{row.name} wrote {len(read)} of {row.result.num_questions} answers without the "
                f"tags: read without them, {read.count('right')} are "
                f"right and {read.count('unread')} can't be read{counted}."
            )


def _unpaired(before: StageRow, after: StageRow) -> str:
    for row, other in ((before, after), (after, before)):
        if _mostly_unread(row.result):
            return (
                f"What {other.name} has more right than {row.name} may be its tags alone, so there "
                "is no difference and no p."
            )
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
