"""What three ways of answering show, and the recommendation that follows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Literal

from rich.console import Group
from rich.text import Text
from scipy.stats import t as student

from sftkey.evaluation.statement import normalize
from sftkey.evaluation.statistics import gain_text, paired_difference, wilson
from sftkey.tables import FittedTable

# The thinking that stands before the answer, in words.
CONDITIONS = {"own": "its own", "reference": "the reference's", "none": "none"}


@dataclass(frozen=True)
class Outcome:
    """What came of one row in one condition.

    `parsed`: an answer was found, and the grader could read it. `stopped`: the model ended the
    response by itself. `nats` are the loss of the reference's key of `num_tokens` after this
    thinking, None where the thinking never ended.
    """

    right: bool
    parsed: bool
    stopped: bool
    nats: float | None
    num_tokens: int


@dataclass(frozen=True)
class Condition:
    """All rows in one condition: Acc, the wrong ones by their error, loss of the reference's key.

    `nats` are a token of the key, over the `num_losses` rows whose thinking ended.
    """

    acc: float
    acc_interval: tuple[float, float]
    num_right: int
    num_never_stopped: int
    num_unparsed: int
    num_answered_wrong: int
    nats: float | None
    num_losses: int


@dataclass(frozen=True)
class Gap:
    """How far two conditions lie apart on the same rows: shares, and nats a token of the key."""

    acc: float
    acc_interval: tuple[float, float]
    nats: float | None
    nats_interval: tuple[float, float] | None

    @property
    def points(self) -> str:
        """Return the difference of the shares in percentage points, with its interval."""
        return gain_text(self.acc, self.acc_interval)


@dataclass(frozen=True)
class ConditionFigures:
    """What a diagnosis stands on: three conditions, and the differences between them.

    `chance` is the share of the most frequent answer, which needs no question. After their own
    thinking `num_unclosed` rows never ended it, and `num_unanswered` have no answer, right or
    wrong.
    """

    num_rows: int
    chance: float
    num_unclosed: int
    num_unanswered: int
    own: Condition
    reference: Condition
    none: Condition
    reference_over_own: Gap
    own_over_none: Gap
    reference_over_none: Gap


def figures(outcomes: Mapping[str, Sequence[Outcome]], answers: Sequence[str]) -> ConditionFigures:
    """Count what came of the rows, the same in each condition; `answers` are the references."""
    own, reference, none = (outcomes[name] for name in CONDITIONS)
    most = Counter(normalize(answer) for answer in answers).most_common(1)
    return ConditionFigures(
        num_rows=len(answers),
        chance=most[0][1] / len(answers) if most else 0.0,
        num_unclosed=sum(row.nats is None for row in own),
        num_unanswered=sum(not row.parsed for row in own),
        own=_condition(own),
        reference=_condition(reference),
        none=_condition(none),
        reference_over_own=_gap(own, reference),
        own_over_none=_gap(none, own),
        reference_over_none=_gap(none, reference),
    )


def _condition(rows: Sequence[Outcome]) -> Condition:
    """Count one condition; a row that has no answer is wrong, and each error counts once."""
    wrong = [row for row in rows if not row.right]
    unparsed = [row for row in wrong if row.stopped and not row.parsed]
    unstopped = [row for row in wrong if not row.stopped]
    num_right = len(rows) - len(wrong)
    losses = [(row.nats, row.num_tokens) for row in rows if row.nats is not None]
    num_tokens = sum(tokens for _, tokens in losses)
    return Condition(
        acc=num_right / max(len(rows), 1),
        acc_interval=wilson(num_right, len(rows)),
        num_right=num_right,
        num_never_stopped=len(unstopped),
        num_unparsed=len(unparsed),
        num_answered_wrong=len(wrong) - len(unparsed) - len(unstopped),
        nats=sum(nats for nats, _ in losses) / num_tokens if num_tokens else None,
        num_losses=len(losses),
    )


def _gap(before: Sequence[Outcome], after: Sequence[Outcome]) -> Gap:
    """Pair two conditions row by row."""
    acc, low, high = paired_difference([row.right for row in before], [row.right for row in after])
    pairs = [
        (old.nats, old.num_tokens, new.nats, new.num_tokens)
        for old, new in zip(before, after, strict=True)
        if old.nats is not None and new.nats is not None
    ]
    return Gap(acc, (low, high), *_nats_gap(pairs))


def _nats_gap(
    pairs: Sequence[tuple[float, int, float, int]],
) -> tuple[float | None, tuple[float, float] | None]:
    """Return a difference of losses a token over pairs of rows, with a 95% t interval.

    Losses a token are ratios of two sums, so each row counts with its residuals from them
    (linearization: Cochran 1977, Sampling Techniques, section 6.4). Of each row `pairs` has nats
    and tokens before, and after.
    """
    if not pairs:
        return None, None
    size = len(pairs)
    old_tokens, new_tokens = sum(pair[1] for pair in pairs), sum(pair[3] for pair in pairs)
    old, new = sum(pair[0] for pair in pairs) / old_tokens, sum(p[2] for p in pairs) / new_tokens
    if size == 1:
        return new - old, None
    residuals = [
        size * ((pair[2] - new * pair[3]) / new_tokens - (pair[0] - old * pair[1]) / old_tokens)
        for pair in pairs
    ]
    error = sqrt(sum(value**2 for value in residuals) / (size - 1) / size)
    width = float(student.ppf(0.975, size - 1)) * error
    return new - old, (new - old - width, new - old + width)


MOST_UNANSWERED = 0.2  # above this share of own responses without an answer, form comes first
WANTED_ACC = 0.95  # nobody trains on for the rest
COPIED_ACC = 0.98  # from here on the answer is read off the reference thinking,
COPIED_NATS = 0.005  # or below this loss a token of its key
NEAR = 0.05  # so close to Acc(reference), Acc(own) isn't limited by the thinking
CARRIED = 0.5  # of what the reference thinking gives: carrying less, own thinking is far below it
FLOOR_ACC = 0.05  # below it hardly any answer is right even after the reference thinking

Kind = Literal["key", "key-own", "more", "stop"]
Regime = Literal["form", "wanted", "copied", "thinking-limited", "answer-limited"]


@dataclass(frozen=True)
class Recommendation:
    """What to do next, in one sentence with the figures that say so.

    `warnings` are sentences on what stands in the way.
    """

    kind: Kind
    regime: Regime
    sentence: str
    warnings: tuple[str, ...] = ()

    @property
    def paragraph(self) -> str:
        """Return all of it as one text."""
        return " ".join((self.sentence, *self.warnings))


def own_thinking_is_empty(figures: ConditionFigures) -> bool:
    """Tell whether the model's own thinking shows no use for its answers.

    Acc(own) doesn't lie clear of Acc(none), or of what the most frequent answer alone would have.
    A key stage over such thinking teaches the key not to read it.
    """
    return figures.own_over_none.acc_interval[0] <= 0 or (
        figures.own.acc_interval[0] <= figures.chance
    )


def recommend(figures: ConditionFigures) -> Recommendation:
    """Say what the figures speak for: one rule, the first case that holds.

    - Form: too many responses have no answer: stage 1 first.
    - Wanted: what is left isn't worth a stage.
    - Copied: the answer is read off the reference thinking, so a key stage has nothing to learn.
    - Answer-limited: Acc(own) is near Acc(reference): where a key stage should pay.
    - Thinking-limited: Acc(own) lies below. Far below, or where own thinking carries nothing, a key
      stage can't give what the thinking lacks. Else the larger of the two possible gains counts.
    """
    own, reference, gap = figures.own.acc, figures.reference.acc, figures.reference_over_own
    near = gap.acc <= NEAR or gap.acc_interval[0] <= 0
    nats = figures.reference.nats
    copied = reference >= COPIED_ACC or (nats is not None and nats <= COPIED_NATS)
    carries = not own_thinking_is_empty(figures) and (
        figures.own_over_none.acc >= CARRIED * figures.reference_over_none.acc
    )
    if figures.num_unanswered > MOST_UNANSWERED * figures.num_rows:
        what = (
            f"More stage 1 or data: {figures.num_unanswered} of {figures.num_rows} responses have "
            f"no answer in their form ({figures.own.num_never_stopped} wrong ones never stopped), "
            "so that accuracies don't tell yet whether thinking or answer is at fault."
        )
        return Recommendation("more", "form", what)
    if own >= WANTED_ACC:
        what = (
            f"Stop: {figures.own.num_right} of {figures.num_rows} answers are right after the "
            f"model's own thinking (Acc {own:.3f}), and a further stage has little left to gain."
        )
        return Recommendation("stop", "wanted", what)
    if copied:
        return _copied(figures, near)
    if near or (carries and 1 - reference > gap.acc):
        return _answer_limited(figures, near)
    return _thinking_limited(figures, carries)


def _copied(figures: ConditionFigures, near: bool) -> Recommendation:
    reference = figures.reference
    read_off = (
        f"the answer is read off the reference thinking (Acc {reference.acc:.3f}, "
        f"{reference.nats or 0:.4f} nats a token of the key), so a key stage has nothing to learn"
    )
    if near:
        what = f"Stop: {read_off}; after its own thinking Acc is {figures.own.acc:.3f}."
        return Recommendation("stop", "copied", what)
    what = (
        f"More stage 1 or data: {read_off}, and what the model's own thinking lacks, "
        f"{figures.reference_over_own.points}, is the thinking's to give."
    )
    return Recommendation("more", "copied", what, _warnings(figures))


def _answer_limited(figures: ConditionFigures, near: bool) -> Recommendation:
    what = (
        f"A key stage: {_both(figures)}, so the answer limits it more than the thinking, and a key "
        f"stage can gain up to {100 * (1 - figures.reference.acc):.1f} points."
    )
    warnings = _warnings(figures)
    if figures.reference.acc < FLOOR_ACC:
        warnings += (
            "Hardly any answer is right even after the reference thinking: the step from there to "
            "the answer may be too hard; give it more epochs, or ask for an easier one.",
        )
    if near and figures.reference_over_own.acc > NEAR:
        warnings += ("The interval allows that the thinking limits it: more rows would tell.",)
    return Recommendation("key", "answer-limited", what, warnings)


def _thinking_limited(figures: ConditionFigures, carries: bool) -> Recommendation:
    gain = f"{100 * figures.reference_over_own.acc:.1f} points"
    limited = f"{_both(figures)}, so the thinking limits it"
    if carries:
        what = (
            f"A key stage over own thinking: {limited}; that thinking carries most of what the "
            f"reference's gives, and a key that has learned to read it could gain up to {gain}."
        )
        return Recommendation("key-own", "thinking-limited", what)
    what = (
        f"More stage 1 or data: {limited}, and a key stage can't give what the thinking lacks, up "
        f"to {gain}."
    )
    return Recommendation("more", "thinking-limited", what, _warnings(figures))


def _both(figures: ConditionFigures) -> str:
    return (
        f"Acc is {figures.own.acc:.3f} after the model's own thinking and "
        f"{figures.reference.acc:.3f} after the reference's ({figures.reference_over_own.points})"
    )


def _warnings(figures: ConditionFigures) -> tuple[str, ...]:
    if not own_thinking_is_empty(figures):
        return ()
    return (
        f"Its own thinking shows no use (Acc {figures.own.acc:.3f} after it, "
        f"{figures.none.acc:.3f} after none, {figures.chance:.3f} by the most frequent answer "
        "alone): a key stage over own thinking would teach the key not to read it.",
    )


DIFFERENCES = {
    "reference_over_own": "reference's - own",
    "own_over_none": "own - none",
    "reference_over_none": "reference's - none",
}


def as_json(figures: ConditionFigures, recommendation: Recommendation) -> dict[str, Any]:
    """Return a diagnosis as plain data; shares and differences run from -1 to 1."""
    plain = asdict(figures)
    conditions = {name: plain.pop(name) for name in CONDITIONS}
    differences = {name: plain.pop(name) for name in DIFFERENCES}
    return {
        **plain,
        "conditions": conditions,
        "differences": differences,
        "own_thinking_is_empty": own_thinking_is_empty(figures),
        "recommendation": asdict(recommendation),
    }


def render(figures: ConditionFigures, recommendation: Recommendation) -> Group:
    """Return both tables and the paragraph, for a rich console."""
    lines = [Text()]
    if figures.num_unclosed:
        what = f"{figures.num_unclosed} of {figures.num_rows} own thinkings never ended"
        lines.append(Text(f"{what}: after them the key has no loss.\n"))
    lines.append(Text(recommendation.paragraph))
    return Group(_conditions(figures), Text(), _differences(figures), *lines)


def _conditions(figures: ConditionFigures) -> FittedTable:
    headers = ["right", "Acc\n[95%]", "never\nstopped", "un-\nparsed", "answered\nwrong"]
    grid = FittedTable("after the\nthinking", [*headers, "key loss,\nnats a token"])
    for name, thinking in CONDITIONS.items():
        found: Condition = getattr(figures, name)
        counts = (found.num_never_stopped, found.num_unparsed, found.num_answered_wrong)
        right = f"{found.num_right} of {figures.num_rows}"
        acc = "{:.3f}\n[{:.3f}, {:.3f}]".format(found.acc, *found.acc_interval)
        nats = "-" if found.nats is None else f"{found.nats:.4f}"
        grid.add([thinking, right, acc, *map(str, counts), nats])
    return grid


def _differences(figures: ConditionFigures) -> FittedTable:
    grid = FittedTable("difference", ["points [95%]", "nats a token [95%]"])
    for name, words in DIFFERENCES.items():
        gap: Gap = getattr(figures, name)
        grid.add([words, gap.points.replace(" points", ""), _nats(gap)])
    return grid


def _nats(gap: Gap) -> str:
    if gap.nats is None:
        return "-"
    if gap.nats_interval is None:
        return f"{gap.nats:+.4f}"
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(gap.nats, *gap.nats_interval)
