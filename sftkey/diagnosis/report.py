"""A diagnosis for people and for programs: the conditions, their differences, what follows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sftkey.diagnosis.rule import (
    Condition,
    ConditionFigures,
    Gap,
    Recommendation,
    own_thinking_is_empty,
)

THINKINGS = {"own": "its own", "reference": "the reference's", "none": "none"}


def as_json(figures: ConditionFigures, recommendation: Recommendation) -> dict[str, Any]:
    """Return a diagnosis as plain data; shares and differences run from -1 to 1."""
    return {
        "num_rows": figures.num_rows,
        "chance": figures.chance,
        "num_unclosed": figures.num_unclosed,
        "num_unanswered": figures.num_unanswered,
        "conditions": {name: asdict(getattr(figures, name)) for name in THINKINGS},
        "differences": {
            name: asdict(getattr(figures, name))
            for name in ("reference_over_own", "own_over_none", "reference_over_none")
        },
        "own_thinking_is_empty": own_thinking_is_empty(figures),
        "recommendation": {
            "kind": recommendation.kind,
            "regime": recommendation.regime,
            "sentence": recommendation.sentence,
            "warnings": list(recommendation.warnings),
        },
    }


def render(figures: ConditionFigures, recommendation: Recommendation) -> Group:
    """Return both tables and the paragraph, for a rich console."""
    lines = [Text()]
    if figures.num_unclosed:
        what = f"{figures.num_unclosed} of {figures.num_rows} own thinkings never ended"
        lines.append(Text(f"{what}: after them the key has no loss.\n"))
    lines.append(Text(recommendation.paragraph))
    return Group(_conditions(figures), Text(), _differences(figures), *lines)


def _grid(first: str, headers: list[str]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    grid.add_column(first, no_wrap=True)
    for header in headers:
        grid.add_column(header, justify="right", no_wrap=True)
    return grid


def _conditions(figures: ConditionFigures) -> Table:
    headers = ["right", "Acc\n[95%]", "never\nstopped", "un-\nparsed", "answered\nwrong"]
    grid = _grid("after the\nthinking", [*headers, "key loss,\nnats a token"])
    for name, thinking in THINKINGS.items():
        grid.add_row(thinking, *_cells(getattr(figures, name), figures.num_rows))
    return grid


def _cells(condition: Condition, num_rows: int) -> list[str]:
    return [
        f"{condition.num_right} of {num_rows}",
        "{:.3f}\n[{:.3f}, {:.3f}]".format(condition.acc, *condition.acc_interval),
        str(condition.num_never_stopped),
        str(condition.num_unparsed),
        str(condition.num_answered_wrong),
        "-" if condition.nats is None else f"{condition.nats:.4f}",
    ]


def _differences(figures: ConditionFigures) -> Table:
    grid = _grid("difference", ["points [95%]", "nats a token [95%]"])
    for name, gap in {
        "reference's - own": figures.reference_over_own,
        "own - none": figures.own_over_none,
        "reference's - none": figures.reference_over_none,
    }.items():
        grid.add_row(name, gap.points.replace(" points", ""), _nats(gap))
    return grid


def _nats(gap: Gap) -> str:
    if gap.nats is None:
        return "-"
    if gap.nats_interval is None:
        return f"{gap.nats:+.4f}"
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(gap.nats, *gap.nats_interval)
