"""A run's losses are read from its ledger and logs, and drawn by stage and segment."""

import json
import sys
from pathlib import Path

import pytest

from sftkey.evaluation.page import LEAST_LOSS, StageLosses, draw_losses, read_losses
from sftkey.recipe.load import load_recipe
from sftkey.training.run_folder import Ledger
from tests.support.tiny import write_recipe


def test_losses_are_read_by_stage_and_segment(tmp_path: Path) -> None:
    """Training as logged; what was measured, and on which rows; nothing of what isn't there.

    A stage that hasn't begun is left out, and so is a loss that isn't finite; 0 stands at the
    least that a logarithmic scale shows.
    """
    recipe = load_recipe(write_recipe(tmp_path, tmp_path))
    ledger = Ledger(tmp_path, recipe)
    ledger.stages[0].num_steps = 20
    ledger.stages[0].validation = {
        "start": {"prompt": 9.0, "answer": 2.0},
        "end": {"answer": 0.5},
        "4": {"answer": float("inf")},
        "12": {"answer": 1.0},
    }
    ledger.save()
    ledger.log(0).parent.mkdir(parents=True)
    lines = [
        {"step": 10, "segments": {"thinking": 3.0, "answer": 0.0}},
        {"step": 20, "segments": {"thinking": 2.0, "answer": float("nan")}},
    ]
    ledger.log(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "data.json").write_text(json.dumps({"validation": 0}))
    (stage,) = read_losses(tmp_path, recipe)
    assert stage == StageLosses(
        "completion",
        {"thinking": [(10, 3.0), (20, 2.0)], "answer": [(10, LEAST_LOSS)]},
        {"answer": [(0, 2.0), (12, 1.0), (20, 0.5)]},
        "some training rows",
    )


STAGES = [
    StageLosses("first", {"answer": [(1, 3.0), (2, 2.5)]}, {"answer": [(0, 4.0), (2, 2.0)]}),
    StageLosses("key", {"end": [(1, 2.5)]}, {}),
]


def test_a_pane_is_drawn_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a logarithmic scale only where losses differ by ten times."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: kept.append(figure))
    monkeypatch.setattr("sftkey.files._put", lambda temporary, path: None)
    assert draw_losses(tmp_path, STAGES) == tmp_path / "losses.png"
    draw_losses(tmp_path, [*STAGES, StageLosses("last", {"end": [(1, 0.01)]}, {})])
    near, far = kept
    assert [pane.get_title("left") for pane in near.axes] == ["first", "key"]
    assert [[list(line.get_ydata()) for line in pane.get_lines()] for pane in near.axes] == [
        [[3.0, 2.5], [4.0, 2.0]],
        [[2.5]],
    ]
    assert {pane.get_yscale() for pane in near.axes} == {"linear"}
    assert {pane.get_yscale() for pane in far.axes} == {"log"}


def test_without_losses_or_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written then."""
    assert draw_losses(tmp_path, []) is None
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert draw_losses(tmp_path, STAGES) is None
    assert list(tmp_path.iterdir()) == []
