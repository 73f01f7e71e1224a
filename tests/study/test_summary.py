"""From finished cells to a study's results: each arm's figures, by hand."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance
from typing import Any

import pytest

from sftkey.errors import RunError
from sftkey.study.report import report
from sftkey.study.results import ArmFigures, DifferenceToControl, FinishedCell, StudyResults
from sftkey.study.seeds import (
    detectable_difference,
    difference_p,
    estimate,
)
from sftkey.study.summary import summarize, supposed_of
from tests.support.cells import COMMAND, COMMIT, HARDWARE, answered, cell, made_cells, made_flags

Z = 1.959964
Cell = dict[str, Any]


def summed(cells: Sequence[Cell], control: str = "sft_tag", order: Sequence[str] = ()) -> Any:
    """Summarize made cells."""
    return summarize([FinishedCell.model_validate(each) for each in cells], control, order)


def named(results: StudyResults, name: str) -> ArmFigures:
    """Return the only row of that name."""
    (arm,) = [arm for arm in results.arms if arm.name == name]
    return arm


def compared(results: StudyResults, name: str = "sftkey") -> DifferenceToControl:
    """Return an arm's difference to the control, which it must have."""
    difference = named(results, name).difference_to_control
    assert difference is not None
    return difference


def right(*ranges: range, num: int = 100) -> list[bool]:
    """Return flags that are right on some questions."""
    return [any(number in each for each in ranges) for number in range(num)]


def width(interval: tuple[float, float]) -> float:
    """Measure an interval."""
    return interval[1] - interval[0]


def test_an_unparsed_answer_is_wrong_and_counts() -> None:
    """Of 40 and 40, 30 and 20 are right; 1 and 2 can't be parsed and stay among the 40."""
    seeds = [cell(right(range(40 - n, 40), num=40), seed=s) for s, n in [(1, 30), (2, 20)]]
    arm = named(summed(seeds), "sftkey")
    assert (arm.num_seeds, arm.num_questions, arm.acc, arm.fmt) == (2, 40, 50 / 80, 38 / 40)
    assert [(each.seed, each.acc, each.fmt) for each in arm.seeds] == [
        (1, 30 / 40, 38 / 40),
        (2, 20 / 40, 38 / 40),
    ]
    assert [(each.num_unparsed, each.num_questions) for each in arm.seeds] == [(1, 40), (1, 40)]
    assert arm.seeds[0].correct == "0" * 10 + "1" * 30
    assert arm.seeds[0].strict == ("0" + "1" * 19) * 2


def test_a_seed_has_wilsons_interval() -> None:
    """Its ends are the roots of Wilson's equation, for Acc 30/40 and for Fmt 38/40."""
    (seed,) = named(summed([cell(right(range(30), num=40))]), "sftkey").seeds
    for share, interval in [(0.75, seed.acc_interval), (0.95, seed.fmt_interval)]:
        for end in interval:
            assert abs(end - share) == pytest.approx(Z * sqrt(end * (1 - end) / 40), abs=1e-6)
        assert interval[0] < share < interval[1]


def test_steps_tokens_and_seconds_are_of_all_stages_and_the_mean_over_seeds() -> None:
    """Two stages are summed; seeds of 200 and 300 steps make 250."""
    more: Cell = {
        "steps": {"completion": 100, "key": 200},
        "trained_tokens": {"completion": 900, "key": 101},
        "seconds": {"completion": 60.0, "key": 1.0},
    }
    arm = named(summed([cell([True] * 9), cell([True] * 9, seed=2, **more)]), "sftkey")
    assert (arm.steps, arm.trained_tokens) == (250, (80_000 + 1_001) / 2 - 0.5)
    assert arm.seconds == (180 + 61) / 2
    assert arm.seeds[1].model_dump(include=set(more)) == more


def test_seconds_of_two_machines_are_not_mixed() -> None:
    """Two seeds of 180 s each on the first seed's machine, and one of 10 s on another."""
    faster: Cell = {"hardware": "H100", "seconds": {"completion": 9.0, "key": 1.0}}
    seeds = [cell([True] * 9), cell([True] * 9, seed=2), cell([True] * 9, seed=3, **faster)]
    arm = named(summed(seeds), "sftkey")
    assert (arm.num_seeds, arm.seconds) == (3, 180)


