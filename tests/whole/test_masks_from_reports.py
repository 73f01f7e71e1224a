"""Inputs of the kinds that went wrong for users of other trainers: right, or refused by number."""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sftkey.adapt.frame import choose_frame
from sftkey.checks.mask_proof import Oracle
from sftkey.checks.rows import frame_findings
from sftkey.cli import main
from sftkey.data.renderer import Renderer, render, stop_ids
from sftkey.data.response import TOOLS, Example, Segment
from sftkey.data.template import probe_template
from sftkey.data.tokenization import Refusal, Row, tokenize
from sftkey.errors import FrameError, ModelError, RecipeError
from sftkey.models import loading
from sftkey.models.facts import published_stops
from sftkey.models.loading import load_tokenizer
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import ModelSection, ResponseSection
from tests.support.families import FAMILIES
from tests.support.model_folders import model_folder, write_rows
from tests.support.real_tokenizers import real_tokenizer
from tests.support.tokenizers import CHATML, made

SYSTEM = "{% if messages[0].role == 'system' %}{% set flag = messages[0].content %}{% endif %}"
BY_ROW = SYSTEM + (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | replace('/no_think', '') | replace('/think', '') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if flag is defined and '/no_think' in flag %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
NATIVE = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))


def framed(
    template: str | None = CHATML, section: ResponseSection | None = None, **change: Any
) -> Renderer:
    """Probe a byte-level tokenizer of its own, with a template and other changes."""
    tokenizer = changed(template, **change)
    return Renderer.read(tokenizer, section or ResponseSection(), change.get("kwargs", {}))


def changed(template: str | None = CHATML, **change: Any) -> Any:
    """Return a copy of the byte-level tokenizer with a template and other changes."""
    tokenizer = copy.deepcopy(made("byte_level"))
    tokenizer.chat_template = template
    if "normalizer" in change:
        tokenizer.backend_tokenizer.normalizer = change["normalizer"]
    if "pre_tokenizer" in change:
        tokenizer.backend_tokenizer.pre_tokenizer = change["pre_tokenizer"]
    if "processor" in change:
        tokenizer.backend_tokenizer.post_processor = change["processor"]
    for token in change.get("tokens", ()):
        tokenizer.add_tokens([token], special_tokens=token.special)
    return tokenizer


def outcome(renderer: Renderer, example: Example) -> Row | Refusal:
    """Return what becomes of one row; a row is proven by decoding it."""
    (row,) = tokenize([example], renderer)
    if isinstance(row, Row):
        assert Oracle(renderer).fault(example, row) is None
    return row


def asked(system: str) -> tuple[dict[str, str], ...]:
    """Return a prompt with a system message."""
    return ({"role": "system", "content": system}, {"role": "user", "content": "2 + 2?"})


def test_header_depends_on_the_row() -> None:
    """A row whose own generation prompt closes the thinking is refused; its neighbours aren't."""
    renderer = framed(BY_ROW, NATIVE)
    rows = [Example(asked(text), "2 and 2.", "4", n) for n, text in enumerate(["A", "B /no_think"])]
    right, refused = tokenize(rows, renderer)
    assert isinstance(right, Row)
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (1, "template")


def test_header_wrongly_accused() -> None:
    """A flag that the template takes out of a system message is no message that it drops."""
    example = Example(asked("Calculate. /think"), "2 and 2.", "4", 0)
    row = outcome(framed(BY_ROW, NATIVE), example)
    assert isinstance(row, Row)


def test_the_prompt_is_what_the_model_is_asked_id_for_id() -> None:
    """Of every row, with its own messages."""
    renderer = framed(BY_ROW, NATIVE)
    example = Example(asked("Calculate."), "2 and 2.", "4", 0)
    row = outcome(renderer, example)
    assert isinstance(row, Row)
    text = render(renderer.tokenizer, example.prompt, {})  # type: ignore[arg-type]
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)] == ids
    assert set(row.segment_ids[: len(ids)]) == {Segment.PROMPT}


BY_DEFAULT = (  # as SmolLM3's: a mode, taken out of the system message, and a text of its own
    "{% set said = messages[0].content if messages[0].role == 'system' else '' %}Mode: /think "
    "{{ said.replace('/think', '').strip() or 'Be kind.' }}"
) + CHATML.replace("in messages", "in messages if m['role'] != 'system'")


@pytest.mark.parametrize("system", ["/think", "", " ", "Be brief. /think"])
def test_a_system_message_that_changes_nothing_is_not_called_dropped(system: str) -> None:
    """Empty, or a flag for what the template does anyway: nothing that it says is lost."""
    assert isinstance(outcome(framed(BY_DEFAULT), Example(asked(system), "2 and 2.", "4", 0)), Row)
    lost = outcome(framed(BY_DEFAULT), Example(asked("Be kind."), "2 and 2.", "4", 0))
    assert isinstance(lost, Refusal)


