"""Results of a stage: the figures, their file, and generations of another engine."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sftkey.data.response import Example, QuestionKey, Response
from sftkey.errors import DataError, RunError
from sftkey.evaluation.answers import read_generations
from sftkey.evaluation.results import StageResult, read_result, read_results, write_result
from sftkey.evaluation.statistics import wilson
from sftkey.generation.generate import Generation
from tests.support import scoring

RESPONSE = Response("<Thinking>\n", "\n</Thinking>", "\n<Answer>\n", "\n</Answer>")
EXAMPLES = [Example(f"How much is {n} and {n}?", "", str(2 * n), n) for n in (4, 2, 3, 1)]
GENERATIONS = {
    1: Generation(RESPONSE.render("1 + 1", "2"), 9, True),  # right, strict
    2: Generation("It is <Answer>4", 5, False),  # right, but no more
    3: Generation(RESPONSE.render("3 + 3 = 7", "7"), 9, True),  # wrong, strict
    4: Generation("4 + 4 + 4 + 4", 12, False),  # no answer
}
HINT = 'hint: a row is {"index": 7, "text": "…"}, one for each question; `stopped` is optional'


def keyed(generations: dict[int, Generation]) -> dict[QuestionKey, Generation]:
    """Put generations under the only question of each row."""
    return {QuestionKey(index): generation for index, generation in generations.items()}


def asked(*rows: int) -> list[QuestionKey]:
    """Ask one question of each row."""
    return [QuestionKey(row) for row in rows]


def scored(generations: dict[int, Generation] = GENERATIONS, **changes: Any) -> StageResult:
    """Score the four generations above."""
    return scoring.scored(keyed(generations), EXAMPLES, RESPONSE, **{"position": 2, **changes})


def test_score_counts() -> None:
    """Every figure of four questions, counted by hand; unparsed is wrong."""
    result = scored(settings={"judge": "m"})
    assert result.num_questions == 4
    assert (result.acc, result.fmt) == (0.5, 0.5)
    assert result.acc_interval == result.fmt_interval == wilson(2, 4)
    assert result.score == pytest.approx(0.5)
    assert (result.num_unparsed, result.num_never_stopped) == (1, 2)
    assert (result.mean_thinking_length, result.thinking_unit) == ((5 + 9) / 2, "tokens")
    assert (result.num_thinking_judged, result.num_thinking_right) == (0, 0)  # no references
    flags = [(q.index, q.correct, q.strict, q.parsed, q.stopped) for q in result.questions]
    assert flags == [
        (1, True, True, True, True),
        (2, True, False, True, False),
        (3, False, True, True, True),
        (4, False, False, False, False),
    ]
    response = {
        "thinking_open": "<Thinking>\n",
        "thinking_close": "\n</Thinking>",
        "answer_open": "\n<Answer>\n",
        "answer_close": "\n</Answer>",
    }
    about = {"max_new_tokens": 512, "temperature": 0.0}
    assert result.settings == {"grader": "number", "response": response, **about, "judge": "m"}


def test_score_weighs_acc_by_alpha() -> None:
    """Score is Acc at alpha 1, Fmt at 0, and the paper's at 0.7."""
    strict = {index: Generation(RESPONSE.render("", "2"), 9, True) for index in GENERATIONS}
    result = scored(strict)
    assert (result.acc, result.fmt) == (0.25, 1)
    assert result.score == pytest.approx(0.7 * 0.25 + 0.3)


def test_thinking_is_counted_in_tokens(tiny_tokenizer: Any) -> None:
    """The mean goes over the generations that have thinking."""
    result = scored(changes={"tokenizer": tiny_tokenizer})
    lengths = [len(tiny_tokenizer(text)["input_ids"]) for text in ("1 + 1", "3 + 3 = 7")]
    assert result.mean_thinking_length == sum(lengths) / 2
    assert result.thinking_unit == "tokens"


def test_what_is_not_known_is_none() -> None:
    """Without thinking there is no mean; without `stopped` no count of what never stopped."""
    result = scored({index: Generation("2") for index in GENERATIONS})
    assert result.mean_thinking_length is None
    assert result.num_never_stopped is None
    assert result.num_unparsed == 4


def test_what_the_template_puts_around_a_completion_is_no_fault_of_its_format() -> None:
    """The bridge that the model writes first and the end of turn that an engine leaves are cut."""
    whole = {
        index: Generation(f"<think></think>{RESPONSE.render('', '2')}<|im_end|>")
        for index in GENERATIONS
    }
    assert scored(whole).fmt == 0
    around = {"assistant_prefix": "<think></think>", "end": "<|im_end|>"}
    assert scored(whole, changes=around).fmt == 1


