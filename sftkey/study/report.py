"""A study's results as people read them: a table for each task, and what was shown and what not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sftkey.evaluation.statistics import CHANCE, score_of
from sftkey.evaluation.thinking_change import MOST_LOSS
from sftkey.evaluation.thinking_form import PASSED
from sftkey.study.results import ArmFigures, Detectable, DifferenceToControl, Interval, StudyResults

HEAD = ("arm", "n", "Acc [95%]", "Fmt", "points more than {control} [95%]", "p", "tokens", "time")


def report(
    results: StudyResults,
    pictures: Sequence[str] | None = (),
    title: str = "Results",
    alpha: float | None = None,
) -> str:
    """Return `report.md`.

    Args:
        results: The study's.
        pictures: Files beside the report; if there are none, it says how to get them. None:
            nothing is said of pictures.
        title: Its head.
        alpha: Adds Score to the tables, alpha * Acc + (1 - alpha) * Fmt.
    """
    lines = [f"# {title}", ""]
    for task in results.tasks:
        lines += [
            f"## {task}",
            "",
            table(results, task, alpha),
            "",
            " ".join(said(results, task)),
            "",
        ]
        lines += _list("Warnings", warnings(results, task))
        lines += _list("Chosen on the validation rows", chosen(results, task))
        lines += _list("The thinking", thinking(results, task))
    lines += [] if pictures is None else _pictures(pictures)
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines += ["## Where it was measured", "", f"`{results.command}`, commit {results.commit}, "]
    lines[-1] += f"{results.hardware}; {versions}." if versions else f"{results.hardware}."
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "Intervals are 95% ones over seeds and questions; n is questions x seeds. p is the smallest "
    "alpha whose interval excludes 0, Holm-corrected over the arms; a primary comparison is tested "
    "first, and alone. A difference counts as shown if p is below 0.05 and there are two seeds or "
    "more. Tokens are the trained "
    "ones and time that of training, of all stages, the mean over seeds; the time of those on the "
    "first one's hardware.",
)


def _list(head: str, items: Sequence[str]) -> list[str]:
    return [f"### {head}", "", *(f"- {item}" for item in items), ""] if items else []


def _pictures(files: Sequence[str]) -> list[str]:
    if not files:
        how = 'python -m pip install "sftkey[plots]"'
        return [f"No pictures: matplotlib isn't installed (`{how}`, then the same command).", ""]
    return [line for file in files for line in (f"![{file.removesuffix('.png')}]({file})", "")]


def table(results: StudyResults, task: str, alpha: float | None = None) -> str:
    """Return a task's table in Markdown; `alpha` adds Score."""
    arms = [arm for arm in results.arms if arm.task == task]
    rows = [[cell.format(control=results.control) for cell in HEAD], *map(_row, arms)]
    if alpha is not None:
        rows[0].append(f"Score, alpha {alpha:g}")
        for row, arm in zip(rows[1:], arms, strict=True):
            row.append(f"{score_of(arm.acc, arm.fmt, alpha):.3f}")
    if any(arm.rates for arm in arms):
        rows[0] += ["valid thinkings [95%]", "Rpass@1 [95%]"]
        for row, arm in zip(rows[1:], arms, strict=True):
            row += [arm.rates[name].text() if arm.rates else "" for name in ("valid", PASSED)]
    judged = [arm.judge for arm in arms]
    if any(judged):
        rows[0].append("judge: Acc, agreement, kappa")
        for row, judge in zip(rows[1:], judged, strict=True):
            kappa = "" if judge is None or judge.kappa is None else f", {judge.kappa:.2f}"
            agreed = f"{judge.acc:.3f}, {judge.num_agreeing}/{judge.num_judged}" if judge else ""
            row.append(agreed + kappa)
    rules = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))


def _row(arm: ArmFigures) -> list[str]:
    difference = arm.difference_to_control
    times = f" x {arm.num_seeds}" if arm.stages or arm.num_seeds > 1 else ""
    return [
        arm.name,
        f"{arm.num_questions}{_in_conversations(arm)}{times}",
        f"{arm.acc:.3f} [{arm.acc_interval[0]:.3f}, {arm.acc_interval[1]:.3f}]",
        f"{arm.fmt:.3f}",
        f"{_points(difference.difference)} {_ends(difference.interval)}" if difference else "",
        _p(difference.p_holm) if difference else "",
        "" if arm.trained_tokens is None else f"{arm.trained_tokens:,}",
        "" if arm.seconds is None else f"{arm.seconds / 60:.1f} min",
    ]


def _in_conversations(arm: ArmFigures) -> str:
    count = arm.num_conversations
    return "" if count is None else f" in {count} conversations"


