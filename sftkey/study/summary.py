"""From finished cells to the figures of each arm."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import PureWindowsPath
from statistics import fmean
from typing import Any

from sftkey.evaluation.judge import judge_figures
from sftkey.evaluation.results import answer_figures
from sftkey.evaluation.stage import turned
from sftkey.evaluation.statistics import CHANCE, by_conversation, num_conversations
from sftkey.evaluation.thinking import valid_change
from sftkey.recipe.stages import BASE
from sftkey.study.rates import buckets, rates, share
from sftkey.study.results import (
    Answered,
    ArmFigures,
    Detectable,
    DifferenceToControl,
    FinishedCell,
    SeedFigures,
    StudyResults,
    ThinkingFigures,
    paired,
    same_questions,
    table_of,
)
from sftkey.study.seeds import (
    Supposed,
    corrected,
    detectable_difference,
    difference_p,
    estimate,
    observed,
)

Cells = Sequence[FinishedCell]
Shares = dict[str, dict[str, float]]


def thinking_figures(cells: Cells, earlier: Cells) -> ThinkingFigures:
    """Say what an arm's last stage did; `earlier`: the arm that ended one stage before it."""
    questions = [question for cell in cells for question in cell.questions]
    judged = [each.thinking_right for each in questions if each.thinking_right is not None]
    following = [each.follows for each in questions if each.follows is not None]
    lengths = [cell.mean_thinking_length for cell in cells if cell.mean_thinking_length is not None]
    pairs = [
        (old, new)
        for cell, other in paired(cells, earlier)
        for old, new in zip(other.questions, cell.questions, strict=True)
        if old.thinking_hash and new.thinking_hash
    ]
    change = turned(pairs)
    return ThinkingFigures(
        num_questions=len(questions),
        num_judged=len(judged),
        num_right=sum(judged),
        mean_length=fmean(lengths) if lengths else None,
        before=earlier[0].arm if pairs else None,
        num_compared=len(pairs),
        num_identical=sum(old.thinking_hash == new.thinking_hash for old, new in pairs),
        num_made_wrong=change.num_made_wrong if change else 0,
        num_made_right=change.num_made_right if change else 0,
        loss=_thinking_loss(cells),
        num_judged_following=len(following),
        num_following=sum(following),
        valid=valid_change(pairs),
    )


def _thinking_loss(cells: Cells) -> tuple[float, float] | None:
    means = []
    for at in ("start", "end"):
        found = [cell.validation.get(cell.stages[-1], {}).get(at, {}) for cell in cells]
        if not all("thinking" in losses for losses in found):
            return None
        means.append(fmean(losses["thinking"] for losses in found))
    return means[0], means[1]


def shares(cells: Cells) -> tuple[Shares, Shares]:
    """Return each segment's share of the loss and of the gradient's norm, by stage, over seeds.

    Of the validation rows' completions as the stage finds them, trained or not: what a plain loss
    over all of it would be made of.
    """
    losses: dict[str, list[dict[str, float]]] = {}
    gradients: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        for stage in cell.stages:
            start = cell.validation.get(stage, {}).get("start", {})
            sums = {
                name: loss * cell.segment_tokens[name]
                for name, loss in start.items()
                if name in cell.segment_tokens and name != "prompt"
            }
            losses.setdefault(stage, []).append(_of_whole(sums))
            norms = dict(cell.gradient_norm.get(stage, {}))
            norms.pop("prompt", None)
            gradients.setdefault(stage, []).append(_of_whole(norms))
    return _means(losses), _means(gradients)


def _of_whole(parts: dict[str, float]) -> dict[str, float]:
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items()} if whole else {}


def _means(by_stage: dict[str, list[dict[str, float]]]) -> Shares:
    return {
        stage: {name: fmean(each[name] for each in seeds) for name in seeds[0]}
        for stage, seeds in by_stage.items()
        if seeds[0] and all(each.keys() == seeds[0].keys() for each in seeds)
    }


ANSWER_FLAGS = ("correct", "strict")


