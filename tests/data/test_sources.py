"""Where rows come from, and what becomes of them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from sftkey.data import examples as rules
from sftkey.data.examples import RowOptions
from sftkey.data.response import Example
from sftkey.data.sources import BUILT_IN, load_examples, with_defaults
from sftkey.data.values import Template
from sftkey.errors import DataError
from sftkey.recipe.schema import SPLIT_RULES, DataSection
from tests.support.model_folders import write_rows

GSM8K = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4"}
HASHED = {"prompt": "{question}", "response": "answer", "split_rule": "hash_marks"}
TURNS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>Two and two.</think>4"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "<think>4 + 1.</think>5"},
]

# What stands before the last answer: the template decides on an earlier thinking.
EARLIER = (
    TURNS[0],
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    TURNS[2],
)


def section(source: object, **fields: Any) -> DataSection:
    """Make a section whose source may be a path."""
    return DataSection.model_validate({"source": str(source), **fields})


def jsonl(file: Path, *rows: object) -> Path:
    """Write rows into a file, a line each."""
    write_rows(file, rows)
    return file


def message_of(data: DataSection, split: str = "train") -> str:
    """Return the whole text of the error that the section ends in."""
    with pytest.raises(DataError) as caught:
        load_examples(data, seed=7, split=split)
    return str(caught.value)


def reasons(data: DataSection, **options: Any) -> list[tuple[int, str]]:
    """Return what can't be used, with its reason."""
    return [(row.index, row.reason) for row in load_examples(data, seed=7, **options).unsplit]


def test_columns_of_the_examples_names_need_no_template(tmp_path: Path) -> None:
    """Prompt, thinking and answer are taken from columns of these names."""
    file = jsonl(
        tmp_path / "rows.jsonl", {"prompt": "2 + 2?", "thinking": "Two twos.", "answer": 4}
    )
    loaded = load_examples(section(file), seed=7)
    assert loaded.examples == [Example("2 + 2?", "Two twos.", "4", 0)]
    assert loaded.unsplit == []


def test_templates_reach_into_columns(tmp_path: Path) -> None:
    """Nested values, lists, formats and literal braces work as in `str.format`."""
    row = {"q": "2 + 2?", "meta": {"steps": ["Two twos.", "Add."], "value": 4.0}, "a.b": "x"}
    data = section(
        jsonl(tmp_path / "rows.jsonl", row),
        prompt="{q} {{brace}} {a.b}",
        thinking="{meta[steps][1]}",
        answer="{meta[value]:.0f}",
    )
    assert load_examples(data, seed=7).examples == [Example("2 + 2? {brace} x", "Add.", "4", 0)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"a": "x", "b": "y"}, "<x\n\ny\n>"),
        ({"a": "", "b": "y"}, "<\n\ny\n>"),
        ({"a": "x", "b": ""}, "<x\n>"),
    ],
)
def test_an_empty_column_leaves_no_white_space(row: dict[str, str], text: str) -> None:
    """A row without context begins with its question, one without input ends with it."""
    assert Template("<{a}\n\n{b}\n>", list(row)).fill(row) == text
    assert Template("{a}\n\n{b}\n", list(row)).fill(row) == text[1:-1].lstrip()


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=1))
def test_a_template_agrees_with_str_format(row: dict[str, str]) -> None:
    """On plain columns a template is `str.format`, whatever the text holds."""
    text = "{{" + "|".join(f"{{{name}}}" for name in row) + "}}"
    assert Template(text, list(row)).fill(row) == text.format(**row)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_local_files_give_text_as_it_was_written(tmp_path: Path, ending: str) -> None:
    """No reader takes a date for a time, drops leading zeros, or takes NA for nothing."""
    rows = [
        {"prompt": "A\nB", "thinking": 'x, "y"', "answer": answer}
        for answer in ("2023-01-01", "007", "NA", "1,000", "ä")
    ]
    file = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        jsonl(file, *rows)
    elif ending == "json":
        file.write_text(json.dumps(rows))
    else:
        import pandas

        renderer = pandas.DataFrame(rows)
        renderer.to_csv(file, index=False) if ending == "csv" else renderer.to_parquet(file)
    examples = load_examples(section(file), seed=7).examples
    assert examples == [Example(**row, index=index) for index, row in enumerate(rows)]


