"""`report.html` of a study, all in one file, and its pictures."""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sftkey.data.response import QuestionKey
from sftkey.errors import RunError
from sftkey.evaluation.answers import read_answers
from sftkey.evaluation.page import SEGMENT_COLOURS, bare, empty_figure, render, save_figure
from sftkey.evaluation.results import Question
from sftkey.files import write_text
from sftkey.recipe.loss_on import loss_weights
from sftkey.recipe.stages import BASE
from sftkey.study import report
from sftkey.study.results import ArmFigures, FinishedCell, StudyResults
from sftkey.study.schema import Study
from sftkey.study.tasks import StudyFolder, arm_recipe, run_name, tasks_of

MOST_QUESTIONS = 6000  # on a page, which then has some megabytes


def write_page(
    folder: Path,
    results: StudyResults,
    cells: Sequence[FinishedCell],
    pictures: Sequence[str],
    title: str,
) -> Path:
    """Write `report.html` beside `report.md` in a study's folder, and return it.

    The results are of the cells, the pictures files in the folder. Where the study's runs still lie
    there, too, the questions have their texts.
    """
    most = MOST_QUESTIONS // len(results.tasks)
    tasks = [_task(folder, results, cells, name, most) for name in results.tasks]
    names = dict.fromkeys(arm.name for arm in results.arms)
    page = folder / "report.html"
    text = render(
        "study/page.html.jinja",
        title=title,
        results=results,
        tasks=tasks,
        num_shown=sum(len(task["questions"]) for task in tasks),
        texts=any(asked.text for task in tasks for asked in task["questions"]),
        others=[name for name in names if name not in (BASE, results.control)],
        pictures={
            Path(name).stem: b64encode((folder / name).read_bytes()).decode() for name in pictures
        },
        alone=report.ALONE,
        where=report.where(results),
        notes=report.NOTES,
    )
    write_text(page, text)
    return page


def _task(
    folder: Path, results: StudyResults, cells: Sequence[FinishedCell], task: str, most: int
) -> dict[str, Any]:
    """Gather what the page shows of a task; of more than `most` questions the first ones."""
    here = [cell for cell in cells if cell.task == task]
    arms = [arm.name for arm in results.of(task)]
    questions = list(_questions(folder, here, arms, results.control))
    questions.sort(key=lambda asked: "differs" not in asked.traits)
    equal = report.equal_arms(results, task)
    return {
        "name": task,
        "arms": arms,
        "rows": report.rows(results, task),
        "said": report.said(results, task),
        "equals": {head: report.rows(results, task, arms=arms) for head, arms in equal.items()},
        "lists": {head: found(results, task) for head, found in report.LISTS.items()},
        "questions": questions[:most],
        "num_questions": len(questions),
    }


@dataclass(frozen=True)
class Verdict:
    """What an arm's seeds answered to a question."""

    num_right: int
    num_asked: int
    num_unparsed: int

    @property
    def word(self) -> str:
        """`right`, `wrong` or `unparsed` where all seeds agree, else nothing."""
        num_wrong = self.num_asked - self.num_right - self.num_unparsed
        counts = {"right": self.num_right, "unparsed": self.num_unparsed, "wrong": num_wrong}
        agreed = (word for word, count in counts.items() if count == self.num_asked)
        return next(agreed, "") if self.num_asked else ""

    @property
    def text(self) -> str:
        """The word of one seed, or how many of several were right."""
        return f"{self.num_right} of {self.num_asked}" if self.num_asked > 1 else self.word


@dataclass(frozen=True)
class QuestionVerdicts:
    """A question, and by arm what was answered."""

    name: str
    text: str
    verdicts: Mapping[str, Verdict]
    control: str

    @property
    def traits(self) -> list[str]:
        """By what the page finds it: `differs`, and the arms that are better or worse."""
        shares = {
            arm: verdict.num_right / verdict.num_asked
            for arm, verdict in self.verdicts.items()
            if verdict.num_asked and arm != BASE
        }
        found = ["differs"] if len(set(shares.values())) > 1 else []
        at = shares.get(self.control)
        for arm, share in shares.items():
            if at is not None and share != at:
                found.append(f"{'better' if share > at else 'worse'}-{arm}")
        return found