def summarize(
    cells: Cells, control: str, arms: Sequence[str] = (), primary: str | None = None
) -> StudyResults:
    """Gather the results of all cells that are finished, as `read_cells` gives them.

    Arms that `arms` doesn't name follow in the order of the cells; that of `primary` is tested
    first.
    """
    tasks = {task: list(group) for task, group in groupby(cells, key=lambda cell: cell.task)}
    figures: list[ArmFigures] = []
    for group in tasks.values():
        by_arm = _by_arm(group, arms)
        differences = _differences(by_arm, control, primary)
        figures += filter(None, [_base(group)])
        for name, of_arm in by_arm.items():
            figures.append(_arm(of_arm, by_arm, by_arm.get(control, []), differences.get(name)))
    return StudyResults(
        tasks=tuple(tasks),
        control=control,
        primary=primary,
        detectable_difference=tuple(
            _stated(task, group, control, primary) for task, group in tasks.items()
        ),
        arms=tuple(figures),
        commit=_joined(cell.commit for cell in cells),
        hardware=_joined(cell.hardware for cell in cells),
        versions={
            name: _joined(cell.versions.get(name, "") for cell in cells)
            for name in dict.fromkeys(name for cell in cells for name in cell.versions)
        },
        command=_joined(_without_paths(cell.command) for cell in cells),
    )


def stated(
    task: str,
    num_questions: int,
    num_seeds: int,
    num_arms: int,
    supposed: Supposed | None,
    same_questions: bool,
) -> Detectable:
    """State which difference a study of a task can show, whatever it finds.

    The arguments are those of `detectable_difference`; `num_arms` is 1 of a primary comparison.
    """
    used = supposed or Supposed()
    difference = detectable_difference(
        num_questions, num_seeds, used, num_arms=num_arms, same_questions=same_questions
    )
    return Detectable(
        task=task,
        num_questions=num_questions,
        num_seeds=num_seeds,
        num_arms=num_arms,
        difference=difference,
        estimated=supposed is not None,
        **asdict(used),
    )


def _stated(task: str, cells: Cells, control: str, primary: str | None) -> Detectable:
    by_arm = _by_arm(cells)
    num_arms = 1 if primary in by_arm else max(len(by_arm) - 1, 1)
    num_seeds = len({cell.seed for cell in cells})
    same = all(map(same_questions, by_arm.values()))
    num_questions = len(cells[0].questions)
    return stated(task, num_questions, num_seeds, num_arms, supposed_of(cells, control), same)


def supposed_of(cells: Cells, control: str) -> Supposed | None:
    """Estimate from a task's finished cells what `stated` supposes; None of less than two seeds."""
    return observed(list(_tables(_by_arm(cells), control).values()))


def _by_arm(cells: Cells, order: Sequence[str] = ()) -> dict[str, Cells]:
    there = [cell.arm for cell in cells]
    names = [name for name in dict.fromkeys((*order, *there)) if name in there]
    return {name: [cell for cell in cells if cell.arm == name] for name in names}


def _tables(by_arm: Mapping[str, Cells], control: str) -> dict[str, tuple[Any, Any, bool]]:
    """Return by arm its flags, its control's, and whether all seeds answered the same questions.

    A column is a question, or a conversation where some have several questions.
    """
    tables = {}
    for name, cells in by_arm.items():
        pairs = paired(cells, by_arm.get(control, ())) if name != control else []
        if pairs:
            rows = [cell.rows for cell, _ in pairs]
            arm, other = (
                by_conversation(table_of(each, "correct"), rows)
                for each in zip(*pairs, strict=True)
            )
            tables[name] = (arm, other, same_questions(cells))
    return tables


def _differences(
    by_arm: Mapping[str, Cells], control: str, primary: str | None
) -> dict[str, DifferenceToControl]:
    """Compare every arm with the control, and correct the p for their number."""
    tables = _tables(by_arm, control)
    ps = {name: float(difference_p(*table)) for name, table in tables.items()}
    for_all = corrected(ps, primary)
    found = {}
    for name, table in tables.items():
        gain = estimate(*table)
        found[name] = DifferenceToControl(
            control=control,
            num_seeds=gain.num_seeds,
            num_questions=len(by_arm[name][0].questions),
            difference=gain.value,
            interval=gain.interval,
            p=ps[name],
            p_holm=for_all[name],
            shown=for_all[name] < CHANCE and gain.num_seeds > 1,
        )
    return found


