"""Messages are read in the forms that data sets write them."""

import copy
import json
import re
from types import MappingProxyType
from typing import Any

import pytest

from sftkey.data.examples import RowOptions, make_examples
from sftkey.data.messages import FLAGS, read_messages
from sftkey.data.prompt import Habits, render_prompt
from sftkey.data.values import RowError
from sftkey.errors import FrameError
from sftkey.recipe.schema import DataSection
from tests.support.tiny import CHATML
from tests.support.tokenizers import made

PLAIN = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "7"})
THOUGHT = (PLAIN[0], {**PLAIN[1], "reasoning_content": "c"})


WRITE_CALLS = (
    "write an assistant's message with `tool_calls`: "
    '[{"type": "function", "function": {"name": …, "arguments": {…}}}]'
)


def parts(*items: Any) -> list[dict[str, Any]]:
    """Make a conversation whose answer has these parts."""
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": list(items)}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (list(PLAIN), PLAIN),
        (json.dumps(PLAIN), PLAIN),
        (str(list(PLAIN)), PLAIN),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "7"}], PLAIN),
        ([{"speaker": "Human", "text": "Q"}, {"speaker": "bot", "text": "7"}], PLAIN),
        ([{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "7"}], PLAIN),
        ([{"role": "prompter", "text": "Q"}, {"role": "assistant", "text": "7"}], PLAIN),
        ([{**PLAIN[0], "from": "human", "text": None}, {**PLAIN[1], "value": ""}], PLAIN),
        ([{"role": "User", "content": "Q"}, {"role": "model", "content": "7"}], PLAIN),
        (parts({"type": "text", "text": "7"}), PLAIN),
        (parts("7"), PLAIN),
        (parts({"type": "thinking", "thinking": "c"}, {"type": "text", "text": "7"}), THOUGHT),
        (parts({"type": "reasoning", "text": "c"}, {"type": "text", "text": "7"}), THOUGHT),
        (parts({"type": "output_text", "text": "7"}), PLAIN),
        ([PLAIN[0], {**PLAIN[1], "thinking": "c"}], THOUGHT),
        ([PLAIN[0], {**PLAIN[1], "reasoning": "c", "reasoning_content": None}], THOUGHT),
        (
            [PLAIN[0], {**PLAIN[1], "reasoning_content": ""}],
            (PLAIN[0], {**PLAIN[1], "reasoning_content": ""}),
        ),
    ],
)
def test_forms_of_messages(value: Any, expected: tuple[dict[str, str], ...]) -> None:
    """Other keys, other roles, parts, JSON text: the same messages."""
    assert read_messages(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Q", "no list of messages"),
        (["Q"], "message 0 has no text as `role` and `content`"),
        ([{"role": "user", "content": None}], "message 0 has no text as `role` and `content`"),
        (
            [{"author": "user", "utterance": "Q"}],
            "message 0 has no text as `role` and `content`; rename `author`, `utterance`, where "
            "they are meant",
        ),
        (
            [{**PLAIN[0], "speaker": "Ann"}],
            "message 0 says different things as `role` and `speaker`; leave one out",
        ),
        (
            [{**PLAIN[0], "text": "Q?"}],
            "message 0 says different things as `content` and `text`; leave one out",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "message 0: a tool call has no `name`",
        ),
        (
            parts({"type": "image_url"}),
            "message 1 holds a part of the type 'image_url', which is no text",
        ),
        (parts(7), "message 1 holds a part of the type 'unknown', which is no text"),
        (
            [{"role": "assistant", "content": None, "function_call": {"name": "add"}}],
            f"message 0: `function_call` is an old form; {WRITE_CALLS}",
        ),
        (
            [{"from": "function_call", "value": '{"name": "add"}'}],
            f"message 0: the role 'function_call' is an old form; {WRITE_CALLS}",
        ),
    ],
)
def test_what_is_no_message(value: Any, message: str) -> None:
    """The place of the first one is named."""
    with pytest.raises(RowError) as raised:
        read_messages(value)
    assert str(raised.value) == message


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_calls_and_further_keys_are_handed_on() -> None:
    """Arguments become a mapping; what is null or empty says nothing."""
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "4", "name": "add", "tool_calls": None},
        {"role": "assistant", "content": "4", "prefix": True},
    ]
    calling, told, prefixed = read_messages(messages)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert calling == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert told == {"role": "tool", "content": "4", "name": "add"}
    assert prefixed["prefix"] is True


