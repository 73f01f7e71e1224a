"""The proof of masks says right of what is right, and wrong of everything else."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from sftkey.checks import mask_proof as proof
from sftkey.checks.mask_proof import Oracle, hard_examples, judge, prove
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import OWN_TAGS, Refusal, Row, tokenize
from sftkey.recipe.schema import ResponseSection
from tests.support.mask_table import num_refused_otherwise
from tests.support.tokenizers import (
    FRAMES,
    KINDS,
    framed,
    made,
)

OF_THE_FRAME = {
    "the thinking holds the text of a special token",
    "the answer holds the text of a special token",
    f"{OWN_TAGS} the answer",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FRAMES)
def test_every_row_is_right_or_holds_what_is_the_frames(kind: str, name: str) -> None:
    """On every made tokenizer and frame nothing is wrong, and nothing is refused without need."""
    proven = prove(framed(kind, name), num_rows=300, seed=1)
    assert proven.wrong == []
    assert proven.refused.keys() == OF_THE_FRAME
    assert num_refused_otherwise(proven) == 0
    assert proven.right + sum(proven.refused.values()) == proven.rows == 300
    assert proven.right > 230


def test_rows_depend_on_the_seed_alone() -> None:
    """The same seed gives the same rows, another one others."""
    renderer = framed()
    assert hard_examples(renderer, 50, 3) == hard_examples(renderer, 50, 3)
    assert hard_examples(renderer, 50, 3) != hard_examples(renderer, 50, 4)


def test_rows_have_all_shapes_of_prompts() -> None:
    """Questions alone, after a system message, after an earlier turn; plain frames take text."""
    prompts = [example.prompt for example in hard_examples(framed(), 200, 0)]
    roles = {None if isinstance(p, str) else tuple(m["role"] for m in p) for p in prompts}
    assert roles == {None, ("system", "user"), ("user", "assistant", "user")}
    no_system = [e.prompt for e in hard_examples(framed(frame="llama2"), 200, 0)]
    assert not any(isinstance(p, tuple) and p[0]["role"] == "system" for p in no_system)
    assert all(isinstance(e.prompt, str) for e in hard_examples(framed(frame="plain"), 200, 0))


def test_rows_can_be_trained_on() -> None:
    """No made row is one that loading would have refused: prompts and answers hold something."""
    examples = hard_examples(framed(), 500, 0)
    assert all(example.answer.strip() for example in examples)
    assert {bool(example.thinking) for example in examples} == {True, False}


SCATTERED = "stage `key` trains tokens that do not follow one another up to the row's end"
Mutation = Callable[[Row, Renderer], None]


def shifted_left(row: Row, renderer: Renderer) -> None:
    """Let every segment begin a token too early."""
    row.segment_ids = [*row.segment_ids[1:], Segment.END]


def shifted_right(row: Row, renderer: Renderer) -> None:
    """Let every segment begin a token too late."""
    row.segment_ids = [Segment.PROMPT, *row.segment_ids[:-1]]


def dropped_end(row: Row, renderer: Renderer) -> None:
    """Leave out the end of turn."""
    row.input_ids, row.segment_ids = row.input_ids[:-1], row.segment_ids[:-1]


def untrained_end(row: Row, renderer: Renderer) -> None:
    """Take the end of turn for a part of the thinking."""
    row.segment_ids = [*row.segment_ids[:-1], Segment.THINKING]


def end_as_tag(row: Row, renderer: Renderer) -> None:
    """Take the end of turn for a tag."""
    row.segment_ids = [*row.segment_ids[:-1], Segment.ANSWER_TAG]


def text_after_the_end(row: Row, renderer: Renderer) -> None:
    """Add what many templates write behind the end of turn."""
    row.input_ids = [*row.input_ids, *renderer.encode(["\n"])[0].ids]
    row.segment_ids = [*row.segment_ids, Segment.END]


def leaked_thinking(row: Row, renderer: Renderer) -> None:
    """Let the thinking's last token into the key."""
    last = max(n for n, segment in enumerate(row.segment_ids) if segment == Segment.THINKING)
    row.segment_ids[last] = int(Segment.ANSWER_TAG)