def test_answers_that_never_stopped_are_counted_where_all_are_known() -> None:
    """Two of nine ran on; if it isn't known of one, no number is given."""
    made = cell([True] * 9)
    for number in (2, 5):
        made["questions"][number]["stopped"] = False
    assert named(summed([made]), "sftkey").seeds[0].num_never_stopped == 2
    made["questions"][0]["stopped"] = None
    assert named(summed([made]), "sftkey").seeds[0].num_never_stopped is None


def test_the_base_row_comes_first_and_counts_once() -> None:
    """Three seeds times three arms asked it the same: 29 of 200; the arms keep the order asked."""
    results = summed(made_cells(), order=["sft_twice", "sftkey"])
    assert [arm.name for arm in results.arms] == ["base", "sft_twice", "sftkey", "sft_tag"]
    base = results.arms[0]
    assert (base.num_seeds, base.num_questions, base.acc, base.fmt) == (1, 200, 29 / 200, 0.95)
    assert [(each.seed, each.steps, each.acc) for each in base.seeds] == [(None, {}, 29 / 200)]
    assert (base.stages, base.difference_to_control, base.thinking) == ((), None, None)
    assert [arm.name for arm in summed([cell([True] * 9)]).arms] == ["base", "sftkey"]


@pytest.mark.parametrize(("sha", "same"), [("same", True), ("other", False)])
def test_base_answers_that_differ_count_once_each(sha: str, same: bool) -> None:
    """100 and 96 of 200: other questions tell more, the same ones asked twice hardly do."""
    flags = [right(range(100), num=200), right(range(96), num=200)]
    cells = [
        cell(flags[0], arm, seed, base=answered(flags[seed - 1]), questions_sha256=asked)
        for arm in ("sft_tag", "sftkey")
        for seed, asked in [(1, "same"), (2, sha)]
    ]
    base, alone = summed(cells).arms[0], summed(cells[:1]).arms[0]
    assert (base.num_seeds, base.acc, len(base.seeds)) == (2, 0.49, 2)
    assert base.same_questions == same
    assert (width(base.acc_interval) > 0.95 * width(alone.acc_interval)) == same


def test_the_difference_is_paired_by_question() -> None:
    """12 gains and 4 losses of 100: +0.08, and the interval of the differences themselves."""
    cells = [
        cell(right(range(50)), "sft_tag"),
        cell(right(range(4, 62))),
    ]
    found = compared(summed(cells))
    assert (found.control, found.num_seeds, found.num_questions) == ("sft_tag", 1, 100)
    assert found.difference == pytest.approx(0.08)
    values = [1.0] * 12 + [-1.0] * 4 + [0.0] * 84 + [sqrt(0.5), -sqrt(0.5)]
    half = Z * sqrt(variance(values) / 102)
    assert found.interval == pytest.approx((fmean(values) - half, fmean(values) + half), abs=1e-6)
    assert named(summed(cells), "sft_tag").difference_to_control is None


def test_seeds_are_paired_and_those_of_one_arm_alone_are_left_out() -> None:
    """Of seeds 1, 2, 3 against 4, 3, 2 the second and third are paired: +0.10 and +0.02."""
    arm = {1: range(100), 2: range(60), 3: range(32)}
    control = {4: range(1), 3: range(30), 2: range(50)}
    cells = [cell(right(each), "sft_tag", seed) for seed, each in control.items()]
    cells += [cell(right(each), seed=seed) for seed, each in arm.items()]
    found = compared(summed(cells))
    assert (found.num_seeds, found.difference) == (2, pytest.approx(0.06))
    assert named(summed(cells), "sftkey").acc == pytest.approx((1.0 + 0.6 + 0.32) / 3)
    assert named(summed(cells[:1] + cells[3:]), "sftkey").difference_to_control is None


@pytest.mark.parametrize("other", ["questions", "order"])
def test_arms_that_answered_other_questions_are_refused(other: str) -> None:
    """The error names task, seed and both arms, be it other rows or another order of them."""
    cells = made_cells(seeds=(1, 2), num_questions=40)
    made = next(each for each in cells if (each["arm"], each["seed"]) == ("sftkey", 2))
    if other == "questions":
        made["questions_sha256"] = "other"
    else:
        made["questions"].reverse()
    with pytest.raises(RunError) as caught:
        summed(cells)
    assert str(caught.value) == (
        "orders, seed 2: sftkey answered other questions than sft_tag, so they can't be paired\n"
        "hint: arms of one study share a recipe's test rows; run both cells again"
    )


