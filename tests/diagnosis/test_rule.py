"""The diagnosis's figures and its rule: four recommendations, and the regimes of real tasks."""

from collections.abc import Sequence
from math import sqrt

import pytest
from scipy.stats import ttest_rel

from sftkey.diagnosis.rule import (
    ConditionFigures,
    Outcome,
    figures,
    own_thinking_is_empty,
    recommend,
)

KEY_TOKENS = 10


def rows(right: Sequence[bool], nats: float, parsed: bool = True) -> list[Outcome]:
    """Make a row of each flag; every key has ten tokens, of `nats` each."""
    return [Outcome(flag, parsed or flag, True, nats * KEY_TOKENS, KEY_TOKENS) for flag in right]


def made(
    own: float,
    reference: float,
    none: float,
    *,
    nats: float = 0.1,
    num_rows: int = 400,
    choices: int = 400,
    parsed: bool = True,
) -> ConditionFigures:
    """Make figures of these accuracies.

    What is right without thinking is right after each; choices: answers that are equally frequent.
    """

    def flags(acc: float) -> list[bool]:
        return [number < round(acc * num_rows) for number in range(num_rows)]

    outcomes = {
        "own": rows(flags(own), 3 * nats, parsed),
        "reference": rows(flags(reference), nats),
        "none": rows(flags(none), 5 * nats),
    }
    return figures(outcomes, [str(number % choices) for number in range(num_rows)])


@pytest.mark.parametrize(
    ("given", "kind", "regime"),
    [
        (made(0.60, 0.62, 0.20), "key", "answer-limited"),
        (made(0.60, 0.85, 0.20), "key-own", "thinking-limited"),
        (made(0.30, 0.80, 0.20), "more", "thinking-limited"),
        (made(0.97, 0.975, 0.30), "stop", "wanted"),
        # gsm_symbolic: the answer repeats the reasoning's last number
        (made(0.40, 0.995, 0.05, nats=0.0009), "more", "copied"),
        (made(0.94, 0.97, 0.05, nats=0.0009), "stop", "copied"),
        (made(0.90, 0.99, 0.05), "more", "copied"),
        # products: thinking right in 200 of 200, answers in 1
        (made(0.005, 0.005, 0.0, num_rows=200), "key", "answer-limited"),
        # CREAK after SFT-Tag (two seeds), after the key stage, after SFT twice
        (made(0.545, 0.798, 0.53, choices=2), "more", "thinking-limited"),
        (made(0.528, 0.798, 0.53, choices=2), "more", "thinking-limited"),
        (made(0.583, 0.843, 0.54, choices=2), "more", "thinking-limited"),
        (made(0.503, 0.805, 0.50, choices=2), "more", "thinking-limited"),
        # and after a key stage over its own thinking
        (made(0.500, 0.593, 0.50, choices=2), "more", "thinking-limited"),
        # the thinking limits it somewhat, the answer more
        (made(0.50, 0.60, 0.10), "key", "answer-limited"),
        # a base model, which knows no tags
        (made(0.10, 0.10, 0.10, parsed=False), "more", "form"),
    ],
)
def test_the_rule_tells_the_regimes_apart(given: ConditionFigures, kind: str, regime: str) -> None:
    """Each set of figures gets its recommendation for the right reason."""
    found = recommend(given)
    assert (found.kind, found.regime) == (kind, regime)


def test_swapped_conditions_would_be_told_otherwise() -> None:
    """The rule reads each condition for what it is."""
    assert recommend(made(0.80, 0.30, 0.20)).kind == "key"
    assert recommend(made(0.30, 0.80, 0.20)).kind == "more"
    assert recommend(made(0.60, 0.85, 0.55)).kind == "more"


def test_a_key_stage_says_what_it_can_gain() -> None:
    """The sentence has both accuracies, the interval and the ceiling."""
    found = recommend(made(0.60, 0.62, 0.20))
    assert found.paragraph == (
        "A key stage: Acc is 0.600 after the model's own thinking and 0.620 after the reference's "
        "(+2.0 points [+1.0, +3.9]), so the answer limits it more than the thinking, and a key "
        "stage can gain up to 38.0 points."
    )


