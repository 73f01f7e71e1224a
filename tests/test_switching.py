"""Generation after a frozen key stage: the key adapter acts from the thinking's last token on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_tokenizer
from models_made import made_family, nf4, with_lora
from tokenizers_made import CHATML, KINDS, OPENED, made

from sftkey.data.frame import Frame, probe_frame
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.generation import Generation, generate, generate_to_file
from sftkey.key_adapter import KEY, acting, context_adapters
from sftkey.recipe import ResponseSection
from sftkey.switching import Switch, ThinkingEnds, find_switch

MOST, STOP = 14, 2
TEXT = "How many legs do 3 cats and 2 birds have together, and how many have 7 pens?"
TOKENIZER = made_tokenizer()
PROMPTS = [TOKENIZER(TEXT[:end])["input_ids"] for end in (7, 40, 3, 25, 60, 12, 33)]


def with_key(adapted: Any) -> Any:
    """Put a key adapter beside the one that a model has; both of its factors are random."""
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, inference_mode=True
    )
    adapted.add_adapter(KEY, config)
    return adapted.eval()


@cache
def family(name: str) -> Any:
    """Make a model of a family with two adapters, over the vocabulary of the tests' tokenizer."""
    model = made_family(name, vocab_size=len(TOKENIZER))
    return with_key(with_lora(name, Path(), model))


def of_nf4() -> Any:
    """Make a model in NF4 with two adapters."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return with_key(nf4("llama", Path(folder)))


def base_alone() -> Any:
    """Make a model whose thinking no adapter has touched: after full fine-tuning, say."""
    model = with_key(with_lora("qwen3", Path(), made_family("qwen3", vocab_size=300)))
    model.delete_adapter("default")
    model.set_adapter(KEY, inference_mode=True)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: family("llama"),
    "qwen3": lambda: family("qwen3"),
    "gemma3": lambda: family("gemma3"),  # the window is shorter than the prompts
    "nf4": cache(of_nf4),
    "base alone": cache(base_alone),
}


def free(model: Any, prompt: list[int]) -> list[int]:
    """Write with the previous adapters alone, without cache, padding or transformers' loop."""
    ids = list(prompt)
    with torch.no_grad(), acting(model, context_adapters(model)):
        while len(ids) < len(prompt) + MOST:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def key_by_hand(model: Any, ids: list[int], count: int) -> list[int]:
    """Go on after a thinking: all but its last token through the previous adapters into a cache."""
    context, key = torch.tensor([ids[:-1]]), []
    token = torch.tensor([ids[-1:]])
    with torch.no_grad():
        with acting(model, context_adapters(model)):
            past = model(input_ids=context, use_cache=True).cache if len(ids) > 1 else None
        with acting(model, [*context_adapters(model), KEY]):
            while len(key) < count and (not key or key[-1] != STOP):
                output = model(input_ids=token, cache=past, use_cache=True)
                past, token = output.cache, output.logits[:, -1:].argmax(-1)
                key.append(int(token))
    return key


def text_of(ids: list[int]) -> str:
    """Decode ids as they are."""
    return str(TOKENIZER.decode(ids))


@cache
def written_by_hand(name: str) -> tuple[str, list[list[int]], list[int | None]]:
    """Choose as closing tag what most rows write, at several places; generate by hand.

    Returns:
        The tag, what is written after each prompt, and the tokens of its thinking, if it ended.
    """
    model = MODELS[name]()
    thinkings = [free(model, prompt) for prompt in PROMPTS]
    texts = [text_of(ids) for ids in thinkings]
    parts = {text[n : n + k] for text in texts for n in range(len(text)) for k in (1, 2, 3)}

    def lengths(tag: str) -> list[int | None]:
        return [
            next((n for n in range(1, MOST + 1) if tag in text_of(ids[:n])), None)
            for ids in thinkings
        ]

    def spread(tag: str) -> tuple[int, int]:
        found = [n for n in lengths(tag) if n is not None]
        return len(set(found)), -len(found)

    usable = sorted(tag for tag in parts if tag.strip() == tag and tag.isprintable() and tag)
    tag = max((each for each in usable if None in lengths(each)), key=spread)
    rows = []
    for prompt, ids, length in zip(PROMPTS, thinkings, lengths(tag), strict=True):
        if length is None:
            rows.append(ids)
            continue
        thinking = ids[:length]
        rows.append([*thinking, *key_by_hand(model, [*prompt, *thinking], MOST - length)])
    return tag, rows, lengths(tag)


def generations(
    model: Any, tag: str, prompts: list[list[int]] = PROMPTS, **changes: Any
) -> dict[int, Generation]:
    """Generate with the key adapter from the tag on."""
    switch = Switch(tuple(context_adapters(model)), tag, "", **changes.pop("switch", {}))
    settings = {"stop_ids": [STOP], "max_new_tokens": MOST, "batch_size": 3, **changes}
    return dict(generate(model, TOKENIZER, prompts, switch=switch, **settings))


def as_generation(ids: list[int]) -> Generation:
    """Cut ids at the stop, as `generate` does."""
    end = ids.index(STOP) if STOP in ids else len(ids)
    return Generation(text_of(ids[:end]), end, STOP in ids)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_two_generations_by_hand(name: str, batch_size: int) -> None:
    """Each row switches at its own place, in batches of any composition, token for token."""
    tag, rows, lengths = written_by_hand(name)
    model = MODELS[name]()
    assert len(set(lengths)) >= 4, "rows should switch at several places, one of them never"
    assert None in lengths
    found = generations(model, tag, batch_size=batch_size)
    assert found == {row: as_generation(ids) for row, ids in enumerate(rows)}
    alone = [as_generation(free(model, prompt)) for prompt in PROMPTS]
    assert sum(found[row] != alone[row] for row in found) >= 3, "the key adapter should matter"
