"""Thinkings: which are right, which are the same, and what a stage did to them."""

import doctest
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sftkey.evaluation.thinking as module
from sftkey.data.response import Example, QuestionKey, Response
from sftkey.evaluation.results import StageResult
from sftkey.evaluation.stage import ThinkingChange, Turned, thinking_change
from sftkey.evaluation.thinking import judge_thinkings, thinking_hash
from sftkey.generation.generate import Generation
from tests.evaluation.test_grading import PIECES
from tests.support.scoring import scored
from tests.support.timing import takes_linear_time

RESPONSE = Response("<T>", "</T>", "<A>", "</A>")
CHAIN = Example("4 + 3 - 2 =", "4 + 3 = 7\n7 - 2", "5", 0)
PRODUCTS = Example("Legs?", "3 cows: 3 x 4 = 12\n12 hens: 12 x 14 = 168", "180", 0)
ORDERS = Example("The dearest?", "3 kites: 12\n4 lamps: 16", "lamps", 0)
WORDS = Example("Spell cat backwards.", "c a t", "tac", 0)
GSM8K = Example(
    "Clips?", "She sold 48/2 = 24 clips in May.\nThat is 48+24 = 72 in 2 months.", "72", 0
)


def judged(
    written: str | None, example: Example, grader: str = "number", made: bool = False
) -> bool | None:
    """Judge one thinking."""
    (right,) = judge_thinkings([written], [example], grader, made)
    return right


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module) == (0, 9)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (CHAIN.thinking, True),
        ("  4+3=7 \n\n7  -  2", True),
        ("First 4 + 3 = 7. Then 7 − 2 = 5.", True),  # noqa: RUF001
        ("4 + 3 = 8\n4 + 3 = 7\n7 - 2", True),  # mended on the way
        ("4 + 3 = 8\n8 - 2", False),
        ("4 + 3 = 7\n7 + 2", False),
        ("4 + 3 = 7\n7 - 12", False),
        ("4 + 3 = 7\n7 - 2 - 1", False),
        ("4 + 3 = 7\n7 - 2\n5 + 9", False),
        ("7 - 2\n4 + 3 = 7", False),
        ("4 + 3 = 7", False),
        ("7 - 2", False),
        ("5", False),
        ("", False),
        (None, False),
    ],
)
def test_steps_before_the_answer_stand_in_order(written: str | None, right: bool) -> None:
    """The demo's thinking stops before the answer: its steps count, and the last ends it."""
    assert judged(written, CHAIN) is right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("3 cows: 3 × 4 = 12\n12 hens: 12 * 14 = 168.0", True),  # noqa: RUF001
        ("- 3 cows: 3 \\times 4 = 12; 12 hens: 12x14 = 168", True),
        ("3 cows: 3 x 4 = 12\n12 hens: 12 x 14 = 158", False),
        ("3 cows: 3 x 4 = 12\n12 hens: 12 x 41 = 168", False),
        ("3 cows: 12 hens: 14 x 12 = 168", False),
    ],
)
def test_products_written_out_are_steps(written: str, right: bool) -> None:
    """Every product and its result stands there, whatever sign means times."""
    assert judged(written, PRODUCTS) is right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("24 * 3 = 72", True),
        ("She sold 24 fewer, so 72 in all", True),
        ("She sold 24. 24 + 48 = $72.00 in both of the 2 months", True),
        ("48 + 24 = 71", False),
        ("72 and then 24", False),
        ("no number", False),
        (None, False),
    ],
)
def test_a_thinking_that_arrives_at_the_answer_may_take_its_own_way(
    written: str | None, right: bool
) -> None:
    """Where the references end in the answers, as GSM8K's do, the result alone counts."""
    assert judged(written, GSM8K) is right


def test_what_kind_of_task_it_is_all_references_say() -> None:
    """One reference that ends in its answer by chance doesn't make a task of such."""
    chance = Example("10 - 5 =", "6 + 4 = 10\n10 - 5", "5", 1)
    assert judged("9 - 5", chance) is True
    assert judge_thinkings(["9 - 5"] * 2, [chance, CHAIN], "number") == [False, False]


