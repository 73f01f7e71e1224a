import re
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings

from sftkey.data.renderer import Renderer, stop_ids
from sftkey.data.response import Example, Segment
from sftkey.data.template import read_template
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.recipe.schema import ResponseSection
from tests.support.tokenizers import CHATML, KINDS, LLAMA2, OPENED, TEXT, made

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# What the templates write as one token of their families' vocabularies.
CONTROL = re.compile(
    r"<\|[^|<>'\"]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<\|channel>|<channel\|>"
)
THINK = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
OPENED_THINK = ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", ""))
CHANNELS = ResponseSection(
    thinking=("<|channel|>analysis<|message|>", "<|end|>"),
    answer=("<|start|>assistant<|channel|>final<|message|>", ""),
)
ONE_TAG = ResponseSection(  # all that parts thinking and answer stands in one
    thinking=(CHANNELS.thinking[0], CHANNELS.thinking[1] + CHANNELS.answer[0]), answer=("", "")
)
TO_SELF = ResponseSection(
    thinking=(" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
    answer=("", ""),
)
OWN = ResponseSection()
IM_END = "<|im_end|>"
DEEPSEEK_END = "<\uff5cend▁of▁sentence\uff5c>"  # full-width bars


def standing_in(template: str) -> Any:
    """Return a byte-level tokenizer with the special tokens that a template of trl's writes."""
    tokenizer = KINDS["look_ahead"]()
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(CONTROL.findall(text)))})
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    ("template", "section", "kwargs", "assistant_prefix", "end"),
    [
        ("qwen2_5", OWN, {}, "", IM_END),
        ("qwen3", OWN, {}, "<think>\n\n</think>\n\n", IM_END),
        ("qwen3", OWN, {"enable_thinking": False}, "", IM_END),
        ("qwen3", THINK, {}, "", IM_END),
        ("qwen3_5_nothink", OWN, {}, "", IM_END),
        ("qwen3_5_think", OWN, {}, "\n</think>\n\n", IM_END),
        ("qwen3_5_think", OPENED_THINK, {}, "", IM_END),
        ("qwen3_8", OPENED_THINK, {}, "", IM_END),
        ("qwen3_instruct_2507", OWN, {}, "", IM_END),
        ("deepseek_r1_distill", OPENED_THINK, {}, "", DEEPSEEK_END),
        ("deepseekv3", OPENED_THINK, {}, "", DEEPSEEK_END),
        ("nemotron_3_nano", OPENED_THINK, {}, "", IM_END),
        ("gptoss", OWN, {}, "<|channel|>final<|message|>", "<|return|>"),
        ("gptoss", CHANNELS, {}, "", "<|return|>"),
        ("gptoss", ONE_TAG, {}, "", "<|return|>"),
        ("llama3", OWN, {}, "", "<|eot_id|>"),
        ("llama3_1", OWN, {}, "", "<|eot_id|>"),
        ("llama3_2", OWN, {"date_string": "1 Jan 2026"}, "", "<|eot_id|>"),
        ("gemma", OWN, {}, "", "<end_of_turn>"),
        ("gemma3", OWN, {}, "", "<end_of_turn>"),
        ("gemma4", OWN, {}, "", "<turn|>"),
        ("phi3", OWN, {}, "", "<|end|>"),
        ("cohere", OWN, {}, "", "<|END_OF_TURN_TOKEN|>"),
        ("cohere2", OWN, {}, "", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("lfm2", OWN, {}, "", IM_END),
        ("muse_glimmer", OWN, {}, " to=user<|message|>", "<|eot|>"),
        ("muse_glimmer", TO_SELF, {}, "", "<|eot|>"),
    ],
)
def test_families(
    template: str, section: ResponseSection, kwargs: dict[str, Any], assistant_prefix: str, end: str
) -> None:
    """Each family's template gives its bridge and end, and rows begin with inference's ids."""
    tokenizer = standing_in(template)
    renderer = Renderer.read(tokenizer, section, kwargs)
    assert (renderer.assistant_prefix, renderer.end) == (assistant_prefix, end)
    ends = tokenizer.encode(end, add_special_tokens=False)
    assert (renderer.end_id, renderer.end_ids) == (ends[-1], ends)
    fed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True, return_dict=False, **kwargs
    )
    (row,) = tokenize([Example("Q", "a", "7", 0)], renderer)
    assert isinstance(row, Row)
    assert row.input_ids[: len(fed)] == fed == renderer.prompt_ids("Q")
    completion = tokenizer.decode(row.input_ids[len(fed) :])
    assert completion == assistant_prefix + renderer.response.render("a", "7") + end
    assert row.segment_ids[len(fed)] == Segment.THINKING


