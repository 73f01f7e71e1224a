"""Parts of a study's results: the thinking, questions by length and ratio, shares of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np

from sftkey.evaluation.finished_cells import (
    FinishedCell,
    paired,
    same_questions,
    table_of,
)
from sftkey.evaluation.seeds import difference_estimate, mean_estimate
from sftkey.evaluation.statistics import discordant
from sftkey.evaluation.study_results import Bucket, ThinkingFigures

NUM_BUCKETS = 4
Measure = Literal["length", "ratio"]
Cells = Sequence[FinishedCell]
Shares = dict[str, dict[str, float]]


def thinking_figures(cells: Cells, earlier: Cells) -> ThinkingFigures:
    """Say what the last stage did to the thinking.

    Args:
        cells: An arm's, one a seed.
        earlier: Those of the arm that ended one stage before, if there is one.
    """
    questions = [question for cell in cells for question in cell.questions]
    judged = [each.thinking_right for each in questions if each.thinking_right is not None]
    following = [each.follows for each in questions if each.follows is not None]
    lengths = [cell.mean_thinking_length for cell in cells if cell.mean_thinking_length is not None]
    pairs = [
        (old, new)
        for cell, other in paired(cells, earlier)
        for old, new in zip(other.questions, cell.questions, strict=True)
        if old.thinking_sha256 and new.thinking_sha256
    ]
    flags = [
        (old.thinking_right, new.thinking_right)
        for old, new in pairs
        if old.thinking_right is not None and new.thinking_right is not None
    ]
    right, wrong = discordant([old for old, _ in flags], [new for _, new in flags])
    return ThinkingFigures(
        num_questions=len(questions),
        num_judged=len(judged),
        num_right=sum(judged),
        mean_length=fmean(lengths) if lengths else None,
        before=earlier[0].arm if pairs else None,
        num_compared=len(pairs),
        num_identical=sum(old.thinking_sha256 == new.thinking_sha256 for old, new in pairs),
        num_made_wrong=wrong,
        num_made_right=right,
        loss=_thinking_loss(cells),
        num_judged_following=len(following),
        num_following=sum(following),
    )


def _thinking_loss(cells: Cells) -> tuple[float, float] | None:
    losses = [
        [cell.validation.get(cell.stages[-1], {}).get(at, {}).get("thinking") for cell in cells]
        for at in ("start", "end")
    ]
    known = [[loss for loss in each if loss is not None] for each in losses]
    if any(len(each) < len(cells) for each in known):
        return None
    return fmean(known[0]), fmean(known[1])


def buckets(cells: Cells, control: Cells, measure: Measure) -> tuple[Bucket, ...]:
    """Divide each seed's questions into quarters of equal number; none where the measure is one.

    Args:
        cells: An arm's, one a seed.
        control: The control's; empty for its own row.
        measure: `length`: the tokens of the reference's thinking; `ratio`: these by its key's.
    """
    pairs = paired(cells, control)
    cells = [cell for cell, _ in pairs] or cells
    values = [_measured(cell, measure) for cell in cells]
    if any(value is None for value in values):
        return ()
    measured: Any = np.array(values)
    num = min(NUM_BUCKETS, measured.shape[1])
    if measured.min() == measured.max() or num < NUM_BUCKETS:
        return ()
    orders = np.argsort(measured, axis=1, kind="stable")
    right = table_of(cells, "correct")
    other = table_of([each for _, each in pairs], "correct") if pairs else None
    same = same_questions(cells)
    parts = np.array_split(orders, num, axis=1)
    return tuple(_bucket(part, measured, right, other, same) for part in parts)


def _bucket(part: Any, measured: Any, right: Any, other: Any, same: bool) -> Bucket:
    """Give the figures of some questions of each seed, whose places are `(S, q)`."""
    mine = np.take_along_axis(right, part, axis=1)
    inside = np.take_along_axis(measured, part, axis=1)
    acc = mean_estimate(mine, same)
    figures = Bucket(
        low=float(inside.min()),
        high=float(inside.max()),
        num_questions=acc.num_questions,
        num_seeds=acc.num_seeds,
        acc=acc.value,
        acc_interval=acc.interval,
    )
    if other is None:
        return figures
    gain = difference_estimate(mine, np.take_along_axis(other, part, axis=1), same)
    return figures.model_copy(update={"gain": gain.value, "gain_interval": gain.interval})


def _measured(cell: FinishedCell, measure: Measure) -> list[float] | None:
    """Give the measure of each question; None where the cell doesn't have the lengths."""
    thinking, key = (cell.reference_tokens.get(name, []) for name in ("thinking", "key"))
    if len(thinking) != len(cell.questions) or len(key) != len(thinking):
        return None
    if measure == "length":
        return [float(length) for length in thinking]
    return [length / max(end, 1) for length, end in zip(thinking, key, strict=True)]


def shares(cells: Cells) -> tuple[Shares, Shares]:
    """Give each segment's share of the loss and of the gradient's norm, by stage, over seeds.

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