@pytest.mark.parametrize(("written", "said"), [("m.content | upper", "rewrites"), ("''", "drops")])
def test_a_system_message_that_is_rewritten_is_not_called_dropped(written: str, said: str) -> None:
    """Both refuse the row."""
    template = CHATML.replace("m['content']", f"({written}) if m.role == 'system' else m.content")
    refused = outcome(framed(template), Example(asked("Be brief."), "2 and 2.", "4", 0))
    assert isinstance(refused, Refusal)
    assert refused.reason == f"the chat template {said} the system message"


def test_kwargs() -> None:
    """One that the template never reads is refused with the nearest that it does."""
    template = CHATML + "{% if enable_thinking %}{% endif %}"
    name = framed(template, kwargs={"enable_thinking": True}).tokenizer.name_or_path or "tokenizer"
    with pytest.raises(FrameError) as refused:
        framed(template, kwargs={"enable_thinkng": True})
    assert str(refused.value) == (
        f"{name}: 1 problem\n  model.chat_template_kwargs.enable_thinkng: the chat template "
        "never reads it; did you mean `enable_thinking`?\nhint: its variables are enable_thinking"
    )


@pytest.mark.parametrize(
    ("key", "near"), [("name", ""), ("weather", ""), ("trian", "; did you mean `train`?")]
)
def test_keys_of_messages(key: str, near: str) -> None:
    """What no template writes of a message refuses the row, whatever its name is."""
    prompt = ({"role": "user", "content": "2 + 2?", key: "x"},)
    refused = outcome(framed(), Example(prompt, "2 and 2.", "4", 3))
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (3, "template")
    assert refused.reason == f"the chat template never reads `{key}` of a message{near}"


HI = {"role": "user", "content": "2 + 2?"}
TURN = "(messages[-2:] if messages[-1].role == 'assistant' else messages[-1:])"
LAST_ALONE = CHATML.replace("in messages", f"in {TURN}")
NO_SYSTEM = CHATML.replace("in messages", "in messages if m['role'] != 'system'")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (NO_SYSTEM, asked("2 + 2")),
        ("Be brief. {% if true %}" + NO_SYSTEM + "{% endif %}", asked("Be brief.")),
        (LAST_ALONE, (HI, {"role": "assistant", "content": "2"}, HI)),
    ],
    ids=["system", "system in the template's own", "earlier turns"],
)
def test_a_dropped_message_hides_behind_another(
    template: str, prompt: tuple[dict[str, str], ...]
) -> None:
    """Its text stands in the prompt, but only as another message's."""
    refused = outcome(framed(template), Example(prompt, "2 and 2.", "4", 2))
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (2, "template")
    assert "the chat template drops the" in refused.reason
    assert isinstance(outcome(framed(), Example(prompt, "2 and 2.", "4", 2)), Row)


@pytest.mark.parametrize(("value", "truth"), [("false", False), (0, False), ("Yes", True)])
def test_kwargs_that_are_no_truth_to_the_template(value: Any, truth: bool) -> None:
    """Jinja takes a text for true, and 0 is not its false."""
    template = "{{ 'x' if flag is false }}{{ 'y' if flag is true }}" + CHATML
    framed(template, kwargs={"flag": truth})
    with pytest.raises(FrameError, match=f"kwargs.flag: .* doesn't take {value!r} for"):
        framed(template, kwargs={"flag": value})
    template = template.replace("is false", "== 'false'").replace("is true", "== 'Yes'")
    if isinstance(value, str):
        framed(template, kwargs={"flag": value})


EFFORT = "{% if effort == 'high' %}H{% elif effort == 'low' %}L{% endif %}{{ 'x' if flag }}"


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"effort": "hihg"}, "effort: .* it knows no 'hihg'; did you mean `high`"),
        ({"flag": "flase"}, "flag: the chat template takes 'flase' for true, as any text"),
        ({"flag": 2}, "flag: the chat template takes 2 for true"),
        ({"flag": None}, "flag: expected a value; got null"),
        ({"effort": "low", "flag": False}, None),
    ],
)
def test_kwargs_whose_value_the_template_does_not_know(
    kwargs: dict[str, Any], what: str | None
) -> None:
    """A word that it compares with none of its own changes nothing, or is true as any text."""
    if what is None:
        framed(EFFORT + CHATML, kwargs=kwargs)
        return
    with pytest.raises(FrameError, match=what):
        framed(EFFORT + CHATML, kwargs=kwargs)


@pytest.mark.parametrize("kwargs", [{"flag": True}, {"flag": False}, {"flag": 512}])
def test_kwargs_that_change_no_chat_are_noted(kwargs: dict[str, Any]) -> None:
    """Neither as they are nor the other way round; what is so by default is used."""
    dead, tools = "{% if false %}{{ flag }}{% endif %}", "{{ flag if tools }}"
    for template, codes in ((dead, ["kwargs-unused"]), (tools, [])):
        found = list(frame_findings(framed(template + CHATML, kwargs=kwargs)))
        assert [finding.code for finding in found] == codes
        assert not any(finding.refuses for finding in found)