def said(results: StudyResults, task: str) -> list[str]:
    """Say of one task what was shown and what wasn't, against which control."""
    sentences = [_stated(each) for each in results.detectable_difference if each.task == task]
    if results.primary:
        sentences.append(f"The primary comparison, tested first, is that of {results.primary}.")
    arms = [arm for arm in results.arms if arm.task == task and arm.difference_to_control]
    shown, unshown, runs = [], [], []
    for arm in arms:
        difference = arm.difference_to_control
        if difference and difference.shown:
            word = "better" if difference.difference > 0 else "worse"
            shown.append(f"{arm.name} answers {word} than {results.control} {_figures(difference)}")
        elif difference and difference.num_seeds == 1:
            runs.append(f"{arm.name} against {results.control} {_figures(difference)}")
        elif difference:
            unshown.append(f"{arm.name} {_figures(difference)}")
    if shown:
        sentences.append(f"Shown: {'; '.join(shown)}.")
    if unshown:
        sentences.append(
            f"Not shown to be better or worse than {results.control}: {'; '.join(unshown)}. That "
            "is no proof that they are alike."
        )
    if not arms:
        sentences.append(f"Nothing is compared: {results.control} has no cell beside another arm.")
    if runs:
        sentences.append(
            f"Of one seed, so of these two runs and not of two ways of training: {'; '.join(runs)}."
            " Interval and p say nothing of what another seed would give."
        )
    return sentences


def _stated(stated: Detectable) -> str:
    seeds = f"{stated.num_seeds} seed{'s' * (stated.num_seeds != 1)}"
    comparisons = f"{stated.num_arms} comparison{'s' * (stated.num_arms != 1)}"
    if stated.difference is None:
        return (
            f"{stated.num_questions} questions and one seed show nothing of the ways of training."
        )
    source = "estimated from these cells" if stated.estimated else "supposed"
    return (
        f"{stated.num_questions} questions, {seeds} and {comparisons} show a difference of "
        f"{100 * stated.difference:.1f} points in four of five studies ({source}: two runs differ "
        f"on {stated.differing:.0%} of the questions, {stated.by_question:.0%} of it alike in all "
        f"seeds, and their difference by {100 * stated.between_seeds:.1f} points from seed to "
        "seed); smaller ones are likely missed."
    )


def _figures(difference: DifferenceToControl) -> str:
    points = f"{_points(difference.difference)} points {_ends(difference.interval)}"
    return f"({points}, p {_p(difference.p_holm)})"


def warnings(results: StudyResults, task: str) -> list[str]:
    """Say what is to be minded before anything is believed."""
    found = []
    arms = [arm for arm in results.arms if arm.task == task and arm.stages]
    most = max((arm.num_seeds for arm in arms), default=0)
    for arm in arms:
        if arm.num_seeds < most:
            found.append(f"{arm.name}: {arm.num_seeds} of {most} seeds are finished.")
        told = arm.thinking
        if told and told.loss and told.loss[1] - told.loss[0] > MOST_LOSS:
            rise = told.loss[1] - told.loss[0]
            found.append(
                f"{arm.name}: the last stage raised the thinking's validation loss by {rise:.4f} "
                "nats a token."
            )
        if told and told.num_made_wrong > told.num_made_right:
            found.append(
                f"{arm.name}: {told.num_made_wrong} right thinkings turned wrong against "
                f"{told.before}, {told.num_made_right} wrong ones right."
            )
        if told and told.valid and told.valid.p < CHANCE:
            found.append(f"{arm.name}: against {told.before}, {told.valid.text()}.")
    if not all(arm.same_questions for arm in arms):
        found.append("Each seed answered other questions, so a question has one flag an arm.")
    if "," in results.commit:
        found.append(f"The cells are of several commits: {results.commit}.")
    return found


def chosen(results: StudyResults, task: str) -> list[str]:
    """List what was chosen on the validation rows, by arm and stage."""
    return [
        f"{arm.name}, {stage}: {', '.join(f'{key} {value:g}' for key, value in values.items())}"
        for arm in results.arms
        if arm.task == task
        for stage, values in arm.chosen.items()
    ]


def thinking(results: StudyResults, task: str) -> list[str]:
    """Say of each arm what its last stage did to the thinking, as far as it is known."""
    return [
        f"{arm.name}: {'; '.join(figures)}"
        for arm in results.arms
        if arm.task == task and (figures := list(_thinking(arm)))
    ]


def _thinking(arm: ArmFigures) -> Iterable[str]:
    if rates := arm.rates:
        forms = ("valid", "empty", "truncated", "missing")
        yield ", ".join(f"{form} {rates[form].rate:.1%}" for form in forms)
    told = arm.thinking
    if told is None:
        return
    if told.num_judged:
        yield f"right {told.num_right} of {told.num_judged}"
    if told.num_compared:
        yield f"identical to {told.before}'s {told.num_identical} of {told.num_compared}"
    if told.mean_length is not None:
        yield f"mean length {told.mean_length:.1f} tokens over {told.num_questions}"
    if told.loss:
        yield "validation loss {:.4f} -> {:.4f} nats a token".format(*told.loss)
    if told.num_judged_following:
        yield f"the answer follows from it {told.num_following} of {told.num_judged_following}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _ends(interval: Interval) -> str:
    return "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in interval))


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


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
    """Return an arm's colour and marker, the same in every picture; the control is black."""
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
    """Return the bars of loss and gradient, of every stage of every arm that starts elsewhere."""
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
