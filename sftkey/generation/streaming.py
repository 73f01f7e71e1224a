"""A generation's text while it is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder writes for a character of which bytes are missing


class Streamer:
    """Passes a text on as it grows, each time from its beginning; of one prompt alone.

    transformers calls `put` with the prompt and then with every token, and `end` behind the last.
    Its own `TextStreamer` keeps a text in pieces, where a tag may be cut anywhere.

    Args:
        tokenizer: Turns ids back into text.
        stop_ids: They end the text, and don't stand in it.
        on_text: Gets all of the text so far.
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
        if self._in_prompt:
            self._in_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.stop_ids]
        self._pass_on()

    def end(self) -> None:
        """Expect a prompt next."""
        self._in_prompt = True

    def _pass_on(self) -> None:
        text = str(self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False))
        self.on_text(text.rstrip(UNFINISHED))