def test_a_folder_has_a_file_or_shards_for_each_split(tmp_path: Path) -> None:
    """Splits are files by name; a config is a folder in it, as in a copy from the hub."""
    row = {"prompt": "p", "thinking": "t", "answer": "a"}
    (tmp_path / "main").mkdir()
    jsonl(tmp_path / "main" / "train-00000-of-00002.jsonl", row)
    jsonl(tmp_path / "main" / "train-00001-of-00002.jsonl", row, row)
    jsonl(tmp_path / "main" / "test.jsonl", row)
    data = section(tmp_path, config="main")
    assert [example.index for example in load_examples(data, 7, "train").examples] == [0, 1, 2]
    assert len(load_examples(data, 7, "test").examples) == 1
    assert message_of(data, "dev") == (
        f"{tmp_path / 'main'}: expected a file of the split 'dev'; found test, train"
    )
    (tmp_path / "main" / "test.csv").write_text("prompt\n")
    assert message_of(data, "test") == (
        f"{tmp_path / 'main'}: expected one kind of file for the split 'test'; found .csv, .jsonl"
    )
    assert len(load_examples(section(tmp_path), 7, "train").examples) == 3


def test_a_built_in_is_default_values(tmp_path: Path) -> None:
    """A file with gsm8k's columns gives what gsm8k gives, and the recipe's own values win."""
    data = with_defaults(section("gsm8k"))
    file = jsonl(tmp_path / "rows.jsonl", GSM8K)
    local = data.model_copy(update={"source": str(file), "config": None})
    assert local == section(file, **HASHED)
    assert load_examples(local, 7).examples == [Example("2 + 2?", "2 + 2 = 4.", "4", 0)]
    assert with_defaults(section("gsm8k", prompt="Q: {question}")).prompt == "Q: {question}"
    assert with_defaults(section("gsm8k", thinking="{x}")).response is None
    for values in BUILT_IN.values():
        DataSection.model_validate(values)


def test_the_rules_are_those_that_recipes_allow() -> None:
    """The recipe's list of rules is the list of rules."""
    assert tuple(rules.RULES) == SPLIT_RULES


def test_what_a_row_lacks_is_a_reason_with_its_number(tmp_path: Path) -> None:
    """Nulls, lists, empty texts, missing keys and broken text are no examples; other rows are."""
    whole = {"prompt": "p", "thinking": "", "answer": "a", "meta": {"x": 1}}
    file = jsonl(
        tmp_path / "rows.jsonl",
        whole,
        {**whole, "answer": None},
        {**whole, "answer": ["a"]},
        {**whole, "answer": " "},
        {**whole, "prompt": "\n"},
        {**whole, "meta": {}},
        {key: value for key, value in whole.items() if key != "thinking"},
        {**whole, "answer": "\ud83d"},
    )
    data = section(file, prompt="{prompt}{meta[x]}")
    assert reasons(data) == [
        (1, "`answer` is null"),
        (2, "`answer` holds a list, not text"),
        (3, "the answer is empty"),
        (5, "`meta[x]` does not exist"),
        (6, "`thinking` is null"),
        (7, "half of a surrogate pair, which is no text"),
    ]
    assert reasons(section(file))[3] == (4, "the prompt is empty")
    assert reasons(section(file, thinking="{thinking:d}"))[0] == (
        0,
        "`thinking`: Unknown format code 'd' for object of type 'str'",
    )


