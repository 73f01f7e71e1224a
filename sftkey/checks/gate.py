"""The gate: every check of a recipe and its rows, before training."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sftkey.checks.findings import Finding, Report, of_error
from sftkey.checks.lengths import length_findings
from sftkey.checks.masks import Masks, id_findings, judged_findings, read_masks
from sftkey.checks.recipe import recipe_findings, undecided
from sftkey.checks.rehearsal import rehearsal_findings
from sftkey.checks.rows import (
    dropped_findings,
    empty_findings,
    frame_findings,
    lenient,
    noted_findings,
)
from sftkey.checks.stop import generation_findings, stop_findings
from sftkey.data.collator import packed_rows, stage_rows
from sftkey.data.examples import RowOptions
from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared, prepare_splits, refuse_evaluation_without_rows
from sftkey.data.preview import statistics
from sftkey.data.renderer import Renderer, probe_renderer
from sftkey.data.response import Segment
from sftkey.data.splits import Splits, load_splits
from sftkey.errors import CheckError, Problem, SFTKeyError
from sftkey.models.loading import load_tokenizer
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps

if TYPE_CHECKING:
    from sftkey.memory_plan.plan import Fit


LOGGER = logging.getLogger("sftkey")
P = ParamSpec("P")
T = TypeVar("T")


def _rows_report(recipe: Recipe, env: Mapping[str, str] = os.environ) -> Report:
    """Find all that is wrong with a recipe; a check whose input can't be read is skipped.

    Args:
        recipe: A recipe of right form.
        env: What a launcher says of its config and of the number of its processes.

    Returns:
        Findings, statistics and, where rows could be made, the rows.
    """
    findings = list(recipe_findings(recipe, env))
    renderer = splits = None
    if not undecided(recipe, "model", "response"):
        renderer = _attempt(findings, _read_frame, recipe)
    if renderer is not None:
        findings += frame_findings(renderer)
        stops = _attempt(findings, stop_findings, recipe, renderer)
        findings += [] if stops is None else [*stops, *generation_findings(recipe)]
        findings += _attempt(findings, lambda: list(id_findings(recipe, renderer))) or []
    if not undecided(recipe, "data"):
        splits = _attempt(findings, _read_splits, recipe)
    prepared = None
    if renderer is not None and splits is not None:
        prepared = _read_rows(findings, recipe, renderer, splits)
    if splits is not None:
        dropped = splits.dropped if prepared is None else prepared.counts["dropped"]
        findings += dropped_findings(recipe.data, dropped)
        findings += empty_findings(splits.empty_thinking)
    if prepared is None:
        return Report(tuple(findings))
    _attempt(findings, refuse_evaluation_without_rows, recipe, prepared)
    masks = read_masks(recipe, prepared.renderer, prepared.train)
    findings += masks.findings("train")
    if prepared.validation is not None:
        validation = read_masks(recipe, prepared.renderer, prepared.validation)
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


def _read_frame(recipe: Recipe) -> Renderer:
    tokenizer = load_tokenizer(recipe.model)
    return probe_renderer(tokenizer, recipe.response, recipe.model.chat_template_kwargs)


def _read_splits(recipe: Recipe) -> Splits:
    need_test = recipe.data.test is not None
    return load_splits(lenient(recipe.data), recipe.seed, need_test, RowOptions.of(recipe))


def _read_rows(
    findings: list[Finding], recipe: Recipe, renderer: Renderer, splits: Splits
) -> Prepared | None:
    """Tokenize the rows, and let the oracle judge some of them."""
    findings += judged_findings(renderer, splits.train)
    # What was left out before is a finding already.
    data = lenient(recipe.data).model_copy(update={"empty_thinking": "drop"})
    kind = recipe.model_copy(update={"data": data})
    prepared = _attempt(findings, prepare_splits, kind, splits, renderer)
    if prepared is not None:
        findings += noted_findings(prepared.counts["noted"])
    return prepared


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


def with_plan(
    report: Report, recipe: Path, overrides: Sequence[str], gpu: str
) -> tuple[Report, Fit | None]:
    """Add what the plan finds to what the gate found; the plan itself where there is one."""
    from sftkey.checks.findings import Finding, of_error
    from sftkey.memory_plan.plan import fit

    try:
        found = fit(recipe, overrides, gpu)
    except SFTKeyError as error:
        known = {finding.message for finding in report.findings}
        new = [each for each in of_error(error) if each.message not in known]
        return dataclasses.replace(report, findings=(*report.findings, *new)), None
    findings = [] if found.plan.fits else [Finding(**found.finding())]
    return dataclasses.replace(report, findings=(*report.findings, *findings)), found


def check_recipe(recipe: Recipe) -> Report:
    """Find all that is wrong with a recipe and its rows, as `sftkey check` and `train` do.

    No weights are loaded. What can't be read is a finding too, so nothing is raised for it.

    Args:
        recipe: A recipe of right form, from `load_recipe`.

    Returns:
        `findings`, of which `refusals` keep the recipe from being trained; `statistics`; and
        `prepared`, the rows, where they could be made.

    >>> report = check_recipe(sftkey.load_recipe("gsm8k.yaml"))
    >>> report.refusals, report.statistics["stages"]["key"]["steps"]
    ([], 4)
    """
    from sftkey.checks.findings import of_error, of_rows
    from sftkey.evaluation.stage import refuse_unready_judge

    report = _rows_report(recipe)
    findings: list[Finding] = []
    try:
        refuse_unready_judge(recipe)
    except SFTKeyError as error:
        findings += of_error(error)
    if report.prepared is None:
        return dataclasses.replace(report, findings=(*report.findings, *findings))
    try:
        unread = unreadable_answers(recipe, report.prepared)
    except SFTKeyError as error:
        findings += of_error(error)
    else:
        for split, rows in unread.items():
            what = f"{split}: the grader {recipe.eval.grader} can't read the answers of these rows"
            hint = "choose the eval.grader that fits them: number, choice, exact or math"
            findings.append(of_rows("references", what, rows, hint, refuses=split == "test"))
    if not report.refusals and not any(finding.refuses for finding in findings):
        findings += length_findings(recipe, report.prepared)
    if not report.refusals and not any(finding.refuses for finding in findings):
        assert report.prepared is not None
        findings += rehearsal_findings(recipe, report.prepared)
    return dataclasses.replace(report, findings=(*report.findings, *findings))


def unreadable_answers(recipe: Recipe, prepared: Prepared) -> dict[str, list[int]]:
    """Return the rows by split whose answer the grader wouldn't call right: no model's could be.

    The package behind `math` takes a millisecond or more for each, so it isn't asked about train.

    Raises:
        RecipeError: `math` without the package that does it.
    """
    from sftkey.evaluation.grading import unreadable

    splits = {"test": prepared.test, "validation": prepared.validation_examples}
    if recipe.eval.grader != "math":
        splits["train"] = prepared.train_examples
    found = {}
    for split, examples in splits.items():
        texts = list(dict.fromkeys(each.answer for each in examples))
        unread = unreadable(dict(enumerate(texts)), recipe.eval.grader)
        wrong = {texts[number] for number in unread}
        rows = (each.index for each in examples if each.answer in wrong)
        found[split] = list(dict.fromkeys(rows))  # a conversation's turns are one row
    return {split: rows for split, rows in found.items() if rows}


def require_trainable(recipe: Recipe) -> Prepared:
    """Return the rows of a recipe that may be trained; what is worth knowing is logged.

    Raises:
        CheckError: Something refuses the recipe; it holds every finding that does.
    """
    from accelerate import PartialState

    report = check_recipe(recipe)
    if PartialState().is_main_process:
        for finding in report.findings:
            if not finding.refuses:
                LOGGER.warning("%s", finding)
    if report.refusals or report.prepared is None:
        problems = [Problem(finding.code, str(finding)) for finding in report.refusals]
        raise CheckError(recipe.name, problems)
    return report.prepared
