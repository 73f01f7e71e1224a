import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from sftkey.data.renderer import Renderer
from sftkey.recipe.schema import ResponseSection
from tests.support.tokenizers import CHATML, SPECIAL, made

TEXTS = st.lists(
    st.sampled_from([*SPECIAL, "né à", "三只猫", " legs here", "\n"]) | st.text(max_size=5),
    max_size=4,
)


def framed(kind: str) -> Renderer:
    """Probe a made tokenizer with two added tokens, one of which no byte-level sign writes."""
    tokenizer = copy.deepcopy(made(kind, CHATML))
    tokenizer.add_tokens([AddedToken("legs here"), AddedToken("三")])
    return Renderer.read(tokenizer, ResponseSection())


@pytest.mark.parametrize("kind", ["byte_level", "look_ahead"])
@settings(max_examples=60)
@given(texts=TEXTS)
def test_ids_spell_what_decoding_reads(kind: str, texts: list[str]) -> None:
    """And no other text: the decoder is asked for what isn't spelled."""
    renderer = framed(kind)
    ids = renderer.encode(["".join(texts)])[0].ids
    text = renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert renderer.spells(ids, text)
    assert not renderer.spells(ids, f"{text}x")
    assert not renderer.spells(ids[1:], text) or not ids


def test_another_decoder_is_never_guessed() -> None:
    """SentencePiece writes blanks as a sign of its own."""
    renderer = framed("unigram")
    assert not renderer.spells(renderer.encode(["cats"])[0].ids, "cats")
