"""What limits a model's answers, and what could mend that: one rule over the three conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftkey.evaluation.conditions import Figures

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
        """Give all of it as one text."""
        return " ".join((self.sentence, *self.warnings))


def own_thinking_is_empty(figures: Figures) -> bool:
    """Tell whether the model's own thinking shows no use for its answers.

    Acc(own) doesn't lie clear of Acc(none), or of what the most frequent answer alone would have.
    A key stage over such thinking teaches the key not to read it.
    """
    return figures.own_over_none.acc_interval[0] <= 0 or (
        figures.own.acc_interval[0] <= figures.chance
    )


def recommend(figures: Figures) -> Recommendation:
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
        return _form(figures)
    if own >= WANTED_ACC:
        return _wanted(figures)
    if copied:
        return _copied(figures, near)
    if near or (carries and 1 - reference > gap.acc):
        return _answer_limited(figures, near)
    return _thinking_limited(figures, carries)


def _form(figures: Figures) -> Recommendation:
    own = figures.own
    what = (
        f"More stage 1 or data: {figures.num_unanswered} of {figures.num_rows} responses have no "
        f"answer in their form ({own.num_never_stopped} wrong ones never stopped), so that "
        "accuracies don't tell yet whether thinking or answer is at fault."
    )
    return Recommendation("more", "form", what)


def _wanted(figures: Figures) -> Recommendation:
    what = (
        f"Stop: {figures.own.num_right} of {figures.num_rows} answers are right after the model's "
        f"own thinking (Acc {figures.own.acc:.3f}), and a further stage has little left to gain."
    )
    return Recommendation("stop", "wanted", what)


def _copied(figures: Figures, near: bool) -> Recommendation:
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


def _answer_limited(figures: Figures, near: bool) -> Recommendation:
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


def _thinking_limited(figures: Figures, carries: bool) -> Recommendation:
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


def _both(figures: Figures) -> str:
    return (
        f"Acc is {figures.own.acc:.3f} after the model's own thinking and "
        f"{figures.reference.acc:.3f} after the reference's ({figures.reference_over_own.points})"
    )


def _warnings(figures: Figures) -> tuple[str, ...]:
    if not own_thinking_is_empty(figures):
        return ()
    return (
        f"Its own thinking shows no use (Acc {figures.own.acc:.3f} after it, "
        f"{figures.none.acc:.3f} after none, {figures.chance:.3f} by the most frequent answer "
        "alone): a key stage over own thinking would teach the key not to read it.",
    )