def test_every_template_of_trl_is_framed_or_refused() -> None:
    """No template trips the probe; those refused with our own tags are the ones known."""
    refused = set()
    names = {path.stem for path in TEMPLATES.glob("*.jinja") if "_training" not in path.stem}
    for name in sorted(names):
        try:
            Renderer.read(standing_in(name), OWN)
        except FrameError:
            refused.add(name)
    assert len(names) > 30
    assert refused == {
        "deepseek_r1_distill",  # these open the thinking in the prompt, but not in a turn:
        "deepseekv3",
        "nemotron_3_5_lightning",
        "nemotron_3_nano",
        "nemotron_3_super",
        "nemotron_3_ultra",
        "glm4moe",  # ends no turn
        "idefics3",  # these take contents as lists of parts:
        "llava_next",
        "smolvlm",
    }


def refusal(tokenizer: Any, section: ResponseSection = OWN, **kwargs: Any) -> str:
    """Return the text of the error with which a frame is refused."""
    with pytest.raises(FrameError) as raised:
        Renderer.read(tokenizer, section, kwargs)
    return str(raised.value)


def test_prompt_that_is_no_prefix_is_refused() -> None:
    """R1's prompt opens the thinking, its turns don't: own tags can't follow it."""
    assert refusal(standing_in("deepseek_r1_distill")) == (
        "tokenizer: the generation prompt is no prefix of the training text: "
        "one goes on with '<think>\\n', the other with ''\n"
        'hint: the prompt opens the thinking: response.thinking: ["", "\\n</think>"]; '
        "or give a model.chat_template of your own"
    )


def test_prefix_hint_without_a_tag() -> None:
    """Where the prompt ends in no tag, only another template helps."""
    template = CHATML.replace("assistant\n{% endif", "assistant: {% endif")
    assert refusal(made("look_ahead", template)) == (
        "tokenizer: the generation prompt is no prefix of the training text: "
        "one goes on with ': ', the other with '\\n'\n"
        "hint: give a model.chat_template of your own"
    )


def test_opening_tag_that_the_prompt_has_written_is_refused() -> None:
    """The native opening tag would stand there twice."""
    assert refusal(standing_in("qwen3_5_think"), THINK) == (
        "tokenizer: the generation prompt opens the thinking already: "
        "'<|im_start|>assistant\\n<think>\\n'\n"
        'hint: response.thinking: ["", "\\n</think>"]'
    )


def test_thinking_that_the_prompt_has_ended_is_refused() -> None:
    """With thinking switched off, the native tags come too late."""
    assert refusal(standing_in("qwen3"), THINK, enable_thinking=False) == (
        "tokenizer: the generation prompt ends the thinking already: "
        "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'\n"
        "hint: model.chat_template_kwargs: {enable_thinking: true}, where the template knows it"
    )


def test_template_that_ends_no_turn_is_refused() -> None:
    """GLM's turns end where the next begins: nothing could be trained to stop."""
    assert refusal(standing_in("glm4moe")) == (
        "tokenizer: expected a special token that ends a turn, the chat template writes '', "
        "which holds none of this tokenizer's\n"
        "hint: a base model takes response.frame: plain; "
        "else give a model.chat_template whose turns end with a special token"
    )


def test_end_that_is_not_one_token_is_refused() -> None:
    """ChatML on a vocabulary that lacks its tokens."""
    template = CHATML.replace("<|im_end|>", "<|done|>")
    assert refusal(made("look_ahead", template)) == (
        "tokenizer: expected a special token that ends a turn, the chat template writes "
        "'<|done|>\\n', which holds none of this tokenizer's\n"
        "hint: a base model takes response.frame: plain; "
        "else give a model.chat_template whose turns end with a special token"
    )


