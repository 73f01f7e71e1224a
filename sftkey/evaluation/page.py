"""A run's `report.html` and `losses.png`: its trained tokens, losses, results and answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sftkey import __version__
from sftkey.data.prepare import Prepared
from sftkey.data.preview import preview_rows
from sftkey.data.response import QuestionKey
from sftkey.errors import RunError
from sftkey.evaluation.answers import GradedAnswer, read_answers
from sftkey.evaluation.comparison import Comparison, compare_runs, sentences
from sftkey.evaluation.results import result_files
from sftkey.evaluation.statistics import points_text
from sftkey.files import appearing, read_json, write_text
from sftkey.recipe.schema import Recipe
from sftkey.training.log import read_log
from sftkey.training.run_folder import Ledger

SEGMENT_COLOURS = {
    "thinking": "#0072B2",
    "answer_tag": "#E69F00",
    "answer": "#009E73",
    "end": "#D55E00",
}
NUM_ROWS = 2  # of the token map
MOST_QUESTIONS = 500  # whose answers are shown: a page of some megabytes
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 240, 46, 24  # of a chart, in pixels
LEAST_LOSS = 1e-6  # nats a token; what is below stands here on a logarithmic scale
Points = list[tuple[int, float]]
VALIDATION = "validation rows"
MEASURED: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4, "mfc": "white"}


@dataclass(frozen=True)
class StageLosses:
    """The losses of one stage in nats a token, by segment: points of a step and a mean.

    Those of `training` are of the tokens that the stage trains, since the point before; what is
    `measured` are all segments of the completion, before and after the stage on the same `rows`,
    which aren't validation rows in every run.
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
    lines: dict[str, Points] = {name: [] for name in SEGMENT_COLOURS}
    for step, losses in steps:
        for name in lines.keys() & losses.keys():
            if math.isfinite(losses[name]):
                lines[name].append((step, max(losses[name], LEAST_LOSS)))
    return {name: points for name, points in lines.items() if points}


def spread_wide(stages: Sequence[StageLosses]) -> bool:
    """Tell whether the losses differ so much that only a logarithmic scale shows them all."""
    losses = [loss for stage in stages for _, loss in stage.points]
    return max(losses) >= 10 * min(losses)


def empty_figure(width: float, height: float) -> Any | None:
    """Return a figure of so many inches, for a file alone; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def draw_losses(folder: Path, stages: Sequence[StageLosses]) -> Path | None:
    """Draw `losses.png` into a run's folder; None without losses or without matplotlib."""
    figure = empty_figure(1.6 + 3.8 * len(stages), 3.8) if stages else None
    if figure is None:
        return None
    from matplotlib.lines import Line2D

    panes = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for pane, stage in zip(panes, stages, strict=True):
        for name, points in stage.training.items():
            pane.plot(*zip(*points, strict=True), color=SEGMENT_COLOURS[name], linewidth=1.2)
        for name, points in stage.measured.items():
            colour = SEGMENT_COLOURS[name]
            pane.plot(*zip(*points, strict=True), color=colour, linewidth=1, **MEASURED)
        pane.set_xlabel("step")
        pane.set_yscale("log" if spread_wide(stages) else "linear")
        bare(pane, stage.name)
    panes[0].set_ylabel("loss, nats a token")
    drawn = {name for stage in stages for name in (*stage.training, *stage.measured)}
    handles = [
        Line2D([], [], color=colour, label=name.replace("_", " "))
        for name, colour in SEGMENT_COLOURS.items()
        if name in drawn
    ]
    handles.append(Line2D([], [], color="#777777", label="training"))
    handles.append(Line2D([], [], color="#777777", label=stages[0].rows, **MEASURED))
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside right upper")
    file = folder / "losses.png"
    save_figure(figure, file)
    return file


def save_figure(figure: Any, file: Path) -> None:
    """Write a picture, without the version of what drew it."""
    with appearing(file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def bare(pane: Any, title: str) -> None:
    """Put a title over a pane, and take two of its four borders away."""
    pane.set_title(title, loc="left", fontsize=11)
    pane.spines[["top", "right"]].set_visible(False)


def write_page(folder: Path, recipe: Recipe, prepared: Prepared | str) -> list[Path]:
    """Write `report.html` and `losses.png` of a run, and return those that were written.

    `prepared` are its rows; or, where they can't be read, why, which then stands in their place.
    """
    losses = read_losses(folder, recipe)
    page = folder / "report.html"
    write_text(page, render_page(folder, recipe, prepared, losses))
    return [file for file in (page, draw_losses(folder, losses)) if file]


def render_page(
    folder: Path, recipe: Recipe, prepared: Prepared | str, losses: Sequence[StageLosses]
) -> str:
    """Return the page; the arguments are those of `write_page`, and the run's losses."""
    comparison = compare_runs([folder]) if result_files(folder) else None
    counts = folder / "data.json"
    rows = [] if isinstance(prepared, str) else preview_rows(recipe, prepared, NUM_ROWS)
    questions = list(_questions(folder, comparison))
    return render(
        "evaluation/page.html.jinja",
        title=recipe.name,
        recipe=recipe,
        recipe_text=recipe.to_yaml(),
        counts=read_json(counts) if counts.exists() else None,
        rows=rows,
        unread=prepared if isinstance(prepared, str) else None,
        charts=charts(losses),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT},
        segments={name: name.replace("_", " ") for name in SEGMENT_COLOURS},
        losses=losses,
        logarithmic=bool(losses) and spread_wide(losses),
        comparison=comparison,
        sentences=sentences(comparison) if comparison else [],
        questions=questions[:MOST_QUESTIONS],
        num_questions=len(questions),
        points=points_text,
    )