def test_a_true_gain_is_shown_and_none_is_not() -> None:
    """Flags drawn with a gain of 0.2 are shown, those with 0.0 aren't; both values are counts."""
    cells = made_cells({"sft_tag": 0.0, "sftkey": 0.2, "sft_twice": 0.0})
    num = {
        arm: sum(q["correct"] for each in cells if each["arm"] == arm for q in each["questions"])
        for arm in ("sft_tag", "sftkey", "sft_twice")
    }
    results = summed(cells)
    for arm, shown in [("sftkey", True), ("sft_twice", False)]:
        found = compared(results, arm)
        assert found.difference == pytest.approx((num[arm] - num["sft_tag"]) / 600)
        assert found.shown is shown
        assert (found.interval[0] > 0) is shown


def test_p_is_corrected_for_the_number_of_arms() -> None:
    """Seven gains of 40 in each of two seeds: alone shown, beside a second arm not."""
    cells = [
        cell(right(each, num=40), arm, seed)
        for seed in (1, 2)
        for arm, each in [("sft_tag", range(0)), ("sftkey", range(7 + seed))]
    ]
    alone = compared(summed(cells))
    assert 0.025 < alone.p < 0.05
    assert (alone.p_holm, alone.shown) == (alone.p, True)
    cells += [cell(right(range(1), num=40), "sft_twice", seed) for seed in (1, 2)]
    both = compared(summed(cells))
    assert (both.p, both.p_holm, both.shown) == (alone.p, 2 * alone.p, False)
    assert both.interval[0] > 0
    parsed = [FinishedCell.model_validate(each) for each in cells]
    first = compared(summarize(parsed, "sft_tag", primary="sftkey"))
    assert (first.p_holm, first.shown) == (alone.p, True)


def test_one_seed_shows_nothing_of_the_ways_of_training() -> None:
    """However sure two runs differ, other runs may differ otherwise."""
    found = compared(summed([cell([False] * 100, "sft_tag"), cell([True] * 100)]))
    assert found.p < 1e-6
    assert not found.shown


def test_intervals_count_seeds_and_questions() -> None:
    """Where seeds differ much they are wider than of the same flags pooled as one seed."""
    arm, control = [range(90), range(50), range(40)], [range(40)] * 3
    cells = [cell(right(each), seed=seed) for seed, each in enumerate(arm)]
    cells += [cell(right(each), "sft_tag", seed) for seed, each in enumerate(control)]
    pooled = [
        cell([flag for each in group for flag in right(each)], name)
        for group, name in [(arm, "sftkey"), (control, "sft_tag")]
    ]
    by_seed, at_once = summed(cells), summed(pooled)
    assert compared(by_seed).difference == pytest.approx(compared(at_once).difference)
    assert width(compared(by_seed).interval) > 2 * width(compared(at_once).interval)
    assert compared(at_once).p < 0.001 < 0.05 < compared(by_seed).p
    intervals = [named(results, "sftkey").acc_interval for results in (by_seed, at_once)]
    assert width(intervals[0]) > 2 * width(intervals[1])


@pytest.mark.parametrize("same", [True, False])
def test_questions_of_seeds_are_the_same_only_where_they_are(same: bool) -> None:
    """Intervals and p are of the kind that the hashes of the questions say."""
    cells = [
        cell(flags, arm, seed, questions_sha256="all" if same else f"of seed {seed}")
        for seed in (1, 2, 3)
        for arm, flags in made_flags({"sft_tag": 0.0, "sftkey": 0.1}, 100, seed).items()
    ]
    flags = {
        arm: [[q["correct"] for q in each["questions"]] for each in cells if each["arm"] == arm]
        for arm in ("sft_tag", "sftkey")
    }
    both = flags["sftkey"], flags["sft_tag"]
    arm, found = named(summed(cells), "sftkey"), compared(summed(cells))
    assert arm.same_questions is same
    assert arm.acc_interval == estimate(flags["sftkey"], same_questions=same).interval
    assert arm.acc_interval != estimate(flags["sftkey"], same_questions=not same).interval
    assert found.interval == estimate(*both, same).interval
    assert found.interval != estimate(*both, not same).interval
    assert found.p == difference_p(*both, same)


