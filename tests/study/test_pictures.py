"""A study's pictures: what is drawn of which arm, in which colours, and what is left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sftkey.recipe.loss_on import loss_weights
from sftkey.study.page import draw_pictures, stage_weights
from sftkey.study.results import FinishedCell, StudyResults
from sftkey.study.schema import load_study
from sftkey.study.summary import summarize
from tests.support.cells import answered, cell, made_cells

pytest.importorskip("matplotlib")
NAMES = ["accuracy.png", "cost.png", "gain.png", "shares.png"]
BLACK = "#000000"
ROOT = Path(__file__).parents[2]


def summed(cells: Sequence[dict[str, Any]]) -> StudyResults:
    """Summarize made cells, whose control is `sft_tag`."""
    return summarize([FinishedCell.model_validate(each) for each in cells], "sft_tag")


def drawn(folder: Path, results: StudyResults) -> list[str]:
    """Draw the pictures of arms whose last stage is the key's, or a completion's."""
    losses = {"completion": "completion", "again": "completion", "key": "key"}
    weights = {stage: loss_weights(loss_on) for stage, loss_on in losses.items()}
    known = {(arm.task, arm.name): weights for arm in results.arms}
    return draw_pictures(folder, results, known)


def two_tasks(**more: Any) -> StudyResults:
    """Make the results of two tasks, the second without the first's second arm."""
    gains = {"sft_tag": 0.0, "sft_twice": 0.1}
    cells = made_cells(num_questions=40, **more)
    return summed([*cells, *made_cells(gains, num_questions=40, task="sums", **more)])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep each figure, by its file's name, in place of a file."""
    from matplotlib.figure import Figure

    kept: dict[str, Any] = {}

    def keep(figure: Figure, file: Path, **settings: Any) -> None:
        kept[file.name[1:].partition(".")[0] + ".png"] = figure  # named when it is whole
        file.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def inked(file: Path, num_panes: int) -> list[float]:
    """Return the share of each pane's pixels that aren't white."""
    from matplotlib.image import imread

    pixels = imread(file)[..., :3]
    width = pixels.shape[1] // num_panes
    return [
        float((pixels[:, pane * width : (pane + 1) * width] < 0.99).any(-1).mean())
        for pane in range(num_panes)
    ]


def colours(pane: Any) -> dict[str, set[str]]:
    """Map each arm of a picture of gains to the colours and markers of its points."""
    from matplotlib.colors import to_hex

    found = {}
    for line in pane.get_lines():
        if not line.get_label().startswith("_"):
            found[line.get_label()] = {to_hex(line.get_color()), line.get_marker()}
    return found


def rows(pane: Any) -> dict[str, set[str]]:
    """Map each arm of a picture of accuracies to the colours and markers of its row."""
    from matplotlib.colors import to_hex

    names = [label.get_text() for label in pane.get_yticklabels()]
    found: dict[str, set[str]] = {name: set() for name in names}
    for line in pane.get_lines():
        place = line.get_ydata()[0]
        if place == round(place):  # rings of seeds lie below the row
            marker = {line.get_marker()} - {"None"}
            found[names[int(place)]] |= {to_hex(line.get_color())} | marker
    return found


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_three_pictures_are_drawn_that_are_not_blank(num_tasks: int, tmp_path: Path) -> None:
    """Each task has a pane of its own in each of them, side by side."""
    results = two_tasks() if num_tasks == 2 else summed(made_cells(num_questions=40))
    assert drawn(tmp_path, results) == NAMES
    assert sorted(file.name for file in tmp_path.iterdir()) == NAMES
    for name in NAMES:
        assert min(inked(tmp_path / name, num_tasks)) > 0.01


def test_a_blank_pane_is_told_from_ink(tmp_path: Path) -> None:
    """The measure of ink is small on a pane with nothing in it, but for its neighbour's labels."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_axis_off()
    right.plot([0, 1], [0, 1])
    figure.savefig(tmp_path / "half.png")
    ink = inked(tmp_path / "half.png", 2)
    assert ink[0] < 0.005 < 0.01 < ink[1]


@pytest.mark.usefixtures("figures")
def test_nothing_is_drawn_of_which_nothing_is_known(tmp_path: Path) -> None:
    """Without lengths or a control there is no gain, without losses there are no shares."""
    unmeasured = made_cells(num_questions=40, reference_tokens={}, validation={})
    assert drawn(tmp_path, summed(unmeasured)) == ["accuracy.png", "cost.png"]
    free = made_cells(num_questions=40, reference_tokens={}, validation={}, trained_tokens={})
    free = [{**each, "seconds": {}} for each in free]
    assert drawn(tmp_path, summed(free)) == ["accuracy.png"]
    alone = [cell([True, False] * 20)]
    assert drawn(tmp_path, summed(alone)) == ["accuracy.png", "cost.png", "shares.png"]


def test_a_task_of_which_nothing_is_known_has_an_empty_pane(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    """The other task's picture is drawn nevertheless."""
    cells = made_cells(num_questions=40, task="sums", reference_tokens={}, validation={})
    drawn(tmp_path, summed([*made_cells(num_questions=40), *cells]))
    assert list(figures) == NAMES
    assert [pane.has_data() for pane in figures["accuracy.png"].axes] == [True, True]
    for name in NAMES[2:]:
        assert [pane.has_data() for pane in figures[name].axes] == [True, False]
        assert [pane.axison for pane in figures[name].axes] == [True, False]