def render(template: str, **values: Any) -> str:
    """Return a page of a template that extends `base.html.jinja`, which needs its `title`."""
    environment = Environment(
        loader=PackageLoader("sftkey", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **values)


@dataclass(frozen=True)
class QuestionAnswers:
    """A question and what each stage answered, by stage."""

    question: str
    expected: str
    name: str
    answers: Mapping[str, GradedAnswer]

    @property
    def traits(self) -> list[str]:
        """By what the page finds it: `differs`, where stages do; `wrong`, where the last is."""
        right = [answer.right for answer in self.answers.values()]
        found = {"differs": len(set(right)) > 1, "wrong": not right[-1]}
        return [name for name, is_so in found.items() if is_so]


def _questions(folder: Path, comparison: Comparison | None) -> Iterator[QuestionAnswers]:
    """Yield the questions in their order; none of runs whose answers weren't kept with them."""
    by_stage: dict[str, dict[QuestionKey, GradedAnswer]] = {}
    for row in comparison.rows if comparison else ():
        try:
            answers = read_answers(folder, row.result.stage)
        except RunError:  # of an older version, or broken: the page says how to get them
            continue
        by_stage[row.result.stage] = {each.key: each for each in answers}
    for key in sorted({key for answers in by_stage.values() for key in answers}):
        found = {stage: answers[key] for stage, answers in by_stage.items() if key in answers}
        first = next(iter(found.values()))
        yield QuestionAnswers(first.question, first.expected, str(key), found)


@dataclass(frozen=True)
class Chart:
    """The losses of a stage, in pixels of an SVG of `WIDTH` x `HEIGHT`.

    A line has its segment, whether it is measured before and after the stage, and points; a tick
    its place, and a step or a loss.
    """

    name: str
    lines: Sequence[tuple[str, bool, Sequence[tuple[float, float]]]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def charts(stages: Sequence[StageLosses]) -> list[Chart]:
    """Lay out a chart for each stage; they share the scale of the losses."""
    losses = [loss for stage in stages for _, loss in stage.points]
    if not losses:
        return []
    scale = math.log10 if spread_wide(stages) else float
    low, high = scale(min(losses)), scale(max(losses))
    if low == high:
        low, high = low - 0.5, high + 0.5

    def y(value: float) -> float:
        return round(8 + (HEIGHT - BOTTOM - 16) * (high - value) / (high - low), 1)

    marks = ticks(low, high, whole=scale is math.log10)
    words = [f"{10**mark:g}" if scale is math.log10 else f"{mark:g}" for mark in marks]
    y_ticks = [(y(mark), word) for mark, word in zip(marks, words, strict=True)]
    found = []
    for stage in stages:
        most = max(1, *(step for step, _ in stage.points))

        def x(step: int, most: int = most) -> float:
            return round(LEFT + 8 + (WIDTH - LEFT - 24) * step / most, 1)

        lines = [
            (name, measured, [(x(step), y(scale(loss))) for step, loss in points])
            for measured, by_segment in ((False, stage.training), (True, stage.measured))
            for name, points in by_segment.items()
        ]
        steps = sorted({0, round(most / 2), most})
        found.append(Chart(stage.name, lines, [(x(step), f"{step:,}") for step in steps], y_ticks))
    return found


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about four round values between two; `whole` numbers where they are powers of ten.

    >>> ticks(5.58, 5.87), ticks(-4.3, 0.7, whole=True)
    ([5.6, 5.7, 5.8], [-4.0, -3.0, -2.0, -1.0, 0.0])
    """
    small = 1e-9  # of a step, by which floats may miss a round value
    rough = (high - low) / 4 * (1 - small)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(1.0, math.floor(rough)) if whole else step
    first, last = math.ceil(low / step - small), math.floor(high / step + small)
    return [float(f"{step * number:.12g}") for number in range(first, last + 1)]