def test_unknown_columns_are_named_at_once_with_those_that_exist(tmp_path: Path) -> None:
    """All wrong columns stand in one error, beside the right ones."""
    file = jsonl(tmp_path / "rows.jsonl", GSM8K)
    hint = (
        "hint: `data.prompt`, `data.thinking` and `data.answer` are templates over the columns, "
        "or `data.response` is the one to split by `data.split_rule`"
    )
    assert message_of(section(file, prompt="{questoin}")) == (
        f"{file}: 2 problems\n"
        "  data.prompt: no column 'questoin'; the columns are question, answer\n"
        "  data.thinking: no column 'thinking'; the columns are question, answer\n"
        'hint: these rows are read with data.prompt: "{question}", data.response: answer, '
        "data.split_rule: hash_marks"
    )
    whole = jsonl(tmp_path / "whole.jsonl", {"instruction": "Q", "completion": "7"})
    assert message_of(section(whole)).endswith(
        f"{hint}; rows without a reasoning need `thinking: own` in every stage, and "
        'data.answer: "{completion}" where that is one'
    )
    assert message_of(section(file, **{**HASHED, "response": "output"})) == (
        f"{file}: 1 problem\n"
        f"  data.response: no column 'output'; the columns are question, answer\n{hint}"
    )
    assert message_of(section(file, split_rule="boxed")) == (
        f"{file}: data.response: expected the column that `data.split_rule` splits; got none"
    )
    assert message_of(section(file, prompt="{question}", response="answer")) == (
        f"{file}: data.split_rule: expected a rule that splits `answer`; got none"
    )


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        (
            {"prompt": TURNS[:1], "completion": [{**TURNS[1], "content": "4", "thinking": "c"}]},
            'data.prompt: "{prompt}", data.response: completion',
        ),
        (
            {"prompt": "2 + 2?", "completion": json.dumps(TURNS[1:2])},
            'data.prompt: "{prompt}", data.response: completion, data.split_rule: think_tags',
        ),
        (
            {"id": 1, "conversations": TURNS},
            "data.response: conversations, data.split_rule: think_tags",
        ),
        (
            {"id": 1, "chat": [TURNS[0], {"role": "assistant", "content": "4"}]},
            "data.response: chat; `sftkey adapt` finds a data.split_rule, where they need one",
        ),
    ],
)
def test_messages_that_no_line_names_have_their_lines(
    tmp_path: Path, row: dict[str, Any], lines: str
) -> None:
    """The very lines are written, and with them the row is read."""
    file = jsonl(tmp_path / "rows.jsonl", row)
    *_, hint = message_of(section(file)).splitlines()
    assert hint == f"hint: these messages are read with {lines}"
    lines = lines.partition(";")[0]
    fields = dict(line.removeprefix("data.").split(": ") for line in lines.split(", "))
    fields = {name: yaml.safe_load(text) for name, text in fields.items()}
    data = section(file, **fields)
    (example,) = load_examples(data, 0, options=RowOptions(reasoning=False)).examples
    assert example.answer in ("4", "5")
    if "split_rule" in fields:
        data = section(file, split_rule="think_tags")
        assert message_of(data).endswith(lines.removesuffix(", data.split_rule: think_tags"))


def test_the_last_assistant_turn_is_the_response(tmp_path: Path) -> None:
    """Everything before the last answer is its prompt, as messages."""
    file = jsonl(tmp_path / "rows.jsonl", {"messages": [*TURNS, {"role": "user", "content": "?"}]})
    loaded = load_examples(section(file, split_rule="think_tags"), seed=7)
    assert loaded.examples == [Example(EARLIER, "4 + 1.", "5", 0)]


def test_all_turns_give_an_example_each(tmp_path: Path) -> None:
    """Each answer becomes an example over the turns before it; a bad one costs no other."""
    bad = {"role": "assistant", "content": "5"}
    file = jsonl(tmp_path / "rows.jsonl", {"messages": TURNS}, {"messages": [*TURNS[:3], bad]})
    data = section(file, split_rule="think_tags")
    assert load_examples(data, seed=7, options=RowOptions("all")).examples == [
        Example(tuple(TURNS[:1]), "Two and two.", "4", 0),
        Example(EARLIER, "4 + 1.", "5", 0, 1),
        Example(tuple(TURNS[:1]), "Two and two.", "4", 1),
    ]
    assert reasons(data, options=RowOptions("all")) == [(1, "no `</think>`")]


def test_reasoning_content_needs_no_rule(tmp_path: Path) -> None:
    """A turn that carries its reasoning apart is split already; earlier turns keep theirs."""
    answer = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
    chat = [TURNS[0], answer, TURNS[2], {**answer, "content": "5"}]
    file = jsonl(tmp_path / "rows.jsonl", {"prompt": "2 + 2?", "messages": chat})
    loaded = load_examples(section(file), seed=7)
    assert loaded.examples == [Example((TURNS[0], answer, TURNS[2]), "Two and two.", "5", 0)]
    tagged = [TURNS[0], {**TURNS[1], "reasoning_content": ""}]
    file = jsonl(tmp_path / "tagged.jsonl", {"talk": None}, {"talk": tagged})
    data = section(file, response="talk", split_rule="think_tags")
    assert load_examples(data, seed=7).examples == [Example((TURNS[0],), "Two and two.", "4", 1)]
    assert reasons(data) == [(0, "no list of messages")]