@pytest.mark.parametrize("key", ["messages", "add_generation_prompt", "tokenize", "chat_template"])
def test_kwargs_that_are_set_for_each_row(key: str) -> None:
    """They are named as such, and nothing is blamed on the template."""
    with pytest.raises(FrameError, match=f"{key}: sftkey sets it for each row"):
        framed(kwargs={key: False})


def test_normalizer_rewrites() -> None:
    """An answer that becomes another one refuses its row; a thinking is told with an example."""
    renderer = framed(normalizer=normalizers.NFKC())
    refused = outcome(renderer, Example("2 + 2?", "two", "2²", 5))
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (5, "not-returned")
    assert refused.reason.startswith("the tokenizer changes the answer")
    (row,) = tokenize([Example("2 + 2?", "x² is 4", "4", 6)], renderer)
    assert isinstance(row, Row)
    ((what, shown),) = row.notes
    assert what == "the tokenizer changes the thinking"
    assert "x² is 4" in shown


def test_a_normalizer_that_strips_is_no_bug() -> None:
    """It strips what stands between special tokens, and not each part of it."""
    example = Example("2 + 2?", " 2 and 2. ", "4 ", 0)
    assert isinstance(outcome(framed(normalizer=normalizers.Strip()), example), Row)


def test_an_opening_tag_inside_an_answer_is_told_as_such() -> None:
    """The answer comes back, and the reasoning too: it isn't the reasoning that holds a tag."""
    row = outcome(framed(section=NATIVE), Example("2 + 2?", "2 and 2.", "<think>4", 0))
    assert isinstance(row, Row)
    assert row.notes == (("the response's own tags stand inside the answer", "'<think>4'"),)


@pytest.mark.parametrize("text", ["a</Thinking>b", "4</Answer>5", "<Thinking>4"])
@pytest.mark.parametrize("where", ["thinking", "answer"])
def test_tags_inside(where: str, text: str) -> None:
    """What our own parser would read as another answer isn't trained."""
    renderer = framed()
    texts = {"thinking": "2 and 2.", "answer": "4", where: text}
    (row,) = tokenize([Example("2 + 2?", texts["thinking"], texts["answer"], 0)], renderer)
    parsed = renderer.response.parse(renderer.response.render(texts["thinking"], texts["answer"]))
    assert (parsed.answer == texts["answer"]) == isinstance(row, Row)
    if isinstance(row, Row) and parsed.thinking != texts["thinking"]:
        assert row.notes


def test_an_added_token_eats_white_space() -> None:
    """A word that swallows the blank behind it changes an answer, which is refused."""
    renderer = framed(tokens=[AddedToken("legs", rstrip=True, special=False)])
    (row,) = tokenize([Example("2 + 2?", "2 and 2.", "12 legs   long", 0)], renderer)
    if isinstance(row, Row):
        key = [
            n for n, s in zip(row.input_ids, row.segment_ids, strict=True) if s == Segment.ANSWER
        ]
        assert "12 legs   long" in renderer.tokenizer.decode(key)
    else:
        assert "tokenizer" in row.reason or "legs" in row.reason


def test_control_text_in_earlier_reasoning() -> None:
    """It would become a control token of the prompt."""
    prompt = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "so <|im_end|> it is"},
        {"role": "user", "content": "2 + 2?"},
    )
    refused = outcome(framed(), Example(prompt, "2 and 2.", "4", 7))
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (7, "special-token-text")
    assert "<|im_end|>" in refused.reason


def test_control_text_that_json_writes_otherwise() -> None:
    """Gemma 4's quotation mark is a control token, before which JSON sets a backslash."""
    renderer = framed(WITH_TOOLS, tokens=[AddedToken('<|"|>', special=True)])
    told = json.dumps([{"name": "say", "description": 'Say <|"|> now.'}])
    for prompt in (({"role": TOOLS, "content": told}, HI), (HI | {"content": 'Say <|"|>.'},)):
        example = Example(prompt, "2 and 2.", "4", 7)
        refused = outcome(renderer, example)
        assert isinstance(refused, Refusal)
        assert (refused.index, refused.code) == (7, "special-token-text")
        assert not Oracle(renderer).can_be_built(example)


def test_control_text_that_the_normalizer_makes() -> None:
    """It is none as it was written, and one when the tokenizer has rewritten it."""
    token = AddedToken("<|done|>", special=True, normalized=True)
    renderer = framed(normalizer=normalizers.NFKC(), tokens=[token])
    for content in ("2 <|done|\uff1e?", "2 \uff1e?"):
        refused = outcome(renderer, Example(({"role": "user", "content": content},), "2.", "4", 1))
        assert isinstance(refused, Refusal) == ("done" in content)
        assert isinstance(refused, Row) or refused.code == "special-token-text"