def test_missing_template_is_refused() -> None:
    """A base model's tokenizer needs the plain frame, or a template."""
    assert refusal(made("look_ahead")) == (
        "tokenizer: expected a chat template, the tokenizer has none\n"
        "hint: a base model takes response.frame: plain; else give model.chat_template"
    )


def test_template_without_generation_prompt_is_refused() -> None:
    """The model would have to write the assistant's header itself."""
    template = CHATML.partition("{% if add_generation_prompt %}")[0]
    assert refusal(made("look_ahead", template)) == (
        "tokenizer: the chat template has no generation prompt: "
        "the model itself would write '<|im_start|>assistant\\n'\n"
        "hint: give a model.chat_template that heeds add_generation_prompt"
    )


def test_template_that_raises_is_refused() -> None:
    """What the template says is handed on."""
    assert refusal(made("look_ahead", "{{ raise_exception('no chats here') }}")) == (
        "tokenizer: the chat template raises on a question and its answer: no chats here\n"
        "hint: give another model.chat_template"
    )


def test_template_that_loses_texts_is_refused() -> None:
    """A template that doesn't write what was said is none to train with."""
    assert refusal(made("look_ahead", "<|im_start|>hello<|im_end|>")) == (
        "tokenizer: the chat template doesn't write the user's and the assistant's text once each\n"
        "hint: give another model.chat_template"
    )


def test_end_inside_a_tag_is_refused() -> None:
    """Generation would stop at the tag."""
    section = ResponseSection(answer=("\n<|im_end|>\n", ""))
    assert refusal(made("look_ahead", CHATML), section) == (
        "tokenizer: the end of turn '<|im_end|>' stands in '\\n<|im_end|>\\n' too, "
        "where generation would stop\n"
        "hint: choose response.thinking and response.answer without it"
    )


def test_slow_tokenizer_is_refused() -> None:
    """Without offsets no boundary is known."""

    class Slow:
        is_fast = False
        name_or_path = "some/model"

    assert refusal(Slow()) == (
        "some/model: expected a fast tokenizer, got a slow one, "
        "which doesn't say where its tokens stand\n"
        "hint: put a tokenizer.json beside the model, or choose a model that has one"
    )


SYSTEM = ({"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Q"})


def test_system_message_that_the_template_drops_is_refused() -> None:
    """The data's system message must not vanish on the way."""
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    renderer = Renderer.read(made("look_ahead", template), OWN)
    with pytest.raises(FrameError) as raised:
        renderer.prompt_text(SYSTEM)
    assert str(raised.value) == (
        "tokenizer: the chat template drops the system message\n"
        "hint: write it into data.prompt, or choose another model.chat_template"
    )