@pytest.mark.parametrize("arguments", ['{"a": 2, "b": null}', {"a": 2, "b": None}])
def test_calls_may_be_text_of_json(arguments: Any) -> None:
    """As tables hold them; a null in such a text is meant."""
    call = {"type": "function", "id": None, "function": {"name": "add", "arguments": arguments}}
    calling = {"role": "assistant", "content": "", "tool_calls": json.dumps([call])}
    (read,) = loaded(PLAIN[0], calling, {"role": "tool", "content": "4"}, PLAIN[1]).examples
    function = {"name": "add", "arguments": {"a": 2, "b": None}}
    assert read.prompt[1]["tool_calls"] == [{"type": "function", "function": function}]
    for none in ("[]", ""):
        assert read_messages([{**PLAIN[1], "tool_calls": none}]) == (PLAIN[1],)
    with pytest.raises(RowError, match="`tool_calls` is no list of calls"):
        read_messages([{**PLAIN[1], "tool_calls": "add(2)"}])


@pytest.mark.parametrize("key", FLAGS)
def test_flags_of_training_are_one_flag_or_refused(key: str) -> None:
    """True and 1 say what is so anyway; false and 0 leave a turn out; all else can't be done."""
    for value, read in ((True, {}), (1.0, {}), (False, {"train": False}), (0, {"train": False})):
        assert read_messages([{**PLAIN[1], key: value}]) == ({**PLAIN[1], **read},)
    for value in (0.5, [0, 1], "no"):
        with pytest.raises(RowError, match=f"message 0: `{key}` is .* expected true or false"):
            read_messages([{**PLAIN[1], key: value}])
    with pytest.raises(RowError, match=f"`{key}` asks for a loss on a message of the user"):
        read_messages([{**PLAIN[0], key: 1}])


def loaded(
    *messages: dict[str, Any], turns: Any = "all", kwargs: Any = MappingProxyType({}), **row: Any
) -> Any:
    """Make the examples of one row of messages."""
    data = DataSection(source="x.jsonl")
    options = RowOptions(turns, reasoning=False, template_kwargs=kwargs)
    return make_examples([{"messages": list(messages), **row}], data, options)


def test_turns_that_are_not_to_be_trained_are_left_out() -> None:
    """They stay in the prompts of later turns, without the flag; turns that call tools, too."""
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "4"}
    found = loaded(PLAIN[0], {**PLAIN[1], "weight": 0}, PLAIN[0], calling, told, PLAIN[1])
    (example,) = found.examples
    assert [each.code for each in found.unsplit] == ["not-trained", "not-trained"]
    assert example.prompt[1] == PLAIN[1]
    assert [*example.prompt[3]] == ["role", "content", "tool_calls"]
    assert not loaded(PLAIN[0], {**PLAIN[1], "train": False}, turns="last").examples


def test_what_nothing_reads_of_a_trained_turn_is_refused() -> None:
    """A half-written answer to be gone on from is trained as a whole one otherwise."""
    near = {"trian": "; did you mean `train`?", "mask": "; did you mean `loss_mask`?"}
    for key, value in {"prefix": True, "name": "Ann", "mask": 0, "trian": False}.items():
        (refused,) = loaded(PLAIN[0], {**PLAIN[1], key: value}).unsplit
        what = f"`{key}` of a trained turn, which nothing reads; leave it out"
        assert refused.reason == what + near.get(key, "")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_a_row_s_tools_stand_first(tools: Any) -> None:
    """As descriptions or their JSON; a column of plain words is no such thing."""
    (example,) = loaded(*PLAIN, tools=tools).examples
    assert json.loads(example.prompt[0]["content"]) == [TOOL]
    assert example.prompt[1:] == (PLAIN[0],)
    for other in (None, "hammer", [], ["hammer"]):
        assert loaded(*PLAIN, tools=other).examples[0].prompt == (PLAIN[0],)
    (refused,) = loaded(*PLAIN, tools=[TOOL, {"type": "function"}]).unsplit
    assert refused.reason == "`tools` holds the description of a tool without a `name`"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("functions", [TOOL["function"]], "the old form of `tools`: write .* leave the column out"),
        ("functions", json.dumps([TOOL["function"]]), "the old form of `tools`"),
        ("documents", [{"text": "T"}], "aren't handed to the template"),
        ("chat_template", "T", "write model.chat_template;"),
        ("chat_template_kwargs", {"a": None, "b": False}, "write model.chat_template_kwargs;"),
        ("enable_thinking", False, "write model.chat_template_kwargs;"),
        ("tool_choice", "none", "no template writes it"),
        ("function_call", {"name": "add"}, "no template writes it"),
        ("parallel_tool_calls", False, "no template writes it"),
        ("system_prompt", "S", "write data.system_column: system_prompt, or data.system: null"),
        ("weight", 0.5, "the row: `weight` is 0.5, expected true or false"),
        ("loss_mask", [0, 1], "the row: `loss_mask` is .* expected true or false"),
        ("train", False, "a row that isn't to be trained"),
        ("images", ["a.png"], "`images` isn't read: text alone is"),
        ("history", [["Q", "A"]], "`history` holds earlier turns"),
    ],
)
def test_what_stands_beside_messages_is_used_or_refused(
    column: str, value: Any, reason: str
) -> None:
    """Every other trainer's column that changes what is seen or trained; what says nothing is."""
    (refused,) = loaded(*PLAIN, **{column: value}).unsplit
    assert re.search(reason, refused.reason)
    assert (refused.code == "not-trained") == (value is False and column == "train")
    for nothing in (None, "", [], {"a": None}):
        assert loaded(*PLAIN, **{column: nothing}).examples
    text = {"prompt": "Q", "thinking": "c", "answer": "7", column: value}
    beside_text = make_examples([text], DataSection(source="x.jsonl"))
    assert len(beside_text.unsplit) == (column == "functions")


