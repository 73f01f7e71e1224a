"""What the gate reads off the rows: those left out or that lose something, and their lengths."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sftkey.checks.findings import Finding, of_rows
from sftkey.data.collator import row_lengths
from sftkey.data.prepare import Prepared
from sftkey.data.prompt import THINK_TAG
from sftkey.data.refused import left_out, numbered
from sftkey.data.renderer import Renderer, ids_set_before
from sftkey.data.template import reads_of, unused_kwargs
from sftkey.data.tokenization import DROPS, DROPS_THINKING
from sftkey.models.facts import Skeleton, mixing_length
from sftkey.recipe.schema import DataSection, Recipe
from sftkey.recipe.stages import num_stage_batches, trainer_setting

SAME_PROMPT = (
    "inference gets the same prompt; give a model.chat_template that keeps it, if it counts"
)


def lenient(data: DataSection) -> DataSection:
    """Drop where the recipe says error, so that all that is wrong comes to light at once."""
    too_long = "drop" if data.too_long == "error" else data.too_long
    return data.model_copy(update={"unsplit_rows": "drop", "overlap": "drop", "too_long": too_long})


def dropped_findings(data: DataSection, dropped: Mapping[str, Any]) -> Iterator[Finding]:
    """Find the rows that are left out; they refuse the recipe if it doesn't allow it."""
    for each in left_out(data, dropped):
        message = f"{each.split}: {each.what}"
        yield Finding(each.code, each.rows, message, each.hint, each.hint is not None)


def empty_findings(rows: Mapping[str, Sequence[int]]) -> Iterator[Finding]:
    """Find the rows that are trained with an empty thinking, few enough to be let through."""
    for split, numbers in rows.items():
        hint = "data.empty_thinking: drop leaves these rows out"
        what = f"{split}: the thinking is empty"
        yield of_rows("empty-thinking", what, numbers, hint, refuses=False)


def frame_findings(renderer: Renderer) -> Iterator[Finding]:
    """Find thinking that the template writes beside the response's own, and a begin that lacks."""
    tokenizer, prefix = renderer.tokenizer, renderer.assistant_prefix
    begin, chat = tokenizer.bos_token_id, renderer.kind != "plain"
    if chat and begin in ids_set_before(tokenizer) and begin not in renderer.prompt_ids("Q"):
        what = f"the chat template doesn't begin with {tokenizer.bos_token!r}, which the tokenizer"
        hint = "inference gets the same prompt; write it into a model.chat_template, if it counts"
        yield Finding("no-begin", (), f"{what} sets before a text by itself", hint, refuses=False)
    for key in unused_kwargs(tokenizer, renderer.chat_template_kwargs):
        what = f"model.chat_template_kwargs.{key}: it changes none of the chats that were tried"
        hint = "leave it out, if no row has what it acts on"
        yield Finding("kwargs-unused", (), what, hint, refuses=False)
    if THINK_TAG.search(prefix):
        opening = "<think>\n" if "<think>" in prefix else ""
        native = f"response.thinking: {json.dumps([opening, chr(10) + '</think>'])}"
        switch = "model.chat_template_kwargs: {enable_thinking: false}; or "
        knows = "enable_thinking" in reads_of(tokenizer).variables
        what = f"the chat template inserts {prefix!r} before every answer, beside the response's"
        hint = f"{switch if knows else ''}the template's own tags, {native}"
        yield Finding("template-inserts", (), f"{what} own thinking", hint)


def noted_findings(noted: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what rows lose that are trained all the same."""
    for where, counted in noted.items():
        code = "template-drops-thinking" if where.endswith(DROPS_THINKING) else "changed"
        hint = SAME_PROMPT if DROPS in where else "it is trained as it stands in `sftkey show`"
        message = f"{where}: {numbered(counted['rows'], counted['count'])}"
        message = "; ".join([message, *counted.get("examples", ())])
        yield Finding(code, tuple(counted["rows"]), message, hint, refuses=False)


def length_findings(recipe: Recipe, prepared: Prepared, skeleton: Skeleton) -> Iterator[Finding]:
    """Find lengths that the model's positions don't fit, and stages of which no batch is left."""
    yield from _dropped_batches(recipe, prepared, int(os.environ.get("WORLD_SIZE", "1")))
    yield from _mixed_lengths(skeleton, prepared)
    yield from _positions(recipe, prepared, skeleton)


def _dropped_batches(recipe: Recipe, prepared: Prepared, num_processes: int) -> Iterator[Finding]:
    """Refuse stages whose only batch `dataloader_drop_last` drops."""
    for stage in recipe.stages:
        trainer = recipe.stage_trainer(stage)
        if not trainer_setting(trainer, "dataloader_drop_last"):
            continue
        num_rows = prepared.num_rows(recipe, stage)
        if num_stage_batches(trainer, num_rows, num_processes):
            continue
        size = trainer_setting(trainer, "per_device_train_batch_size") * num_processes
        what = f"stages.{stage.name}: expected at least {size} rows, a whole batch; got {num_rows}"
        hint = "dataloader_drop_last drops what fills none: leave it out, or lower the batch size"
        yield Finding("no-batch", (), what, hint)


def _mixed_lengths(skeleton: Skeleton, prepared: Prepared) -> Iterator[Finding]:
    """Refuse rows so long that they would change the positions of the rows beside them."""
    limit = mixing_length(skeleton.config)
    if limit is not None and (longest := _longest_row(prepared)) > limit:
        what = (
            f"{skeleton.config.model_type}: its positions are scaled by a batch's longest row "
            f"above {limit} tokens, so that a row's loss would depend on the rows beside it; the "
            f"longest row has {longest}"
        )
        yield Finding("model", (), what, f"write data.max_length={limit}")


def _positions(recipe: Recipe, prepared: Prepared, skeleton: Skeleton) -> Iterator[Finding]:
    """Refuse rows or answers that run out of learned positions, or answers longer than any.

    Rotary positions go on beyond what the config names; a table of learned ones ends there.
    """
    reach, questions = skeleton.most_tokens, prepared.questions(recipe)
    if reach is None:
        return
    learned, longest = has_learned_positions(skeleton.model, reach), 0
    if learned and (row := _longest_row(prepared)) > reach:
        what = f"{skeleton.config.model_type}: it has learned {reach} positions; "
        hint = f"write data.max_length={reach}"
        yield Finding("positions", (), f"{what}the longest row has {row} tokens", hint)
    if learned and questions:
        prompts = (prepared.renderer.prompt_ids(question.prompt) for question in questions)
        longest = max(map(len, prompts))
    new = recipe.eval.max_new_tokens
    if not questions or longest + new <= reach:
        return
    behind = f" behind the longest question's {longest}" if longest else ""
    what = f"eval.max_new_tokens: the model has {reach} positions; got {new} new tokens{behind}"
    hint = f"write eval.max_new_tokens={max(reach - longest, 1)} or fewer"
    yield Finding("positions", (), what, hint)


def _longest_row(prepared: Prepared) -> int:
    """Return the tokens of the longest row that trains or validates."""
    splits = [rows for rows in (prepared.train, prepared.validation) if rows is not None]
    return max(max(row_lengths(rows)) for rows in splits)


def has_learned_positions(skeleton: PreTrainedModel, reach: int) -> bool:
    """Tell whether positions are rows of an embedding, as GPT-2's are (OPT has two rows more)."""
    words = skeleton.get_input_embeddings()
    return any(
        isinstance(module, torch.nn.Embedding)
        and module is not words
        and reach <= module.num_embeddings <= reach + 2
        for module in skeleton.modules()
    )
