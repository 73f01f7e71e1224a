"""Columns are guessed by their names and by what rules split; the rest is left to the user."""

from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sftkey.activity import current
from sftkey.adapt.columns import PHRASES
from sftkey.adapt.data import choose_data, choose_grader, measure
from sftkey.adapt.readings import OWN_WAY
from sftkey.data import sources
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import DataError
from sftkey.recipe.schema import ResponseSection
from tests.support.model_folders import sums, write_rows
from tests.support.tokenizers import CHATML, made

HELD_OUT = {"validation": 4, "test": 4, "overlap": "drop"}
THOUGHT = "<think>\nSo.\n</think>\n\n7"


def turns(content: str, **more: Any) -> list[dict[str, Any]]:
    """Make a conversation of one question."""
    return [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": content, **more},
    ]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (
            {"question": "Q", "cot": "c", "answer": "7"},
            {"prompt": "{question}", "thinking": "{cot}", "answer": "{answer}"},
        ),
        (
            {"prompt": "Q", "thinking": "c", "answer": "7"},
            {"prompt": "{prompt}", "thinking": "{thinking}", "answer": "{answer}"},
        ),
        (
            {"instruction": "Q", "input": "of this", "rationale": "c", "label": "7"},
            {
                "prompt": "{instruction}\n\n{input}",
                "thinking": "{rationale}",
                "answer": "{label}",
            },
        ),
        (
            {"question": "Q", "model_reasoning": "c", "ground_truth": "7", "reasoning_model": "m"},
            {"prompt": "{question}", "thinking": "{model_reasoning}", "answer": "{ground_truth}"},
        ),
        (
            {"cot_prompt": "Q", "cot": "c", "answer": "7"},
            {"prompt": "{cot_prompt}", "thinking": "{cot}", "answer": "{answer}"},
        ),
        (
            {"question": "Q", "answer": "c\n#### 7"},
            {"prompt": "{question}", "response": "answer", "split_rule": "hash_marks"},
        ),
        (
            {"problem": "Q", "solution": "c \\boxed{7}", "source": "x"},
            {"prompt": "{problem}", "response": "solution", "split_rule": "boxed"},
        ),
        (
            {"prompt": "Q", "response": THOUGHT},
            {"prompt": "{prompt}", "response": "response", "split_rule": "think_tags"},
        ),
        ({"messages": turns(THOUGHT)}, {"split_rule": "think_tags"}),
        ({"messages": turns("7", reasoning_content="c"), "prompt": "Q"}, {}),
        (
            {"messages": turns(THOUGHT, info={"source": "x", "answer_content": "7"})},
            {"split_rule": "think_tags"},
        ),
        (
            {"Body": "C.", "Question": "Q", "cot": "c", "Answer": 7},
            {"prompt": "{Body}\n\n{Question}", "thinking": "{cot}", "answer": "{Answer}"},
        ),
        (
            {"problem": "Q", "solution": "c \\boxed{7}", "full": "Q: c \\boxed{7}"},
            {"prompt": "{problem}", "response": "solution", "split_rule": "boxed"},
        ),
        (
            {"data": {"conversations": turns(THOUGHT)}},
            {"response": "data[conversations]", "split_rule": "think_tags"},
        ),
        (
            {"input": "Q", "reasoning_content": "c d", "content": "7", "repo": "x"},
            {"prompt": "{input}", "thinking": "{reasoning_content}", "answer": "{content}"},
        ),
        (
            {"question": "Q", "reasoning": "c d", "answer": "c d\n#### 7"},
            {"prompt": "{question}", "response": "answer", "split_rule": "hash_marks"},
        ),
        ({"messages": turns(THOUGHT, reasoning_content="")}, {"split_rule": "think_tags"}),
        (
            {"system": "S", "messages": [{"role": "system", "content": "S"}, *turns(THOUGHT)]},
            {"split_rule": "think_tags"},
        ),
    ],
    ids=lambda value: "-".join(value) if "-".join(value) else "none",
)
def test_columns_that_say_what_they_are(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Names and rules tell how rows are read, and the rows become examples."""
    source = write_rows(tmp_path / "rows.jsonl", [row] * 40)
    choice = choose_data(source, seed=0, plain=False)
    assert choice.fields == {"source": source, **fields, **HELD_OUT}
    assert (len(choice.examples), choice.undecided) == (40, [])
    assert choice.examples[0].answer == "7"


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (
            {"user": "Q", "assistant": "7", "reasoning": "c d"},
            {"prompt": "{user}", "thinking": "{reasoning}", "answer": "{assistant}"},
        ),
        (
            {"human": "Q", "gpt": THOUGHT},
            {"prompt": "{human}", "response": "gpt", "split_rule": "think_tags"},
        ),
        (
            {"inputs": "Q", "targets": "c d. The answer is 7."},
            {"prompt": "{inputs}", "response": "targets", "split_rule": PHRASES[1]},
        ),
    ],
    ids=lambda value: "-".join(value),
)
def test_speakers_are_columns_of_a_prompt_and_its_answer(
    tmp_path: Path, row: dict[str, str], fields: dict[str, str]
) -> None:
    """Where no column is called a prompt, and each row has another question."""
    asking = next(iter(row))
    rows = [row | {asking: f"Q {n}"} for n in range(40)]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert {**fields, **choice.fields} == choice.fields
    assert [choice.examples[0].prompt, choice.examples[0].answer] == ["Q 0", "7"]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"id": "1", "body": "x"}, {"prompt", "thinking", "answer"}),
        ({"question": "Q", "answer": "7", "note": "It is so."}, {"thinking"}),
        ({"question": "Q", "answer": "7", "note": "因为三加四"}, {"thinking"}),
        ({"question": "Q", "answer": "a text " * 6}, {"thinking", "answer"}),
        ({"question": "Q", "id": "7"}, {"thinking", "answer"}),
        ({"question": ["Q"], "cot": "c", "answer": "7"}, {"prompt", "thinking"}),
        ({"messages": turns("c d. So 7")}, {"thinking"}),
        ({"messages": turns("7", thoughts="c")}, {"thinking"}),
        ({"messages": turns("7"), "note": "It is so."}, {"thinking"}),
        ({"question": "Q", "reasoning": "7", "answer": "Add three. " * 4}, {"thinking", "answer"}),
        ({"context": ["C.", "D."], "question": "Q", "cot": "c", "answer": "7"}, {"prompt"}),
        ({"context": {"text": "C."}, "question": "Q", "cot": "c", "answer": "7"}, {"prompt"}),
        ({"history": [["Q", "7"]], "prompt": "Q", "response": THOUGHT}, {"prompt"}),
        ({"question": "Q", "answers": ["a", "b"], "cot": "c", "label": 1}, {"prompt"}),
        ({"passages": ["P.", "R."], "question": "Q", "cot": "c", "answer": "7"}, {"prompt"}),
        ({"system": ["S"], "prompt": "Q", "response": THOUGHT}, {"system_column"}),
        ({"system": ["S"], "prompt": "Q", "answer": "7"}, {"system_column", "thinking"}),
        ({"question": "Q", "reasoning": 37, "answer": "7"}, {"thinking"}),
        ({"problem": "Q", "solution": "x = \\boxed{1} or x = \\boxed{2}."}, {"thinking", "answer"}),
        ({"problem": "Q", "solution": "So \\boxed{1}. It takes one."}, {"thinking", "answer"}),
        ({"prompt": "Q", "response": "#### Plan\nAdd.\n\nIt is 7."}, {"thinking", "answer"}),
        ({"prompt": "Q <think>", "response": "c</think>7"}, {"prompt"}),
        ({"question": "Q", "cot": ["c"], "answer": "7"}, {"thinking"}),
        ({"question": "Q", "options": ["a", "b"], "cot": "c", "answer": 1}, {"answer"}),
        ({"question": "Q", "options": "['a' 'b']", "cot": "c", "answer": "A"}, {"prompt"}),
        ({"question": "Q", "cot": "c", "answer": "7", "label": "8"}, {"thinking", "answer"}),
        ({"question": "Q", "response": "c. The answer is **7** eggs."}, {"thinking", "answer"}),
        ({"question": "Q", "cot": "<think>c d</think>", "answer": "7"}, {"thinking"}),
        ({"question": "Q", "cot": "c d", "answer": "<answer>7</answer>"}, {"thinking"}),
        ({"messages": turns("7", reasoning_content="<think>c</think>")}, {"thinking"}),
        ({"question": "Q", "thinking": "N/A", "answer": "7"}, {"thinking"}),
        ({"Q!": "Q", "cot:": "c", "{answer}": "7"}, {"prompt", "thinking", "answer"}),
        ({"question": "Q", "": "c d", "answer": "7"}, {"thinking"}),
        (
            {"problem": "Q", "qwq": "c d \\boxed{7}", "solution": "e \\boxed{7}"},
            {"thinking", "answer"},
        ),
        (
            {"problem": "Q", "r1_reasoning": "c", "r1_solution": "7", "gold_solution": "7 eggs"},
            {"thinking", "answer"},
        ),
        ({"prompt": "Q", "ground_truth": '["7"]'}, {"thinking", "answer"}),
        ({"prompt": "<image 1> Q", "response": THOUGHT}, {"prompt"}),
        ({"prompt": "Q", "response": "c. The answer is 7. I hope so."}, {"thinking", "answer"}),
        ({"question": "Q", "cot": "c d", "answer": "c d. It is 7. " * 4}, {"thinking", "answer"}),
        ({"question": "Q", "cot": "c d\n</think>", "answer": "7"}, {"thinking"}),
        ({"prompt": "Q", "response": THOUGHT + "<|im_end|>"}, {"thinking", "answer"}),
        ({"messages": turns(THOUGHT + "</s>")}, {"thinking"}),
        ({"prompt": "<s>[INST] Q [/INST]", "response": THOUGHT}, {"prompt"}),
        ({"question": "Q", "answer": "7<\uff5cend\u2581of\u2581sentence\uff5c>"}, {"thinking"}),
    ],
)
def test_columns_that_do_not_are_left_to_the_user(
    tmp_path: Path, row: dict[str, Any], asked: set[str]
) -> None:
    """What no name and no rule tells is marked, all at once, and no rows are counted on."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", [row] * 40), seed=0, plain=False)
    assert set(choice.undecided) == asked
    assert choice.examples == []


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "Q", "answer": "7"}, "Q", "7"),
        ({"question": "Q", "cot": "", "answer": "7", "id": "a-1"}, "Q", "7"),
        ({"prompt": "Q", "thinking": "", "answer": "7"}, "Q", "7"),
        ({"prompt": "Q", "completion": "Paris", "level": "Level 5"}, "Q", "Paris"),
        ({"data": {"question": "Q", "answer": "7"}}, "Q", "7"),
        ({"prompt": "Q", "response": "<think>\n\n</think>\n\n7"}, "Q", "7"),
        ({"messages": turns("<think></think>7")}, "Q", "7"),
        ({"messages": turns("7", reasoning_content=None), "id": 1}, "Q", "7"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "7"}]},
            "Q",
            "7",
        ),
        ({"prompt": turns("7")[:1], "completion": turns("7")[1:]}, "Q", "7"),
        ({"prompt": turns("7")[:1], "reward_model": {"ground_truth": "7"}}, "Q", "7"),
        (
            {"context": "C d.", "question": "Q", "options": ["a b", "c"], "answer": "B"},
            "C d.\n\nQ\nA) a b\nB) c",
            "B",
        ),
    ],
)
def test_answers_alone_are_read_where_nothing_can_be_a_reasoning(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str
) -> None:
    """Empty columns and single words are no reasoning, so there is nothing to ask."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", [row] * 40), seed=0, plain=False)
    assert (choice.own, choice.undecided, "thinking" in choice.fields) == (True, [], False)
    example = choice.examples[0]
    asked = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    assert (asked, example.thinking, example.answer) == (prompt, "", answer)
    used = {"prompt", "question", "messages", "conversations", "context", "answer", "response"}
    said = "".join(note for note in choice.notes if note.startswith("columns that aren't used"))
    assert not used & set(said.replace(",", " ").split())


def test_tools_that_the_prompts_hold_are_used(tmp_path: Path) -> None:
    """A column that is read by its name isn't told as left out; words in it are."""
    for tools, notes in (([{"name": "add"}], []), ("saw", ["columns that aren't used: tools"])):
        rows = [{"question": "Q", "cot": "c d", "answer": "7", "tools": tools}] * 40
        choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
        assert [note for note in choice.notes if "used" in note] == notes