def _arm(
    cells: Cells,
    by_arm: Mapping[str, Cells],
    control: Cells,
    difference: DifferenceToControl | None,
) -> ArmFigures:
    first, same = cells[0], same_questions(cells)
    timed = [cell for cell in cells if cell.hardware == first.hardware]
    against = control if control and control[0].arm != first.arm else ()
    loss_share, gradient_share = shares(cells)
    return ArmFigures(
        name=first.arm,
        task=first.task,
        stages=first.stages,
        num_seeds=len(cells),
        **_answered(cells, same),
        steps=round(fmean(sum(cell.steps.values()) for cell in cells)),
        trained_tokens=round(fmean(sum(cell.trained_tokens.values()) for cell in cells)),
        seconds=fmean(sum(cell.seconds.values()) for cell in timed),
        difference_to_control=difference,
        thinking=thinking_figures(cells, _stage_earlier(cells, by_arm)),
        by_thinking_length=buckets(cells, against, "length"),
        by_ratio=buckets(cells, against, "ratio"),
        loss_share=loss_share,
        gradient_share=gradient_share,
        chosen=first.chosen,
        seeds=tuple(_seed(cell, cell) for cell in cells),
    )


def _answered(answered: Sequence[Answered], same: bool, one_model: bool = False) -> dict[str, Any]:
    """Return what the answers of all seeds add up to; the arguments are those of `rates`."""
    rows = [each.rows for each in answered]
    acc, fmt = (share(table_of(answered, name), rows, same, one_model) for name in ANSWER_FLAGS)
    return {
        "num_questions": len(rows[0]),
        "num_conversations": num_conversations(rows[0]),
        "same_questions": same,
        "acc": acc.value,
        "acc_interval": acc.interval,
        "fmt": fmt.value,
        "fmt_interval": fmt.interval,
        "judge": judge_figures(question for each in answered for question in each.questions),
        "rates": rates(answered, same, one_model),
    }


def _stage_earlier(cells: Cells, by_arm: Mapping[str, Cells]) -> Cells:
    """Find the arm that ends where this one's last stage begins.

    Stages of two arms can have one name and other settings; one that both share has one loss.
    """
    wanted = cells[0].stages[:-1]
    for group in by_arm.values():
        if group[0].stages == wanted and all(
            cell.validation.get(stage) == other.validation.get(stage)
            for cell, other in paired(cells, group)
            for stage in wanted
        ):
            return group
    return ()


def _base(cells: Cells) -> ArmFigures | None:
    """Return the row of the model before all stages: no seed trained it.

    Greedy answers to the same questions are the same for all seeds, and count once; other
    questions of other seeds are so many more of one model.
    """
    asked, seeds = {}, set[int]()
    for cell in sorted(cells, key=lambda cell: cell.seed):
        if cell.base and cell.seed not in seeds:
            asked[cell.questions_sha256, tuple(cell.base.flags("correct"))] = cell.base
            seeds.add(cell.seed)
    if not asked:
        return None
    answered = list(asked.values())
    same = len({sha for sha, _ in asked}) == 1
    return ArmFigures(
        name=BASE,
        task=cells[0].task,
        stages=(),
        num_seeds=len(answered),
        **_answered(answered, same, one_model=True),
        seeds=tuple(_seed(each) for each in answered),
    )


def _seed(answered: Answered, cell: FinishedCell | None = None) -> SeedFigures:
    about = cell.model_dump(include={"seed", "steps", "trained_tokens", "seconds"}) if cell else {}
    for name in ANSWER_FLAGS:
        about[name] = "".join(f"{flag:d}" for flag in answered.flags(name))
    return SeedFigures(**about, **answer_figures(answered.questions))


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def _without_paths(command: str) -> str:
    """Shorten absolute paths to their last name: where a machine keeps things is its own affair."""
    paths = r"(?<![\w.])(?:[A-Za-z]:\\|/|~)[^\s'\"]*"
    return re.sub(paths, lambda m: PureWindowsPath(m[0]).name, command)  # it knows both separators