def test_a_turn_can_be_the_response_of_a_plain_prompt(tmp_path: Path) -> None:
    """A base model takes no chat: keys lead to the turn, and the prompt is text."""
    file = jsonl(tmp_path / "rows.jsonl", {"q": "2 + 2?", "talk": TURNS}, {"q": "1?", "talk": []})
    data = section(
        file, prompt="{q}", response="talk[1][content]", split_rule="think_tags", answer=None
    )
    loaded = load_examples(data, seed=7)
    assert loaded.examples == [Example("2 + 2?", "Two and two.", "4", 0)]
    assert reasons(data) == [(1, "`talk[1]` does not exist")]
    missing = section(file, **{**HASHED, "prompt": "{q}", "response": "chat[1][content]"})
    assert message_of(missing).splitlines()[:2] == [
        f"{file}: 1 problem",
        "  data.response: no column 'chat'; the columns are q, talk",
    ]


def test_choices_are_rendered_by_their_places(tmp_path: Path) -> None:
    """Lists inside a column, as the choices of OpenBookQA, are reached by number."""
    choices = {"text": ["moon", "sun"], "label": ["A", "B"]}
    file = jsonl(tmp_path / "rows.jsonl", {"stem": "Which shines?", "choices": choices, "key": "B"})
    lines = [f"{{choices[label][{place}]}}. {{choices[text][{place}]}}" for place in (0, 1)]
    prompt = "\n".join(["{stem}", *lines])
    data = section(file, prompt=prompt, thinking="", answer="{key}")
    (example,) = load_examples(data, seed=7).examples
    assert example == Example("Which shines?\nA. moon\nB. sun", "", "B", 0)


def test_conversations_that_hold_no_response_are_reasons(tmp_path: Path) -> None:
    """Each broken conversation is counted with what is wrong with it."""
    file = jsonl(
        tmp_path / "rows.jsonl",
        {"messages": TURNS[:1]},
        {"messages": TURNS[1:2]},
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
        {"messages": TURNS[:2]},
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS[:2]]},
        {"messages": [*TURNS[:2], TURNS[3]]},
    )
    assert reasons(section(file, split_rule="think_tags", system="Be kind.")) == [
        (0, "no assistant turn"),
        (1, "the prompt is empty"),
        (2, "message 1 has no text as `role` and `content`"),
        (4, "`data.system` is set, but the row has a system message of its own"),
        (5, "the answer follows a message of the role 'assistant', not a user's"),
    ]
    no_rule = "no `reasoning_content`, and no `data.split_rule` that splits the text"
    assert reasons(section(file))[3] == (3, no_rule)