@pytest.mark.parametrize("late", ["", "Three and four make seven."])
def test_a_reasoning_that_only_the_last_row_holds_is_asked_for(tmp_path: Path, late: str) -> None:
    """All rows are looked at, though readings are found on the first thousand."""
    rows = [{"question": f"Q{n}", "cot": "", "answer": "7"} for n in range(1001)]
    rows[-1]["cot"] = late
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert (choice.own, choice.undecided) == (not late, ["thinking"] * bool(late))


@pytest.mark.parametrize(
    ("row", "key", "said"),
    [
        (
            {"question": "Q", "options": ["a", "b", "c"], "cot": "c", "answer": 1},
            "answer",
            "from which number the options are counted: "
            '"{answer:letter}" (from 0) or "{answer:letter_from_1}" (from 1)',
        ),
        (
            {"prompt": "<|im_start|>user\nQ<|im_end|>\n", "response": THOUGHT},
            "prompt",
            "the prompts in prompt hold <|im_start|>, which the chat template writes itself; "
            "remove its marks from the rows",
        ),
        (
            {"messages": turns("7 eggs. " * 6, thought="c d")},
            "thinking",
            "messages: nothing reads thought of a message; a reasoning is reasoning_content; a "
            "template, or `response` and a split_rule for the column of both: think_tags, boxed, "
            "hash_marks, or a regular expression with the groups thinking and answer; the columns "
            f"are messages; {OWN_WAY}",
        ),
        (
            {"question": "Q", "answer": "7</s>"},
            "thinking",
            "answer: holds </s> of a chat template in 40 rows; the reasoning's column: none looks "
            f"so; the columns are question, answer; {OWN_WAY}",
        ),
        (
            {"question": "Q", "cot": "c d", "answer": "c d. It is 7. " * 4},
            "answer",
            "cot: stands in answer, too; a template, or `response` and a split_rule for the column "
            "of both: think_tags, boxed, hash_marks, or a regular expression with the groups "
            f"thinking and answer; the columns are question, cot, answer; {OWN_WAY}",
        ),
        (
            {"question": "<image>\nQ", "cot": "c d", "answer": "7"},
            "prompt",
            "the prompts in question stand beside pictures or sounds, which no text model sees; "
            "take other rows",
        ),
        (
            {"Frage": "Q", "Antwort": "7"},
            "prompt",
            'a template, such as "{Frage}"; the columns are Frage, Antwort',
        ),
        (
            {"messages": turns("7", tool_calls="x")},
            "prompt",
            'a template, such as "{messages}"; the columns are messages; messages: message 1: '
            "`tool_calls` is no list of calls",
        ),
        (
            {"question": "Q", "cot": ["c"], "answer": "7"},
            "thinking",
            "cot: holds a list, not text; the reasoning's column: none looks so; the columns are "
            f"question, cot, answer; {OWN_WAY}",
        ),
        (
            {"question": "Q", "cot": "<think>c d</think>", "answer": "7"},
            "thinking",
            "thinking: {cot}, answer: {answer} leaves tags in 40 of 40 rows; remove them there; "
            f'the reasoning\'s column: "{{cot}}"; the columns are question, cot, answer; {OWN_WAY}',
        ),
        (
            {"question": "Q", "cot": "c", "answer": ["7"]},
            "answer",
            "cot: holds single words; answer: holds a list, not text; a template, or `response` "
            "and a split_rule for the column of both: think_tags, boxed, hash_marks, or a regular "
            "expression with the groups thinking and answer; the columns are question, cot, "
            f"answer; {OWN_WAY}",
        ),
        (
            {"messages": turns("<think></think>" + "7 eggs. " * 6)},
            "thinking",
            "a template, or `response` and a split_rule for the column of both: think_tags, boxed, "
            "hash_marks, or a regular expression with the groups thinking and answer; the columns "
            f"are messages; {OWN_WAY}",
        ),
        (
            {"history": [["Q", "7"]], "prompt": "Q", "thinking": "c", "answer": "7"},
            "prompt",
            "history holds a list, which no template writes; make it one text in the rows (earlier "
            "turns: messages), or write the prompt without it",
        ),
    ],
)
def test_what_is_asked_names_the_ways(
    tmp_path: Path, row: dict[str, Any], key: str, said: str
) -> None:
    """What is to be written, or what is wrong with the rows, stands in the question."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", [row] * 40), seed=0, plain=False)
    assert choice.fields[key] == f"DECIDE: {said}"


HALF_EMPTY = [
    (
        [{"messages": turns(THOUGHT, info="c")}],
        [{"messages": turns(THOUGHT)}],
        "split_rule: think_tags reads 20 of 40 rows, in others: `info` of a trained turn, which ",
    ),
    (
        [{"prompt": "Q", "thinking": "c d", "answer": ""}],
        [{"prompt": "Q", "thinking": "c d", "answer": "7"}],
        "thinking: {thinking}, answer: {answer} reads 20 of 40 rows, in others: the answer is "
        "empty; ",
    ),
    (
        [{"prompt": "Q", "thinking": "", "answer": "7"}],
        [{"prompt": "Q", "thinking": "c d", "answer": "7"}],
        "thinking: empty in 20 of 40 rows; the reasoning's column: ",
    ),
    (
        [{"prompt": "Q", "thinking": "None", "answer": "7"}],
        [{"prompt": "Q", "thinking": "c d", "answer": "7"}],
        "thinking: empty in 20 of 40 rows; the reasoning's column: ",
    ),
    (
        [{"messages": turns("<think></think>7")}],
        [{"messages": turns(THOUGHT)}],
        "split_rule: think_tags reads 20 of 40 rows, in others: the thinking is empty; "
        "`empty_thinking: drop` would leave such rows out; ",
    ),
    (
        [{"messages": turns("7", reasoning_content=None)}],
        [{"messages": turns("7", reasoning_content="c")}],
        "messages: reasoning beside the content in 20 of 40 rows; ",
    ),
]


@pytest.mark.parametrize(("without", "given", "said"), HALF_EMPTY)
def test_rows_of_which_half_hold_a_reasoning_are_asked_for(
    tmp_path: Path, without: list[Any], given: list[Any], said: str
) -> None:
    """They are neither dropped nor taken for answers alone, and the question says how many."""
    source = write_rows(tmp_path / "rows.jsonl", (without + given) * 20)
    choice = choose_data(source, seed=0, plain=False)
    assert choice.fields["thinking"].startswith(f"DECIDE: {said}")


def test_system_messages_of_some_rows_are_read(tmp_path: Path) -> None:
    """Null and empty ones say nothing, and no reason to drop the others."""
    rows = [row | {"system": ("S", None, "")[n % 3]} for n, row in enumerate(sums(40))]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.fields["system_column"] == "system"
    kinds = ["text" if isinstance(each.prompt, str) else "chat" for each in choice.examples[:3]]
    assert kinds == ["chat", "text", "text"]


def test_dates_and_decimals_of_a_table_are_answers(tmp_path: Path) -> None:
    """A template writes them as they stand."""
    import pyarrow
    from pyarrow import parquet

    values = {"days": date(2020, 1, 5), "prices": Decimal("1.50"), "hours": time(3, 45)}
    for name, value in values.items():
        columns = {"question": ["Q"] * 40, "cot": ["c d"] * 40, "answer": [value] * 40}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        choice = choose_data(str(tmp_path / f"{name}.parquet"), seed=0, plain=False)
        assert choice.examples[0].answer == str(value)


def test_rows_that_may_be_called_bad_are_said(tmp_path: Path) -> None:
    """A column of true and false, or of 1 and 0, leaves no row out; nor do other answers."""
    row = {"prompt": "Q", "completion": THOUGHT}
    rows = [row | {"good": each, "reward": float(each)} for each in (True, False) * 20]
    rows = [row | {"answer": "7" if place else "8"} for place, row in enumerate(rows)]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    trained = "they are trained, too: where it calls them bad, remove them"
    assert choice.notes == [
        "columns that aren't used: good, reward, answer",
        f"good is false in 20 of 40 rows; {trained}",
        f"reward is 0 in 20 of 40 rows; {trained}",
        "data.split_rule splits 40 of 40 rows",
        "answer holds another answer than the one read in 1 of 40 rows",
    ]


def test_columns_that_no_template_can_name_are_said(tmp_path: Path) -> None:
    """They would be read as a format, or as nothing."""
    rows = [row | {"is it so?!": "yes", "": n} for n, row in enumerate(sums(40))]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.undecided == []
    listed = "is it so?!, one without a name"
    assert f"columns that no template can name: {listed}; rename them" in choice.notes


def test_conversations_of_some_rows_are_read(tmp_path: Path) -> None:
    """An empty list is a row without an answer, and no reason to take the column for another."""
    rows = [{"messages": turns(THOUGHT) if n else []} for n in range(40)]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert (choice.fields["split_rule"], choice.fields["unsplit_rows"]) == ("think_tags", "drop")
    assert choice.notes[-1] == "  row 0: no assistant turn"


def test_what_follows_the_last_answer_is_said(tmp_path: Path) -> None:
    """A user's last message is in no row."""
    rows = [{"messages": [*turns(THOUGHT), {"role": "user", "content": "Thanks"}]}] * 40
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    said = "40 conversations go on behind their last answer; that isn't read"
    assert (choice.undecided, said in choice.notes) == ([], True)


