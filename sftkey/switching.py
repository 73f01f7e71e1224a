"""Where the thinking ends in what a model writes, and so where its key adapter begins to act."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from sftkey.errors import FrameError
from sftkey.models.key_adapter import context_adapters, has_key_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sftkey.data.renderer import Frame

SPARE_TOKENS = 8  # beside those that a tag can have: a token may stand for no text at all


@dataclass(frozen=True)
class Switch:
    r"""Where the key adapter begins to act, and beside which others.

    Args:
        context: The adapters that write the thinking; they act on the key, too.
        close: The thinking's closing tag.
        answer_open: The answer's opening tag: it ends the thinking where `close` is blank.
        bridge: What a template lets the model write before the thinking.
        thinking_given: The prompts hold the whole thinking, its last token being their last one.

    >>> switch = Switch((), "\n</Thinking>", "\n<Answer>\n")
    >>> switch.thinking_end("2 + 2 = 4\n</Thinking>\n<Ans")
    21
    >>> switch.thinking_end("2 + 2 = 4\n</Think") is None
    True
    """

    context: tuple[str, ...]
    close: str
    answer_open: str
    bridge: str = ""
    thinking_given: bool = False

    def __post_init__(self) -> None:
        """See that the end of the thinking can be found.

        Raises:
            FrameError: Neither tag has a character.
        """
        if not self.marker:
            raise FrameError(
                "response.thinking",
                "expected a closing tag, or an opening tag of the answer; both are empty, so that "
                "nothing tells where the key adapter of `context: frozen` is to act",
                "write one of them",
            )

    @property
    def marker(self) -> str:
        """Give what tells that the thinking has ended."""
        unclosed = self.close + self.answer_open
        return self.close.strip() or unclosed.rstrip() or unclosed

    def thinking_end(self, text: str) -> int | None:
        """Count the characters up to the end of the thinking; None while it isn't known.

        White space before the closing tag may be missing; white space behind it belongs to the
        thinking as far as the tag has it, so that what comes next has to be seen.
        """
        if self.bridge.startswith(text):
            return None
        start = len(self.bridge) if text.startswith(self.bridge) else 0
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


def find_switch(
    model: PreTrainedModel | PeftModel, frame: Frame, *, thinking_given: bool = False
) -> Switch | None:
    """Say where a model switches to its key adapter; None for a model that has none.

    Args:
        model: As a stage has left it.
        frame: The run's.
        thinking_given: As in `Switch`.

    Raises:
        FrameError: No tag ends the thinking.
    """
    if not has_key_adapter(model):
        return None
    response = frame.response
    return Switch(
        tuple(context_adapters(model)),
        response.thinking_close,
        response.answer_open,
        frame.bridge,
        thinking_given,
    )


class ThinkingEnds(StoppingCriteria):
    """Stops each row where its thinking has ended.

    Args:
        switch: Tells the end.
        tokenizer: Turns ids back into text.
        length: Columns of the prompts.
        stop_ids: A row that one of them has ended never switches.
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
            if self.switch.marker in self._text(ids):  # only then is all of it read
                self._find_end(row, input_ids[row, self.length :].tolist())
        ended = [row in self.num_tokens for row in range(len(recent))]
        return torch.tensor(ended, device=input_ids.device)

    def _find_end(self, row: int, ids: list[int]) -> None:
        """Find the token that holds the thinking's last character; it may hold others behind it."""
        text = self._text(ids)
        end = self.switch.thinking_end(text)
        if end is None:
            return
        num_tokens = len(ids)
        while num_tokens and self._text(ids[: num_tokens - 1]).startswith(text[:end]):
            num_tokens -= 1
        self.num_tokens[row] = num_tokens

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
