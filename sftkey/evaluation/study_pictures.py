"""Three pictures of a study's results, where matplotlib is installed.

The colours are those of Okabe and Ito, which people with any colour vision tell apart; arms have
markers of their own besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sftkey.evaluation.study_results import ArmFigures, StudyResults

BLACK = "#000000"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = "D^vPX*<>p"  # "s" is the control's and "o" the base model's
SEGMENTS = ("thinking", "answer_tag", "answer", "end")
Draw = Callable[[Any, StudyResults, str], bool]


def draw_pictures(folder: Path, results: StudyResults) -> list[str]:
    """Draw accuracy, gain and shares into a folder; give the names of the files.

    A picture of which nothing is known is left out; without matplotlib all are.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    files = []
    for name, draw, height in [
        ("accuracy", _accuracy, 0.42),
        ("gain", _gain, 0.0),
        ("shares", _shares, 0.32),
    ]:
        rows = max(_num_rows(results, task, name) for task in results.tasks)
        size = (6.4 * len(results.tasks), max(3.6, 1.6 + height * rows))
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panes = figure.subplots(1, len(results.tasks), squeeze=False)[0]
        drawn = [draw(pane, results, task) for pane, task in zip(panes, results.tasks, strict=True)]
        if any(drawn):
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            files.append(f"{name}.png")
    return files


def _arms(results: StudyResults, task: str) -> list[ArmFigures]:
    return [arm for arm in results.arms if arm.task == task]


def _num_rows(results: StudyResults, task: str, name: str) -> int:
    return len(_arms(results, task) if name == "accuracy" else _bars(_arms(results, task)))


def _looks(results: StudyResults, arm: str) -> tuple[str, str]:
    """Give an arm's colour and marker, the same in every picture; the control is black."""
    if arm == results.control:
        return BLACK, "s"
    names = list(dict.fromkeys(each.name for each in results.arms))
    place = [name for name in names if name not in ("base", results.control)].index(arm)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def _bare(pane: Any, title: str) -> None:
    pane.set_title(title, loc="left", fontsize=11)
    pane.spines[["top", "right"]].set_visible(False)


def _accuracy(pane: Any, results: StudyResults, task: str) -> bool:
    """Draw a row for each arm: its mean and interval, and each seed as a small ring."""
    arms = _arms(results, task)[::-1]
    for place, arm in enumerate(arms):
        colour, marker = ("#777777", "o") if not arm.stages else _looks(results, arm.name)
        low, high = arm.acc_interval
        pane.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        pane.plot(arm.acc, place, marker, color=colour, markersize=9)
        pane.annotate(
            f"{arm.acc:.3f}", (arm.acc, place), (0, 8), textcoords="offset points", ha="center"
        )
        for seed in arm.seeds if len(arm.seeds) > 1 else ():
            pane.plot(seed.acc, place - 0.22, "o", mfc="none", color=colour, markersize=4)
        if arm.name == results.control:
            pane.axvspan(low, high, color="#dddddd", alpha=0.6, linewidth=0, zorder=0)
    pane.set_yticks(range(len(arms)), [arm.name for arm in arms])
    pane.set_ylim(-0.6, len(arms) - 0.3)
    pane.set_xlabel("accuracy, 95% interval over seeds and questions\nrings: single seeds")
    _bare(pane, f"{task}: accuracy (grey: interval of {results.control})")
    return bool(arms)


def _gain(pane: Any, results: StudyResults, task: str) -> bool:
    """Draw each arm's gain on the control, by quarters of the thinking/key ratio."""
    arms = [
        arm for arm in _arms(results, task) if arm.by_ratio and arm.by_ratio[0].gain is not None
    ]
    for place, arm in enumerate(arms):
        colour, marker = _looks(results, arm.name)
        at = [number + 0.7 * ((place + 0.5) / len(arms) - 0.5) for number in range(4)]
        gains = [100 * (bucket.gain or 0.0) for bucket in arm.by_ratio]
        ends = [[100 * end for end in bucket.gain_interval or (0, 0)] for bucket in arm.by_ratio]
        for x, (low, high) in zip(at, ends, strict=True):
            pane.plot([x, x], [low, high], color=colour, linewidth=2)
        pane.plot(at, gains, marker, color=colour, markersize=7, label=arm.name)
    if not arms:
        pane.set_axis_off()
        return False
    names = [f"{bucket.low:.3g} to {bucket.high:.3g}" for bucket in arms[0].by_ratio]
    pane.set_xticks(range(len(names)), names)
    for border in range(1, len(names)):
        pane.axvline(border - 0.5, color="#dddddd", linewidth=1, zorder=0)
    pane.axhline(0, color=BLACK, linewidth=1)
    pane.set_xlabel("tokens of the reference's thinking for each of its key, in quarters")
    pane.set_ylabel(f"points more than {results.control}")
    pane.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _bare(pane, f"{task}: gain by thinking/key ratio")
    return True


Bar = tuple[str, dict[str, float]]


def _bars(arms: Sequence[ArmFigures]) -> list[Bar]:
    """Give the bars of loss and gradient, of every stage of every arm that starts elsewhere."""
    bars: list[Bar] = []
    for arm in arms:
        for stage in arm.stages:
            for what, found in (("loss", arm.loss_share), ("gradient", arm.gradient_share)):
                bar = (f"{stage}, {what}", found.get(stage, {}))
                if bar[1] and bar not in bars:
                    bars.append((f"{arm.name}: {bar[0]}", bar[1]))
    # Arms that share a stage have its very figures: one bar is enough.
    unique: dict[str, Bar] = {}
    for name, shares in bars:
        unique.setdefault(f"{name.partition(': ')[2]} {sorted(shares.items())}", (name, shares))
    return list(unique.values())


def _shares(pane: Any, results: StudyResults, task: str) -> bool:
    """Draw stacked bars: what loss and gradient are made of when a stage begins."""
    bars = _bars(_arms(results, task))[::-1]
    if not bars:
        pane.set_axis_off()
        return False
    for place, (_, found) in enumerate(bars):
        left = 0.0
        for segment, colour in zip(SEGMENTS, COLOURS, strict=False):
            share = found.get(segment, 0.0)
            label = segment.replace("_", " ") if place == len(bars) - 1 else None
            pane.barh(place, share, left=left, color=colour, label=label, edgecolor="white")
            if share >= 0.08:
                middle = left + share / 2
                pane.text(middle, place, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    pane.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    pane.set_xlim(0, 1)
    pane.set_xlabel("share of the completion's sum, as the stage begins")
    pane.legend(frameon=False, fontsize=9, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.18))
    _bare(pane, f"{task}: loss and gradient by segment")
    return True