def test_few_empty_thinkings_are_left_out_and_said(tmp_path: Path) -> None:
    """More than the gate lets through, and fewer than are asked about."""
    rows = sums(40)
    rows[7]["cot"] = rows[9]["cot"] = ""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert (choice.fields["empty_thinking"], len(choice.examples)) == ("drop", 38)
    assert choice.why["empty_thinking"] == "2 of 40 rows; keep trains them, too"
    assert "2 of 40 thinkings are empty" in choice.notes


def test_a_context_that_is_often_null_is_asked_for(tmp_path: Path) -> None:
    """A template takes no null, and such rows would be left out."""
    rows = [row | {"context": "C" if n % 2 else None} for n, row in enumerate(sums(40))]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.undecided == ["prompt"]
    assert choice.fields["prompt"].startswith("DECIDE: context is null in 20 of 40 rows, and ")


def test_a_question_that_is_the_same_in_all_rows_is_asked_for(tmp_path: Path) -> None:
    """It stands for one that is elsewhere; a context beside it may make it one of many."""
    rows = [{"question": "-", "response": f"<think>c</think>{n}"} for n in range(40)]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.fields["prompt"].startswith("DECIDE: the prompts made of question are the same ")
    rows = [row | {"context": f"C {n}"} for n, row in enumerate(rows)]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.fields["prompt"] == "{context}\n\n{question}"


