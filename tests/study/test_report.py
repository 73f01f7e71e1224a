"""A study's report: its table, what its sentences claim, and what it warns of."""

import sys
from pathlib import Path
from typing import Any

import pytest

from sftkey.evaluation.judge import JudgeFigures
from sftkey.study.page import draw_pictures
from sftkey.study.report import chosen, equals, report, said, table, thinking, to_confirm, warnings
from sftkey.study.results import (
    ArmFigures,
    Detectable,
    DifferenceToControl,
    FinishedCell,
    StudyResults,
    ThinkingFigures,
)
from sftkey.study.summary import summarize
from tests.support.cells import made_cells

STATED = (
    "200 questions, 3 seeds and 2 comparisons show a difference of 7.1 points in four of five "
    "studies (supposed: two runs differ on 25% of the questions, 30% of it alike in all seeds, and "
    "their difference by 1.0 points from seed to seed); smaller ones are likely missed."
)
HEAD = "| arm | n | Acc [95%] | Fmt | points more than sft_tag [95%] | p | tokens | time |"


def made_arm(name: str, **more: Any) -> ArmFigures:
    """Make the figures of an arm."""
    figures: dict[str, Any] = {
        "task": "orders",
        "stages": ("completion", "key"),
        "num_seeds": 3,
        "num_questions": 200,
        "same_questions": True,
        "acc": 0.5,
        "acc_interval": (0.4561, 0.5439),
        "fmt": 0.95,
        "fmt_interval": (0.9, 1.0),
        "seeds": (),
    }
    return ArmFigures(name=name, **{**figures, **more})


def gain(difference: float, low: float, high: float, p: float, shown: bool) -> DifferenceToControl:
    """Make a difference to `sft_tag`."""
    return DifferenceToControl(
        control="sft_tag",
        num_seeds=3,
        num_questions=200,
        difference=difference,
        interval=(low, high),
        p=p / 2,
        p_holm=p,
        shown=shown,
    )


def told(**more: Any) -> ThinkingFigures:
    """Make what is known of an arm's thinking."""
    figures: dict[str, Any] = {"num_questions": 600, "num_judged": 0, "num_right": 0}
    return ThinkingFigures(**{**figures, "mean_length": None, **more})


def made_results(*arms: ArmFigures, **more: Any) -> StudyResults:
    """Make the results of two tasks; the second's one arm shows up in nothing said of the first."""
    other = made_arm("sums_only", task="sums", num_seeds=9, chosen={"key": {"weight": 3.0}})
    other = other.model_copy(update={"thinking": told(num_judged=9, num_right=7)})
    figures: dict[str, Any] = {"differing": 0.25, "by_question": 0.3, "between_seeds": 0.01}
    stated = {"num_questions": 200, **figures}
    figures = {
        "tasks": ("orders", "sums"),
        "control": "sft_tag",
        "detectable_difference": (
            Detectable(task="orders", num_seeds=3, num_arms=2, difference=0.0712, **stated),
            Detectable(task="sums", num_seeds=2, num_arms=1, difference=0.31, **stated),
        ),
        "arms": (*arms, other),
        "commit": "0123456789ab",
        "hardware": "CPU",
        "versions": {},
        "command": "sftkey study made.yaml",
    }
    return StudyResults(**{**figures, **more})


BETTER = made_arm("sftkey", difference_to_control=gain(0.1504, 0.1, 0.2, 0.0002, True))
WORSE = made_arm("dft", difference_to_control=gain(-0.08, -0.12, -0.04, 0.012, True))
UNSHOWN = made_arm("sft_twice", difference_to_control=gain(0.01, -0.03, 0.05, 1.0, False))
CONTROL = made_arm("sft_tag", stages=("completion",), trained_tokens=40_000, seconds=90.0)