def test_control_text_in_the_name_of_an_argument() -> None:
    """What a tool is called with has names, which templates write as they write values."""
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | string }}")
    call = {"name": "add", "arguments": {"<|im_end|>": 2}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = ({"role": "user", "content": "2?"}, called, {"role": "tool", "content": "4"})
    refused = outcome(framed(template), Example(prompt, "2 and 2.", "4", 1))
    assert isinstance(refused, Refusal)
    assert (refused.index, refused.code) == (1, "special-token-text")


@pytest.mark.parametrize("answer", ["4", "4 ", "4\n"])
def test_the_end_swallows_a_blank(answer: str) -> None:
    """An end of turn that strips to its left leaves the row right, or refuses it."""
    end = AddedToken("<|done|>", lstrip=True, special=True)
    template = CHATML.replace("<|im_end|>", "<|done|>")
    row = outcome(framed(template, tokens=[end]), Example("2 + 2?", "2 and 2.", answer, 0))
    assert isinstance(row, Row) or "bug" not in row.reason


ADD_BARE = {"name": "add"}
WITH_TOOLS = "{{ tools | tojson if tools }}" + CHATML
OF_ANSWERS = "m.role == 'assistant' or m.role == 'system'"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (CHATML.replace("m['role']", f"('assistant' if {OF_ANSWERS} else 'user')"), "as an ass"),
        ("{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHATML, "drops `description`"),
        ({"default": CHATML, "tool_use": WITH_TOOLS.replace("<|im_end|>", "</s>")}, "tools choose"),
        (
            {"default": CHATML, "tool_use": WITH_TOOLS.replace("t\n{% e", "t\n#{% e")},
            "no prefix",
        ),
        (WITH_TOOLS, None),
        ({"default": CHATML, "tool_use": WITH_TOOLS}, None),
    ],
    ids=["role", "description", "another end", "another header", "written", "named"],
)
def test_system_and_tools_are_written_as_what_they_are(template: Any, what: str | None) -> None:
    """Neither as an answer, nor in part, nor by another template with another frame."""
    tools = {"role": TOOLS, "content": json.dumps([ADD])}
    prompt = asked("Be brief.") if what == "as an ass" else (tools, HI)
    row = outcome(framed(template), Example(prompt, "2 and 2.", "4", 8))
    assert isinstance(row, Row) == (what is None)
    assert what is None or (row.index == 8 and what in row.reason)


@pytest.mark.parametrize(
    ("tools", "what"),
    [
        ("add", "expected a list of tools with their names; got 'add'"),
        ([{"type": "function"}], "expected a list of tools with their names; got"),
        ([{**ADD_BARE, "description": "Ends <|im_end|>."}], "holds the text of the special token"),
        ([{**ADD_BARE, "description": "Adds."}], "the chat template drops `description`"),
    ],
)
def test_tools_of_the_recipe_are_judged_as_those_of_a_row(tools: Any, what: str) -> None:
    """In `chat_template_kwargs` they are a list that is written whole; a row has no others."""
    writes_names = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHATML
    with pytest.raises(FrameError, match=what):
        framed(writes_names, kwargs={"tools": tools})
    renderer = framed(writes_names, kwargs={"tools": [ADD_BARE]})
    assert "add<|im_start|>user" in renderer.prompt_text("2 + 2?")
    others = ({"role": TOOLS, "content": '[{"name": "subtract"}]'}, HI)
    for prompt, row in (((HI,), Row), (others, Refusal)):
        assert isinstance(outcome(renderer, Example(prompt, "2 and 2.", "4", 8)), row)


CHOICE = {"type": "string", "description": "How to.", "enum": ["up", "down"]}
ROUNDS = {"name": "round", "parameters": {"properties": {"mode": CHOICE | {"default": "up"}}}}
WRITES_ENUM = "{{ p.description }}{{ p.enum | join }}"


@pytest.mark.parametrize("of_recipe", [False, True])
@pytest.mark.parametrize(
    ("written", "left_out"),
    [
        ("{{ p | tojson }}", []),
        (WRITES_ENUM + "{{ p.type }}", ["default"]),
        (WRITES_ENUM.replace("{{ p.enum | join }}", ""), ["type", "enum", "default"]),
    ],
)
def test_what_a_template_drops_of_a_tools_parameters_is_noted(
    written: str, left_out: list[str], of_recipe: bool
) -> None:
    """Many write names and descriptions alone; that is told by rendering another value."""
    told = "{% for t in tools or [] %}{{ t.name }}{% for n, p in t.parameters.properties.items() %}"
    template = f"{told}{{{{ n }}}}{written}{{% endfor %}}{{% endfor %}}{CHATML}"
    renderer = framed(template, kwargs={"tools": [ROUNDS]} if of_recipe else {})
    prompt = (HI,) if of_recipe else ({"role": TOOLS, "content": json.dumps([ROUNDS])}, HI)
    row = outcome(renderer, Example(prompt, "2 and 2.", "4", 8))
    assert isinstance(row, Row)
    notes = [f"the chat template drops `{name}` of `tools`" for name in left_out]
    assert [what for what, _ in row.notes] == notes


def test_named_templates_without_a_default() -> None:
    """None of them is taken unsaid, and none is called bad Jinja."""
    with pytest.raises(FrameError, match="expected a chat template named default; got a, b"):
        framed({"b": CHATML, "a": WITH_TOOLS})  # type: ignore[arg-type]