def test_a_column_of_efforts_is_no_reasoning(tmp_path: Path) -> None:
    """A few single words in many rows say how long the thinking is to be."""
    rows = [
        {"question": f"Q{n}", "reasoning": ("low", "high")[n % 2], "answer": "yes"}
        for n in range(40)
    ]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert (choice.own, choice.undecided) == (False, ["thinking"])


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (
            {"question": "Q", "options": ["a", "b"], "rationale": "c", "answer": 0},
            "Q\nA) a\nB) b",
            "A",
        ),
        ({"context": "C", "question": "Q", "cot": "c", "answer": "7"}, "C\n\nQ", "7"),
        ({"instruction": "Q", "input": "", "output": THOUGHT}, "Q", "7"),
        ({"prompt": "Q", "response": "<think>c</think><answer>7</answer>"}, "Q", "7"),
        ({"prompt": "Q", "response": "<Thought>c</Thought><Output>7</Output>"}, "Q", "7"),
        ({"query": "Q", "response": "c\n#### 7\nThe answer is: 7"}, "Q", "7"),
        ({"data": '{"question": "Q", "cot": "c", "answer": "7"}'}, "Q", "7"),
        ({"messages": turns("7", thinking="c")}, "Q", "7"),
        ({"messages": turns("7", reasoning="c")}, "Q", "7"),
        ({"question": "Q", "response": '{"cot": "c", "answer": "7"}'}, "Q", "7"),
        ({"question": "Q", "response": "c\n\n**Answer:** 7"}, "Q", "7"),
        ({"question": "Q", "response": "c. The answer is **7**."}, "Q", "7"),
        ({"question": "Q", "cot": "c", "answer": "[1, 2]"}, "Q", "[1, 2]"),
        ({"prompt": "Q", "completion": turns("7", thinking="c")[1:]}, "Q", "7"),
        ({"messages": turns("7")[:1], "reasoning": "c", "answer": "7"}, "Q", "7"),
        ({"question": "Q", "r1_trace_of": THOUGHT, "answer": "7"}, "Q", "7"),
        (
            {"question": "Q", "options": "['a', 'b']", "cot": "c", "answer": "B"},
            "Q\nA) a\nB) b",
            "B",
        ),
        (
            {"question": "Q", "options": ["a", "b"], "cot": "c", "answer": "2"},
            "Q\nA) a\nB) b",
            "B",
        ),
        (
            {"question": "Q", "opa": "a", "opb": "b", "cot": "c", "answer": 0},
            "Q\nA) a\nB) b",
            "A",
        ),
        (
            {"question": "Q", "Choice1": "a", "Choice2": "b", "cot": "c", "answer": 0},
            "Q\nA) a\nB) b",
            "A",
        ),
        (
            {"row": {"question": "Q", "option_a": "a", "option_b": "b", "cot": "c", "answer": "B"}},
            "Q\nA) a\nB) b",
            "B",
        ),
        (
            {"row": {"question": "Q", "cot": "c", "answer": "7"}, "meta": {"a": "x", "b": "y"}},
            "Q",
            "7",
        ),
        (
            {"question": "Q", "option_0": "a", "option_1": "b", "cot": "c", "answer": "2"},
            "Q\nA) a\nB) b",
            "B",
        ),
        (
            {
                "question": "Q",
                "options": [{"key": "A", "value": "a"}, {"key": "B", "value": "b"}],
                "cot": "c",
                "answer": "b",
                "label": "B",
            },
            "Q\nA) a\nB) b",
            "b",
        ),
    ],
)
def test_layouts_are_read_whole(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str
) -> None:
    """Options, context and input reach the prompt; the answer is the answer alone."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", [row] * 40), seed=0, plain=False)
    asked = choice.examples[0].prompt
    assert (asked if isinstance(asked, str) else asked[-1]["content"]) == prompt
    assert choice.examples[0].answer == answer


def test_rows_that_a_rule_does_not_split_are_dropped_and_counted(tmp_path: Path) -> None:
    """A rule that splits nine in ten is the one, and the recipe says what becomes of the others."""
    rows = [{"question": "Q", "answer": "c\n#### 7"}] * 39 + [{"question": "Q", "answer": "7"}]
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", rows), seed=0, plain=False)
    assert choice.fields["unsplit_rows"] == "drop"
    assert choice.why["unsplit_rows"] == ("1 of 40 rows, at first: no line that begins with `####`")
    assert choice.why["split_rule"] == "splits 39 of 40 rows"


def test_plain_prompts_end_with_their_line(tmp_path: Path) -> None:
    """Without a template the answer begins on a line of its own."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", sums(40)), seed=0, plain=True)
    assert choice.fields["prompt"] == "{question}\n"
    assert choice.examples[0].prompt == "What is 0 + 0?\n"


