"""The loop below generation: what a model writes after one batch of prompts.

After a stage with `context: frozen` the previous adapters write the thinking, as if there were no
other. Where it ends, its last token is computed once more with the key adapter acting, since this
token predicts the first one of the key; all that stands before it stays in the cache as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from sftkey.models.key_adapter import KEY, acting
from sftkey.switching import Switch, ThinkingEnds


def write(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """Generate after prompts; gives the new ids alone."""
    input_ids, attention_mask = _padded(model, prompts, config)
    with torch.no_grad():
        output: Any = model.generate(  # type: ignore[operator]  # of a mixin that the stubs don't know
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config
        )
    written: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return written


def write_switching(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    switch: Switch,
) -> list[list[int]]:
    """Generate after prompts, each row with the key adapter from the end of its thinking on.

    Rows whose thinking doesn't end, or that stop in it, are as the previous adapters wrote them.
    """
    input_ids, attention_mask = _padded(model, prompts, config)
    length, most = input_ids.shape[1], config.max_new_tokens
    ends = ThinkingEnds(switch, tokenizer, length, config.eos_token_id)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # layers with a window keep what a shorter row's needs
    with torch.no_grad(), acting(model, switch.context):
        output: Any = model.generate(  # type: ignore[operator]  # as above
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_changed(config, 1 if switch.thinking_given else most),
            stopping_criteria=None if switch.thinking_given else StoppingCriteriaList([ends]),
            **{cache_name(model): cache},
        )
    if switch.thinking_given:
        output, ends.num_tokens = input_ids, dict.fromkeys(range(len(prompts)), 0)
    written: list[list[int]] = output[:, length:].tolist()
    rows = sorted(row for row, num_tokens in ends.num_tokens.items() if num_tokens < most)
    for row, num_tokens in ends.num_tokens.items():
        del written[row][num_tokens:]
    if not rows:
        return written
    starts = length - attention_mask.sum(1)[rows]
    places = torch.tensor([length - 1 + len(written[row]) for row in rows], device=output.device)
    last = output[rows, places]
    kept, kept_mask = _kept(cache, model.config, rows, starts, places)
    left = [most - len(written[row]) for row in rows]
    with torch.no_grad(), acting(model, [*switch.context, KEY]):
        keys: Any = model.generate(  # type: ignore[operator]  # as above
            input_ids=last[:, None],
            attention_mask=kept_mask,
            generation_config=_changed(config, max(left)),
            **{cache_name(model): kept},
        )
    for row, ids, num_tokens in zip(rows, keys[:, 1:].tolist(), left, strict=True):
        written[row] += ids[:num_tokens]
    return written


def _kept(
    cache: DynamicCache,
    config: Any,
    rows: list[int],
    starts: torch.Tensor,
    places: torch.Tensor,
) -> tuple[DynamicCache, torch.Tensor]:
    """Keep of each row what stands before its place, shifted so that all of it ends in one column.

    Args:
        cache: All columns of all rows; emptied on the way.
        config: The model's.
        rows: Which rows are kept.
        starts: `(B,)`, the column in which each of these begins.
        places: `(B,)`, the column of its token that is computed again.

    Returns:
        The cache of C columns, and the `(B, C + 1)` mask of them and the token behind.
    """
    length = int((places - starts).max())
    columns = places[:, None] + torch.arange(-length, 1, device=places.device)
    mask = (columns >= starts[:, None]).long()
    source = columns[:, None, :-1, None].clamp(min=0)
    kept = DynamicCache(config=config)
    layers: Any = cache.layers
    for number, layer in enumerate(layers):
        if layer.keys is not None and length:
            index = source.to(layer.keys.device)
            keys = layer.keys[rows].take_along_dim(index, 2)
            kept.update(keys, layer.values[rows].take_along_dim(index, 2), number)
        layer.keys = layer.values = None
    return kept, mask


def _padded(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the prompts, filled up on the left, and their mask: `(B, T)` each."""
    length = max(len(prompt) for prompt in prompts)
    padding = [[config.pad_token_id] * (length - len(prompt)) for prompt in prompts]
    rows = [pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * len(pad) + [1] * (length - len(pad)) for pad in padding]
    return torch.tensor(rows, device=model.device), torch.tensor(mask, device=model.device)


def _changed(config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.max_new_tokens = max_new_tokens
    return changed


def cache_name(model: PreTrainedModel | PeftModel) -> str:
    """Give the argument of the cache, which transformers 5.24 renamed."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
