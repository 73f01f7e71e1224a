"""Parts of a study's results by hand, and the files that cells and results lie in."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sftkey.errors import RunError
from sftkey.study.results import (
    ArmFigures,
    Bucket,
    FinishedCell,
    StudyResults,
    ThinkingFigures,
    find_results,
    read_cells,
    read_results_file,
    write_results,
)
from sftkey.study.summary import summarize
from tests.support.cells import TOKENS, cell, made_cells, write_cells

Cell = dict[str, Any]


def summed(cells: Sequence[Cell]) -> StudyResults:
    """Summarize made cells, whose control is `sft_tag`."""
    return summarize([FinishedCell.model_validate(each) for each in cells], "sft_tag")


def named(results: StudyResults, name: str = "sftkey") -> ArmFigures:
    """Return the only row of that name."""
    (arm,) = [arm for arm in results.arms if arm.name == name]
    return arm


def test_the_thinking_is_compared_with_the_arm_one_stage_earlier() -> None:
    """Of 30 thinkings 6 are others than before; 2 got wrong, 1 right, and one can't be judged."""
    cells = [cell([True] * 30, arm, seed) for seed in (1, 2) for arm in ("sft_tag", "sftkey")]
    changed = cells[1]["questions"]  # every third one is wrong before, from 0 on
    for number, flag in [(0, True), (1, False), (2, False), (4, None)]:
        changed[number]["thinking_right"] = flag
    changed[6]["thinking_sha256"] = None
    cells[3]["mean_thinking_length"] = 33.5
    for number in range(8):
        changed[number]["follows"] = number > 0
    results = summed(cells)
    assert named(results).thinking == ThinkingFigures(
        num_questions=60,
        num_judged=59,
        num_right=(20 + 1 - 2 - 1) + 20,
        mean_length=32.5,
        before="sft_tag",
        num_compared=59,
        num_identical=2 * 24 - 1,
        num_made_wrong=2,
        num_made_right=1,
        loss=(0.3, 0.35),
        num_judged_following=8,
        num_following=7,
    )
    first = named(results, "sft_tag").thinking
    assert first is not None
    assert (first.before, first.num_compared, first.num_right) == (None, 0, 40)
    assert first.loss == (0.5, 0.3)


def test_an_arm_whose_stage_only_has_the_same_name_is_not_the_earlier_one() -> None:
    """Beside another arm's `completion`, the one whose losses the arm's own first stage has."""
    tag, key = cell([True] * 30, "sft_tag"), cell([True] * 30)
    validation = {"completion": {"start": {"thinking": 9.0}, "end": {"thinking": 8.0}}}
    plain = {**cell([True] * 30, "sft_tag", validation=validation), "arm": "sft"}
    for cells, before in [([plain, tag, key], "sft_tag"), ([plain, key], None)]:
        told = named(summed(cells)).thinking
        assert told is not None
        assert told.before == before


def test_the_thinking_loss_is_the_mean_over_seeds_or_unknown() -> None:
    """0.3 -> 0.35 and 0.4 -> 0.55 make 0.35 -> 0.45; one unknown end makes all unknown."""
    cells = [cell([True] * 9), cell([True] * 9, seed=2)]
    cells[1]["validation"]["key"] = {"start": {"thinking": 0.4}, "end": {"thinking": 0.55}}
    told = named(summed(cells)).thinking
    assert told is not None
    assert told.loss == pytest.approx((0.35, 0.45))
    del cells[1]["validation"]["key"]["end"]["thinking"]
    told = named(summed(cells)).thinking
    assert told is not None
    assert told.loss is None


MEASURES: dict[str, Callable[[int], tuple[int, int]]] = {
    "length": lambda place: (place, place),  # all have one ratio
    "ratio": lambda place: (40, 40 - place),  # all have one length
}


