"""Frame and tags are those that a model's template has, and that its tokenizer splits cleanly."""

from typing import Any

import pytest

from sftkey.adapt.frame import CHANNELS, FrameChoice, choose_frame
from sftkey.checks.mask_proof import prove
from tests.data.test_renderer import TEMPLATES, standing_in
from tests.support.families import CHATML_OF_SMOLLM2, FAMILIES
from tests.support.mask_table import num_refused_otherwise
from tests.support.tokenizers import CHATML, KINDS, made

OURS = (("<Thinking>\n", "\n</Thinking>"), ("\n<Answer>\n", "\n</Answer>"))
MOVED = (("<Thinking>\n", "\n</Thinking>\n"), ("<Answer>\n", "\n</Answer>"))
# On the vocabularies that stand in, `</think>` is no token, and its `>` joins the lines' ends.
THINK = (("<think>\n", "\n</think>\n\n"), ("", ""))
OPENED = (("", "\n</think>\n\n"), ("", ""))
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
DATE = {"date_string": "26 Jul 2024"}


def tags(choice: FrameChoice) -> tuple[Any, Any]:
    """Return the tags that were chosen."""
    return choice.section.thinking, choice.section.answer


@pytest.mark.parametrize(
    ("template", "expected", "kwargs", "end"),
    [
        ("qwen3", THINK, {}, "<|im_end|>"),
        ("qwen3_instruct_2507", MOVED, {}, "<|im_end|>"),
        ("qwen3_5_think", OPENED, {}, "<|im_end|>"),
        ("qwen3_5_nothink", OPENED, ON, "<|im_end|>"),
        ("deepseek_r1_distill", OPENED, {}, "<\uff5cend▁of▁sentence\uff5c>"),
        ("gptoss", (CHANNELS.thinking, CHANNELS.answer), {}, "<|return|>"),
        ("llama3", MOVED, {}, "<|eot_id|>"),
        ("llama3_1", MOVED, DATE, "<|eot_id|>"),
        ("llama3_2", MOVED, DATE, "<|eot_id|>"),
        ("gemma4", MOVED, OFF, "<turn|>"),
        ("phi3", MOVED, {}, "<|end|>"),
    ],
)
def test_families(template: str, expected: Any, kwargs: dict[str, Any], end: str) -> None:
    """Each template gets its own tags where it has some, and is told what it must be told."""
    choice = choose_frame(standing_in(template), ())
    assert choice.renderer is not None
    assert (tags(choice), choice.kwargs, choice.renderer.end_token) == (expected, kwargs, end)
    assert choice.section.frame == "chat"
    assert choice.undecided == {}
    proof = prove(choice.renderer, 60, seed=0)
    assert (proof.wrong, num_refused_otherwise(proof)) == ([], 0)


def test_a_prompt_that_opens_the_thinking_with_a_tag_of_any_name() -> None:
    """EXAONE Deep's is `<thought>`; a tag that stands in a turn, too, opens none."""
    opened = CHATML.replace("assistant\n{% endif", "assistant\n<thought>\n{% endif")
    choice = choose_frame(made("look_ahead", opened), ())
    assert tags(choice) == (("", "\n</thought>\n\n"), ("", ""))
    assert choice.why["thinking"] == ("the model's own; its prompt has opened the thinking already")
    assert choice.renderer is not None
    assert prove(choice.renderer, 20, seed=0).wrong == []
    role = CHATML.replace("<|im_start|>{{ m['role'] }}", "<{{ m['role'] }}>")
    role = role.replace("<|im_start|>assistant", "<assistant>")
    assert tags(choose_frame(made("look_ahead", role), ()))[0] in (OURS[0], MOVED[0])


def test_every_template_of_trl_gets_a_frame_or_a_mark() -> None:
    """Nothing trips the choice; where no frame is right, the user is asked for a template."""
    asked = {}
    for file in sorted(TEMPLATES.glob("*.jinja")):
        if "_training" not in file.stem:
            choice = choose_frame(standing_in(file.stem), ())
            asked |= {file.stem: choice.undecided} if choice.renderer is None else {}
    assert asked.keys() == {"glm4moe", "idefics3", "llava_next", "smolvlm"}
    assert asked["glm4moe"] == {
        "model.chat_template": "DECIDE: a template of your own; the model's: expected a special "
        "token that ends a turn, the chat template writes '', which holds none of this tokenizer's"
    }