def leaked_middle(row: Row, renderer: Renderer) -> None:
    """Let the thinking's first token into the key."""
    row.segment_ids[row.segment_ids.index(Segment.THINKING)] = int(Segment.ANSWER)


def missed_key(row: Row, renderer: Renderer) -> None:
    """Leave the key's first token to the thinking."""
    row.segment_ids[row.segment_ids.index(Segment.ANSWER_TAG)] = int(Segment.THINKING)


def missed_answer(row: Row, renderer: Renderer) -> None:
    """Leave the answer's first token to its tag."""
    row.segment_ids[row.segment_ids.index(Segment.ANSWER)] = int(Segment.ANSWER_TAG)


def no_answer(row: Row, renderer: Renderer) -> None:
    """Take the whole answer for its tag."""
    row.segment_ids = [2 if n == Segment.ANSWER else n for n in row.segment_ids]


def lost_token(row: Row, renderer: Renderer) -> None:
    """Lose a token of the completion."""
    place = row.segment_ids.index(Segment.THINKING)
    del row.input_ids[place], row.segment_ids[place]


def another_prompt(row: Row, renderer: Renderer) -> None:
    """Double the first token, as a second beginning-of-sequence would."""
    row.input_ids = [row.input_ids[0], *row.input_ids]
    row.segment_ids = [row.segment_ids[0], *row.segment_ids]


def trained_prompt(row: Row, renderer: Renderer) -> None:
    """Train the prompt's last token."""
    row.segment_ids[row.segment_ids.index(Segment.THINKING) - 1] = int(Segment.THINKING)


def short_segments(row: Row, renderer: Renderer) -> None:
    """Leave a token without a segment."""
    row.segment_ids = row.segment_ids[:-1]


