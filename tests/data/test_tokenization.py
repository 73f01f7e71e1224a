import json
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from sftkey.checks.mask_proof import Oracle
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Refusal, Row, tokenize
from sftkey.recipe.schema import ResponseSection
from tests.support.tokenizers import (
    CHATML,
    FRAMES,
    KINDS,
    PLAIN,
    TEXT,
    framed,
    made,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renderer", FRAMES)
@settings(max_examples=40)
@given(prompt=TEXT, thinking=TEXT, answer=TEXT)
def test_rows_are_right(kind: str, renderer: str, prompt: str, thinking: str, answer: str) -> None:
    """An oracle that only decodes finds prompt, key, answer and end of turn where they belong."""
    probed = framed(kind, renderer)
    example = Example(f"Q{prompt}", thinking, answer, 3)
    (row,) = tokenize([example], probed)
    if isinstance(row, Refusal):  # tags inside the answer
        assert not Oracle(probed).can_be_built(example)
    else:
        assert Oracle(probed).fault(example, row) is None


def texts_of(row: Row, renderer: Renderer) -> list[tuple[str, str]]:
    """Return each token's text with the name of its segment."""
    return [
        (renderer.tokenizer.decode([number]), Segment(segment).name)
        for number, segment in zip(row.input_ids, row.segment_ids, strict=True)
    ]


def test_straddling_token_stays_out_of_the_key() -> None:
    """Where `>` of the thinking's tag merges with the line's end, the token is THINKING."""
    renderer = framed("byte_level", "chatml")
    (row,) = tokenize([Example("Q", "x", "7", 0)], renderer)
    assert isinstance(row, Row)
    texts = texts_of(row, renderer)
    ends = [place for place, (_, segment) in enumerate(texts) if segment == "THINKING"]
    text, _ = texts[ends[-1]]
    assert ">\n" in text
    assert texts[ends[-1] + 1][1] == "ANSWER_TAG"


def test_blank_that_straddles_counts_though_offsets_leave_it_out() -> None:
    """A token whose leading blank is the thinking's last character is THINKING."""
    section = ResponseSection(thinking=("", " "), answer=("have ", ""))
    renderer = Renderer.read(made("look_ahead", CHATML), section)
    (row,) = tokenize([Example("Q", "x", "together?", 0)], renderer)
    assert isinstance(row, Row)
    thinking = [text for text, segment in texts_of(row, renderer) if segment == "THINKING"]
    assert thinking[0] == "x"
    assert thinking[1].startswith(" h")


def test_nothing_of_the_thinking_leaks_where_the_answer_has_no_tag() -> None:
    """A token of the thinking's last character and the answer's first is THINKING."""
    section = ResponseSection(thinking=("", " "), answer=("", ""))
    renderer = Renderer.read(made("look_ahead", CHATML), section)
    (row,) = tokenize([Example("Q", "x", "have", 0)], renderer)
    assert isinstance(row, Row)
    thinking = [text for text, segment in texts_of(row, renderer) if segment == "THINKING"]
    answer = "".join(text for text, segment in texts_of(row, renderer) if segment == "ANSWER")
    assert thinking[1].startswith(" h")
    assert "".join(thinking) + answer == "x have"


def test_answer_keeps_a_token_that_also_holds_its_tag() -> None:
    """A token of the answer's last character and the closing tag's first is ANSWER."""
    section = ResponseSection(answer=("\n<Answer>\n", " have together?"))
    renderer = Renderer.read(made("byte_level", CHATML), section)
    (row,) = tokenize([Example("Q", "x", "3 cats and 2 birds", 0)], renderer)
    assert isinstance(row, Row)
    answer = "".join(text for text, segment in texts_of(row, renderer) if segment == "ANSWER")
    assert answer == "3 cats and 2 birds have together?"


def test_prompt_that_merges_with_the_completion_is_kept_apart() -> None:
    """Where one string would change the prompt's ids, the rest is tokenized apart."""
    renderer = framed("look_ahead", "closed by the prefix")
    (row,) = tokenize([Example("Q", "x", "7", 0)], renderer)
    assert isinstance(row, Row)
    prompt = renderer.prompt_ids("Q")
    text = renderer.prompt_text("Q")
    whole = renderer.encode(
        [text + renderer.assistant_prefix + renderer.response.render("x", "7")]
    )[0].ids
    assert whole[: len(prompt)] != prompt  # else this test shows nothing
    assert row.input_ids[: len(prompt)] == prompt
    assert row.segment_ids[len(prompt)] == Segment.THINKING


def test_bos_is_set_once_before_plain_prompts() -> None:
    """The tokenizer's own first token comes before a plain row, and isn't doubled."""
    renderer = framed("unigram", "plain")
    bos = renderer.tokenizer.bos_token_id
    rows = tokenize([Example("Q", "", "7", 0), Example("<s>Q", "", "7", 1)], renderer)
    for row in rows:
        assert isinstance(row, Row)
        assert row.input_ids[0] == bos
        assert row.input_ids.count(bos) == 1
        assert row.segment_ids[0] == Segment.PROMPT


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (("Q", "a</s>", "7"), "the thinking holds the text of the special token '</s>'"),
        (("Q", "", "<|im_end|>"), "the answer holds the text of the special token '<|im_end|>'"),
        (("[INST]", "", "7"), "the prompt holds the text of the special token '[INST]'"),
    ],
)
def test_special_token_text_is_refused(example: tuple[str, str, str], reason: str) -> None:
    """Text that would become a special token is refused by name, and other rows go on."""
    rows = tokenize([Example(*example, 4), Example("Q", "", "7", 5)], framed("unigram", "chatml"))
    assert rows[0] == Refusal(4, reason, "special-token-text")
    assert isinstance(rows[1], Row)