def _questions(
    folder: Path, cells: Sequence[FinishedCell], arms: Sequence[str], control: str
) -> Iterator[QuestionVerdicts]:
    """Yield a task's questions; seeds that answered the same ones stand in one row."""
    sets: dict[str | None, list[FinishedCell]] = defaultdict(list)
    for cell in cells:
        sets[cell.questions_sha256].append(cell)
    for group in sets.values():
        seeds = sorted({cell.seed for cell in group})
        of_seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
        asked: dict[QuestionKey, dict[str, list[Question]]]  # and by arm
        asked = defaultdict(lambda: defaultdict(list))
        based = next((cell.base.questions for cell in group if cell.base), ())
        for arm, questions in [*((cell.arm, cell.questions) for cell in group), (BASE, based)]:
            for question in questions:
                asked[question.key][arm].append(question)
        texts = _texts(folder, group)
        for key, by_arm in asked.items():
            yield QuestionVerdicts(
                f"{of_seeds if len(sets) > 1 else ''}{key}",
                texts.get(key, ""),
                {arm: _verdict(by_arm[arm]) for arm in arms},
                control,
            )


def _verdict(asked: Sequence[Question]) -> Verdict:
    unparsed = sum(not (question.parsed or question.correct) for question in asked)
    return Verdict(sum(question.correct for question in asked), len(asked), unparsed)


def _texts(folder: Path, cells: Sequence[FinishedCell]) -> dict[QuestionKey, str]:
    """Return the questions, from the first of the cells' runs that has them."""
    for cell in cells:
        run = StudyFolder(folder).runs(cell.task) / run_name(cell.arm, cell.seed)
        try:
            answers = read_answers(run, cell.stages[-1])
        except RunError:  # a copied folder has cells alone
            continue
        return {each.key: each.question for each in answers}
    return {}


