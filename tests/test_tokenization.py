from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers_made import CHATML, KINDS, LLAMA2, OPENED, TEXT, made

from sftkey.data.frame import Frame, probe_frame
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Refusal, Row, fit, tokenize
from sftkey.errors import DataError, FrameError
from sftkey.recipe import ResponseSection

NATIVE = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
OPENED_NATIVE = ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", ""))
PLAIN = ResponseSection(frame="plain")
FRAMES = {
    "chatml": (CHATML, ResponseSection()),
    "llama2": (LLAMA2, ResponseSection()),
    "native": (CHATML, NATIVE),
    "opened": (OPENED, OPENED_NATIVE),
    "closed by the bridge": (OPENED, ResponseSection()),
    "plain": (None, PLAIN),
}


def framed(kind: str, frame: str) -> Frame:
    """Probe a made tokenizer with one of the frames."""
    template, section = FRAMES[frame]
    return probe_frame(made(kind, template), section)


class Oracle:
    """Judges rows with `decode()` alone."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.normalizer = frame.tokenizer.backend_tokenizer.normalizer

    def normal(self, text: str) -> str:
        """Give what a tokenizer keeps of a text: its own normal form."""
        return self.normalizer.normalize_str(text) if self.normalizer else text

    def decode(self, ids: list[int]) -> str:
        """Decode after a stand-in, since SentencePiece takes the first blank of a text away."""
        head = self.frame.encode(["cats"])[0].ids
        text = self.frame.tokenizer.decode(head + ids, skip_special_tokens=False)
        assert text.startswith("cats")
        return text[len("cats") :]

    def judge(self, example: Example, row: Row) -> None:
        """Assert everything that must hold of a row."""
        frame, ids = self.frame, row.input_ids
        segments = [Segment(number) for number in row.segment_ids]
        assert len(ids) == len(segments)
        self.judge_prompt(example, row, segments)
        completion = ids[segments.count(Segment.PROMPT) :]
        segments = segments[segments.count(Segment.PROMPT) :]
        # No text is lost.
        pieces = frame.response.pieces(example.thinking, example.answer)
        thinking = self.normal(frame.bridge + pieces[0][1])
        key = self.normal("".join(text for _, text in pieces[1:]) + frame.end)
        assert self.decode(completion) == self.normal(thinking + key)
        # The key is the text after the thinking, but for a token that straddles its beginning.
        start = next(n for n, segment in enumerate(segments) if segment != Segment.THINKING)
        assert Segment.THINKING not in segments[start:]
        trained = self.decode(completion)[len(self.decode(completion[:start])) :]
        assert key.endswith(trained)
        if len(trained) < len(key):
            assert len(self.decode(completion[: start - 1]).rstrip("\ufffd")) < len(thinking)
        # The end of turn comes last, once.
        assert ids[-1] == frame.end_id
        assert segments[-1] == Segment.END
        assert completion.count(frame.end_id) == 1
        self.judge_answer(example, completion, segments, len(thinking), key)

    def judge_prompt(self, example: Example, row: Row, segments: list[Segment]) -> None:
        """The prompt's ids are what inference feeds."""
        tokenizer, frame = self.frame.tokenizer, self.frame
        if frame.kind == "chat":
            fed = tokenizer.apply_chat_template(
                [{"role": "user", "content": example.prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        else:
            fed = tokenizer(example.prompt)["input_ids"]
        assert frame.prompt_ids(example.prompt) == fed
        count = segments.count(Segment.PROMPT)
        assert segments[:count] == [Segment.PROMPT] * count
        assert row.input_ids[:count] == fed

    def judge_answer(
        self, example: Example, ids: list[int], segments: list[Segment], start: int, key: str
    ) -> None:
        """Every token that touches the answer is ANSWER, and no other; THINKING comes first."""
        answer = self.normal(example.answer)
        before = self.normal(self.frame.response.answer_open)
        if not answer or self.normal(before + answer) != before + answer:
            return
        start += len(before)
        places = [n for n, segment in enumerate(segments) if segment == Segment.ANSWER]
        if not places:
            assert not before  # all of it straddles the thinking's end
            return
        first, last = places[0], places[-1]
        assert places == list(range(first, last + 1))
        assert len(self.decode(ids[:first]).rstrip("\ufffd")) <= start
        assert len(self.decode(ids[:last]).rstrip("\ufffd")) < start + len(answer)
        assert len(self.decode(ids[: last + 1])) >= start + len(answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", FRAMES)
@settings(max_examples=50, deadline=None)
@given(prompt=TEXT, thinking=TEXT, answer=TEXT)
def test_rows_are_right(kind: str, frame: str, prompt: str, thinking: str, answer: str) -> None:
    """An oracle that only decodes finds prompt, key, answer and end of turn where they belong."""
    probed = framed(kind, frame)
    example = Example(f"{prompt}?", thinking, f"{answer}7", 3)
    (row,) = tokenize([example], probed)
    assert isinstance(row, Row), row
    Oracle(probed).judge(example, row)