def test_plain_prompt_may_hold_special_tokens() -> None:
    """A plain prompt is the user's own frame, special tokens and all."""
    renderer = framed("look_ahead", "plain")
    (row,) = tokenize([Example("<|im_start|>user\nQ<|im_end|>\n", "", "7", 0)], renderer)
    assert isinstance(row, Row)


def test_tags_may_hold_special_tokens() -> None:
    """The completion's special tokens are those of the tags and the end of turn."""
    section = ResponseSection(thinking=("[INST]", "[/INST]"), answer=("", ""))
    renderer = Renderer.read(made("look_ahead", CHATML), section)
    (row,) = tokenize([Example("Q", "x", "7", 0)], renderer)
    assert isinstance(row, Row)
    assert texts_of(row, renderer)[-3:] == [
        ("[/INST]", "THINKING"),
        ("7", "ANSWER"),
        ("<|im_end|>", "END"),
    ]


def test_unknown_character_is_refused() -> None:
    """A character that becomes the unknown token would be lost: the row is refused."""
    tokenizer = KINDS["unigram"]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["byte_fallback"] = False
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    renderer = Renderer.read(tokenizer, PLAIN)
    assert tokenize([Example("Q", "三", "7", 0)], renderer) == [
        Refusal(
            0,
            "a character that the tokenizer doesn't know became a special token",
            "unknown-character",
        )
    ]


def losing() -> Renderer:
    """Return a plain frame over byte-level tokens that lack the byte 4, as SmolLM2's do."""
    state = json.loads(KINDS["byte_level"]().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["another"] = vocabulary.pop("\N{LATIN CAPITAL LETTER A WITH OGONEK}")
    backend = Tokenizer.from_str(json.dumps(state))
    return Renderer.read(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), PLAIN)


def test_character_that_gets_lost_is_refused() -> None:
    """What the tokenizer would drop without a word refuses its row, and no other."""
    rows = tokenize([Example("Q", "a\x04b", "7", 0), Example("Q", "ab", "7", 1)], losing())
    assert rows[0] == Refusal(0, "the completion holds '\\x04', which the tokenizer would lose")
    assert isinstance(rows[1], Row)


def test_character_that_the_prompt_loses_shifts_nothing() -> None:
    """Offsets behind a lost character are wrong, so the completion's are taken apart from it."""
    renderer, example = losing(), Example("Q\x04", "ab", "7", 0)
    (row,) = tokenize([example], renderer)
    assert isinstance(row, Row)
    assert renderer.tokenizer.decode(row.input_ids[:1]) == "Q"
    assert row.segment_ids[:2] == [Segment.PROMPT, Segment.THINKING]
    assert Oracle(renderer).fault(example, row) is None


def swallowing(**sides: bool) -> Renderer:
    """Return a plain frame whose end of text heeds what stands beside it."""
    tokenizer = KINDS["look_ahead"]()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, **sides)], special_tokens=True)
    tags = {"thinking": ("", "\n"), "answer": ("", "")}
    return Renderer.read(tokenizer, ResponseSection(frame="plain", end="<|end|>", **tags))


def test_end_that_swallows_white_space_is_refused() -> None:
    """A blank at the answer's end that the end of turn takes in would be lost."""
    renderer = swallowing(lstrip=True)
    rows = tokenize([Example("Q", "x", "7 ", 0), Example("Q", "x", "7", 1)], renderer)
    assert rows[0] == Refusal(
        0, "the end of turn '<|end|>' swallows white space before it", "end-of-turn"
    )
    assert isinstance(rows[1], Row)