def test_plain_frames_take_no_conversations(tmp_path: Path) -> None:
    """Without a template nobody knows how to write roles."""
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": turns(THOUGHT)}] * 40)
    choice = choose_data(source, seed=0, plain=True)
    assert choice.fields["prompt"] == "DECIDE: one text; the plain frame takes no messages"


def test_splits_of_a_folder_are_its_own(tmp_path: Path) -> None:
    """Files that are called validation and test are these; what is missing is held out."""
    write_rows(tmp_path / "train.jsonl", sums(40))
    write_rows(tmp_path / "test.jsonl", sums(5))
    choice = choose_data(str(tmp_path), seed=0, plain=False)
    assert (choice.fields["validation"], choice.fields["test"]) == (4, "test")


def test_reading_many_rows_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command can say what it is at, since the rows may be a million."""
    said = []

    def load_rows(*_: Any) -> list[dict[str, Any]]:
        said.append(str(current()))
        return sums(40)

    monkeypatch.setattr("sftkey.adapt.data.load_rows", load_rows)
    choose_data(str(tmp_path), seed=0, plain=False)
    assert said == ["reading the rows"]


def test_few_rows_are_not_held_out(tmp_path: Path) -> None:
    """Of nine rows none is taken away."""
    choice = choose_data(write_rows(tmp_path / "rows.jsonl", sums(9)), seed=0, plain=False)
    assert not choice.fields.keys() & HELD_OUT.keys()


def test_a_built_in_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns are known; the recipe repeats none of them."""

    def rows(data: Any, split: str) -> list[dict[str, Any]]:
        assert (data.source, data.config) == ("openai/gsm8k", "main")
        if split == "validation":
            raise DataError(data.source, "no such split")
        return [{"question": "Q", "answer": f"c\n#### {n}"} for n in range(40)]

    monkeypatch.setattr(sources, "hub_rows", rows)
    choice = choose_data("gsm8k", seed=0, plain=False)
    held_out = {"validation": 4, "test": "test", "overlap": "drop"}
    assert choice.fields == {"source": "gsm8k", **held_out}
    assert choose_data("gsm8k", seed=0, plain=True).fields["prompt"] == "{question}\n"