@given(st.text(st.sampled_from("0123456789 .,-+*/^=aA\n½²፩٣")))
@example("7" * 5000)
@example("7" * 5000 + " = " + "7" * 5000)
@pytest.mark.fault("texts that take long to read")
def test_no_thinking_is_an_error(text: str) -> None:
    """One of more digits than Python reads as a number is wrong, as any other wrong one is."""
    for reference in (CHAIN, GSM8K):
        assert judged(text, reference) in (True, False)
    assert judged(f"{text}\nc a t", WORDS, "exact", made=True)
    assert judged("7" * 5000, Example("", "7" * 5000, "5"))


@pytest.mark.parametrize("reference", [CHAIN, GSM8K, WORDS])
@pytest.mark.fault("texts that take long to read")
def test_judging_takes_linear_time(reference: Example) -> None:
    """Four times the length takes four times as long, whatever a model repeats."""

    def judge(length: int, piece: str) -> None:
        judged(piece * (length // len(piece)), reference, made=reference is WORDS)

    for piece in [*PIECES, "4 + 3 = 7\n", "c a ", "½", "= 7 "]:
        assert takes_linear_time(partial(judge, piece=piece), length=2_000), piece


@pytest.mark.parametrize("grader", ["choice", "exact", "math"])
def test_what_no_rule_can_say_is_none(grader: str) -> None:
    """Free thinkings may be right in other words; an empty reference says nothing."""
    assert judged(ORDERS.thinking, ORDERS, grader) is None
    assert judged(None, ORDERS, grader) is None
    assert judged("so", Example("2?", " ", "2", 0), "number", made=True) is None
    assert judged("so", Example("2?", "in words", "2", 0), "number") is None


@pytest.mark.parametrize(
    ("written", "example", "right"),
    [
        ("3 Kites: 12,  4 lamps: 16.", ORDERS, True),
        ("3 kites: 12\n4 jars: 16", ORDERS, False),
        ("3 kites: 14\n4 lamps: 16", ORDERS, False),
        ("c a t", WORDS, True),
        ("c e t", WORDS, False),
        (None, WORDS, False),
    ],
)
def test_made_thinkings_are_judged_whatever_the_grader(
    written: str | None, example: Example, right: bool
) -> None:
    """Where answers are words, the words of the steps count too."""
    assert judged(written, example, "exact", made=True) is right


def test_hashes_are_equal_up_to_the_first_closing_tag() -> None:
    """What follows the thinking doesn't matter; a thinking that never ends is all of its text."""
    one = thinking_hash("<T>a</T><A>1</A>", RESPONSE)
    assert len(one) == 16
    assert one == thinking_hash(" <T>a</T><A>2</A></T>", RESPONSE)
    assert one != thinking_hash("<T>b</T><A>1</A>", RESPONSE)
    assert thinking_hash("<T>a", RESPONSE) != thinking_hash("<T>a b", RESPONSE)
    bare = Response("", "", "Answer: ", "")
    assert thinking_hash("a\nAnswer: 1", bare) == thinking_hash("a\nAnswer: 2", bare)
    assert thinking_hash("a 1", Response("", "", "", "")) != thinking_hash(
        "a 2", Response("", "", "", "")
    )


def result(
    stage: str,
    right: set[int],
    changed: set[int] = frozenset(),
    **more: Any,  # type: ignore[assignment]
) -> StageResult:
    """Make a stage of 40 questions whose thinkings are right in a set, some of them reworded."""
    examples = [Example(f"{n} + 1 =", f"{n} + 1 = {n + 1}\n{n + 1} + 2", "0", n) for n in range(40)]
    texts = [
        ("So " if n in changed else "") + (f"{n} + 1 = {n + 1}\n{n + 1} + 2" if n in right else "?")
        for n in range(40)
    ]
    return scored(
        {QuestionKey(n): Generation(RESPONSE.render(text, "0")) for n, text in enumerate(texts)},
        examples,
        RESPONSE,
        stage=stage,
        position=1,
        **more,
    )


def test_a_change_is_paired_question_by_question() -> None:
    """Identical, turned wrong and turned right are counted where they happened."""
    before, after = result("one", set(range(20))), result("two", set(range(4, 22)), {5, 6})
    change = thinking_change(before, after)
    # 0-3 turned wrong, 20 and 21 right, 5 and 6 are reworded: the other 32 are the same.
    assert (change.num_questions, change.num_identical) == (40, 32)
    assert change.turned == Turned(40, 20, 18, 4, 2, pytest.approx(22 / 64))
    assert change.line() == (
        "two: thinking against one: 32 of 40 identical, mean length 8.8 -> 8.4 tokens, "
        "right 20 -> 18 of 40 (4 right ones turned wrong, 2 wrong right)"
    )
    assert change.warnings() == []
    same = thinking_change(before, before)
    assert (same.num_identical, same.turned) == (40, Turned(40, 20, 20, 0, 0, 1.0))


@pytest.mark.parametrize(("wrong", "warned"), [(4, False), (5, True)])
def test_more_turned_wrong_than_by_chance_is_harm(wrong: int, warned: bool) -> None:
    """Four of four might be chance (1/16), five of five are not (1/32); two-sided p says no yet."""
    before, after = result("one", set(range(20))), result("two", set(range(wrong, 20)))
    change = thinking_change(before, after)
    assert bool(change.warnings()) is warned
    if warned:
        assert change.warnings() == [
            "two harmed the thinking: 5 right ones turned wrong, 0 wrong right (one-sided "
            "p 0.031). In a key stage `loss_on: {thinking: 0.1, key: 1.0}` holds the thinking, "
            "and `context: frozen` can't change it."
        ]


def test_more_turned_right_than_wrong_is_no_harm() -> None:
    """A stage that made the thinking better is left in peace, however sure it is."""
    change = thinking_change(result("one", set(range(5))), result("two", set(range(40))))
    assert change.turned is not None
    assert (change.turned.p, change.warnings()) == (1.0, [])


@pytest.mark.parametrize(
    ("end", "warned"), [(0.519, False), (0.521, True), (0.6, True), (0.3, False)]
)
def test_a_loss_that_rose_by_more_than_two_hundredths_is_harm(end: float, warned: bool) -> None:
    """It needs no generations, and is said with the remedy."""
    change = ThinkingChange("key", (0.5, end))
    assert change.line() == f"key: thinking: validation loss 0.5000 -> {end:.4f}"
    assert change.warnings() == (
        [
            f"key harmed the thinking: its validation loss rose by {end - 0.5:.4f} nats a token "
            "(more than 0.02). In a key stage `loss_on: {thinking: 0.1, key: 1.0}` holds the "
            "thinking, and `context: frozen` can't change it."
        ]
        if warned
        else []
    )


def test_results_from_before_there_were_such_figures_leave_them_open() -> None:
    """An old result has neither hashes nor judgements: its stage's successor says what it can."""
    new = result("two", set(range(20)), thinking_loss=(0.5, 0.5))
    old = result("one", set(range(20))).model_dump()
    for name in ("num_thinking_judged", "num_thinking_right", "thinking_loss"):
        del old[name]
    for question in old["questions"]:
        del question["thinking_right"], question["thinking_hash"]
    change = thinking_change(StageResult.model_validate(old), new)
    assert (change.num_identical, change.turned) == (None, None)
    assert change.line() == (
        "two: thinking against one: mean length 8.8 -> 8.8 tokens, validation loss 0.5000 -> 0.5000"
    )


def test_other_questions_are_not_paired() -> None:
    """Without a stage before on the same questions the losses alone are told."""
    one, two = result("one", {1}), result("two", {1}, thinking_loss=(0.5, 0.6))
    other = one.model_copy(update={"questions_sha256": "another"})
    alone = ThinkingChange("two", (0.5, 0.6))
    assert thinking_change(other, two) == thinking_change(None, two) == alone
    assert ThinkingChange("two").line() == "two: thinking: nothing is known"