def test_the_table_has_every_figure_with_its_n() -> None:
    """A row for each arm of the task; what isn't known of an arm stays empty."""
    base = made_arm("base", stages=(), num_seeds=1, acc=0.145, acc_interval=(0.1, 0.2005))
    better = BETTER.model_copy(update={"trained_tokens": 1_080_000, "seconds": 100.0})
    assert table(made_results(base, CONTROL, better, WORSE), "orders").splitlines() == [
        HEAD,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| base | 200 | 0.145 [0.100, 0.201] | 0.950 |  |  |  |  |",
        "| sft_tag | 200 x 3 | 0.500 [0.456, 0.544] | 0.950 |  |  | 40,000 | 1.5 min |",
        "| sftkey | 200 x 3 | 0.500 [0.456, 0.544] | 0.950 | +15.0 [+10.0, +20.0] | <0.001 "
        "| 1,080,000 | 1.7 min |",
        "| dft | 200 x 3 | 0.500 [0.456, 0.544] | 0.950 | -8.0 [-12.0, -4.0] | 0.012 |  |  |",
    ]


def test_base_answers_of_several_seeds_have_their_n() -> None:
    """Where each seed asked other questions the base model's row counts them all."""
    base = made_arm("base", stages=(), num_seeds=2)
    assert table(made_results(base), "orders").splitlines()[2].startswith("| base | 200 x 2 |")


def test_the_table_has_a_column_of_the_judge_if_there_is_one() -> None:
    """Its Acc, how often it agrees of what it judged, and kappa, where that is defined."""
    judge = JudgeFigures(num_judged=590, num_questions=600, num_agreeing=571, kappa=0.9, acc=0.51)
    undefined = judge.model_copy(update={"kappa": None})
    arms = [made_arm("a", judge=judge), made_arm("b", judge=undefined), made_arm("c")]
    results = made_results(*arms)
    lines = table(results, "orders").splitlines()
    assert lines[0] == HEAD + " judge: Acc, agreement, kappa |"
    assert lines[1].count("---") == 9
    assert [line.split(" | ")[-1] for line in lines[2:]] == [
        "0.510, 571/590, 0.90 |",
        "0.510, 571/590 |",
        " |",
    ]
    assert table(results, "sums").splitlines()[0] == HEAD


def test_sentences_say_what_is_shown_and_what_is_not() -> None:
    """The detectable difference first, then better and worse, then what proves nothing."""
    results = made_results(CONTROL, BETTER, WORSE, UNSHOWN)
    assert said(results, "orders") == [
        STATED,
        "Shown: sftkey answers better than sft_tag (+15.0 points [+10.0, +20.0], p<0.001); "
        "dft answers worse than sft_tag (-8.0 points [-12.0, -4.0], p 0.012).",
        "Not shown to be better or worse than sft_tag: sft_twice (+1.0 points [-3.0, +5.0], "
        "p 1.000). That is no proof that they are alike.",
    ]
    assert len(said(made_results(CONTROL, UNSHOWN), "orders")) == 2


def test_without_a_pair_nothing_is_compared() -> None:
    """The sentence says so, and one of a single comparison has no plural."""
    first, last = said(made_results(BETTER), "sums")
    assert first.startswith("200 questions, 2 seeds and 1 comparison show a difference of 31.0 ")
    assert last == "Nothing is compared: sft_tag has no cell beside another arm."


def test_one_seed_says_nothing_of_another() -> None:
    """The sentence stands where an arm that is compared has one seed, and only there."""
    difference = gain(0.15, 0.1, 0.2, 0.0002, False).model_copy(update={"num_seeds": 1})
    one = made_arm("sftkey", num_seeds=1, difference_to_control=difference)
    (stated,) = made_results().detectable_difference[:1]
    stated = stated.model_copy(update={"num_seeds": 1, "difference": None})
    results = made_results(CONTROL, one, detectable_difference=(stated,))
    assert said(results, "orders") == [
        "200 questions and one seed show nothing of the ways of training.",
        "Of one seed, so of these two runs and not of two ways of training: sftkey against sft_tag "
        "(+15.0 points [+10.0, +20.0], p<0.001). Interval and p say nothing of what another seed "
        "would give.",
    ]


