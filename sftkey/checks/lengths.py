"""What the gate finds in lengths: answers beyond a model's positions, stages without a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from sftkey.checks.findings import Finding, of_error
from sftkey.data.collator import packed_rows, stage_rows
from sftkey.data.prepare import Prepared
from sftkey.errors import SFTKeyError
from sftkey.models.facts import skeleton_of
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_batches, trainer_setting


def length_findings(
    recipe: Recipe, prepared: Prepared, env: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Find answers that the model's positions don't reach, and stages of which no batch is left.

    Args:
        recipe: A recipe whose form and rows are sound.
        prepared: Its rows.
        env: A launcher says in it how many processes there are.
    """
    yield from dropped_batches(recipe, prepared, int(env.get("WORLD_SIZE", "1")))
    try:
        yield from _positions(recipe, prepared, skeleton_of(recipe.model))
    except SFTKeyError as error:
        yield from of_error(error)


def dropped_batches(recipe: Recipe, prepared: Prepared, num_processes: int) -> Iterator[Finding]:
    """Refuse stages whose only batch `dataloader_drop_last` drops."""
    for stage in recipe.stages:
        trainer = recipe.stage_trainer(stage)
        if not trainer_setting(trainer, "dataloader_drop_last"):
            continue
        packs = packed_rows(recipe, prepared.train)
        num_rows = len(stage_rows(recipe, stage, prepared.train, packs)) * stage.rows_each
        if num_stage_batches(trainer, num_rows, num_processes):
            continue
        size = trainer_setting(trainer, "per_device_train_batch_size") * num_processes
        what = f"stages.{stage.name}: expected at least {size} rows, a whole batch; got {num_rows}"
        hint = "dataloader_drop_last drops what fills none: leave it out, or lower the batch size"
        yield Finding("no-batch", (), what, hint)


def _positions(recipe: Recipe, prepared: Prepared, skeleton: PreTrainedModel) -> Iterator[Finding]:
    """Refuse answers that alone are longer than the model's positions, or run out of learned ones.

    Rotary positions go on beyond what the config names; a table of learned ones ends there.
    """
    reach = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    questions = prepared.questions(recipe)
    if not isinstance(reach, int) or reach <= 0 or not questions:
        return
    new = recipe.eval.max_new_tokens
    longest = 0
    if has_learned_positions(skeleton, reach):
        prompts = (prepared.renderer.prompt_ids(question.prompt) for question in questions)
        longest = max(map(len, prompts))
    if longest + new <= reach:
        return
    behind = f" behind the longest question's {longest}" if longest else ""
    what = f"eval.max_new_tokens: the model has {reach} positions; got {new} new tokens{behind}"
    hint = f"write eval.max_new_tokens={max(reach - longest, 1)} or fewer"
    yield Finding("positions", (), what, hint)


def has_learned_positions(skeleton: PreTrainedModel, reach: int) -> bool:
    """Tell whether positions are rows of an embedding, as GPT-2's are (OPT has two rows more)."""
    words = skeleton.get_input_embeddings()
    return any(
        isinstance(module, torch.nn.Embedding)
        and module is not words
        and reach <= module.num_embeddings <= reach + 2
        for module in skeleton.modules()
    )