def test_a_key_stage_over_own_thinking_says_why() -> None:
    """The sentence has what own thinking carries, and what could be gained."""
    assert recommend(made(0.60, 0.85, 0.20)).paragraph == (
        "A key stage over own thinking: Acc is 0.600 after the model's own thinking and 0.850 "
        "after the reference's (+25.0 points [+21.0, +29.5]), so the thinking limits it; that "
        "thinking carries most of what the reference's gives, and a key that has learned to read "
        "it could gain up to 25.0 points."
    )


def test_empty_thinking_is_warned_of() -> None:
    """CREAK: the paragraph advises against a key stage over own thinking, with the figures."""
    found = recommend(made(0.545, 0.798, 0.53, choices=2))
    assert found.paragraph == (
        "More stage 1 or data: Acc is 0.545 after the model's own thinking and 0.797 after the "
        "reference's (+25.2 points [+21.2, +29.7]), so the thinking limits it, and a key stage "
        "can't give what the thinking lacks, up to 25.2 points. Its own thinking shows no use (Acc "
        "0.545 after it, 0.530 after none, 0.500 by the most frequent answer alone): a key stage "
        "over own thinking would teach the key not to read it."
    )


def test_a_step_that_is_too_hard_is_warned_of() -> None:
    """Three products: a key stage, but the step may be beyond the model."""
    warnings = recommend(made(0.005, 0.005, 0.0, num_rows=200)).warnings
    assert warnings[-1] == (
        "Hardly any answer is right even after the reference thinking: the step from there to the "
        "answer may be too hard; give it more epochs, or ask for an easier one."
    )


def test_copied_answers_stop_or_ask_for_thinking() -> None:
    """Nothing is left for the key to learn; whether the thinking lacks something decides."""
    assert recommend(made(0.94, 0.97, 0.05, nats=0.0009)).paragraph == (
        "Stop: the answer is read off the reference thinking (Acc 0.970, 0.0009 nats a token of "
        "the key), so a key stage has nothing to learn; after its own thinking Acc is 0.940."
    )
    assert recommend(made(0.40, 0.995, 0.05, nats=0.0009)).paragraph == (
        "More stage 1 or data: the answer is read off the reference thinking (Acc 0.995, 0.0009 "
        "nats a token of the key), so a key stage has nothing to learn, and what the model's own "
        "thinking lacks, +59.5 points [+54.6, +64.2], is the thinking's to give."
    )


def test_form_and_what_is_wanted_come_first() -> None:
    """A model without the form isn't judged by its accuracies, a good one isn't trained on."""
    assert recommend(made(0.10, 0.10, 0.10, parsed=False)).paragraph == (
        "More stage 1 or data: 360 of 400 responses have no answer in their form (0 wrong ones "
        "never stopped), so that accuracies don't tell yet whether thinking or answer is at fault."
    )
    assert recommend(made(0.97, 0.975, 0.30)).paragraph == (
        "Stop: 388 of 400 answers are right after the model's own thinking (Acc 0.970), and a "
        "further stage has little left to gain."
    )


def test_few_rows_say_that_they_are_few() -> None:
    """A gap whose interval has room for none and for a large one is told as such."""
    own = [True] * 10 + [False] * 10
    reference = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    outcomes = {
        "own": rows(own, 0.1),
        "reference": rows(reference, 0.1),
        "none": rows([False] * 20, 0.1),
    }
    found = recommend(figures(outcomes, [str(number) for number in range(20)]))
    assert (found.kind, found.warnings) == (
        "key",
        ("The interval allows that the thinking limits it: more rows would tell.",),
    )


@pytest.mark.parametrize(
    ("given", "empty"),
    [
        (made(0.60, 0.85, 0.20), False),
        (made(0.60, 0.85, 0.595), True),  # no more than without thinking
        (made(0.30, 0.85, 0.20, choices=3), True),  # no more than the most frequent answer
        (made(0.583, 0.843, 0.40, choices=2), False),
        (made(0.10, 0.85, 0.20), True),  # worse than none
    ],
)
def test_empty_thinking_is_no_better_than_none_or_chance(
    given: ConditionFigures, empty: bool
) -> None:
    """Own thinking carries something only where Acc(own) lies clear of both."""
    assert own_thinking_is_empty(given) is empty