def test_what_is_estimated_and_what_comes_first_is_said() -> None:
    """Cells that tell how much runs vary are named as the source, and so is a primary arm."""
    (stated,) = made_results().detectable_difference[:1]
    stated = stated.model_copy(update={"estimated": True})
    results = made_results(CONTROL, BETTER, detectable_difference=(stated,), primary="sftkey")
    first, second, _ = said(results, "orders")
    assert "four of five studies (estimated from these cells: two runs differ on 25%" in first
    assert second == "The primary comparison, tested first, is that of sftkey."


def test_missing_seeds_and_several_commits_are_warned_of() -> None:
    """An arm that has fewer seeds than another, and cells of two commits; else nothing."""
    fewer = UNSHOWN.model_copy(update={"num_seeds": 2})
    base = made_arm("base", stages=(), num_seeds=1, same_questions=False)
    results = made_results(base, CONTROL, fewer, commit="0123456789ab, fedcba987654")
    assert warnings(results, "orders") == [
        "sft_twice: 2 of 3 seeds are finished.",
        "The cells are of several commits: 0123456789ab, fedcba987654.",
    ]
    assert warnings(made_results(base, CONTROL, UNSHOWN), "orders") == []


def test_other_questions_a_seed_are_warned_of() -> None:
    """It stands once, however many arms have them."""
    arms = [made_arm(name, same_questions=False) for name in ("sft_tag", "sftkey")]
    assert warnings(made_results(*arms), "orders") == [
        "Each seed answered other questions, so a question has one flag an arm."
    ]


@pytest.mark.parametrize(("end", "warned"), [(0.3252, True), (0.3198, False), (0.2, False)])
def test_a_thinking_loss_that_rose_is_warned_of(end: float, warned: bool) -> None:
    """More than 0.02 nats a token are, less or a fall isn't."""
    arm = made_arm("sftkey", thinking=told(loss=(0.3, end)))
    assert warnings(made_results(CONTROL, arm), "orders") == warned * [
        "sftkey: the last stage raised the thinking's validation loss by 0.0252 nats a token."
    ]


@pytest.mark.parametrize(("wrong", "warned"), [(8, True), (7, False), (0, False)])
def test_right_thinkings_turned_wrong_are_warned_of(wrong: int, warned: bool) -> None:
    """Only where they are more than those turned right."""
    turned = told(before="sft_tag", num_made_wrong=wrong, num_made_right=7)
    arm = made_arm("sftkey", thinking=turned)
    assert warnings(made_results(CONTROL, arm), "orders") == warned * [
        "sftkey: 8 right thinkings turned wrong against sft_tag, 7 wrong ones right."
    ]


def test_choices_are_listed_by_arm_and_stage() -> None:
    """Numbers are short; an arm without a choice, or of another task, isn't there."""
    arm = made_arm(
        "w", chosen={"one": {"learning_rate": 2e-4, "weight": 5.0}, "two": {"weight": 1}}
    )
    assert chosen(made_results(CONTROL, arm), "orders") == [
        "w, one: learning_rate 0.0002, weight 5",
        "w, two: weight 1",
    ]


def test_the_thinking_is_told_as_far_as_it_is_known() -> None:
    """Each figure has its n; arms of which nothing is known are left out."""
    known = told(
        num_judged=590,
        num_right=400,
        mean_length=31.54,
        before="sft_tag",
        num_compared=580,
        num_identical=480,
        loss=(0.3, 0.35),
        num_judged_following=570,
        num_following=560,
    )
    arms = [
        made_arm("a", thinking=told()),
        made_arm("b"),
        made_arm("c", thinking=known),
        made_arm("d", thinking=told(loss=(0.3, 0.2))),
    ]
    assert thinking(made_results(*arms), "orders") == [
        "c: right 400 of 590; identical to sft_tag's 480 of 580; mean length 31.5 tokens over "
        "600; validation loss 0.3000 -> 0.3500 nats a token; the answer follows from it 560 of "
        "570",
        "d: validation loss 0.3000 -> 0.2000 nats a token",
    ]