def test_tags_that_split_cleanly_stay_as_they_are() -> None:
    """Where a tag is a token, or doesn't join the line's end, nothing is moved."""
    tokenizer = standing_in("qwen3")
    tokenizer.add_tokens(["<think>", "</think>"])
    choice = choose_frame(tokenizer, ())
    assert tags(choice) == (("<think>\n", "\n</think>"), ("\n\n", ""))
    assert choice.why["answer"] == "no token straddles the end of the thinking"


def test_a_line_end_that_joins_the_tag_goes_with_it() -> None:
    """The text stays the same; the border lies where a token ends."""
    choice = choose_frame(made("look_ahead", CHATML), ())
    assert tags(choice) == MOVED
    assert "".join(MOVED[0]) + "".join(MOVED[1]) == "".join(OURS[0]) + "".join(OURS[1])
    assert choice.why["answer"] == (
        "the line's end goes with the thinking: this tokenizer joins it to the tag before"
    )


def test_tags_that_never_split_cleanly_are_said_to() -> None:
    """Where a token joins tag and tag, the default ones stay, and the token stays masked."""
    choice = choose_frame(made("byte_level", CHATML), ())
    assert tags(choice) == OURS
    assert choice.why["answer"] == (
        "a token straddles the end of the thinking, and stays out of the key"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_the_frame_is_plain(kind: str) -> None:
    """The end is the tokenizer's own end of text, unless the model's makers stop at another."""
    tokenizer = made(kind)
    choice = choose_frame(tokenizer, ())
    assert (choice.section.frame, choice.section.end) == ("plain", "</s>")
    assert choice.why["frame"] == "the tokenizer has no chat template"
    other = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert choose_frame(tokenizer, (other,)).section.end == "<|im_end|>"


def test_a_template_of_other_tokens_gives_a_plain_frame() -> None:
    """ChatML beside a vocabulary without its tokens is a base model's borrowed template."""
    choice = choose_frame(made("unigram", CHATML_OF_SMOLLM2.replace("|>", "|)")), ())
    assert choice.section.frame == "plain"
    assert choice.why["frame"] == "the template's end of turn is no token of this tokenizer"


def test_a_plain_end_that_nothing_names_is_left_to_the_user() -> None:
    """Without an end of text no row could be trained to stop."""
    tokenizer = KINDS["look_ahead"]()
    tokenizer.eos_token = None
    choice = choose_frame(tokenizer, ())
    assert choice.renderer is None
    assert choice.undecided == {
        "response.end": "DECIDE: the special token that ends a text; of <unk>, <s>, </s>, "
        "<|im_start|>, <|im_end|>, [INST], [/INST]"
    }


def test_a_date_that_nothing_fixes_is_named() -> None:
    """gpt-oss's template writes today's date, and takes none."""
    assert choose_frame(standing_in("gptoss"), ()).why["frame"] == (
        "the chat template's turns, which end with <|return|>; "
        "it writes today's date into prompts, and nothing fixes it"
    )


def test_a_date_in_a_template_that_raises_is_left_alone() -> None:
    """The probe says what is wrong; the date is of no help."""
    template = "{{ date_string }}{{ raise_exception('no chats here') }}"
    choice = choose_frame(made("look_ahead", template), ())
    assert choice.kwargs == {}
    assert choice.undecided == {
        "model.chat_template": "DECIDE: a template of your own; the model's: "
        "the chat template raises on a question and its answer: no chats here"
    }


@pytest.mark.parametrize("name", ["qwen3-8b", "deepseek-r1-distill-qwen-1.5b"])
@pytest.mark.network
def test_real_vocabularies_split_native_tags_cleanly(name: str) -> None:
    """On the published vocabularies the tags are tokens, and stay as the recipes have them."""
    choice = choose_frame(FAMILIES[name].real_one(), ())
    opening = "" if "r1" in name else "<think>\n"
    assert tags(choice) == ((opening, "\n</think>"), ("\n\n", ""))