def test_the_same_questions_have_the_same_fingerprint() -> None:
    """It depends on rows, prompts and references, and on nothing that a model did."""
    written = keyed({index: Generation("") for index in GENERATIONS})
    same = scoring.scored(written, EXAMPLES[::-1], RESPONSE, "base", 0, "exact")
    assert same.questions_sha256 == scored().questions_sha256
    changed = [Example("Another prompt", "", EXAMPLES[0].answer, 4), *EXAMPLES[1:]]
    other = scoring.scored(keyed(GENERATIONS), changed, RESPONSE)
    assert other.questions_sha256 != same.questions_sha256


def test_chat_prompts_have_a_fingerprint() -> None:
    """Prompts may be messages."""
    messages = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "2?"})
    written = {QuestionKey(0): Generation("")}
    result = scoring.scored(written, [Example(messages, "", "2", 0)], RESPONSE)
    assert len(result.questions_sha256) == 64


def test_no_question_is_an_error() -> None:
    """A share of nothing is no figure."""
    with pytest.raises(DataError) as caught:
        scoring.scored({}, [], RESPONSE)
    assert str(caught.value) == "test rows: expected at least one question; got none"


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """The file holds everything, and a write that failed leaves the old one whole."""
    result = scored(settings={"max_new_tokens": 12})
    file = write_result(tmp_path, result)
    assert file == tmp_path / "key.json"
    assert read_result(file) == result
    assert json.loads(file.read_text())["acc"] == 0.5
    assert os.listdir(tmp_path) == ["key.json"]


def test_a_result_from_before_thinkings_were_judged_is_read(tmp_path: Path) -> None:
    """What such a file lacks is None, not 0."""
    content = scored().model_dump(mode="json")
    for name in ("num_thinking_judged", "num_thinking_right", "thinking_loss"):
        del content[name]
    for question in content["questions"]:
        del question["thinking_right"], question["thinking_hash"]
    (tmp_path / "key.json").write_text(json.dumps(content))
    result = read_result(tmp_path / "key.json")
    assert (result.num_thinking_judged, result.num_thinking_right) == (None, None)
    assert result.thinking_loss is None
    assert {(q.thinking_right, q.thinking_hash) for q in result.questions} == {(None, None)}


def test_thinkings_are_judged_and_hashed(tmp_path: Path) -> None:
    """Each question says whether its thinking is right; no text of it stands in the file."""
    examples = [Example(f"{n}?", f"{n} + {n} = {2 * n}", str(2 * n), n) for n in (1, 2, 3, 4)]
    result = scoring.scored(keyed(GENERATIONS), examples, RESPONSE)
    assert [q.thinking_right for q in result.questions] == [False, False, False, False]
    right = {**GENERATIONS, 1: Generation(RESPONSE.render("That makes 1 + 1 = 2", "3"))}
    result = scoring.scored(keyed(right), examples, RESPONSE, thinking_loss=(0.5, 0.25))
    assert [q.thinking_right for q in result.questions] == [True, False, False, False]
    assert (result.num_thinking_judged, result.num_thinking_right) == (4, 1)
    assert [q.follows for q in result.questions] == [False, None, True, None]
    assert (result.num_judged_following, result.num_following) == (2, 1)
    assert result.thinking_loss == (0.5, 0.25)
    assert len({q.thinking_hash for q in result.questions}) == 4
    assert "That" not in write_result(tmp_path, result).read_text()


@pytest.mark.fault("a write cut short")
def test_a_write_that_is_cut_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result appears under its name only when it is whole."""
    write_result(tmp_path, scored())

    def fail(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sftkey.files.sync", fail)
    with pytest.raises(OSError, match=r"^no space left$"):
        write_result(tmp_path, scored({index: Generation("") for index in GENERATIONS}))
    assert read_result(tmp_path / "key.json") == scored()


def test_results_of_a_run_come_in_the_order_of_its_stages(tmp_path: Path) -> None:
    """The base model first; what else lies in the folder doesn't disturb."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for position, stage in [(2, "a"), (0, "base"), (1, "z")]:
        write_result(folder, scored(stage=stage, position=position))
    (folder / "a.jsonl").write_text("{}\n")
    (folder / ".a.json.123").write_text("torn")
    assert [result.stage for result in read_results(tmp_path)] == ["base", "z", "a"]