@pytest.mark.parametrize(
    "row",
    [
        {"id": 3, "source": "x", "url": "u", "model": "m", "score": 0.5},
        {"weight": 1.0, "train": True, "parallel_tool_calls": True, "tool_choice": "auto"},
        {"functions": ["hammer"], "loss": 0.7},
    ],
)
def test_what_only_describes_a_row_is_silent(row: dict[str, Any]) -> None:
    """Columns about a row, and values that say what is so anyway."""
    assert loaded(*PLAIN, **row).examples


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ({"chat_template_kwargs": {"think": True, "a": None}}, {"think": True, "style": "brief"}),
        ({"chat_template_kwargs": '{"think": false}'}, {"think": False}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
    ],
)
def test_what_a_row_tells_the_template_may_be_the_recipe_s(row: Any, recipe: Any) -> None:
    """What the recipe tells it is said twice; another value can't be honoured and is refused."""
    assert loaded(*PLAIN, kwargs=recipe, **row).examples
    other = dict.fromkeys(recipe, "another")
    (refused,) = loaded(*PLAIN, kwargs=other, **row).unsplit
    assert re.search(
        r"for all rows: write model.chat_template_kwargs; now it is {.*: another.*}; leave the "
        "column out",
        refused.reason,
    )


def test_a_column_of_system_messages_is_said_already_or_settled() -> None:
    """Where the conversation or the recipe says it, the column says nothing more."""
    system = {"role": "system", "content": "S"}
    assert loaded(system, *PLAIN, system="S").examples
    assert loaded(system, *PLAIN, system="Another").unsplit
    row = {"messages": list(PLAIN), "system": "S"}
    for settled, prompt in (({"system": None}, PLAIN[:1]), (BY_COLUMN, (system, PLAIN[0]))):
        data = DataSection(source="x.jsonl", **settled)
        (example,) = make_examples([row], data, RowOptions(reasoning=False)).examples
        assert example.prompt == prompt


IN_TAGS = "<think>c</think>7"
RULED = {"split_rule": "think_tags"}
SAYS_TWICE = "a reasoning beside the text, and one that data.split_rule finds in it; leave one out"
WHOLE = {"type": "text", "text": "7", "weight": 1, "signature": "s", "annotations": []}
HALF = "half of a surrogate pair, which is no text"


