"""One batch of a model's generation: plain, as it streams, and with a switch to the key adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sftkey.data.response import decoded
from sftkey.errors import FrameError
from sftkey.models.adapters import without_adapters
from sftkey.models.key_pass import KEY, acting, cache_name, context_adapters, key_adapters

if TYPE_CHECKING:
    from sftkey.data.renderer import Renderer


UNFINISHED = "\ufffd"  # what a decoder writes for a character of which bytes are missing
SPARE_TOKENS = 8  # beside those that a tag can have: a token may stand for no text at all


@dataclass(frozen=True)
class Switch:
    r"""Where the key adapter begins to act, and beside which others.

    >>> switch = Switch((), "\n</Thinking>", "\n<Answer>\n")
    >>> switch.thinking_end("2 + 2 = 4\n</Thinking>\n<Ans")
    21
    >>> switch.thinking_end("2 + 2 = 4\n</Think") is None
    True
    """

    context: tuple[str, ...]  # the adapters that write the thinking; they act on the key, too
    close: str  # the thinking's closing tag
    answer_open: str  # the answer's opening tag: it ends the thinking where `close` is blank
    assistant_prefix: str = ""  # what a template lets the model write before the thinking
    thinking_given: bool = False  # the prompts end with the thinking's last token

    def __post_init__(self) -> None:
        if not self.marker:
            raise FrameError(
                "response.thinking",
                "expected a closing tag, or an opening tag of the answer; both are empty, so that "
                "nothing tells where the key adapter of `context: frozen` is to act",
                "write one of them",
            )

    @property
    def marker(self) -> str:
        """Return what tells that the thinking has ended."""
        unclosed = self.close + self.answer_open
        return self.close.strip() or unclosed.rstrip() or unclosed

    def thinking_end(self, text: str) -> int | None:
        """Count the characters up to the end of the thinking; None while it isn't known.

        White space before the closing tag may be missing; white space behind it belongs to the
        thinking as far as the tag has it, so that what comes next has to be seen.
        """
        if self.assistant_prefix.startswith(text):
            return None
        start = len(self.assistant_prefix) if text.startswith(self.assistant_prefix) else 0
        found = text.find(self.marker, start)
        if found < 0:
            return None
        if not self.close.strip():
            return found + len(self.close)
        end = found + len(self.marker)
        behind = self.close[len(self.close.rstrip()) :]
        if text.startswith(behind, end):
            return end + len(behind)
        return None if behind.startswith(text[end:]) else end

    def num_thinking_tokens(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
    ) -> int | None:
        """Count the tokens up to the one that holds the thinking's last character.

        It may hold others behind it. None while the end isn't known.
        """
        text = decoded(tokenizer, ids)
        end = self.thinking_end(text)
        if end is None:
            return None
        num_tokens = len(ids)
        while num_tokens and decoded(tokenizer, ids[: num_tokens - 1]).startswith(text[:end]):
            num_tokens -= 1
        return num_tokens


def find_switch(
    model: PreTrainedModel | PeftModel, renderer: Renderer, *, thinking_given: bool = False
) -> Switch | None:
    """Say where a model switches to its key adapter; None for a model that has none."""
    if not key_adapters(model):
        return None
    tags = renderer.response.thinking_close, renderer.response.answer_open
    context = tuple(context_adapters(model))
    return Switch(context, *tags, renderer.assistant_prefix, thinking_given)


class StopAtThinkingEnd(StoppingCriteria):
    """Stops each row where its thinking has ended.

    The prompts have `length` columns. A row that one of the `stop_ids` has ended never switches.
    """

    def __init__(
        self,
        switch: Switch,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        stop_ids: Collection[int],
    ) -> None:
        self.switch, self.tokenizer, self.length = switch, tokenizer, length
        self.num_tokens: dict[int, int] = {}  # of the thinking, by row
        self._stop_ids, self._stopped = set(stop_ids), set[int]()
        self._window = len(switch.close.encode() + switch.answer_open.encode()) + SPARE_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Look at the newest token of each `(B, T)` row: `(B,)`, whether its thinking has ended."""
        recent = input_ids[:, max(self.length, input_ids.shape[1] - self._window) :].tolist()
        self._stopped |= {row for row, ids in enumerate(recent) if ids[-1] in self._stop_ids}
        for row, ids in enumerate(recent):
            if row in self._stopped or row in self.num_tokens:
                continue
            if self.switch.marker in decoded(self.tokenizer, ids):  # only then is all of it read
                whole = input_ids[row, self.length :].tolist()
                if (end := self.switch.num_thinking_tokens(self.tokenizer, whole)) is not None:
                    self.num_tokens[row] = end
        ended = [row in self.num_tokens for row in range(len(recent))]
        return torch.tensor(ended, device=input_ids.device)