def measured(by: str, num: int = 40) -> list[Cell]:
    """Make arm and control of two seeds, whose questions by measure are 1 to 40.

    They lie in another order in each seed. The arm has those above 15 right, the control those to
    10.
    """
    cells = []
    for seed, step in [(1, 7), (2, 11)]:
        places = [n * step % num + 1 for n in range(num)]
        thinking, key = zip(*map(MEASURES[by], places), strict=True)
        more: Cell = {
            "reference_tokens": {"thinking": list(thinking), "key": list(key)},
            "questions_sha256": str(seed),
        }
        cells.append(cell([place > 15 for place in places], seed=seed, **more))
        cells.append(cell([place <= 10 for place in places], "sft_tag", seed, **more))
    return cells


def quarters(arm: ArmFigures, by: str) -> tuple[Bucket, ...]:
    """Return an arm's quarters by a measure; by the other, which is constant, it has none."""
    found, none = arm.by_thinking_length, arm.by_ratio
    if by == "ratio":
        found, none = none, found
    assert none == ()
    return found


@pytest.mark.parametrize("by", ["length", "ratio"])
def test_quarters_have_gains_that_add_up(by: str) -> None:
    """Quarters of ten: gains of -1, 0.5, 1 and 1, whose mean is the difference of the arms."""
    results = summed(measured(by))
    found = quarters(named(results), by)
    ends: dict[str, list[tuple[float, float]]] = {
        "length": [(1, 10), (11, 20), (21, 30), (31, 40)],
        "ratio": [(40 / 39, 40 / 30), (40 / 29, 2), (40 / 19, 4), (40 / 9, 40)],  # 40 by 0 is 40
    }
    assert [(each.low, each.high) for each in found] == [pytest.approx(end) for end in ends[by]]
    assert [(each.num_seeds, each.num_questions, each.acc) for each in found] == [
        (2, 10, acc) for acc in (0.0, 0.5, 1.0, 1.0)
    ]
    assert [each.gain for each in found] == [-1.0, 0.5, 1.0, 1.0]
    difference = named(results).difference_to_control
    assert difference is not None
    assert difference.difference == pytest.approx((-1.0 + 0.5 + 1.0 + 1.0) / 4)
    intervals = [each.gain_interval or (0.0, 0.0) for each in found]
    assert all(low < high for low, high in intervals)
    assert intervals[0][1] < 0 < intervals[2][0]
    control = quarters(named(results, "sft_tag"), by)
    assert [(each.acc, each.gain, each.gain_interval) for each in control] == [
        (acc, None, None) for acc in (1.0, 0.0, 0.0, 0.0)
    ]


def test_there_are_no_quarters_without_measures_or_with_too_few_questions() -> None:
    """Lengths that are missing, or fewer than the questions, or three questions, give none."""
    for tokens in ({}, {"thinking": list(range(39)), "key": [1] * 39}):
        cells = measured("length")
        cells[2]["reference_tokens"] = tokens
        arm = named(summed(cells))
        assert (arm.by_thinking_length, arm.by_ratio) == ((), ())
    assert quarters(named(summed(measured("length", num=3))), "length") == ()
    assert len(quarters(named(summed(measured("length", num=4))), "length")) == 4


def test_shares_are_of_the_completion_and_sum_to_one() -> None:
    """The loss's is loss times tokens at the stage's start; the prompt's part is left out."""
    more: Cell = {
        "segment_tokens": {"prompt": 500.0, **TOKENS},
        "gradient_norm": {
            "key": {"prompt": 9.0, "thinking": 3.0, "answer_tag": 1.0, "answer": 4.0, "end": 2.0}
        },
    }
    arm = named(summed([cell([True] * 9, **more)]))
    assert arm.loss_share.keys() == {"completion", "key"}
    for stage, sums in [
        ("completion", {"thinking": 15.0, "answer_tag": 0.06, "answer": 3.0, "end": 0.01}),
        ("key", {"thinking": 9.0, "answer_tag": 0.06, "answer": 1.0, "end": 0.01}),
    ]:
        whole = sum(sums.values())
        expected = {name: part / whole for name, part in sums.items()}
        assert arm.loss_share[stage] == pytest.approx(expected)
        assert sum(arm.loss_share[stage].values()) == pytest.approx(1.0)
    expected = {"thinking": 0.3, "answer_tag": 0.1, "answer": 0.4, "end": 0.2}
    assert arm.gradient_share == {"key": pytest.approx(expected)}