@pytest.mark.parametrize(
    ("mutate", "what"),
    [
        (shifted_left, "stage `completion` does not train exactly what follows the prompt"),
        (shifted_right, "stage `completion` does not train exactly what follows the prompt"),
        (
            dropped_end,
            "text was lost: '<Thinking>\\nx\\n</Thinking>\\n<Answer>\\n35 birds\\n</Answer>'",
        ),
        (
            untrained_end,
            SCATTERED,
        ),
        (end_as_tag, "the end of turn is not trained as such"),
        (
            text_after_the_end,
            "text was lost: "
            "'<Thinking>\\nx\\n</Thinking>\\n<Answer>\\n35 birds\\n</Answer><|im_end|>\\n'",
        ),
        (
            leaked_middle,
            SCATTERED,
        ),
        (missed_answer, "stage `answer` trains other text: ' birds'"),
        (no_answer, "stage `answer` trains other text: '>\\n'"),
        (another_prompt, "the row does not begin with what inference feeds"),
        (trained_prompt, "stage `completion` does not train exactly what follows the prompt"),
        (short_segments, "not a segment for every token"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mutated_row_is_wrong(mutate: Mutation, what: str) -> None:
    """Whatever is changed in a right row, the oracle says what is wrong with it."""
    renderer, example = framed(), Example("Q", "x", "35 birds", 0)
    (row,) = tokenize([example], renderer)
    assert isinstance(row, Row)
    assert Oracle(renderer).fault(example, row) is None
    mutate(row, renderer)
    assert Oracle(renderer).fault(example, row) == what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mutate",
    [shifted_left, shifted_right, dropped_end, leaked_thinking, missed_key, lost_token],
    ids=lambda value: value.__name__,
)
def test_a_mutated_tokenization_is_never_proven(
    kind: str, mutate: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in every row is found in (almost) every row, on every kind of tokenizer."""

    def mutated(examples: Sequence[Example], renderer: Renderer) -> list[Row | Refusal]:
        rows = tokenize(examples, renderer)
        for row in rows:
            if isinstance(row, Row):
                mutate(row, renderer)
        return rows

    monkeypatch.setattr(proof, "tokenize", mutated)
    proven = prove(framed(kind), num_rows=100, seed=2)
    assert proven.right <= 2
    assert len(proven.wrong) > 75
    assert proven.refused.keys() <= OF_THE_FRAME


def test_refusing_everything_is_wrong() -> None:
    """A refusal counts only where no row can be built in another way either."""
    renderer = framed()
    examples = [Example("Q", "x", "7", 0), Example("Q", "a </s> b", "7", 1)]
    refused: list[Row | Refusal] = [Refusal(0, "no"), Refusal(1, "no")]
    proven = judge(renderer, examples, refused)
    assert [wrong.what for wrong in proven.wrong] == ["refused, but a row can be built: no"]
    assert proven.refused == {"no": 1}
    assert num_refused_otherwise(proven) == 1


def test_refusals_for_each_reason_are_confirmed() -> None:
    """What the tokenization refuses, the tokenizer's own call can't build."""
    tokenizer = KINDS["look_ahead"]()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, lstrip=True)], special_tokens=True)
    section = ResponseSection(frame="plain", end="<|end|>", answer=("", ""))
    renderer = Renderer.read(tokenizer, section)
    odd: Any = ({"role": "critic", "content": "x"}, {"role": "user", "content": "Q"})
    swallowed = "the end of turn '<|end|>' swallows white space before it"
    raised = "the chat template raises on a prompt of critic, user: only user and assistant"
    for probed, example, reason in [
        (renderer, Example("Q", "x", "7 ", 0), swallowed),
        (framed(frame="llama2"), Example(odd, "x", "7", 0), raised),
    ]:
        proven = judge(probed, [example], tokenize([example], probed))
        assert proven.refused == {reason: 1}


def test_refusals_of_one_kind_are_counted_together() -> None:
    """A reason that names a token or a character is one reason for all of them."""
    texts = ["holds the text of the special token '</s>'", "holds '\\x04', which is lost"]
    renderer, examples = framed(), [Example("Q", "a </s>", "7", n) for n in range(4)]
    others = [texts[0].replace("/", ""), texts[1].replace("4", "6")]
    refused: list[Row | Refusal] = [Refusal(n, r) for n, r in enumerate([*texts, *others])]
    assert judge(renderer, examples, refused).refused == {
        "holds the text of a special token": 2,
        "holds a character that is lost": 2,
    }


def test_blank_that_the_tokenizer_sets_behind_a_special_token_is_no_loss() -> None:
    """Older SentencePiece sets one behind every special token, here the prompt's last."""
    state = json.loads(made("unigram").backend_tokenizer.to_str())
    state["pre_tokenizer"]["prepend_scheme"] = "always"
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    section = ResponseSection(frame="plain")
    renderer, example = Renderer.read(tokenizer, section), Example("Q[/INST]", "x", "7", 0)
    (row,) = tokenize([example], renderer)
    assert isinstance(row, Row)
    assert "Q[/INST] <Thinking>" in tokenizer.decode(row.input_ids)
    assert Oracle(renderer).fault(example, row) is None
    assert Oracle(renderer).can_be_built(example)


@pytest.mark.parametrize(("kind", "kept"), [("unigram", " "), ("byte_level", "▁")])
def test_sign_of_a_blank(kind: str, kept: str) -> None:
    """SentencePiece reads its own sign in a text as a blank; others keep it."""
    renderer, example = framed(kind), Example("Q", "a▁b", "7", 0)
    (row,) = tokenize([example], renderer)
    assert isinstance(row, Row)
    assert f"a{kept}b" in renderer.tokenizer.decode(row.input_ids)
    assert Oracle(renderer).fault(example, row) is None


def test_swallowed_text_is_no_row() -> None:
    """The oracle sees what offsets would hide: a row that decodes to other text."""
    renderer, example = framed(), Example("Q", "x", "7", 0)
    (row,) = tokenize([replace(example, thinking="y")], renderer)
    assert isinstance(row, Row)
    assert str(Oracle(renderer).fault(example, row)).startswith("text was lost: '<Thinking>\\ny\\n")