def test_arms_keep_their_colours_and_the_control_is_black(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the picture, and though a task lacks an arm; base is grey, a colour no arm has."""
    drawn(tmp_path, two_tasks())
    orders, sums = map(rows, figures["accuracy.png"].axes)
    gains = [colours(pane) for pane in figures["gain.png"].axes]
    first, second = {"#0072b2", "D"}, {"#e69f00", "^"}
    assert orders == {
        "base": {"#777777", "o"},
        "sft_tag": {BLACK, "s"},
        "sftkey": first,
        "sft_twice": second,
    }
    assert sums == {name: orders[name] for name in ("base", "sft_tag", "sft_twice")}
    assert gains == [{"sftkey": first, "sft_twice": second}, {"sft_twice": second}]
    for pane in figures["gain.png"].axes:
        (zero,) = [line for line in pane.get_lines() if list(line.get_ydata()) == [0, 0]]
        assert zero.get_color() == BLACK


def test_accuracy_is_drawn_where_it_is(figures: dict[str, Any], tmp_path: Path) -> None:
    """Each row has its mean, interval and seeds; the control's interval is shaded."""
    results = two_tasks()
    draw_pictures(tmp_path, results, {})
    pane = figures["accuracy.png"].axes[0]
    arms = [arm for arm in results.arms if arm.task == "orders"]
    assert [label.get_text() for label in pane.get_yticklabels()] == [
        *("sft_twice", "sftkey", "sft_tag", "base")  # from below
    ]
    drawn = [(list(line.get_xdata()), float(line.get_ydata()[0])) for line in pane.get_lines()]
    for arm, place in zip(arms, (3, 2, 1, 0), strict=True):
        lines = [xs for xs, y in drawn if y == place]
        assert lines == [list(arm.acc_interval), [arm.acc]]
        rings = [xs for xs, y in drawn if place - 0.5 < y < place]
        assert rings == [[seed.acc] for seed in (arm.seeds if arm.name != "base" else ())]
    (shade,) = pane.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx(arms[1].acc_interval)


def test_costs_are_drawn_with_accuracy_and_interval(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    """A pane over tokens and one over minutes, every trained arm in both, the base in neither."""
    results = summed(made_cells(num_questions=40))
    drawn(tmp_path, results)
    tokens, minutes = figures["cost.png"].axes
    for pane, costs in [
        (tokens, {arm.name: arm.trained_tokens for arm in results.arms if arm.stages}),
        (minutes, {arm.name: (arm.seconds or 0) / 60 for arm in results.arms if arm.stages}),
    ]:
        lines = pane.get_lines()
        bars, points = lines[::2], {line.get_label(): line for line in lines[1::2]}
        arms = {arm.name: arm for arm in results.arms}
        assert points.keys() == costs.keys()
        for bar, (name, line) in zip(bars, points.items(), strict=True):
            assert line.get_ydata()[0] == arms[name].acc
            assert tuple(bar.get_ydata()) == arms[name].acc_interval
            assert line.get_xdata()[0] == pytest.approx(costs[name], rel=0.03)
            assert bar.get_xdata()[0] == line.get_xdata()[0]


def test_gains_are_drawn_in_points(figures: dict[str, Any], tmp_path: Path) -> None:
    """Each arm has its four gains and their intervals; the quarters' ends stand below."""
    results = two_tasks()
    drawn(tmp_path, results)
    pane = figures["gain.png"].axes[1]
    (arm,) = [arm for arm in results.arms if (arm.task, arm.name) == ("sums", "sft_twice")]
    (gains,) = [list(line.get_ydata()) for line in pane.get_lines() if len(line.get_ydata()) == 4]
    assert gains == pytest.approx([100 * (bucket.gain or 0.0) for bucket in arm.by_ratio])
    intervals = [list(line.get_ydata()) for line in pane.get_lines()]
    for bucket in arm.by_ratio:
        assert [100 * end for end in bucket.gain_interval or ()] in intervals
    names = [label.get_text() for label in pane.get_xticklabels()]
    assert names == [
        "2.5 to 2.75\nn 9",
        "2.88 to 3.25\nn 12",
        "3.38 to 3.75\nn 9",
        "3.88 to 4.38\nn 10",
    ]


def test_shares_are_drawn_once_each_and_fill_a_bar(figures: dict[str, Any], tmp_path: Path) -> None:
    """The stage that three arms begin with is one bar; pieces of a bar lie end to end."""
    norms = {"completion": {"thinking": 3.0, "answer_tag": 0.5, "answer": 1.0, "end": 0.5}}
    drawn(tmp_path, summed(made_cells(num_questions=40, gradient_norm=norms)))
    (pane,) = figures["shares.png"].axes
    names = [label.get_text() for label in pane.get_yticklabels()]
    assert names == [
        "sft_twice: again, loss",
        "sftkey: key, loss",
        "sft_tag: completion, gradient",
        "sft_tag: completion, loss",
    ]
    for place in range(len(names)):
        pieces = [p for p in pane.patches if p.get_y() < place < p.get_y() + p.get_height()]
        ends = [0.0, *(piece.get_x() + piece.get_width() for piece in pieces)]
        assert [piece.get_x() for piece in pieces] == pytest.approx(ends[:-1])
        assert ends[-1] == pytest.approx(1.0)
    gradient = [p.get_width() for p in pane.patches if p.get_y() < 2 < p.get_y() + p.get_height()]
    assert gradient == pytest.approx([0.6, 0.1, 0.2, 0.1])
    key = [p.get_width() for p in pane.patches if p.get_y() < 1 < p.get_y() + p.get_height()]
    assert key[0] == 0.0  # a key stage trains on no thinking
    assert sum(key) == pytest.approx(1.0)


def test_equal_measures_are_never_parted(figures: dict[str, Any], tmp_path: Path) -> None:
    """Where half of the questions have one ratio there are fewer parts, named by what is in them.

    Seeds whose questions differ have different numbers in a part; the mean gain stays that of each
    seed's own questions.
    """
    cells = made_cells({"sft_tag": 0.0, "sftkey": 0.1}, num_questions=40)
    for each in cells:
        low = 10 + each["seed"]
        ratios = [3] * low + [7] * (30 - low) + [9] * 10
        each["reference_tokens"] = {"thinking": ratios, "key": [4] * 40}
        each["questions_sha256"] = str(each["seed"])
    results = summed(cells)
    drawn(tmp_path, results)
    names = [
        label.get_text().split("\n")[0] for label in figures["gain.png"].axes[0].get_xticklabels()
    ]
    assert names == ["0.75", "1.75", "2.25"]
    (arm,) = [arm for arm in results.arms if arm.name == "sftkey"]
    for bucket, (start, stop) in zip(arm.by_ratio, [(0, 10), (10, 30), (30, 40)], strict=True):
        gains = []
        for mine in (each for each in cells if each["arm"] == "sftkey"):
            (other,) = (e for e in cells if (e["arm"], e["seed"]) == ("sft_tag", mine["seed"]))
            ends = [n + mine["seed"] * (n == 10) for n in (start, stop)]
            right, before = (
                [question["correct"] for question in each["questions"][slice(*ends)]]
                for each in (mine, other)
            )
            gains.append((sum(right) - sum(before)) / len(right))
        assert bucket.gain == pytest.approx(sum(gains) / len(gains))


def test_a_base_that_is_far_away_takes_no_width(figures: dict[str, Any], tmp_path: Path) -> None:
    """It stands as an arrow at the border, with its figure; one that is near is drawn."""
    nothing, fifth = answered([False] * 40), answered([n % 5 != 1 for n in range(40)])
    far = [cell([n % 10 != seed for n in range(40)], seed=seed, base=nothing) for seed in (1, 2)]
    drawn(tmp_path, summed(far))
    pane = figures["accuracy.png"].axes[0]
    assert pane.get_xlim()[0] > 0.5
    assert "0.000, outside the picture" in [text.get_text() for text in pane.texts]
    near = [cell([n % 10 != 1 for n in range(40)], base=fifth)]
    drawn(tmp_path, summed(near))
    assert not any("outside" in text.get_text() for text in figures["accuracy.png"].axes[0].texts)


def test_the_weights_are_those_of_the_arms_recipe(tmp_path: Path) -> None:
    """Of each stage of an arm; of the base and of another task's arms nothing is known."""
    study = load_study(ROOT / "recipes" / "smollm2-135m" / "study-orders.yaml")
    (task,) = [Path(each.recipe).stem for each in study.recipes]
    arms = {arm.name: arm for arm in two_tasks().arms if arm.task == "orders"}
    found = {
        name: stage_weights(
            study, ROOT / "recipes" / "smollm2-135m", arm.model_copy(update={"task": task})
        )
        for name, arm in arms.items()
    }
    assert found["base"] == {}
    assert found["sftkey"] == {"completion": loss_weights("completion"), "key": loss_weights("key")}
    assert stage_weights(study, tmp_path, arms["sftkey"].model_copy(update={"task": "sums"})) == {}