@pytest.fixture
def renderer() -> Renderer:
    """Return a frame."""
    return Renderer.read(made("look_ahead", CHATML), ResponseSection())


def lengths_of(
    renderer: Renderer, lengths: list[int], most: int | None = None
) -> tuple[int, int, str]:
    """Measure rows whose thinking holds so many digits, each group of three a token."""
    examples = [Example("Q", "123" * length, "7", n) for n, length in enumerate(lengths)]
    found = measure(examples, renderer, most)
    return found.max_length, found.max_new_tokens, found.why


def test_the_length_is_the_longest_rows(renderer: Renderer) -> None:
    """Where one row in a thousand isn't far longer, all fit, to the next 64."""
    length, new, why = lengths_of(renderer, [10] * 999 + [20])
    assert length % 64 == new % 64 == 0
    longest = int(why.split()[-2])
    assert why == f"the longest row has {longest} tokens"
    assert length - 64 < longest <= length


def test_few_long_rows_do_not_set_the_length(renderer: Renderer) -> None:
    """Otherwise 99.5 of 100 rows fit, and the reason names the longest."""
    usual, _, _ = lengths_of(renderer, [10] * 1000)
    length, new, why = lengths_of(renderer, [10] * 999 + [2000])
    assert length == usual
    assert new <= length
    assert why.startswith("holds 99.5% of the rows; the longest has ")