def test_errors_are_split_and_an_answer_that_is_missing_is_wrong() -> None:
    """Each wrong row has one error; rows without an answer count in Acc, not beside it."""
    own = [
        Outcome(True, True, True, 1.0, 10),
        Outcome(True, True, False, 1.0, 10),  # right, though it went on
        Outcome(False, True, True, 1.0, 10),
        Outcome(False, False, True, None, 10),
        Outcome(False, False, False, None, 10),
    ]
    other = rows([True, True, False, False, True], 0.1)
    found = figures({"own": own, "reference": other, "none": other}, list("aabbc"))
    assert (found.own.acc, found.own.num_right) == (0.4, 2)
    errors = (found.own.num_never_stopped, found.own.num_unparsed, found.own.num_answered_wrong)
    assert errors == (1, 1, 1)
    assert (found.num_unclosed, found.num_unanswered, found.chance) == (2, 2, 0.4)
    assert (found.own.nats, found.own.num_losses) == (pytest.approx(0.1), 3)
    assert found.reference_over_own.acc == pytest.approx(0.2)


def test_losses_are_a_token_and_their_interval_is_paired() -> None:
    """With keys of one length the interval is that of a paired t test; tokens weigh otherwise."""
    before, after = [5.0, 7.0, 9.0, 3.0], [4.0, 7.5, 6.0, 1.0]
    pair = [[Outcome(True, True, True, nats, 10) for nats in each] for each in (before, after)]
    gap = figures({"own": pair[0], "reference": pair[1], "none": pair[0]}, list("abcd"))
    expected = ttest_rel(after, before).confidence_interval(0.95)
    assert gap.reference_over_own.nats_interval == pytest.approx(
        (expected.low / 10, expected.high / 10)
    )
    uneven = [Outcome(True, True, True, 1.0, 1), Outcome(True, True, True, 1.0, 9)]
    found = figures(dict.fromkeys(("own", "reference", "none"), uneven), ["a", "b"])
    assert found.own.nats == pytest.approx(0.2)
    assert found.own_over_none.nats_interval == (0.0, 0.0)


def test_the_interval_of_a_loss_counts_its_tokens() -> None:
    """Rows whose loss a token is the same are certain, however long their keys are."""
    old = [Outcome(True, True, True, 0.2 * tokens, tokens) for tokens in (2, 5, 9)]
    new = [Outcome(True, True, True, 0.1 * tokens, tokens) for tokens in (2, 5, 9)]
    gap = figures({"own": old, "reference": new, "none": old}, list("abc")).reference_over_own
    assert gap.nats == pytest.approx(-0.1)
    assert gap.nats_interval == pytest.approx((-0.1, -0.1))


def test_without_pairs_there_is_no_difference_of_losses() -> None:
    """A model whose own thinking never ends has no loss after it; one pair has no interval."""
    open_ended = [Outcome(False, False, False, None, 10)] * 2
    ended = rows([True, False], 0.1)
    found = figures({"own": open_ended, "reference": ended, "none": ended}, ["a", "b"])
    assert (found.own.nats, found.reference_over_own.nats) == (None, None)
    assert found.reference_over_own.nats_interval is None
    one = rows([True], 0.1)
    single = figures({"own": one, "reference": one, "none": one}, ["a"]).own_over_none
    assert (single.nats, single.nats_interval) == (0.0, None)


def test_a_quarter_of_the_rows_gives_an_interval_twice_as_wide() -> None:
    """The interval follows the number of rows."""
    few, many = made(0.6, 0.8, 0.2, num_rows=100), made(0.6, 0.8, 0.2, num_rows=400)
    widths = [
        high - low for low, high in (each.reference_over_own.acc_interval for each in (few, many))
    ]
    assert widths[0] / widths[1] == pytest.approx(sqrt(4), rel=0.05)
