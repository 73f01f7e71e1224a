"""The gate: everything that is wrong with a recipe, its model's frame and its rows, at once.

It loads no weights. The rows that it reads are handed on, so that training needn't read them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, ParamSpec, TypeVar

from sftkey.data.collator import packed_rows, stage_rows
from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared, prepare_splits, refuse_evaluation_without_rows
from sftkey.data.preview import statistics
from sftkey.data.renderer import Frame, probe_frame
from sftkey.data.response import Segment
from sftkey.data.splits import Splits, load_splits
from sftkey.errors import SFTKeyError
from sftkey.models.loading import load_tokenizer
from sftkey.planning.check_masks import Masks, judged_findings, read_masks
from sftkey.planning.check_recipe import recipe_findings, undecided
from sftkey.planning.check_rows import (
    dropped_findings,
    frame_findings,
    lenient,
    template_findings,
)
from sftkey.planning.check_stop import stop_findings
from sftkey.planning.findings import Finding, Report, of_error
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps

P = ParamSpec("P")
T = TypeVar("T")


def check(recipe: Recipe, env: Mapping[str, str] = os.environ) -> Report:
    """Find all that is wrong with a recipe; what can't be read hides only what hangs on it.

    Args:
        recipe: A recipe of right form.
        env: What a launcher says of its config and of the number of its processes.

    Returns:
        Findings, statistics and, where rows could be made, the rows.
    """
    findings = list(recipe_findings(recipe, env))
    frame = splits = None
    if not undecided(recipe, "model", "response"):
        frame = _attempt(findings, _read_frame, recipe)
    if frame is not None:
        findings += frame_findings(frame)
        findings += _attempt(findings, stop_findings, recipe, frame) or []
    if not undecided(recipe, "data"):
        splits = _attempt(findings, _read_splits, recipe)
    prepared = None
    if frame is not None and splits is not None:
        prepared = _read_rows(findings, recipe, frame, splits)
    if splits is not None:
        dropped = splits.dropped() if prepared is None else prepared.counts["dropped"]
        findings += dropped_findings(recipe.data, dropped)
    if prepared is None:
        return Report(tuple(findings))
    _attempt(findings, refuse_evaluation_without_rows, recipe, prepared)
    masks = read_masks(recipe, prepared.frame, prepared.train)
    findings += masks.findings("train")
    if prepared.validation is not None:
        validation = read_masks(recipe, prepared.frame, prepared.validation)
        findings += validation.findings("validation")
    num_processes = int(env.get("WORLD_SIZE", "1"))
    numbers = _numbers(recipe, prepared, masks, num_processes)
    return Report(tuple(findings), numbers, prepared)


def _attempt(
    findings: list[Finding], make: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """Make something; an error becomes findings."""
    try:
        return make(*args, **kwargs)
    except SFTKeyError as error:
        findings += of_error(error)
        return None


def _read_frame(recipe: Recipe) -> Frame:
    tokenizer = load_tokenizer(recipe.model)
    return probe_frame(tokenizer, recipe.response, recipe.model.chat_template_kwargs)


def _read_splits(recipe: Recipe) -> Splits:
    need_test = recipe.data.test is not None
    return load_splits(lenient(recipe.data), recipe.seed, need_test, recipe.response.turns)


def _read_rows(
    findings: list[Finding], recipe: Recipe, frame: Frame, splits: Splits
) -> Prepared | None:
    """Tokenize the rows whose prompts the template can write."""
    lost, usable = template_findings(splits, frame)
    findings += lost
    if not usable.train:
        return None
    findings += judged_findings(frame, usable.train)
    kind = recipe.model_copy(update={"data": lenient(recipe.data)})
    return _attempt(findings, prepare_splits, kind, usable, frame)


def _numbers(
    recipe: Recipe, prepared: Prepared, masks: Masks, num_processes: int
) -> dict[str, Any]:
    """Count what the stages train.

    Returns:
        JSON: what `preview.statistics` gives; `key_share`, the key's share of a completion's tokens
        over the rows of train; `num_processes`; `stages`: the steps of each, and the tokens that it
        reads and trains in all its epochs.
    """
    shares = masks.key_shares
    tokens = prepared.counts["tokens"]["train"]
    packs = packed_rows(recipe, prepared.train)
    stages = {}
    for stage in recipe.stages:
        trainer, weights = recipe.stage_trainer(stage), weights_by_segment(stage.loss_on)
        num_rows = len(stage_rows(recipe, stage, prepared.train, packs)) * stage.rows_each
        reads = num_stage_epochs(trainer, num_rows, num_processes) * stage.rows_each
        trained = sum(tokens[segment.name] for segment in Segment if weights[segment])
        stages[stage.name] = {
            "steps": num_stage_steps(trainer, num_rows, num_processes),
            "tokens": round(reads * sum(tokens.values())),
            "trained_tokens": round(reads * trained),
        }
    key_share = {"median": median(shares), "min": min(shares), "max": max(shares)}
    return {
        **statistics(recipe, prepared),
        "key_share": {name: round(share, 4) for name, share in key_share.items()},
        "num_processes": num_processes,
        "stages": stages,
    }