def test_the_template_that_tools_choose_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each row that has tools."""
    renderer = framed({"default": CHATML, "tool_use": WITH_TOOLS})  # type: ignore[arg-type]
    asked = []
    monkeypatch.setattr(
        "sftkey.data.renderer.probe_template",
        lambda *given: asked.append(given) or probe_template(*given),  # type: ignore[func-returns-value]
    )
    prompts = [({"role": TOOLS, "content": json.dumps([ADD])}, HI | {"content": q}) for q in "abc"]
    rows = tokenize([Example(prompt, "2 and 2.", "4") for prompt in prompts], renderer)
    assert all(isinstance(row, Row) for row in rows)
    assert len(asked) == 1


CALLS = "{% for c in m.tool_calls %}{{ c.name }}{{ c.arguments | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("change", "name", "read"),
    [
        (("", ""), {}, True),
        (("{{ c.arguments | tojson }}", ""), {}, False),
        (("m.tool_calls", "(m.tool_calls or [])[:1]"), {}, False),
        (("", ""), {"name": "Bob"}, False),
        ((CALLS, CALLS + "{{ m.name if m.role == 'user' }}"), {"name": "Bob"}, True),
    ],
    ids=["written", "arguments", "the second call", "name of a user", "name of a user, written"],
)
def test_each_call_and_key_is_written(
    change: tuple[str, str], name: dict[str, str], read: bool
) -> None:
    """Whatever another call, or a message of another role, says under the same name."""
    written = CALLS + "{{ m.name if m.role == 'tool' }}"
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + written).replace(*change)
    calls = [{"name": "add", "arguments": {"a": number}} for number in (41, 43)]
    told = {"role": "tool", "name": "add", "content": "84"}
    prompt = (HI | name, CALLED | {"tool_calls": calls}, told)
    row = outcome(framed(template), Example(prompt, "2 and 2.", "4", 9))
    assert isinstance(row, Row) == read
    assert read or (row.index == 9 and "the chat template never reads `" in row.reason)


AS_TEXT = "{{ '<call>' + c.name + ' ' + c.arguments + '</call>' }}"  # as DeepSeek's


@pytest.mark.parametrize(
    "written",
    [
        AS_TEXT,
        "<call>{{ c.name }} {{ c.arguments }}</call>",
        "<call>{{ c.name }} {{ c.arguments | tojson }}</call>",
    ],
    ids=["raises", "writes Python", "writes JSON"],
)
@pytest.mark.parametrize("arguments", [{"a": "x", "b": True, "c": "\u00e9"}, {}])
def test_arguments_that_a_template_takes_as_text(written: str, arguments: dict[str, Any]) -> None:
    """They are JSON, where the template raises on a mapping or would write it as Python does."""
    calls = f"{{% for c in m.tool_calls %}}{written}{{% endfor %}}"
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls)
    called = CALLED | {"tool_calls": [{"name": "add", "arguments": arguments}]}
    prompt = (HI, called, {"role": "tool", "content": "four"})
    renderer = framed(template)
    assert isinstance(outcome(renderer, Example(prompt, "2 and 2.", "4", 1)), Row)
    told = json.dumps(arguments, ensure_ascii=False)
    assert f"<call>add {told}</call>" in renderer.prompt_text(prompt)


def test_two_tokens_end_a_turn() -> None:
    """Both are trained, and generation stops at one of them."""
    tokens = [AddedToken(text, special=True) for text in ("<|end_response|>", "<|end_turn|>")]
    template = CHATML.replace("<|im_end|>", "<|end_response|><|end_turn|>")
    renderer = framed(template, tokens=tokens)
    row = outcome(renderer, Example("2 + 2?", "2 and 2.", "4", 0))
    assert isinstance(row, Row)
    ends = renderer.tokenizer.convert_tokens_to_ids([token.content for token in tokens])
    trained = [n for n, s in zip(row.input_ids, row.segment_ids, strict=True) if s == Segment.END]
    assert trained[: len(ends)] == ends
    assert set(stop_ids(renderer, ends[1])) >= {ends[0]} or set(stop_ids(renderer)) & set(ends)


def test_none_of_two_ends_stands_in_the_response() -> None:
    """Generation stops at each of them: the first would be written twice."""
    section = ResponseSection(answer=("", "<|response|>"))
    with pytest.raises(FrameError, match=r"the end of turn '<\|response\|>' stands in '<\|resp"):
        framed(TWO_ENDS, section, tokens=END_SPECIAL)
    assert framed(TWO_ENDS, tokens=END_SPECIAL).end == "<|response|>\n<|turn|>"


def test_a_prompt_that_opens_the_thinking_and_a_tag_before_the_answer() -> None:
    """Cohere's newer ones: the answer's own tag is what the template writes without a thinking."""
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif").replace(
        "{{ m['content'] }}", "{{ '<text>' if m.role == 'assistant' }}{{ m['content'] }}"
    )
    renderer = framed(template, ResponseSection(thinking=("", "</think>"), answer=("<text>", "")))
    row = outcome(renderer, Example("2 + 2?", "2 and 2.", "4", 0))
    assert isinstance(row, Row)
    assert "<think>2 and 2.</think><text>4<|im_end|>" in renderer.tokenizer.decode(row.input_ids)


def test_one_token_twice_ends_a_turn_once() -> None:
    """Generation stops at the first."""
    renderer = framed(CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>"))
    assert isinstance(outcome(renderer, Example("2 + 2?", "2 and 2.", "4", 0)), Row)
    assert renderer.end == "<|im_end|>"


def test_the_tokenizer_appends_its_end() -> None:
    """A plain frame whose tokenizer ends every text by itself has one end, not two."""
    tokenizer = changed(None)
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    renderer = framed(None, ResponseSection(frame="plain"), processor=processor)
    row = outcome(renderer, Example("2 + 2?", "2 and 2.", "4", 0))
    assert isinstance(row, Row)
    assert row.input_ids.count(number) == 1


def test_adapt_judges_the_template_in_use() -> None:
    """Tags of any name are the model's own; those of a template for tools beside it aren't."""
    seed = ("<seed:think>", "</seed:think>")
    reasoning = "{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>"
    own = CHATML.replace("{{ m['content'] }}", reasoning + "{% endif %}{{ m['content'] }}")
    beside = {"default": CHATML, "tool_use": CHATML + "</think><|channel|>date_string"}
    comment, default = CHATML + "{# no </think>\n<|channel|> #}", ("<Thinking>", "</Thinking>")
    for template, thinking in ((own, seed), (beside, default), (comment, default)):
        tokens = [AddedToken(text, special=True) for text in seed]
        choice = choose_frame(changed(template, tokens=tokens), ())
        assert tuple(each.strip() for each in choice.section.thinking) == thinking
        assert ("no thinking tags" in choice.why["thinking"]) == (thinking is not seed)


@pytest.mark.parametrize(
    "name", ["byte_level", pytest.param("deepseek_v3", marks=pytest.mark.network)]
)
def test_tags_that_share_a_beginning(name: str) -> None:
    """A generation prompt that opens what the training text closes is compared by whole tags."""
    tokenizer = changed() if name == "byte_level" else copy.deepcopy(real_tokenizer(name))
    tokenizer.chat_template = DEEPSEEK_V3_1.replace("END", tokenizer.eos_token)
    section = ResponseSection(thinking=("", "</think>"), answer=("", ""))
    renderer = Renderer.read(tokenizer, section, {"thinking": True})
    row = outcome(renderer, Example("2 + 2?", "2 and 2.", "4", 0))
    assert isinstance(row, Row)
    assert renderer.decode_behind(row.input_ids).endswith(
        f"<think>2 and 2.</think>4{tokenizer.eos_token}"
    )
    with pytest.raises(FrameError, match="ends the thinking already"):
        Renderer.read(tokenizer, section, {"thinking": False})


DEEPSEEK_V3_1 = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}"
    "{% else %}Assistant: </think>{{ m.content }}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: "
    "{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["unigram", pytest.param("gemma3", marks=pytest.mark.network)])
def test_no_begin_of_text(name: str) -> None:
    """The tokenizer sets one by itself, and the template writes none: said, and nothing refused."""
    tokenizer = copy.deepcopy(made(name) if name == "unigram" else real_tokenizer(name))
    tokenizer.chat_template = CHATML.replace("<|im_end|>", tokenizer.eos_token)
    for begin, codes in (("", ["no-begin"]), ("{{ bos_token }}", [])):
        tokenizer.chat_template = begin + tokenizer.chat_template
        found = list(frame_findings(Renderer.read(tokenizer, ResponseSection())))
        assert [finding.code for finding in found] == codes
        assert not any(finding.refuses for finding in found)


@pytest.mark.parametrize("published", [True, False], ids=["generation config", "config alone"])
def test_ends_in_config_json_only(published: bool, tmp_path: Path) -> None:
    """They are read by the rule that check and adapt share, and a generation config goes first."""
    tokenizer = changed()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = ["<|im_end|>"] if published else None
    folder = model_folder(tmp_path, tokenizer, stops, eos_token_id=2 if published else [end, 2])
    section = ModelSection(name_or_path=folder, quantization="none")
    assert published_stops(section) == (((end,), True) if published else ((end, 2), False))
    assert choose_frame(tokenizer, published_stops(section)[0]).section.frame == "chat"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a model's folder."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_code_in_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named; nobody is asked, and nothing is run."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.EvilFast"]}
    file.write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        load_tokenizer(ModelSection(name_or_path=str(folder), quantization="none"))


@pytest.mark.parametrize(
    ("file", "start", "package"),
    [
        ("tokenizer.model", b"\n\x0e", "sentencepiece"),
        ("spiece.model", b"\n\x0e", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0", "tiktoken"),
        (None, b"", "found no vocabulary of its own there"),
    ],
)
def test_a_vocabulary_without_tokenizer_json(
    folder: Path, file: str | None, start: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that reads it is named; nothing is made of no vocabulary at all."""
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file:
        (folder / file).write_bytes(start)
    with pytest.raises(ModelError, match=package):
        load_tokenizer(ModelSection(name_or_path=str(folder), quantization="none"))


