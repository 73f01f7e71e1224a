"""Conversations whose turns are all asked: each answer is graded with its own reference."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sftkey.checks.gate import unreadable_answers
from sftkey.data.response import QuestionKey
from sftkey.errors import DataError
from sftkey.evaluation.answers import read_generations
from sftkey.evaluation.grading import grade
from sftkey.evaluation.results import read_result
from sftkey.evaluation.stage import grade_stage
from sftkey.generation import generate as writing
from sftkey.generation.generate import Generation
from sftkey.recipe.load import load_recipe
from sftkey.training.run import Run, start
from tests.support.model_folders import write_rows

MakeRecipe = Callable[..., Path]
MODEL: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))


@pytest.fixture
def run(tiny_recipe: MakeRecipe, tmp_path: Path) -> Run:
    """Start a run over conversations of two turns, three of which are test rows."""
    rows = []
    for n in range(12):
        asked = [("What is", n), ("And twice", 100 + n)]
        rows.append([])
        for words, answer in asked:
            said = {"content": str(answer), "reasoning_content": f"so {answer}"}
            rows[-1] += [
                {"role": "user", "content": f"{words} {answer}?"},
                {"role": "assistant", **said},
            ]
    file = tmp_path / "conversations.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows))
    recipe = load_recipe(
        tiny_recipe(
            data={"source": str(file), "validation": 2, "test": 3, "max_length": 512},
            response={"turns": "all"},
            eval={"num_questions": 6, "max_new_tokens": 8},
        )
    )
    return start(recipe, tmp_path / "run", grade=grade)


def answer(run: Run, monkeypatch: pytest.MonkeyPatch, shuffled: bool = False) -> list[list[int]]:
    """Let an oracle answer, or one that has the answers of other questions; gives the prompts."""
    questions, response = run.answers.questions, run.prepared.renderer.response
    replies = [example.answer for example in questions]
    replies = replies[1:] + replies[:1] if shuffled else replies
    known = {
        tuple(run.prepared.renderer.prompt_ids(example.prompt)): reply
        for example, reply in zip(questions, replies, strict=True)
    }
    asked: list[list[int]] = []

    def oracle(model: Any, tokenizer: Any, prompts: Any, *, skip: Any, **_: Any) -> Iterator[Any]:
        for position, prompt in reversed(list(enumerate(prompts))):
            if position not in skip:
                asked.append(prompt)
                yield position, Generation(response.render("so", known[tuple(prompt)]), 9, True)

    monkeypatch.setattr(writing, "generate", oracle)
    run.answers.write("base", MODEL)
    grade_stage(run, "base")
    return asked


def test_an_oracle_has_all_turns_right(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn is asked once, behind the reference's turns; the result counts conversations."""
    asked = answer(run, monkeypatch)
    assert len(asked) == len({tuple(ids) for ids in asked}) == 6
    second = next(each for each in run.answers.questions if each.turn == 1)
    history = run.tokenizer.decode(run.prepared.renderer.prompt_ids(second.prompt))
    assert f"What is {second.index}?" in history
    assert f"And twice {second.answer}?" in history
    result = read_result(run.ledger.folder / "evaluation" / "base.json")
    assert (result.acc, result.num_questions, result.num_conversations) == (1.0, 6, 3)
    keys = [(question.index, question.turn) for question in result.questions]
    assert keys == sorted(each.key for each in run.answers.questions)


def test_one_with_the_answers_of_other_turns_has_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a conversation's second turn is no answer to its first."""
    answer(run, monkeypatch, shuffled=True)
    assert read_result(run.ledger.folder / "evaluation" / "base.json").acc == 0.0


def test_answers_go_on_after_a_kill(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written of a conversation's first turn isn't taken for its second."""
    answer(run, monkeypatch)
    file = run.ledger.generations("base")
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    file.with_name("base.part0of1.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    assert len(answer(run, monkeypatch)) == 3
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


def test_generations_that_name_no_turn_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version wrote one answer a row; nothing tells which turn's it is."""
    answer(run, monkeypatch)
    file = run.ledger.generations("base")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    old = [{**row, "turn": None} for row in rows if row["turn"] == 1]
    write_rows(file, old)
    with pytest.raises(DataError) as error:
        grade_stage(run, "base")
    first, row = error.value.problems[0], old[0]["index"]
    assert first.where == f"index {row}"
    assert first.what == "turn: expected which of the row's 2 questions; got none"
    assert f"index {row}, turn 0: expected a generation; got none" in str(error.value)
    assert "move it aside, and `sftkey evaluate` asks again" in str(error.value)
    single = [QuestionKey(each["index"], 1) for each in old]
    assert set(read_generations(file, single)) == set(single)  # one question a row: no doubt


def test_a_second_turns_answer_that_no_grader_reads_is_found(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate looks at the references of all turns, not at each row's last."""
    first = run.prepared.test[0]
    object.__setattr__(first, "answer", "none")
    recipe = run.recipe.model_copy(
        update={"eval": run.recipe.eval.model_copy(update={"grader": "number"})}
    )
    assert unreadable_answers(recipe, run.prepared) == {"test": [first.index]}