def test_a_screening_proposes_the_papers_arm_and_the_best_three() -> None:
    """By the mean over tasks; the control and the base model aren't proposed."""
    shares = {"base": 0.9, "sft_tag": 0.8, "a": 0.5, "b": 0.7, "c": 0.6, "d": 0.4, "sftkey": 0.1}
    arms = [
        made_arm(name, acc=acc, stages=() if name == "base" else ("completion",))
        for name, acc in shares.items()
    ]
    again = made_arm("c", task="sums", acc=0.9)
    results = made_results(*arms, again)
    results = results.model_copy(update={"arms": (*arms, again)})
    assert to_confirm(results) == ["c", "b", "a", "sftkey"]
    without = results.model_copy(update={"arms": (*arms[:-1], again)})
    assert to_confirm(without) == ["c", "b", "a"]


def test_equal_steps_and_equal_time_are_two_tables() -> None:
    """An arm stands where its own figure is the control's; one without another arm says so."""
    control = made_arm("sft_tag", steps=250, seconds=600.0)
    slow = made_arm("sftkey_kl", steps=250, seconds=661.0)
    fast = made_arm("sftkey_frozen", steps=250, seconds=541.0)
    filled = made_arm("sftkey_frozen_long", steps=900, seconds=659.0)
    base = made_arm("base", stages=(), steps=250, seconds=600.0)
    lines = equals(made_results(base, control, slow, fast, filled), "orders")
    steps, time = lines[:4], lines[4:]
    assert steps[0] == "### With as many steps as sft_tag: 250"
    assert time[0] == "### In the time of sft_tag: 10.0 min, give or take a tenth"
    names = [
        [row.split(" | ")[0].removeprefix("| ") for row in part[2].splitlines()[2:]]
        for part in (steps, time)
    ]
    assert names[0] == ["sft_tag", "sftkey_kl", "sftkey_frozen"]
    assert names[1] == ["sft_tag", "sftkey_frozen", "sftkey_frozen_long"]
    alone = equals(made_results(control), "orders")
    assert alone[2] == alone[6] == "No other arm."
    assert equals(made_results(base, slow), "orders") == []


def test_the_report_has_its_parts_in_order() -> None:
    """Each task with its lists, then pictures, where it was measured, and what figures mean."""
    results = made_results(CONTROL, BETTER, versions={"torch": "2.13.0", "trl": "1.16.0"})
    text = report(results, ["accuracy.png", "gain.png"], title="Made")
    lines = text.splitlines()
    assert lines[:4] == ["# Made", "", "## orders", ""]
    heads = [
        *("Made", "orders", "In the time of sft_tag: 1.5 min, give or take a tenth"),
        *("sums", "Chosen on the validation rows", "The thinking"),
    ]
    found = [line.lstrip("# ") for line in lines if line.startswith("#")]
    assert found == [*heads, "Where it was measured"]
    assert {"- sums_only, key: weight 3", "- sums_only: right 7 of 9"} < set(lines)
    assert " ".join(said(results, "orders")) in lines
    assert lines[lines.index("![accuracy](accuracy.png)") :][:4] == [
        *("![accuracy](accuracy.png)", "", "![gain](gain.png)", "")
    ]
    measured = "`sftkey study made.yaml`, commit 0123456789ab, CPU; torch 2.13.0, trl 1.16.0."
    assert measured in lines
    assert "n is questions x seeds" in lines[-1]
    assert measured.partition(";")[0] + "." in report(made_results(CONTROL)).splitlines()


def test_without_matplotlib_there_are_no_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is drawn, and the report says how to get them."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    cells = made_cells(num_questions=40)
    results = summarize([FinishedCell.model_validate(each) for each in cells], "sft_tag")
    files = draw_pictures(tmp_path, results, {})
    assert (files, list(tmp_path.iterdir())) == ([], [])
    assert (
        'No pictures: matplotlib isn\'t installed (`python -m pip install "sftkey[plots]"`, then '
        "the same command)."
    ) in report(results, files).splitlines()
