"""What came of the same questions after three thinkings: the model's own, the reference's, none.

What a key stage over the reference thinking can gain at most is 1 - Acc(reference); what better
thinking, or a key stage over the model's own, could gain is Acc(reference) - Acc(own).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import t as student

from sftkey.evaluation.grading import normalize
from sftkey.evaluation.statistics import paired_difference, wilson

CONDITIONS = ("own", "reference", "none")  # the thinking that stands before the answer


@dataclass(frozen=True)
class Outcome:
    """What came of one row in one condition.

    Args:
        right: Whether the answer is.
        parsed: An answer was found.
        stopped: The model ended the response by itself.
        nats: Loss of the reference's key after this thinking; None where the thinking never ended.
        num_tokens: Of that key.
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
        """Give the difference of the shares in percentage points, with its interval."""
        low, high = self.acc_interval
        return f"{100 * self.acc:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


@dataclass(frozen=True)
class Figures:
    """What a diagnosis stands on.

    Args:
        num_rows: Asked in each condition.
        chance: Share of the most frequent answer, which needs no question.
        num_unclosed: Rows whose own thinking never ended.
        num_unanswered: Rows without an answer after their own thinking, right or wrong.
        own: After the model's own thinking.
        reference: After the data's thinking.
        none: After empty tags.
        reference_over_own: The three differences.
        own_over_none: As above.
        reference_over_none: As above.
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


def figures(outcomes: Mapping[str, Sequence[Outcome]], answers: Sequence[str]) -> Figures:
    """Count what came of the rows.

    Args:
        outcomes: By condition, each with the same rows in the same order.
        answers: The references.
    """
    own, reference, none = (outcomes[name] for name in CONDITIONS)
    most = Counter(normalize(answer) for answer in answers).most_common(1)
    return Figures(
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
    """Give a difference of losses a token over pairs of rows, with a 95% t interval.

    Losses a token are ratios of two sums, so each row counts with its residuals from them
    (linearization: Cochran 1977, Sampling Techniques, section 6.4).

    Args:
        pairs: Nats and tokens of a row before, and after.
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