def test_files_of_the_users_own_are_no_results(tmp_path: Path) -> None:
    """Notes stop no table, and a copy of a stage's figures is no stage beside it."""
    (tmp_path / "evaluation").mkdir()
    result = write_result(tmp_path / "evaluation", scored())
    result.with_name("key copy.json").write_bytes(result.read_bytes())
    result.with_name("notes.json").write_text('{"to do": []}')
    (tmp_path / "ledger.json").write_text('{"facts": {}, "stages": [{"name": "key"}]}')
    assert [each.stage for each in read_results(tmp_path)] == ["key"]


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    """The error says what to run."""
    with pytest.raises(RunError) as caught:
        read_results(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected evaluation/<stage>.json; got none\n"
        "hint: `sftkey train` on its recipe evaluates a run; `sftkey evaluate` does so again"
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"acc": None}, "1 problem\n  acc: Input should be a valid number"),
        ({"stage": 3}, "1 problem\n  stage: Input should be a valid string"),
    ],
)
def test_a_file_that_is_no_result_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """The error names the file and each field."""
    file = tmp_path / "key.json"
    file.write_text(json.dumps({**scored().model_dump(mode="json"), **change}))
    with pytest.raises(RunError) as caught:
        read_result(file)
    hint = "hint: move the file aside; `sftkey evaluate` on its run writes it anew"
    assert str(caught.value) == f"{file}: {problem}\n{hint}"


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    """A torn file is named, not taken for a run without results."""
    (tmp_path / "evaluation").mkdir()
    file = tmp_path / "evaluation" / "key.json"
    file.write_text('{"stage": "ke')
    with pytest.raises(RunError) as caught:
        read_results(tmp_path)
    assert str(caught.value) == (
        f"{file}: Invalid JSON: EOF while parsing a string at line 1 column 13\n"
        "hint: move the file aside; `sftkey evaluate` on its run writes it anew"
    )


def test_generations_of_another_engine_are_read_in_any_order(tmp_path: Path) -> None:
    """`index` and `text` are enough; what else stands in a row is taken or left alone."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"index": 3, "text": "drei ü\u2028"},
        {"index": 1, "text": "one", "stopped": True, "num_tokens": 1, "engine": "other"},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_generations(file, asked(1, 3)) == keyed(
        {3: Generation("drei ü\u2028"), 1: Generation("one", 1, True)}
    )


def test_all_faults_of_a_file_of_generations_are_told_at_once(tmp_path: Path) -> None:
    """Each with its line; questions without a generation come last."""
    file = tmp_path / "rows.jsonl"
    lines = [
        '{"index": 1, "text": "a"}',
        '{"index": 1, "text": "b"}',
        '{"index": 9, "text": "c"}',
        "torn {",
        "[1]",
        '{"text": "d"}',
        '{"index": true, "text": "d"}',
        '{"index": 2, "text": null}',
        '{"index": 2, "text": "e", "stopped": "yes"}',
        '{"index": 2, "text": "e", "num_tokens": 1.5}',
        "[" * 99999,
        r'{"index": 2, "text": "\ud800"}',
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_generations(file, asked(1, 2, 3))
    assert str(caught.value) == "\n".join(
        [
            f"{file}: 13 problems",
            "  line 2, index 1: expected once; it stands in line 1 already",
            "  line 3, index 9: expected the index of one of the 3 questions",
            "  line 4: expected a JSON object; got 'torn {'",
            "  line 5: expected a JSON object; got '[1]'",
            "  line 6: index: expected an integer; got None",
            "  line 7: index: expected an integer; got True",
            "  line 8: text: expected a text; got None",
            "  line 9: stopped: expected true or false; got 'yes'",
            "  line 10: num_tokens: expected an integer; got 1.5",
            f"  line 11: expected a JSON object; got '{'[' * 60}'",
            "  line 12: text: half of a surrogate pair, which is no text",
            "  index 2: expected a generation; got none",
            "  index 3: expected a generation; got none",
            HINT,
        ]
    )


def test_many_missing_generations_are_counted(tmp_path: Path) -> None:
    """An empty file doesn't fill the screen."""
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    with pytest.raises(DataError) as caught:
        read_generations(file, asked(*range(200)))
    lines = str(caught.value).splitlines()
    assert lines[1] == "  index 0: expected a generation; got none"
    assert lines[20:] == ["  index 19: expected a generation; got none", "  and 180 more", HINT]


def test_a_missing_file_of_generations_is_an_error(tmp_path: Path) -> None:
    """The error says what a row looks like."""
    file = tmp_path / "none.jsonl"
    with pytest.raises(DataError) as caught:
        read_generations(file, asked(1))
    assert str(caught.value) == f"{file}: can't be read: No such file or directory\n{HINT}"
