from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Refusal, Row, fit, tokenize
from sftkey.recipe.schema import ResponseSection
from tests.support.tokenizers import CHATML, KINDS, SPECIAL, TEXT, made

LONG = Example("Q", "3 cats: 12\n2 birds: 4\n" * 5, "16", 4)
SHORT = Example("Q", "4", "16", 5)


@cache
def framed(kind: str) -> Renderer:
    """Probe a made tokenizer with the default tags."""
    return Renderer.read(made(kind, CHATML), ResponseSection())


@pytest.fixture
def renderer() -> Renderer:
    """Return a frame whose tokens are short."""
    return framed("look_ahead")


def key_of(row: Row) -> list[int]:
    """Return the ids after the thinking."""
    return [
        number
        for number, segment in zip(row.input_ids, row.segment_ids, strict=True)
        if segment > Segment.THINKING
    ]


def test_rows_that_fit_stay(renderer: Renderer) -> None:
    """A row of just the length is left alone, whatever happens to longer ones."""
    rows = tokenize([LONG, SHORT], renderer)
    length = max(len(row.input_ids) for row in rows if isinstance(row, Row))
    for trim in (False, True):
        assert fit(rows, [LONG, SHORT], renderer, length, trim) == rows


def test_drop_refuses_long_rows(renderer: Renderer) -> None:
    """The reason says the length; a row that was refused before keeps its own reason."""
    examples = [LONG, SHORT, Example("Q", "</s>", "7", 6)]
    rows = tokenize(examples, renderer)
    assert isinstance(rows[1], Row)
    fitted = fit(rows, examples, renderer, len(rows[1].input_ids), False)
    longer = f"longer than {len(rows[1].input_ids)} tokens"
    assert fitted == [Refusal(4, longer, "too-long"), rows[1], rows[2]]


def test_trimming_refuses_what_cannot_fit(renderer: Renderer) -> None:
    """Prompt and key alone may be too long: then the row goes, for the key is never cut."""
    rows = tokenize([LONG], renderer)
    assert fit(rows, [LONG], renderer, 10, True) == [
        Refusal(4, "longer than 10 tokens even without thinking", "too-long")
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(thinking=TEXT, answer=TEXT, share=st.floats(0, 1))
def test_trimming_takes_the_thinkings_end_and_never_the_key(
    kind: str, thinking: str, answer: str, share: float
) -> None:
    """A trimmed row is what tokenizing a shorter thinking gives, with tag and key whole."""
    assume(not any(token in thinking * 3 for token in SPECIAL))
    renderer = framed(kind)
    assume(not any(tag.strip() in answer for tag in vars(renderer.response).values()))
    example, bare = (Example("Q", text, answer, 0) for text in (thinking * 3, ""))
    whole, smallest = tokenize([example, bare], renderer)
    assert isinstance(whole, Row)
    assert isinstance(smallest, Row)
    least, most = len(smallest.input_ids), len(whole.input_ids)
    length = max(least, round(least + share * (most - least)))
    (row,) = fit([whole], [example], renderer, length, True)
    assert isinstance(row, Row)
    assert len(row.input_ids) <= length
    assert key_of(row)[-1] == renderer.end_id
    tokenizer = renderer.tokenizer
    tail = f"</Thinking>\n<Answer>\n{answer}\n</Answer><|im_end|>"
    normalizer = tokenizer.backend_tokenizer.normalizer
    tail = normalizer.normalize_str(tail) if normalizer else tail
    assert tokenizer.decode(row.input_ids).endswith(tail)
    shorter = [
        Example("Q", example.thinking[:cut], answer, 0) for cut in range(len(thinking) * 3 + 1)
    ]
    assert row in tokenize(shorter, renderer)