def test_a_prompt_may_be_messages_and_system_comes_first(tmp_path: Path) -> None:
    """The recipe's system message goes before a text and before messages alike."""
    row = {"prompt": "2 + 2?", "thinking": "t", "answer": "4"}
    file = jsonl(tmp_path / "rows.jsonl", row, {**row, "prompt": TURNS[:1]})
    loaded = load_examples(section(file, system="Be kind."), seed=7)
    prompts = [example.prompt for example in loaded.examples]
    assert prompts == [({"role": "system", "content": "Be kind."}, TURNS[0])] * 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{broken',
            "line 2, column 2: expected JSON; got "
            "'Expecting property name enclosed in double quotes'\n"
            "hint: one object a line, without commas between the lines",
        ),
        ("b.jsonl", '"x"', "line 1: expected an object; got str"),
        (
            "c.json",
            '{"a": 1}',
            "expected a list of objects; got an object with the keys a\n"
            "hint: write the rows alone, as a list or one a line",
        ),
        ("d.json", "[1]", "item 0: expected an object; got int"),
        ("e.csv", "a,b\n1,2,3\n", "line 2: expected 2 cells; got more"),
        (
            "f.csv",
            'a\n"1',
            "expected csv; got unexpected end of data\n"
            "hint: a quote (\") isn't closed; one inside a cell is written twice",
        ),
        (
            "k.csv",
            'a,b\n"1 \\"2\\"",3\n',
            "expected csv; got ',' expected after '\"'\n"
            'hint: a quote (") inside a cell is written twice, without a backslash',
        ),
        ("g.parquet", "rows", "expected parquet; got something else"),
        ("h.jsonl", "\n", "expected rows in `train`; got none"),
        ("i.json", "[]", "expected rows in `train`; got none"),
        ("j.csv", "a,b\n", "expected rows in `train`; got none"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, name: str, text: str, message: str) -> None:
    """A broken or empty file is one error that says where it breaks."""
    (tmp_path / name).write_text(text)
    assert message_of(section(tmp_path / name)) == f"{tmp_path / name}: {message}"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in another encoding, without permission, or not there at all is one error."""
    file = tmp_path / "rows.jsonl"
    assert message_of(section(file)) == f"{file}: no such file"
    (tmp_path / "Rows.json").touch()
    assert message_of(section(file)) == f"{file}: no such file; did you mean `Rows.json`?"
    file.write_bytes(b"\xff\xfe")
    assert message_of(section(file)) == (
        f"{file}: expected jsonl in UTF-8; got 'utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte\nhint: save it as UTF-8, which every editor can"
    )

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message_of(section(file)) == f"{file}: can't be read: Permission denied"


def test_a_source_without_splits_has_no_other_split(tmp_path: Path) -> None:
    """A file's `test` must be a count, a share or a file; a misspelt folder is no hub id."""
    file = jsonl(tmp_path / "rows.jsonl", GSM8K)
    assert message_of(section(file, **HASHED), "test") == (
        f"{file}: expected a count, a share or a file as split; got 'test'\n"
        "hint: this source has no splits of its own"
    )
    assert len(load_examples(section("nowhere.jsonl", **HASHED), 7, str(file)).examples) == 1
    assert message_of(section("./rows")) == (
        "./rows: expected a file, a folder or a hub id; there is no such file"
    )


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("https://huggingface.co/datasets/me/rows/tree/main", "write its hub id: me/rows"),
        ("hf://datasets/me/rows/train.jsonl", "write its hub id: me/rows"),
        ("s3://rows/train.jsonl", "download it, and name the file"),
    ],
)
def test_an_address_is_no_source(tmp_path: Path, address: str, hint: str) -> None:
    """As the rows, or as those of a split."""
    said = f"{address}: expected a file, a folder or a hub id; got an address\nhint: {hint}"
    assert message_of(section(address)) == said
    assert message_of(section(jsonl(tmp_path / "rows.jsonl", GSM8K)), address) == said


def test_made_rows_carry_worked_solutions_and_depend_on_the_seed() -> None:
    """The same seed makes the same rows, whose thinking ends in the answer's number."""
    data = section(
        "reasoning_gym", task="gsm_symbolic", num_rows=20, task_options={"difficulty": 1.0}
    )
    first = load_examples(data, seed=7).examples
    assert first == load_examples(data, seed=7).examples
    assert first != load_examples(data, seed=8).examples
    assert all("####" not in example.thinking and example.thinking for example in first)
    assert sum(example.answer in example.thinking for example in first) >= 19


def test_a_task_without_worked_solutions_takes_templates() -> None:
    """Entries are rows like others: their columns and metadata go into templates."""
    data = section("reasoning_gym", task="chain_sum", num_rows=3, thinking="{metadata[expression]}")
    first = load_examples(data, seed=7).examples[0]
    assert first.thinking in str(first.prompt)
    assert re.fullmatch(r"-?\d+", first.answer)


def test_a_chain_of_sums_is_worked_out_up_to_its_last_step() -> None:
    """Each line adds one term to the result so far; the answer is the result of the last line."""
    options = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    data = section("reasoning_gym", task="chain_sum", num_rows=50, task_options=options)
    examples = load_examples(data, seed=42).examples
    assert len(examples) == 50
    for example in examples:
        *lines, last = example.thinking.split("\n")
        for line, following in zip(lines, [*lines[1:], last], strict=True):
            step, result = line.split(" = ")
            assert eval(step) == int(result)
            assert following.startswith(f"{result} ")
        assert eval(last) == int(example.answer)
    assert examples[0].thinking == "4 + 3 = 7\n7 + 3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task": "gsm"},
            "data.task: expected a task of reasoning-gym; got 'gsm'\n"
            "hint: tasks with worked solutions: chain_sum, gsm_symbolic",
        ),
        (
            {"task": "leg_counting"},
            "data.task: expected a task with worked solutions (chain_sum, gsm_symbolic); "
            "got 'leg_counting'\n"
            "hint: or write `data.thinking` as a template over question, answer and metadata",
        ),
        ({}, "data.num_rows: expected how many rows to make; got none"),
        (
            {"num_rows": 2, "task_options": {"seed": 1}},
            "data.task_options.seed: unknown option\nhint: gsm_symbolic has difficulty",
        ),
        (
            {"num_rows": 2, "task_options": {"difficulty": -1}},
            "data.task_options: gsm_symbolic refuses {'difficulty': -1}: AssertionError",
        ),
    ],
)
def test_made_rows_that_cannot_be_made(fields: dict[str, Any], message: str) -> None:
    """Tasks, options and numbers that don't fit are one error each."""
    data = section("reasoning_gym", **{"task": "gsm_symbolic", **fields})
    assert message_of(data) == f"reasoning_gym: {message}"