@pytest.mark.parametrize(
    ("change", "lines", "reason"),
    [
        ({"content": [WHOLE]}, {}, None),
        ({"content": [WHOLE | {"weight": 0}]}, {}, "`weight` of a part: a message is trained as a"),
        ({"content": [WHOLE | {"image_url": "u"}]}, {}, "`image_url` of a part, which nothing"),
        ({"reasoning": "c", "thinking": "d"}, {}, "different things as `thinking` and `reasoning`"),
        (
            {"content": [{"type": "reasoning", "reasoning": "d"}, "7"], "thinking": "c"},
            {},
            "different things as `thinking` and `content`",
        ),
        ({"reasoning": [{"text": "c"}]}, {}, "message 1 holds a reasoning that is no text"),
        ({"reasoning_content": "c", "content": IN_TAGS}, RULED, SAYS_TWICE),
        ({"reasoning_content": "c", "content": r"\boxed{7}"}, {"split_rule": "boxed"}, SAYS_TWICE),
        ({"reasoning_content": "c"}, RULED, None),
        ({"content": IN_TAGS}, {}, "begins with a reasoning in <think> tags; data.split_rule: thi"),
        ({"content": f"{IN_TAGS}\n", "info": {"source": "x", "thought": "c"}}, RULED, None),
        ({"info": {"thought": "another"}}, {}, "`info` of a trained turn, which nothing reads"),
        ({"info": {"weight": 0}}, {}, "`info` of a trained turn, which nothing reads"),
        ({"role": "user", "thinking": "c"}, {}, "message 1 holds a user's reasoning"),
        ({"role": "tools"}, {}, "message 1: tools aren't a message; write them into a column"),
    ],
)
def test_nothing_is_said_twice_or_where_nothing_reads_it(
    change: dict[str, Any], lines: dict[str, Any], reason: str | None
) -> None:
    """Of a turn; what says the same, or what is so anyway, is read."""
    row = {"messages": [PLAIN[0], PLAIN[1] | change, PLAIN[0], PLAIN[1]][: 2 + 2 * (not lines)]}
    data = DataSection(source="x.jsonl", **lines)
    made = make_examples([row], data, RowOptions("all", reasoning=False))
    assert [bool(re.search(reason or "", each.reason)) for each in made.unsplit] == (
        [True] if reason else []
    )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Q\ud800"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "\udc00"}]},
        {"role": "assistant", "content": "4", "reasoning_content": "\ud800"},
    ],
)
def test_half_of_a_surrogate_pair_is_found_wherever_it_stands(message: dict[str, Any]) -> None:
    """It would end the tokenizer with an error that names no row."""
    (refused,) = loaded(PLAIN[0], message, *PLAIN, turns="last").unsplit
    assert refused.reason == HALF
    assert loaded(*PLAIN, tools=[{"name": "\ud800"}]).unsplit[0].reason == HALF


def test_blanks_around_reasoning_and_answer_are_none_of_theirs() -> None:
    """As in columns: a reply that was cut at its tags has line ends that the tags bring, too."""
    (example,) = loaded(PLAIN[0], {**PLAIN[1], "content": "\n\n7 ", "thinking": "\nc\n"}).examples
    assert (example.thinking, example.answer) == ("c", "7")


def test_a_prompt_is_not_asked_twice() -> None:
    """Where the messages hold it already, the line of the prompt is too much."""
    for prompt in ("Q", list(PLAIN[:1])):
        row = {"prompt": prompt, "talk": list(THOUGHT)}
        data = DataSection(source="x.jsonl", prompt="{prompt}", response="talk")
        (refused,) = make_examples([row], data).unsplit
        assert refused.reason == "the prompt stands in `talk` already; leave data.prompt out"
        data = DataSection(source="x.jsonl", response="talk")
        assert make_examples([row], data).examples[0].prompt == PLAIN[:1]


def calling(*arguments: Any, name: str = "add") -> dict[str, Any]:
    """Make a row that calls tools with these arguments, of which the first has another name."""
    names = [name, *["add"] * len(arguments)]
    calls = [{"name": n, "arguments": each} for n, each in zip(names, arguments, strict=False)]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [PLAIN[0], asked, {"role": "tool", "content": "4"}, THOUGHT[1]]}


@pytest.mark.parametrize("function", ["add", 5, ["add"]])
def test_a_function_that_is_no_object_is_refused(function: Any) -> None:
    """Of a call and of a tool, and not with a traceback."""
    calling = {"role": "assistant", "tool_calls": [{"function": function}]}
    (refused, *_) = loaded(PLAIN[0], calling, PLAIN[0], THOUGHT[1]).unsplit
    assert refused.reason == "message 1: a tool call has no `name`"
    (refused,) = loaded(*THOUGHT, tools=[{"function": function}]).unsplit
    assert refused.reason == "`tools` holds the description of a tool without a `name`"
    told = json.dumps([{"name": "add", "function": None}])
    (example,) = loaded(*THOUGHT, tools=told).examples
    tokenizer = made("byte_level", "{{ tools | tojson if tools }}" + CHATML)
    assert "null" in render_prompt(Habits(tokenizer, {}), example.prompt)
    assert loaded(*THOUGHT, x=[{"function": function}], y=[5], z=[None]).examples


