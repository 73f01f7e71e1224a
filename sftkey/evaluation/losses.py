"""A run's losses by segment over the steps of its stages, read from its folder, and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.files import appearing, read_json
from sftkey.recipe.schema import Recipe
from sftkey.training.log import read_log
from sftkey.training.run_folder import Ledger

SEGMENT_COLOURS = {
    "thinking": "#0072B2",
    "answer_tag": "#E69F00",
    "answer": "#009E73",
    "end": "#D55E00",
}
LEAST_LOSS = 1e-6  # nats a token; what is below stands here on a logarithmic scale
Points = list[tuple[int, float]]
VALIDATION = "validation rows"


@dataclass(frozen=True)
class StageLosses:
    """The losses of one stage in nats a token, by segment: points of a step and a mean.

    Args:
        name: The stage's.
        training: Of the tokens that the stage trains, since the point before.
        measured: All segments of the completion, on the same rows before and after the stage.
        rows: What these rows are: not every run has validation rows.
    """

    name: str
    training: Mapping[str, Points]
    measured: Mapping[str, Points]
    rows: str = VALIDATION

    @property
    def points(self) -> Points:
        """All of them."""
        lines = (*self.training.values(), *self.measured.values())
        return [point for line in lines for point in line]


def read_losses(folder: Path, recipe: Recipe) -> list[StageLosses]:
    """Return the losses of the stages that have begun, as far as they were logged."""
    ledger, file = Ledger(folder, recipe, main=False), folder / "data.json"
    counts = read_json(file) if file.exists() else {}
    rows = VALIDATION if counts.get("validation", 1) else "some training rows"
    found = []
    for number, record in enumerate(ledger.stages):
        training = [(line["step"], line["segments"]) for line in read_log(ledger.log(number))]
        steps = {"start": 0, "end": record.num_steps}
        measured = sorted(
            (steps[at] if at in steps else int(at), losses)
            for at, losses in record.validation.items()
        )
        stage = StageLosses(record.name, _lines(training), _lines(measured), rows)
        if stage.points:
            found.append(stage)
    return found


def _lines(steps: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Points]:
    """Return a line for each segment of the completion; a loss that isn't finite has no point."""
    lines = {
        name: [
            (step, max(losses[name], LEAST_LOSS))
            for step, losses in steps
            if name in losses and math.isfinite(losses[name])
        ]
        for name in SEGMENT_COLOURS
    }
    return {name: points for name, points in lines.items() if points}


def spread_wide(stages: Sequence[StageLosses]) -> bool:
    """Tell whether the losses differ so much that only a logarithmic scale shows them all."""
    losses = [loss for stage in stages for _, loss in stage.points]
    return max(losses) >= 10 * min(losses)


def draw_losses(folder: Path, stages: Sequence[StageLosses]) -> Path | None:
    """Draw `losses.png` into a run's folder; None without losses or without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not stages:
        return None
    size = (1.6 + 3.8 * len(stages), 3.8)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panes = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for pane, stage in zip(panes, stages, strict=True):
        _draw(pane, stage)
        pane.set_yscale("log" if spread_wide(stages) else "linear")
    panes[0].set_ylabel("loss, nats a token")
    names = {name for stage in stages for name in (*stage.training, *stage.measured)}
    handles = _handles(names, stages[0].rows)
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside right upper")
    file = folder / "losses.png"
    with appearing(file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return file


def _draw(pane: Any, stage: StageLosses) -> None:
    for name, points in stage.training.items():
        pane.plot(*zip(*points, strict=True), color=SEGMENT_COLOURS[name], linewidth=1.2)
    for name, points in stage.measured.items():
        steps, losses = zip(*points, strict=True)
        colour = SEGMENT_COLOURS[name]
        pane.plot(steps, losses, "--o", color=colour, markersize=4, linewidth=1, mfc="white")
    pane.set_title(stage.name, loc="left", fontsize=11)
    pane.set_xlabel("step")
    pane.spines[["top", "right"]].set_visible(False)


def _handles(names: set[str], rows: str) -> list[Any]:
    """Return what the legend shows: a line for each segment, and the two kinds of lines."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour, label=name.replace("_", " "))
        for name, colour in SEGMENT_COLOURS.items()
        if name in names
    ]
    measured: dict[str, Any] = {"linestyle": "--", "marker": "o", "mfc": "white"}
    return [
        *lines,
        Line2D([], [], color="#777777", label="training"),
        Line2D([], [], color="#777777", markersize=4, label=rows, **measured),
    ]