def test_shares_are_the_mean_over_seeds() -> None:
    """0.25 and 0.75 make 0.5; a stage of which a seed lacks a segment has none."""
    norms = [{"thinking": 1.0, "answer": 3.0}, {"thinking": 6.0, "answer": 2.0}]
    cells = [
        cell([True] * 9, seed=seed, gradient_norm={"completion": dict(each), "key": dict(each)})
        for seed, each in enumerate(norms)
    ]
    del cells[1]["gradient_norm"]["key"]["answer"]
    del cells[1]["validation"]["completion"]["start"]["end"]
    arm = named(summed(cells))
    assert arm.gradient_share == {"completion": {"thinking": 0.5, "answer": 0.5}}
    assert arm.loss_share.keys() == {"key"}


@pytest.mark.parametrize("known", [True, False])
def test_results_are_read_as_they_were_written(known: bool, tmp_path: Path) -> None:
    """The file gives the same results, where figures aren't known too."""
    cells = made_cells(num_questions=40)
    for each in () if known else cells:
        each["mean_thinking_length"] = None
        for question in each["questions"]:
            question.update(stopped=None, correct=True, judged=True)  # kappa isn't defined
    results = summed(cells)
    file = write_results(tmp_path, results)
    assert find_results(tmp_path) == find_results(file) == file == tmp_path / "results.json"
    assert find_results(tmp_path / "elsewhere") is None
    assert read_results_file(file) == results


def test_results_hold_no_absolute_path(tmp_path: Path) -> None:
    """Of a cell's command the last names are left, and relative paths as they are."""
    command = r"/some/bin/sftkey study ~/where/a.yaml --to='/some/where' C:\where\b.yaml ../c/d ./e"
    file = write_results(tmp_path, summed([cell([True] * 9, command=command)]))
    text = json.loads(file.read_text())["command"]
    assert text == "sftkey study a.yaml --to='where' b.yaml ../c/d ./e"


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_broken_results_file_is_named(tmp_path: Path) -> None:
    """The error names the file, what is wrong in it, and the way to a new one."""
    file = write_results(tmp_path, summed([cell([True] * 9)]))
    hint = "\nhint: `sftkey study` on the study's file writes its results anew"
    whole = json.loads(file.read_text())
    for text, problem in [
        (json.dumps({**whole, "control": 3}), "1 problem\n  control: Input should be a valid str"),
        ("{", "Invalid JSON"),
    ]:
        file.write_text(text)
        with pytest.raises(RunError) as caught:
            read_results_file(file)
        assert str(caught.value).startswith(f"{file}: {problem}")
        assert str(caught.value).endswith(hint)


def test_cells_are_read_by_task_arm_and_seed(tmp_path: Path) -> None:
    """Seeds stand in the order of numbers: 2 before 10."""
    cells = made_cells(seeds=(10, 2), num_questions=20, task="b")
    cells += made_cells(seeds=(3,), num_questions=20, task="a")
    write_cells(tmp_path, cells)
    found = read_cells(tmp_path)
    assert [(each.task, each.arm, each.seed) for each in found] == [
        *(("a", arm, 3) for arm in ("sft_tag", "sft_twice", "sftkey")),
        *(("b", arm, seed) for arm in ("sft_tag", "sft_twice", "sftkey") for seed in (2, 10)),
    ]
    assert found[0] == FinishedCell.model_validate(cells[6])


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    """The error says what was expected there and what makes it."""
    with pytest.raises(RunError) as caught:
        read_cells(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected cells/<task>/<arm>/seed-<seed>.json; got none\n"
        "hint: `sftkey study` on its file runs the cells"
    )


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_broken_cell_is_named(tmp_path: Path) -> None:
    """The error names the file and what is wrong in it."""
    made = cell([True, False], seed=2)
    made["questions"][1]["correct"] = "perhaps"
    write_cells(tmp_path, [cell([True, False]), made])
    with pytest.raises(RunError) as caught:
        read_cells(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'cells' / 'orders' / 'sftkey' / 'seed-2.json'}: 1 problem\n"
        "  questions.1.correct: Input should be a valid boolean, unable to interpret input\n"
        "hint: move the file aside; `sftkey study` on its file runs the cell again"
    )