def test_tools_in_a_column_of_another_name_are_refused() -> None:
    """By what it holds; people with names and what they do are none."""
    takes = {"name": "add", "input_schema": {"type": "object"}}
    for told in ([takes], json.dumps([takes]), [{"type": "function", "function": takes}]):
        (refused,) = loaded(*THOUGHT, apis=told).unsplit
        assert refused.reason.startswith("`apis` describes tools, which are read in a column")
    for said in (
        {"apis": [{"name": "Ada", "description": "Adds."}]},
        {"apis": [takes], "tools": [takes]},
    ):
        assert loaded(*THOUGHT, **said).examples


def test_a_key_of_a_call_that_the_template_never_reads_refuses() -> None:
    """Llama's word for arguments, say, would be dropped where the template writes arguments."""
    written = "{% for c in message.tool_calls or [] %}{{ c.name }}{{ c.arguments }}{% endfor %}"
    content = "{{ message['content'] }}"
    tokenizer = made("byte_level", CHATML.replace(content, content + written))
    for key, is_read in (("parameters", False), ("arguments", True), ("id", True)):
        call = {"name": "add", key: {"a": 2} if key != "id" else "x"}
        messages = read_messages([PLAIN[0], {"role": "assistant", "tool_calls": [call]}, PLAIN[0]])
        if is_read:
            render_prompt(Habits(tokenizer, {}), messages)
            continue
        with pytest.raises(FrameError, match=r"never reads `parameters`.*did you mean `arguments`"):
            render_prompt(Habits(tokenizer, {}), messages)


WITH_NULL = {"a": 2, "b": None, "c": {"d": None, "e": [None]}}


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        ([calling(WITH_NULL)], WITH_NULL),  # none says more: nothing to fill
        ([calling(json.dumps(WITH_NULL)), calling({"b": 1, "c": {"d": 2}})], WITH_NULL),
        ([calling(WITH_NULL), calling({"b": 1, "c": 1}, name="sub")], WITH_NULL),  # no table
        (
            [calling(WITH_NULL), calling({"a": None, "b": 1, "c": None}, name="sub")],
            {"a": 2, "c": WITH_NULL["c"]},
        ),
        (
            [calling(WITH_NULL), calling({"a": 1, "b": 2, "c": {"d": 3, "e": []}}, name="sub")],
            {"a": 2, "c": {"e": [None]}},
        ),
        ([calling(WITH_NULL), calling({"a": None, "b": 1, "c": None})], "the argument 'b' of a"),
    ],
    ids=["alone", "text", "other keys", "filled", "filled inside", "one function"],
)
def test_a_null_argument_is_kept_unless_it_fills_a_table(rows: Any, read: Any) -> None:
    """A table gives all calls the arguments of all functions; of one function none can tell."""
    loaded = make_examples(rows, DataSection(source="x"))
    if isinstance(read, str):
        assert read in loaded.unsplit[0].reason
    else:
        assert loaded.examples[0].prompt[1]["tool_calls"][0]["arguments"] == read  # type: ignore[index]


def test_nulls_that_tables_fill_in_are_no_part_of_tools() -> None:
    """A table gives each description the keys of all; a text of JSON is as it was written."""
    filled = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": None}}}
    bare = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}
    for tools in ([filled], filled, [json.dumps(bare)]):
        (example,) = loaded(*PLAIN, tools=tools).examples
        assert json.loads(example.prompt[0]["content"]) == [bare]
    row = {"tools": json.dumps([bare]), "q": "Q", "thinking": "c", "answer": "7"}
    data = DataSection(source="x.jsonl", prompt="{tools}: {q}")
    assert make_examples([row], data).examples[0].prompt.endswith(": Q")


BY_COLUMN = {"system_column": "system"}
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_are_rendered_or_refused(tiny_tokenizer: Any) -> None:
    """The template writes them and the calls; one that never reads them refuses the row."""
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "4"}
    (example,) = loaded(PLAIN[0], calling, told, PLAIN[1], turns="last", tools=[TOOL]).examples
    without = copy.deepcopy(tiny_tokenizer)
    without.chat_template = CHATML
    with pytest.raises(FrameError, match="the chat template never reads `tools`"):
        render_prompt(Habits(without, {}), example.prompt)
    without.chat_template = WITH_TOOLS
    text = render_prompt(Habits(without, {}), example.prompt)
    assert text.startswith('<tools>[{"type": "function"')
    assert '<call>{"name": "add", "arguments": {"a": 2}}</call>' in text
    assert "<|im_start|>tool\n4<|im_end|>" in text