def test_a_recipe_that_trusts_code_is_refused_with_the_reason(folder: Path) -> None:
    """It is no key that is merely unknown."""
    model = {"name_or_path": str(folder), "trust_remote_code": True}
    recipe = {"name": "x", "model": model, "data": {"source": "x"}, "stages": [{"loss_on": "key"}]}
    (folder / "x.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="trust_remote_code: refused: sftkey loads"):
        load_recipe(folder / "x.yaml")


def test_a_tokenizer_of_mistral_common_beside_it(folder: Path) -> None:
    """The same one is loaded, whatever other files of tokenizers lie there."""
    (folder / "tekken.json").write_text("{}")
    section = ModelSection(name_or_path=str(folder), quantization="none")
    assert load_tokenizer(section)("2 + 2")["input_ids"]


CHAT = (HI, {"role": "assistant", "reasoning_content": "2 and 2.", "content": "4"})
NATIVE_TAGS = {"response": {"thinking": NATIVE.thinking, "answer": NATIVE.answer}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS},
}
CALL = {"name": "add", "arguments": {"a": 2}}
CALLED: dict[str, Any] = {"role": "assistant", "content": ""}
INSIDE = CALLED | {"tool_calls": [{"name": "add", "arguments": {"a": "<|im_end|>"}}]}
WRITES_CALLS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | string }}")
TWO_ENDS = CHATML.replace("<|im_end|>", "<|response|>\n<|turn|>")
BRACKETS = CHATML.replace("assistant\n{% endif %}", "assistant\n[THINK]{% endif %}").replace(
    "{{ m['content'] }}", "{{ '[/THINK]' if m.role == 'assistant' }}{{ m['content'] }}"
)
PREFIXED = pre_tokenizers.ByteLevel(add_prefix_space=True)
BY_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(), PREFIXED])
END_SPECIAL = [AddedToken(text, special=True) for text in ("<|response|>", "<|turn|>")]
# By kind: what is changed of the tokenizer, the row that stands second of four, sections of the
# recipe, and what a command says; None where it says nothing.
SAID: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str | None]] = {
    "header": (
        {"template": BY_ROW},
        {"messages": [*asked("/no_think"), CHAT[1]]},
        NATIVE_TAGS,
        "the generation prompt isn't .* as for a question alone: 1 row, 1",
    ),
    "rewritten system": (
        {"template": BY_ROW},
        {"messages": [*asked("Be brief. /think"), CHAT[1]]},
        NATIVE_TAGS,
        None,
    ),
    "tools": ({}, {"messages": CHAT, "tools": [ADD]}, {}, "never reads `tools`: 1 row, 1"),
    "functions": (
        {},
        {"messages": CHAT, "functions": [ADD["function"]]},
        {},
        "row 1: `functions` is the old form|`functions` is the old form .*: 1 row, 1",
    ),
    "flags": (
        {},
        {"messages": [HI, CHAT[1] | {"weight": 0}, *CHAT]},
        {"response": {"turns": "all"}},
        "isn't to be trained: 1 row, 1|1 row dropped .1.: a turn that isn't to be trained",
    ),
    "kwargs": (
        {"template": CHATML + "{% if enable_thinking %}{% endif %}"},
        {"messages": CHAT},
        {"model": {"chat_template_kwargs": {"enable_thinkng": True}}},
        "enable_thinkng: the chat template never reads it; did you mean `enable_thinking`",
    ),
    "normalizer": (
        {"normalizer": normalizers.NFKC()},
        {"messages": [HI, CHAT[1] | {"content": "2²"}]},
        {},
        "the tokenizer changes the answer: 1 row, 1",
    ),
    "tags rewritten": (
        {"normalizer": normalizers.Lowercase()},
        {"messages": CHAT},
        {},
        "the tokenizer rewrites every response",
    ),
    "prefix blank": ({"pre_tokenizer": PREFIXED}, {"messages": CHAT}, {}, None),
    "blanks": ({"pre_tokenizer": BY_DIGITS}, {"messages": CHAT}, {}, "rewrites every response"),
    "eats white space": (
        {"tokens": [AddedToken("legs", rstrip=True, special=False)]},
        {"messages": [HI, CHAT[1] | {"content": "12 legs   long"}]},
        {},
        "the token 'legs' swallows white space beside it: 1 row, 1",
    ),
    "tags inside": (
        {},
        {"messages": [HI, CHAT[1] | {"content": "4</Answer>5"}]},
        {},
        "own tags stand inside the answer: 1 row, 1",
    ),
    "control text": (
        {"template": WRITES_CALLS},
        {"messages": [HI, INSIDE, {"role": "tool", "content": "4"}, CHAT[1]]},
        {},
        "the prompt holds the text of the special token '<.im_end.>': 1 row, 1",
    ),
    "layouts": (
        {},
        {"messages": [HI, CHAT[1] | {"content": [{"type": "output_text", "text": "4"}]}]},
        {},
        None,
    ),
    "ids without a row": (
        # A word that no vocabulary has: one that it has keeps its id.
        {"tokens": [AddedToken("zlegsz", special=False)], "missing": 1},
        {"messages": [HI, CHAT[1] | {"content": "4 zlegsz"}]},
        {},
        "an id of [0-9]+, and the embedding has [0-9]+ rows: 1 row, 1|4 zlegsz",
    ),
    "part of a message": (
        {},
        {"messages": [HI, CHAT[1] | {"content": [{"type": "text", "text": "4", "weight": 0}]}]},
        {},
        "message 1: `weight` of a part: a message is trained as a whole.*: 1 row, 1|row 1: mess",
    ),
    "two ends": ({"template": TWO_ENDS, "tokens": END_SPECIAL}, {"messages": CHAT}, {}, None),
    "tags alike": (
        {"template": BRACKETS},
        {"messages": CHAT},
        {"response": {"thinking": ("", "[/THINK]"), "answer": ("", "")}},
        None,
    ),
}