def test_end_that_melts_into_the_answer_is_refused() -> None:
    """A token that is one only between blanks is none behind a letter."""
    renderer = swallowing(single_word=True)
    rows = tokenize([Example("Q", "x", "7", 0), Example("Q", "x", "7.", 1)], renderer)
    assert rows[0] == Refusal(0, "the end of turn '<|end|>' is not the last token", "end-of-turn")
    assert isinstance(rows[1], Row)


def test_white_space_that_the_prompt_would_swallow_is_kept() -> None:
    """A special token at the prompt's end takes no blank from the thinking: it goes apart."""
    renderer = swallowing(rstrip=True)
    (row,) = tokenize([Example("Q<|end|>", " x", "7", 0)], renderer)
    assert isinstance(row, Row)
    assert renderer.tokenizer.decode(row.input_ids) == "Q<|end|> x\n7<|end|>"


def test_anchor_that_would_swallow_white_space_is_left_out() -> None:
    """Phi-3's case: blanks are set behind special tokens, and its end of turn takes in newlines."""
    state = json.loads(KINDS["unigram"]().backend_tokenizer.to_str())
    state["pre_tokenizer"]["prepend_scheme"] = "always"
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)], special_tokens=True)
    tags = {"thinking": ("", "\n"), "answer": ("", "")}
    renderer = Renderer.read(tokenizer, ResponseSection(frame="plain", end="<|end|>", **tags))
    example = Example("Q<|end|>", "\nx", "7", 0)
    (row,) = tokenize([example], renderer)
    assert isinstance(row, Row)
    assert renderer.tokenizer.decode(row.input_ids).endswith("<|end|>\nx\n7<|end|>")
    assert Oracle(renderer).fault(example, row) is None


def test_tag_that_swallows_white_space_refuses_the_row() -> None:
    """A special token as a tag must not take a blank from the thinking."""
    tokenizer = KINDS["look_ahead"]()
    tokenizer.add_tokens([AddedToken("<|think|>", special=True, rstrip=True)], special_tokens=True)
    section = ResponseSection(frame="plain", thinking=("<|think|>", "\n"), answer=("", ""))
    renderer = Renderer.read(tokenizer, section)
    rows = tokenize([Example("Q", " x", "7", 0), Example("Q", "x", "7", 1)], renderer)
    what = "the token '<|think|>' swallows white space beside it"
    assert rows[0] == Refusal(0, what, "end-of-turn")
    assert isinstance(rows[1], Row)


def test_row_that_cannot_be_built_is_refused() -> None:
    """Where one string changes the prompt and apart changes the text, the row is refused."""
    tokenizer = KINDS["unigram"]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["prepend_scheme"] = "always"  # behind special tokens too
    state["model"]["vocab"] += [["\n<", 0.0], ["x<", 0.0]]
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    renderer = Renderer.read(tokenizer, PLAIN)
    assert tokenize([Example("Q\n", "x", "7", 0)], renderer) == [
        Refusal(
            0,
            "the ids do not begin with the prompt's, "
            "and the rest tokenized apart decodes to another text",
            "prefix",
        )
    ]


TOOL_TURNS = (
    {"role": "tools", "content": '[{"name": "add"}]'},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]},
    {"role": "tool", "content": "4"},
)


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (({"role": "critic", "content": "x"},), "raises on a prompt of critic"),
        (TOOL_TURNS[3:], "takes no tools, and raises on a prompt of tool"),
        (TOOL_TURNS, "takes no tools, and raises on a prompt of tools, user, assistant, tool"),
    ],
)
def test_roles_that_the_template_raises_on_refuse_the_row(odd: Any, what: str) -> None:
    """One odd conversation doesn't stop the others; a template without tools is named as such."""
    rows = tokenize(
        [Example(odd, "", "7", 0), Example("Q", "", "7", 1)], framed("unigram", "llama2")
    )
    assert rows[0] == Refusal(0, f"the chat template {what}: only user and assistant", "template")
    assert isinstance(rows[1], Row)


def test_system_message_that_the_template_raises_on_refuses_the_row() -> None:
    """A row with a system message that can't be rendered is refused by its number."""
    prompt = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"})
    rows = tokenize([Example(prompt, "", "7", 4)], framed("unigram", "llama2"))
    what = "the chat template raises on the system message: only user and assistant"
    assert rows == [Refusal(4, what, "template")]


def test_batches_keep_the_order() -> None:
    """More rows than one batch come back in order, refused ones in their places."""
    answers = ["</s>" if number % 7 == 0 else str(number) for number in range(1500)]
    examples = [Example("Q", "", answer, place) for place, answer in enumerate(answers)]
    rows = tokenize(examples, framed("look_ahead", "chatml"))
    assert [row.index for row in rows] == list(range(1500))
    assert [isinstance(row, Refusal) for row in rows] == [a == "</s>" for a in answers]