def test_system_message_and_earlier_turns_stand_in_the_prompt() -> None:
    """A conversation is rendered as the template renders it."""
    renderer = Renderer.read(made("look_ahead", CHATML), OWN)
    turns = ({"role": "assistant", "content": "A"}, {"role": "user", "content": "R"})
    assert renderer.prompt_text((*SYSTEM, *turns)) == (
        "<|im_start|>system\nBe brief.\n<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )


def test_blank_before_the_answer_is_the_bridge() -> None:
    """Llama-2's template sets a blank that is no part of the prompt."""
    renderer = Renderer.read(made("unigram", LLAMA2), OWN)
    assert (renderer.assistant_prefix, renderer.end) == (" ", "</s>")
    assert renderer.prompt_text("Q") == "<s>[INST] Q [/INST]"


def test_opening_is_left_to_the_prompt() -> None:
    """With an empty opening tag the template's empty block makes way."""
    renderer = Renderer.read(made("look_ahead", OPENED), OPENED_THINK)
    assert renderer.assistant_prefix == ""
    assert renderer.prompt_text("Q").endswith("<think>\n")


def test_plain_takes_the_prompt_as_it_is() -> None:
    """A base model's frame is the prompt, and a real end-of-text token."""
    tokenizer = made("unigram")
    renderer = Renderer.read(tokenizer, ResponseSection(frame="plain"))
    assert (renderer.kind, renderer.assistant_prefix, renderer.end) == ("plain", "", "</s>")
    assert renderer.prompt_text("Q \n") == "Q \n"
    assert renderer.prompt_ids("Q \n") == tokenizer("Q \n")["input_ids"]
    assert renderer.prompt_ids("Q")[0] == tokenizer.bos_token_id


def test_plain_end_is_the_recipes() -> None:
    """`response.end` names another end-of-text token."""
    renderer = Renderer.read(made("look_ahead"), ResponseSection(frame="plain", end="<|im_end|>"))
    assert (renderer.end, renderer.end_id) == ("<|im_end|>", 4)


def test_plain_end_that_is_no_special_token_is_refused() -> None:
    """Text that merely looks like a token would be several."""
    section = ResponseSection(frame="plain", end="<|done|>")
    assert refusal(made("look_ahead"), section) == (
        "tokenizer: expected one special token that ends a text, got '<|done|>'\n"
        "hint: response.end: one of <unk>, <s>, </s>, <|im_start|>, <|im_end|>, [INST], [/INST]"
    )


def test_plain_refuses_chat_messages() -> None:
    """Without a template nobody knows how to write roles."""
    renderer = Renderer.read(made("look_ahead"), ResponseSection(frame="plain"))
    with pytest.raises(FrameError) as raised:
        renderer.prompt_text(SYSTEM)
    assert str(raised.value) == (
        "response.frame: plain takes a prompt as text, got chat messages\n"
        "hint: take response.frame: chat, or write data.prompt as one text without a system"
    )


@pytest.mark.parametrize(
    ("published", "expected"), [(None, [4]), (4, [4]), (2, [4, 2]), ([2, 4, 1], [4, 2, 1])]
)
def test_trained_end_stops_generation_first(published: Any, expected: list[int]) -> None:
    """What was trained to end a turn stops generation, and what the model's makers published."""
    renderer: Renderer = Renderer.read(made("look_ahead", CHATML), OWN)
    assert renderer.end_id == 4
    assert stop_ids(renderer, published) == expected


ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
END = "{% endif %}"


@pytest.mark.parametrize(
    ("template", "fixed"),
    [
        (ROLES + ASKS + END, True),
        (ROLES + ASKS + "{% if enable_thinking %}<think>{% endif %}" + END, True),
        (ROLES + ASKS + "{% else %}{{ eos_token }}" + END, True),
        (ROLES, True),  # it writes the same whether it is asked or not
        (ROLES + ASKS + END + "{{ messages[0].content }}", False),
        (ROLES + ASKS + "{{ messages[0].role }}" + END, False),
        (ROLES + ASKS + "{% if tools %}<think>{% endif %}" + END, False),
        ("{% set t = messages[0].role %}" + ROLES + ASKS + "{{ t }}" + END, False),
        ("{% set t = namespace(a='') %}" + ROLES + ASKS + "{{ t.a }}" + END, False),
        ("{% set t = add_generation_prompt %}" + ROLES + ASKS + END, False),
        ("{% if add_generation_prompt %}x{% endif %}" + ROLES + ASKS + END, False),
        (ROLES + "{% if messages|length and add_generation_prompt %}x" + END, False),
        ("{% macro t() %}{{ messages }}{% endmacro %}" + ROLES + ASKS + "{{ t() }}" + END, False),
    ],
)
def test_a_header_is_fixed_where_no_row_can_change_it(template: str, fixed: bool) -> None:
    """By the template's syntax tree: what it writes when asked depends on nothing of the row."""
    assert read_template(template).fixed_header is fixed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("template", "section"), [(CHATML, OWN), (OPENED, OPENED_THINK)])
@settings(max_examples=30)
@given(prompt=TEXT, rest=TEXT)
def test_ids_of_a_prompt_are_those_of_its_text_alone(
    kind: str, template: str, section: ResponseSection, prompt: str, rest: str
) -> None:
    """However they are found: by the last special token of the header, or on their own."""
    renderer = Renderer.read(made(kind, template), section)
    text = renderer.prompt_text(f"Q{prompt}")
    ((ids, whole, _),) = renderer.encode_rows([text], [text + rest])
    assert ids == renderer.encode([text])[0].ids
    assert whole == renderer.encode([text + rest])[0].ids


def test_a_header_and_what_stands_in_its_place_are_whole_tokens() -> None:
    """Phi-3.5 ends a chat with `<|endoftext|>` where no answer is asked for."""
    renderer = Renderer.read(standing_in("phi3_5"), OWN)
    assert renderer.header == "<|assistant|>\n"
    assert renderer.tail == renderer.tokenizer.eos_token