BLACK = "#000000"
COLOURS = (*SEGMENT_COLOURS.values(), "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = "D^vPX*<>p"  # "s" is the control's and "o" the base model's
Draw = Callable[[Any, StudyResults, str], bool]


def draw_pictures(
    folder: Path, results: StudyResults, weights: Mapping[tuple[str, str], StageWeights]
) -> list[str]:
    """Draw accuracy, cost, gain and shares into a folder, and return the names of the files.

    A picture of which nothing is known is left out; without matplotlib all are. `weights` are, by
    task and arm, what `stage_weights` returns.
    """
    files: list[str] = []
    bars = {task: _bars(results.of(task), weights) for task in results.tasks}
    num_arms = max(len(results.of(task)) for task in results.tasks)
    pictures: list[tuple[str, Sequence[Draw], float, int]] = [
        ("accuracy", [_accuracy], 0.42, num_arms),
        ("cost", [partial(_cost, "tokens"), partial(_cost, "minutes")], 0.11, num_arms),
        ("gain", [_gain], 0.0, 0),
        ("shares", [partial(_shares, bars)], 0.32, max(map(len, bars.values()))),
    ]
    for name, draws, height, rows in pictures:
        figure = empty_figure(6.4 * len(results.tasks), len(draws) * max(3.6, 1.6 + height * rows))
        if figure is None:
            return []
        panes = figure.subplots(len(draws), len(results.tasks), squeeze=False)
        drawn = False
        for (draw, task), pane in zip(product(draws, results.tasks), panes.flat, strict=True):
            if draw(pane, results, task):
                drawn = True
            else:
                pane.set_axis_off()
        if drawn:
            save_figure(figure, folder / f"{name}.png")
            files.append(f"{name}.png")
    return files


def _looks(results: StudyResults, arm: str) -> tuple[str, str]:
    """Return an arm's colour and marker, the same in every picture; the control is black."""
    if arm == results.control:
        return BLACK, "s"
    names = list(dict.fromkeys(each.name for each in results.arms))
    place = [name for name in names if name not in (BASE, results.control)].index(arm)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def _accuracy(pane: Any, results: StudyResults, task: str) -> bool:
    """Draw a row for each arm: its mean and interval, and each seed as a small ring.

    A base model that lies farther from the arms than they lie apart would leave them no width: an
    arrow at the border says where it is.
    """
    arms = results.of(task)[::-1]
    left, right = _width(arms)
    pane.set_xlim(left, right)
    for place, arm in enumerate(arms):
        colour, marker = ("#777777", "o") if not arm.stages else _looks(results, arm.name)
        text, at = f"{arm.acc:.3f}", (arm.acc, place)
        if not left <= arm.acc <= right:
            edge, arrow, shift, side = (
                (left, "<", 8, "left") if arm.acc < left else (right, ">", -8, "right")
            )
            pane.plot(edge, place, arrow, color=colour, clip_on=False)
            text, at = f"{text}, outside the picture", (edge, place)
            pane.annotate(text, at, (shift, 0), textcoords="offset points", ha=side, va="center")
            continue
        low, high = arm.acc_interval
        pane.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        pane.plot(arm.acc, place, marker, color=colour, markersize=9)
        pane.annotate(text, at, (0, 8), textcoords="offset points", ha="center")
        for seed in arm.seeds if len(arm.seeds) > 1 else ():
            pane.plot(seed.acc, place - 0.22, "o", mfc="none", color=colour, markersize=4)
        if arm.name == results.control:
            pane.axvspan(low, high, color="#dddddd", alpha=0.6, linewidth=0, zorder=0)
    pane.set_yticks(range(len(arms)), [arm.name for arm in arms])
    pane.set_ylim(-0.6, len(arms) - 0.3)
    pane.set_xlabel("accuracy, 95% interval over seeds and questions\nrings: single seeds")
    bare(pane, f"{task}: accuracy (grey: interval of {results.control})")
    return bool(arms)


def _cost(of: str, pane: Any, results: StudyResults, task: str) -> bool:
    """Draw each trained arm where its cost and its accuracy lie, with the accuracy's interval."""
    arms = {arm.name: arm for arm in results.of(task) if arm.stages}
    costs = {
        name: float((arm.trained_tokens if of == "tokens" else arm.seconds) or 0)
        for name, arm in arms.items()
    }
    known = {name: cost if of == "tokens" else cost / 60 for name, cost in costs.items() if cost}
    if not known:
        return False
    for name, at in _side_by_side(known).items():
        colour, marker = _looks(results, name)
        low, high = arms[name].acc_interval
        pane.plot([at, at], [low, high], color=colour, linewidth=2, solid_capstyle="butt")
        pane.plot(at, arms[name].acc, marker, color=colour, markersize=6, linestyle="", label=name)
    what = "trained tokens" if of == "tokens" else "minutes of training on one kind of hardware"
    pane.set_xlabel(f"{what}, all stages together\nbars: 95% intervals over seeds and questions")
    pane.xaxis.set_major_formatter("{x:,.0f}" if of == "tokens" else "{x:g}")
    pane.set_xlim(left=0)
    pane.set_ylabel("accuracy")
    pane.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bare(pane, f"{task}: accuracy over {'trained tokens' if of == 'tokens' else 'time'}")
    return True


def _side_by_side(costs: Mapping[str, float]) -> dict[str, float]:
    """Return where arms are drawn: those that cost the same stand beside each other.

    >>> _side_by_side({"a": 100.0, "b": 50.0, "c": 100.0})
    {'b': 50.0, 'a': 99.0, 'c': 101.0}
    """
    most = max(costs.values())
    step, groups = 0.02 * most, [list[str]()]
    for name in sorted(costs, key=lambda name: costs[name]):
        if groups[-1] and costs[name] - costs[groups[-1][0]] >= step / 2:
            groups.append([])
        groups[-1].append(name)
    return {
        name: costs[name] + step * (place - (len(group) - 1) / 2)
        for group in groups
        for place, name in enumerate(group)
    }


def _width(arms: Sequence[ArmFigures]) -> tuple[float, float]:
    """Return the ends of the axis: all that is drawn of the trained arms, and of a near base."""
    ends = {arm.name: [*arm.acc_interval, *(seed.acc for seed in arm.seeds)] for arm in arms}
    trained = [ends[arm.name] for arm in arms if arm.stages] or list(ends.values())
    low, high = min(map(min, trained)), max(map(max, trained))
    apart = max(high - low, 0.02)
    for each in ends.values():
        if max(each) >= low - apart and min(each) <= high + apart:
            low, high = min(low, *each), max(high, *each)
    margin = 0.06 * max(high - low, 0.02)
    return low - margin, high + margin


def _gain(pane: Any, results: StudyResults, task: str) -> bool:
    """Draw each arm's gain on the control, by parts of the thinking/key ratio."""
    arms = [arm for arm in results.of(task) if any(part.gain is not None for part in arm.by_ratio)]
    for place, arm in enumerate(arms):
        colour, marker = _looks(results, arm.name)
        aside = 0.7 * ((place + 0.5) / len(arms) - 0.5)
        at = [number + aside for number in range(len(arm.by_ratio))]
        gains = [100 * (bucket.gain or 0.0) for bucket in arm.by_ratio]
        for x, bucket in zip(at, arm.by_ratio, strict=True):
            ends = [100 * end for end in bucket.gain_interval or (0, 0)]
            pane.plot([x, x], ends, color=colour, linewidth=2)
        pane.plot(at, gains, marker, color=colour, markersize=7, label=arm.name)
    if not arms:
        return False
    names = [f"{_ends(each.low, each.high)}\nn {each.num_questions}" for each in arms[0].by_ratio]
    pane.set_xticks(range(len(names)), names)
    for border in range(1, len(names)):
        pane.axvline(border - 0.5, color="#dddddd", linewidth=1, zorder=0)
    pane.axhline(0, color=BLACK, linewidth=1)
    pane.set_xlabel("tokens of the reference's thinking for each of its key\nn: questions a seed")
    pane.set_ylabel(f"points more than {results.control}")
    pane.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bare(pane, f"{task}: gain by thinking/key ratio")
    return True


def _ends(low: float, high: float) -> str:
    """Write two ends with as many digits as tell them apart; one value where they are one.

    >>> _ends(1.75, 1.75), _ends(1.5, 2.0), _ends(1.7481, 1.7519)
    ('1.75', '1.5 to 2', '1.748 to 1.752')
    """
    if low == high:
        return f"{low:.3g}"
    digits = next(n for n in range(3, 18) if f"{low:.{n}g}" != f"{high:.{n}g}")
    return f"{low:.{digits}g} to {high:.{digits}g}"


StageWeights = Mapping[str, Mapping[str, float]]  # by stage: each segment's weight in the loss


def stage_weights(study: Study, folder: Path, arm: ArmFigures) -> StageWeights:
    """Return the weight of each segment in the losses of an arm's stages.

    The folder is that of the study's file, from which its recipes are named.
    """
    task = next((task for task in tasks_of(study, folder) if task.name == arm.task), None)
    if task is None or arm.name not in study.arms:
        return {}
    picked = [arm.chosen.get(stage, {}) for stage in arm.stages]
    recipe = arm_recipe(study, task, arm.name, study.seeds[0], picked)
    return {stage.name: loss_weights(stage.loss_on) for stage in recipe.stages}


Bar = tuple[str, dict[str, float]]


def _bars(arms: Sequence[ArmFigures], weights: Mapping[tuple[str, str], StageWeights]) -> list[Bar]:
    """Return the bars of loss and gradient: what each stage of each arm trains on.

    Arms that share a stage have its very figures: one bar is enough.
    """
    unique: dict[str, Bar] = {}
    for arm in arms:
        for stage in arm.stages:
            by_segment = weights.get((arm.task, arm.name), {}).get(stage, {})
            for what, found in (("loss", arm.loss_share), ("gradient", arm.gradient_share)):
                shares = _trained(found.get(stage, {}), by_segment)
                if shares:
                    figures = f"{stage}, {what} {sorted(shares.items())}"
                    unique.setdefault(figures, (f"{arm.name}: {stage}, {what}", shares))
    return list(unique.values())


def _trained(shares: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the shares that segments have of a stage's own sum, from those of the completion."""
    parts = {name: share * weights.get(name, 0.0) for name, share in shares.items()}
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items() if part} if whole else {}


def _shares(bars: Mapping[str, Sequence[Bar]], pane: Any, results: StudyResults, task: str) -> bool:
    """Draw stacked bars: what a stage's loss and gradient are made of when it begins."""
    drawn = bars[task][::-1]
    if not drawn:
        return False
    for place, (_, found) in enumerate(drawn):
        left = 0.0
        for segment, colour in SEGMENT_COLOURS.items():
            share = found.get(segment, 0.0)
            label = segment.replace("_", " ") if place == len(drawn) - 1 else None
            pane.barh(place, share, left=left, color=colour, label=label, edgecolor="white")
            if share >= 0.08:
                middle = left + share / 2
                pane.text(middle, place, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    pane.set_yticks(range(len(drawn)), [name for name, _ in drawn], fontsize=8)
    pane.set_xlim(0, 1)
    pane.set_xlabel("share of what the stage trains on, as it begins")
    pane.legend(frameon=False, fontsize=9, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.18))
    bare(pane, f"{task}: loss and gradient by segment, weights counted")
    return True
