"""The gate: every check of a recipe and its rows, before training."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any, TypeVar

from sftkey.checks import rows
from sftkey.checks.findings import Finding, Report, of_error, of_rows
from sftkey.checks.masks import Masks, id_findings, judged_findings, read_ids, read_masks
from sftkey.checks.recipe import quantized_findings, recipe_findings, stop_findings
from sftkey.checks.rehearsal import rehearsal_findings
from sftkey.data.examples import RowOptions
from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared, prepare_splits, refuse_evaluation_without_rows
from sftkey.data.preview import statistics
from sftkey.data.renderer import Renderer
from sftkey.data.response import Segment
from sftkey.data.splits import Splits, load_splits
from sftkey.errors import CheckError, Problem, SFTKeyError
from sftkey.evaluation.grading import unreadable
from sftkey.evaluation.stage import refuse_unready_judge
from sftkey.models.facts import refuse_other_shapes, refuse_unloadable, skeleton_of
from sftkey.models.loading import load_renderer
from sftkey.recipe.rules import undecided
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps

LOGGER = logging.getLogger("sftkey")
T = TypeVar("T")


def _rows_report(recipe: Recipe, env: Mapping[str, str] = os.environ) -> Report:
    """Find all that is wrong with a recipe; a check whose input can't be read is skipped.

    `env` has what a launcher says of its config and of the number of its processes.

    Returns:
        Findings, statistics and, where rows could be made, the rows.
    """
    findings = list(recipe_findings(recipe, env))
    renderer = splits = prepared = None
    if not undecided(recipe, "model", "response"):
        renderer = _attempt(findings, lambda: load_renderer(recipe))
    if renderer is not None:
        findings += rows.frame_findings(renderer)
        _add(findings, stop_findings(recipe, renderer))
        _add(findings, id_findings(recipe, renderer))
    if not undecided(recipe, "data"):
        data, options = rows.lenient(recipe.data), RowOptions.of(recipe)
        splits = _attempt(findings, lambda: load_splits(data, recipe.seed, options))
    if splits is not None:
        if renderer is not None:
            prepared = _read_rows(findings, recipe, renderer, splits)
        dropped = splits.dropped if prepared is None else prepared.counts["dropped"]
        findings += rows.dropped_findings(recipe.data, dropped)
        findings += rows.empty_findings(splits.empty_thinking)
    if prepared is None:
        return Report(tuple(findings))
    _attempt(findings, lambda: refuse_evaluation_without_rows(recipe, prepared))
    masks = read_masks(recipe, prepared.renderer, prepared.train)
    findings += masks.findings("train")
    if prepared.validation is not None:
        validation = read_masks(recipe, prepared.renderer, prepared.validation)
        findings += validation.findings("validation")
    if prepared.test_rows is not None:
        findings += read_ids(recipe, prepared.renderer, prepared.test_rows).findings("test")
    numbers = _numbers(recipe, prepared, masks, int(env.get("WORLD_SIZE", "1")))
    return Report(tuple(findings), numbers, prepared)


def _attempt(findings: list[Finding], make: Callable[[], T]) -> T | None:
    """Make something; an error becomes findings."""
    try:
        return make()
    except SFTKeyError as error:
        findings += of_error(error)
        return None


def _add(findings: list[Finding], more: Iterable[Finding]) -> None:
    """Add findings; an error that comes among them becomes findings, too."""
    _attempt(findings, lambda: findings.extend(more))


def _read_rows(
    findings: list[Finding], recipe: Recipe, renderer: Renderer, splits: Splits
) -> Prepared | None:
    """Tokenize the rows, and let the oracle judge some of them."""
    findings += judged_findings(renderer, splits.train)
    # What was left out before is a finding already.
    data = rows.lenient(recipe.data).model_copy(update={"empty_thinking": "drop"})
    kind = recipe.model_copy(update={"data": data})
    prepared = _attempt(findings, lambda: prepare_splits(kind, splits, renderer))
    if prepared is not None:
        findings += rows.noted_findings(prepared.counts["noted"])
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
    stages = {}
    for stage in recipe.stages:
        trainer, weights = recipe.stage_trainer(stage), weights_by_segment(stage.loss_on)
        num_rows = prepared.num_rows(recipe, stage)
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
    report = _rows_report(recipe)
    findings, prepared = list(report.findings), report.prepared
    _attempt(findings, lambda: refuse_unready_judge(recipe))
    if prepared is not None:
        _add(findings, _reference_findings(recipe, prepared))
        findings += _switch_findings(recipe, prepared)
        if not any(finding.refuses for finding in findings):
            skeleton = _attempt(findings, lambda: skeleton_of(recipe.model))
            if skeleton is not None:
                _attempt(findings, lambda: refuse_unloadable(recipe.model, skeleton))
                _add(findings, quantized_findings(recipe, skeleton))
                _attempt(findings, lambda: refuse_other_shapes(recipe.model, skeleton))
                findings += rows.length_findings(recipe, prepared, skeleton)
                _add(findings, rehearsal_findings(recipe, prepared, skeleton))
    return dataclasses.replace(report, findings=tuple(findings))


def _switch_findings(recipe: Recipe, prepared: Prepared) -> Iterator[Finding]:
    """Refuse thinkings that end in white space alone and hold it, where an adapter acts behind it.

    A frozen stage's adapter acts from the first such place on, and is trained behind the last.
    """
    response = prepared.renderer.response
    if response.ends_thinking or all(stage.context != "frozen" for stage in recipe.stages):
        return
    end = response.thinking_close + response.answer_open
    rows = [
        each.index
        for each in prepared.train_examples
        if (each.thinking + end).find(end) < len(each.thinking)
    ]
    if rows:
        what = f"train: the thinkings of these rows hold {end!r}, which ends a thinking here"
        hint = "write a closing tag, or an opening tag of the answer; or context: exact"
        yield of_rows("switch", what, rows, hint)


def _reference_findings(recipe: Recipe, prepared: Prepared) -> Iterator[Finding]:
    """Find rows whose answers can't be graded; they refuse a recipe that is tested on them."""
    for split, numbers in unreadable_answers(recipe, prepared).items():
        what = f"{split}: the grader {recipe.eval.grader} can't read the answers of these rows"
        hint = "choose the eval.grader that fits them: number, choice, exact or math"
        yield of_rows("references", what, numbers, hint, refuses=split == "test")


def unreadable_answers(recipe: Recipe, prepared: Prepared) -> dict[str, list[int]]:
    """Return the rows by split whose answer the grader wouldn't call right: no model's could be.

    The package behind `math` takes a millisecond or more for each, so it isn't asked about train.
    """
    splits = {"test": prepared.test, "validation": prepared.validation_examples}
    if recipe.eval.grader != "math":
        splits["train"] = prepared.train_examples
    found = {}
    for split, examples in splits.items():
        texts = list(dict.fromkeys(each.answer for each in examples))
        unread = unreadable(dict(enumerate(texts)), recipe.eval.grader)
        wrong = {texts[number] for number in unread}
        numbers = dict.fromkeys(each.index for each in examples if each.answer in wrong)
        if numbers:  # a conversation's turns are one row
            found[split] = list(numbers)
    return found


def require_trainable(recipe: Recipe) -> Prepared:
    """Return the rows of a recipe that may be trained; what is worth knowing is logged."""
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