def test_the_models_positions_are_the_limit(renderer: Renderer) -> None:
    """No row may be longer than what the model can read."""
    length, _, why = lengths_of(renderer, [1000] * 10, most=512)
    assert length == 512
    assert why.startswith("the model's positions end there; the longest row has ")


def test_room_is_left_for_the_models_own_thinking(renderer: Renderer) -> None:
    """As much as is asked for, or as the model's positions hold behind the longest prompt."""
    examples = [Example("Q", "", "7", 0)]
    without = measure(examples, renderer, None)
    own = measure(examples, renderer, None, thinking=640)
    assert own.max_length == without.max_length + 640
    assert own.max_new_tokens == without.max_new_tokens + 640
    assert own.why.endswith(", 640 of them left for the model's own thinking")
    small = measure(examples, renderer, 256, thinking=640)
    (row,) = tokenize(examples, renderer)
    assert isinstance(row, Row)
    prompt = row.segment_ids.count(Segment.PROMPT)
    assert (small.max_length, small.max_new_tokens) == (256, 256 - prompt)


def test_rows_of_which_none_is_tokenized_are_refused(renderer: Renderer) -> None:
    """If every row holds the text of a special token, no length is right."""
    with pytest.raises(DataError) as raised:
        measure([Example("Q", "</s>", "7", 0)], renderer, None)
    assert str(raised.value) == "--data: no row can be tokenized in this model's frame"


@pytest.mark.parametrize(
    ("answers", "grader"),
    [
        (["7", "-3.5", "1,000", "$5", "20%"], "number"),
        (["-2e-3", "\u22125", "\\$5", "20\\%", "¥500"], "number"),
        (["A", "(B)", "C."], "choice"),
        (["(a)", "b", "c)"], "choice"),
        (["A", "B, D", "A and C"], "choice"),
        (["A) a cat", "B. a dog", "(C) a cow"], "choice"),
        (["$5 or $10", "$7", "none"], "exact"),
        (["A", "3", "D"], "choice"),
        (["\\frac{1}{2}", "7", "x^2"], "math"),
        (["Paris", "7"], "exact"),
    ],
)
def test_the_grader_fits_the_answers(answers: list[str], grader: str) -> None:
    """Numbers, letters, formulas, texts."""
    examples = [Example("Q", "", answer, n) for n, answer in enumerate(answers)]
    assert choose_grader(examples)[0] == grader