def test_an_entry_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task's generator raises comes with the row's number."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset

    def fail(self: object, index: int) -> None:
        raise ValueError("no such number")

    monkeypatch.setattr(GSMSymbolicDataset, "__getitem__", fail)
    data = section("reasoning_gym", task="gsm_symbolic", num_rows=2)
    assert message_of(data) == "gsm_symbolic: row 0 can't be made: no such number"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reasoning-gym the error says how to get it."""
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    data = section("reasoning_gym", task="gsm_symbolic", num_rows=2)
    assert message_of(data) == (
        "reasoning_gym: the package reasoning-gym is not installed\n"
        'hint: pip install "sftkey[demo]"'
    )


def test_a_hub_data_set_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, config and split reach `load_dataset`, and its bars stay as they were."""
    import datasets

    asked: list[object] = []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs, datasets.is_progress_bar_enabled()))
        return datasets.Dataset.from_list([GSM8K] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    datasets.enable_progress_bars()
    examples = load_examples(section("gsm8k"), seed=7, split="test").examples
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}, False)]
    assert datasets.is_progress_bar_enabled()
    assert examples[2] == Example("2 + 2?", "2 + 2 = 4.", "4", 2)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` find nothing that an earlier run has fetched."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture
def hub_answers(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[type, int], None]:
    """Let the hub answer every download with an error."""
    import datasets
    import huggingface_hub

    def answer(kind: type, status: int) -> None:
        response = SimpleNamespace(status_code=status, headers={}, request=None)

        def refuse(*_: object, **__: object) -> None:
            raise kind("refused", response=response)

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", refuse)

    return answer


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_data_set_names_its_page(
    hub_answers: Callable[[type, int], None], status: int
) -> None:
    """Where the hub refuses access, the error says where to accept and how to log in."""
    from huggingface_hub.constants import ENDPOINT

    hub_answers(GatedRepoError, status)
    assert message_of(section("org/gated")) == (
        "org/gated: the hub refuses access: the data set is gated, and this account hasn't been "
        "let in\n"
        f"hint: accept its conditions on {ENDPOINT}/datasets/org/gated, then `hf auth login`"
    )


def test_an_unknown_data_set_is_named(hub_answers: Callable[[type, int], None]) -> None:
    """The hub doesn't tell a missing data set from a private one; the error says so."""
    hub_answers(RepositoryNotFoundError, 401)
    assert message_of(section("org/nothing")) == (
        "org/nothing: expected a file, a folder or a data set of the hub; there is none, or it is "
        "private\n"
        "hint: check the spelling; for a private one: `hf auth login`"
    )


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_without_network_the_error_says_what_to_fetch(no_cache: None) -> None:
    """Offline and without cache: what to download, and what to write then."""
    assert message_of(section("gsm8k")) == (
        "openai/gsm8k: the hub can't be reached, and the data set isn't in the cache\n"
        "hint: where there is a network, `hf download openai/gsm8k --repo-type dataset "
        "--local-dir FOLDER`; then write under `data`: "
        '{"source": "FOLDER", "config": "main", "prompt": "{question}", "response": "answer", '
        '"split_rule": "hash_marks"}'
    )


def test_other_refusals_of_datasets_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that a hub data set lacks is refused in upstream's words, on one line."""
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert message_of(section("org/data"), "dev") == (
        "org/data: can't be loaded: Unknown split \"dev\". Should be one of ['train']."
    )


@pytest.mark.parametrize("name", ["rows.txt", "rows.parq", "v1.0"])
def test_a_file_that_lies_here_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its ending, nobody is asked for a data set of that name."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / name, *[{"prompt": "Q", "thinking": "c", "answer": "7"}] * 2)
    assert [each.answer for each in load_examples(section(name), 0).examples] == ["7", "7"]