class Streamer:
    """Passes the text behind one prompt on as it grows, each time all of it, up to a stop.

    transformers calls `put` with the prompt and then with every token, and `end` behind the last.
    Its own `TextStreamer` keeps a text in pieces, where a tag may be cut anywhere.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        on_text: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.stop_ids, self.on_text = tokenizer, stop_ids, on_text
        self.ids: list[int] = []
        self._in_prompt = True

    def behind(self, ids: Sequence[int]) -> Streamer:
        """Return itself, for a generation that goes on behind these tokens; they are passed on."""
        self.ids = list(ids)
        self._pass_on()
        return self

    def put(self, value: Any) -> None:
        """Take the prompt, or one token."""
        if not self._in_prompt:
            self.ids += [token for token in value.flatten().tolist() if token not in self.stop_ids]
            self._pass_on()
        self._in_prompt = False

    def end(self) -> None:
        """Expect a prompt next."""
        self._in_prompt = True

    def _pass_on(self) -> None:
        self.on_text(decoded(self.tokenizer, self.ids).rstrip(UNFINISHED))


def write(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    streamer: Streamer | None = None,
) -> list[list[int]]:
    """Generate after prompts; gives the new ids alone."""
    input_ids, attention_mask = _padded(model, prompts, config)
    with torch.no_grad():
        output: Any = model.generate(  # type: ignore[operator]  # of a mixin that the stubs don't know
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            streamer=streamer,
        )
    written: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return written


def write_switching(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    switch: Switch,
    streamer: Streamer | None = None,
) -> list[list[int]]:
    """Generate after prompts, each row with the key adapter from the end of its thinking on.

    The streamer gets a thinking when it has ended: some tokens behind its end are written anew.
    Rows whose thinking doesn't end, or that stop in it, are as the previous adapters wrote them.

    First all rows write with the previous adapters until their thinking ends. Then the caches of
    those that switch are moved so that all end in one column, before the last token that is kept.
    That token is read again with the key adapter, too, and the key is written behind it.
    """
    input_ids, attention_mask = _padded(model, prompts, config)
    length, most = input_ids.shape[1], config.max_new_tokens
    ends = StopAtThinkingEnd(switch, tokenizer, length, config.eos_token_id)
    cache_argument = cache_name(without_adapters(model))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # layers with a window keep what a shorter row's needs
    with torch.no_grad(), acting(model, switch.context):
        output: Any = model.generate(  # type: ignore[operator]  # as above
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_changed(config, 1 if switch.thinking_given else most),
            stopping_criteria=None if switch.thinking_given else StoppingCriteriaList([ends]),
            **{cache_argument: cache},
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
    kept, kept_mask = _kept(cache, model.config, rows, starts, places)
    left = [most - len(written[row]) for row in rows]
    with torch.no_grad(), acting(model, [*switch.context, KEY]):
        keys: Any = model.generate(  # type: ignore[operator]  # as above
            input_ids=output[rows, places][:, None],
            attention_mask=kept_mask,
            generation_config=_changed(config, max(left)),
            streamer=streamer and streamer.behind(written[0]),
            **{cache_argument: kept},
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
    """Return the prompts, filled up on the left, and their mask: `(B, T)` each."""
    length = max(len(prompt) for prompt in prompts)
    padding = [[config.pad_token_id] * (length - len(prompt)) for prompt in prompts]
    rows = [pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * len(pad) + [1] * (length - len(pad)) for pad in padding]
    return torch.tensor(rows, device=model.device), torch.tensor(mask, device=model.device)


def _changed(config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.max_new_tokens = max_new_tokens
    return changed