# A turn that isn't to be trained is counted; `show` needs no embedding.
SAID_OTHERWISE = ("flags", "ids without a row")


@pytest.mark.parametrize("kind", SAID)
def test_the_commands_say_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` and `show` refuse, note or take a row in the same words, and blame nothing else."""
    change, row, sections, said = SAID[kind]
    tokenizer = changed(**change)
    model = model_folder(
        tmp_path / "model", tokenizer, vocab_size=len(tokenizer) - change.get("missing", 0)
    )
    rows = [{"messages": [{"role": "user", "content": f"{n} + 1?"}, CHAT[1]]} for n in range(3)]
    recipe: dict[str, Any] = {
        "name": "x",
        "model": {"name_or_path": model, "quantization": "none"} | sections.get("model", {}),
        "lora": {"r": 4, "target_modules": "all-linear"},
        "data": {"source": write_rows(tmp_path / "rows.jsonl", [rows[0], row, *rows[1:]])},
        "trainer": {"per_device_train_batch_size": 2, "max_steps": 2},
        "stages": [{"name": "key", "loss_on": "key"}],
        "response": sections.get("response", {}),
    }
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    for command in ("check", "show"):
        with contextlib.suppress(SystemExit):
            main([command, str(tmp_path / "x.yaml")])
        heard = "".join(capsys.readouterr())
        assert "bug of sftkey" not in heard
        if kind not in SAID_OTHERWISE:
            assert ("refused" in heard or "error:" in heard) == (said is not None)
        assert said is None or re.search(said, heard), heard


@cache
def real(name: str) -> Any:
    """Return a published tokenizer with ChatML's tokens, always the same one."""
    tokenizer = copy.deepcopy(real_tokenizer(name))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.network
@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
@pytest.mark.parametrize(
    "case",
    [
        test_header_depends_on_the_row,
        test_header_wrongly_accused,
        test_the_prompt_is_what_the_model_is_asked_id_for_id,
        test_normalizer_rewrites,
        test_an_added_token_eats_white_space,
        test_control_text_in_earlier_reasoning,
        partial(test_the_end_swallows_a_blank, "4 "),
        test_two_tokens_end_a_turn,
        test_the_tokenizer_appends_its_end,
        test_kwargs,
        test_adapt_judges_the_template_in_use,
    ],
    ids=lambda case: getattr(case, "func", case).__name__.removeprefix("test_"),
)
def test_on_real_tokenizers(
    case: Callable[[], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds of a tokenizer that the tests train holds of published ones."""
    monkeypatch.setitem(globals(), "made", lambda _: real(name))
    case()


@pytest.mark.network
@pytest.mark.parametrize(
    "kind",
    [
        *("header", "tools", "flags", "normalizer", "tags inside", "control text", "two ends"),
        *("eats white space", "ids without a row", "layouts", "rewritten system", "prefix blank"),
    ],
)
def test_the_commands_say_it_of_a_real_tokenizer(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words."""
    name = "llama3_1" if kind == "normalizer" else "qwen3"  # Qwen's class sets its own normalizer
    monkeypatch.setitem(globals(), "made", lambda _: real(name))
    test_the_commands_say_it(kind, tmp_path, capsys)


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("qwen3-8b", True),
        ("llama-3.2-1b-instruct", True),
        ("gpt-oss-20b", True),
        ("gemma-3-1b-it", False),
    ],
)
def test_tools_of_published_templates(family: str, written: bool) -> None:
    """The template writes the tools, the call and what it gave, or the row is refused."""
    tokenizer = FAMILIES[family].real_one()
    section = choose_frame(tokenizer, ()).section
    called = CALLED | {"tool_calls": [{"type": "function", "function": CALL}]}
    tools = {"role": TOOLS, "content": json.dumps([ADD])}
    prompt = (tools, HI, called, {"role": "tool", "name": "add", "content": "four"})
    row = outcome(Renderer.read(tokenizer, section), Example(prompt, "2 and 2.", "4", 0))
    assert isinstance(row, Row) == written
    if isinstance(row, Row):
        text = tokenizer.decode(row.input_ids)
        assert text.count("add") > 1
        assert "four" in text