def test_a_study_says_what_it_is_made_of() -> None:
    """Tasks, the detectable difference of each, and every commit, machine and version once."""
    cells = [*made_cells(num_questions=40), *made_cells({"sftkey": 0.0}, (1,), 20, task="sums")]
    cells[-1].update(commit="fedcba987654", versions={"torch": "2.11.0"}, hardware="H100")
    results = summed(cells)
    supposed = supposed_of(
        [FinishedCell.model_validate(each) for each in cells if each["task"] == "orders"], "sft_tag"
    )
    assert (results.tasks, results.control) == (("orders", "sums"), "sft_tag")
    assert [
        (each.task, each.num_questions, each.num_seeds, each.num_arms, each.difference)
        for each in results.detectable_difference
    ] == [
        ("orders", 40, 3, 2, detectable_difference(40, 3, supposed, num_arms=2)),
        ("sums", 20, 1, 1, None),
    ]
    assert [each.estimated for each in results.detectable_difference] == [True, False]
    assert results.commit == f"{COMMIT}, fedcba987654"
    assert results.hardware == f"{HARDWARE}, H100"
    assert (results.versions, results.command) == ({"torch": "2.13.0, 2.11.0"}, COMMAND)
    assert [arm.task for arm in results.arms] == ["orders"] * 4 + ["sums"] * 2


def test_a_conversation_is_one_in_intervals_and_tests() -> None:
    """Questions that stand four times in a conversation show no more than standing once."""
    cells = made_cells({"sft_tag": 0.0, "sftkey": 0.1}, num_questions=40)
    single, repeated = summed(cells), summed([four_turns(each) for each in cells])
    for name in ("base", "sft_tag", "sftkey"):
        one, four = named(single, name), named(repeated, name)
        assert (one.num_conversations, four.num_conversations) == (None, 40)
        assert (four.num_questions, four.acc) == (160, pytest.approx(one.acc))
        assert four.acc_interval == pytest.approx(one.acc_interval, abs=0.02)
    assert compared(repeated).num_questions == 160
    assert compared(repeated).interval == pytest.approx(compared(single).interval)
    assert compared(repeated).p == compared(single).p


def four_turns(cell: Cell) -> Cell:
    """Let each row of a cell ask its question four times."""

    def questions(answered: Cell) -> Cell:
        turns = [{**each, "turn": turn} for each in answered["questions"] for turn in range(4)]
        return {**answered, "questions": turns}

    return {**questions(cell), "base": questions(cell["base"]), "reference_tokens": {}}


def test_a_cell_that_took_turns_for_one_another_is_refused() -> None:
    """An older version gave two turns of a conversation one key."""
    old = four_turns(cell(right(range(5), num=9)))
    for question in old["questions"]:
        del question["turn"]
    with pytest.raises(ValueError, match="took the turns of a conversation for one another"):
        FinishedCell.model_validate(old)


def test_forms_of_thinkings_are_summed_over_seeds() -> None:
    """Rates and what the last stage lost; cells without forms have none."""
    forms = ["valid"] * 30 + ["empty"] * 5 + ["truncated"] * 3 + ["missing"] * 2

    def with_forms(made: Cell, forms: Sequence[str]) -> Cell:
        pairs = zip(made["questions"], forms, strict=True)
        return {**made, "questions": [{**each, "form": form} for each, form in pairs]}

    flags = right(range(20), num=40)
    after = [with_forms(cell(flags, seed=seed), forms) for seed in (1, 2)]
    before = [with_forms(cell(flags, "sft_tag", seed), ["valid"] * 40) for seed in (1, 2)]
    results = summed([*before, *after])
    arm = named(results, "sftkey")
    assert {name: rate.rate for name, rate in arm.rates.items()} == pytest.approx(
        {"valid": 0.75, "empty": 0.125, "truncated": 0.075, "missing": 0.05, "right and valid": 0.5}
    )
    assert arm.thinking is not None
    assert arm.thinking.valid is not None
    assert (arm.thinking.valid.num_lost, arm.thinking.valid.num_gained) == (20, 0)
    assert arm.thinking.valid.p == pytest.approx(0.5**10)  # a question counts once, not a seed
    written = report(results)
    assert "| valid thinkings [95%] | Rpass@1 [95%] |" in written
    assert "sftkey: valid 75.0%, empty 12.5%, truncated 7.5%, missing 5.0%" in written
    assert "valid thinkings went from 80 to 60 (20 lost, 0 gained, one-sided p<0.001)" in written
    assert named(summed([cell(flags)]), "sftkey").rates == {}
    assert named(results, "base").rates == {}
