"""Graded answers are kept with question, reference and verdict, and found by kind and text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sftkey.activity import current
from sftkey.data.response import Example, Response
from sftkey.errors import RunError
from sftkey.evaluation.answers import (
    GradedAnswer,
    chosen,
    grade_texts,
    graded_answers,
    read_answers,
    write_answers,
)
from sftkey.evaluation.results import score
from sftkey.generation.generate import Generation
from sftkey.training.answers import with_questions
from tests.support.scoring import graded as graded_texts
from tests.support.scoring import run_of

RESPONSE = Response("<think>", "</think>", "<answer>", "</answer>")
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"})
EXAMPLES = [
    Example("What is 3 + 4?", "so", "7", index=5),
    Example(CHAT, "so", "2", index=2),
    Example("And 2 + 2?", "so", "4", index=2, turn=1),
    Example("5 + 5?", "so", "10", index=9),
]
TEXTS = {
    (2, 0): "<think>one and one</think><answer>2</answer>",
    (2, 1): "<think>two</think><answer>It is 5.</answer>",
    (5, 0): "<think>I don't know",
    (9, 0): "Well: <think>five</think><answer>10</answer><|end|>",
}
STOPPED = {(5, 0): False}


def graded() -> list[GradedAnswer]:
    """Grade one answer of each sort."""
    generations: Any = {
        each.key: Generation(TEXTS[each.key], 9, STOPPED.get(each.key, True)) for each in EXAMPLES
    }
    return graded_answers(graded_texts(generations, EXAMPLES, RESPONSE, end="<|end|>"))


def test_an_answer_stands_beside_what_was_expected(tmp_path: Path) -> None:
    """In the order of the rows, with its verdict and kinds, and read again as it was written."""
    answers = graded()
    assert [(each.index, each.turn, each.right, each.kinds) for each in answers] == [
        (2, 0, True, ()),
        (2, 1, False, ("wrong",)),
        (5, 0, False, ("unparsed", "truncated", "invalid")),
        (9, 0, True, ("invalid",)),
    ]
    right, wrong, cut, loose = answers
    assert (right.question, right.expected, right.text) == ("1 + 1?", "2", None)
    assert (wrong.got, wrong.read, wrong.thinking) == ("It is 5.", "5", "two")
    assert (cut.got, cut.read, cut.thinking, cut.text) == (None, None, None, TEXTS[5, 0])
    assert (loose.got, loose.text) == ("10", TEXTS[9, 0])
    (tmp_path / "evaluation").mkdir()
    write_answers(tmp_path / "evaluation", "key", answers)
    assert read_answers(tmp_path, "key") == answers


def test_an_answer_is_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and graded answers stand on one verdict: a formula may take seconds."""
    answers, said = [], []

    def counted(answer: str, reference: str) -> tuple[bool, str]:
        answers.append(answer)
        said.append(str(current()))
        return answer == reference, answer

    monkeypatch.setattr("sftkey.evaluation.grading._same_number", counted)
    recipe, renderer = run_of(RESPONSE, "number", end="<|end|>", stages=["key"])
    generations: Any = {each.key: Generation(TEXTS[each.key]) for each in EXAMPLES}
    texts = grade_texts(recipe, renderer, generations, EXAMPLES)
    result = score(recipe, renderer, "key", texts)
    graded = graded_answers(texts)
    assert answers == ["2", "It is 5.", "10"]
    assert said == [f"grading the answers, {number} of 4" for number in (0, 1, 3)]
    assert [each.right for each in graded] == [each.correct for each in result.questions]


@pytest.mark.parametrize(
    ("kind", "pattern", "rows"),
    [
        (None, None, [(2, 1), (5, 0)]),
        ("wrong", None, [(2, 1)]),
        ("unparsed", None, [(5, 0)]),
        ("truncated", None, [(5, 0)]),
        ("invalid", None, [(5, 0), (9, 0)]),
        (None, "DON'T", [(5, 0)]),
        (None, r"3 \+ 4", [(5, 0)]),
        ("invalid", "^10$", [(9, 0)]),
        ("wrong", "know", []),
    ],
)
def test_answers_are_found_by_kind_and_text(
    kind: str | None, pattern: str | None, rows: list[tuple[int, int]]
) -> None:
    """Those that aren't right; of a kind also those that are; a pattern in any of the texts."""
    assert [(each.index, each.turn) for each in chosen(graded(), kind, pattern)] == rows


def test_what_cannot_be_asked_or_read_is_refused(tmp_path: Path) -> None:
    """A kind, a pattern, a run of an older version, and a file that holds something else."""
    with pytest.raises(RunError, match="--kind: expected one of wrong, unparsed, truncat"):
        chosen([], "bad")
    with pytest.raises(RunError, match="--grep: expected a regular expression; missing"):
        chosen([], None, "(")
    with pytest.raises(RunError, match=r"expected graded answers of key; got none\nhint: .*eval"):
        read_answers(tmp_path, "key")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "key.graded.jsonl").write_text('{"index": 1}\n')
    with pytest.raises(RunError, match="turn: Field required"):
        read_answers(tmp_path, "key")


def test_generations_keep_question_and_reference() -> None:
    """Each line says what was asked and what the data set answers, line separators and all.

    An answer to a question that isn't asked, as of a longer evaluation, is left out.
    """
    examples = [dataclasses.replace(EXAMPLES[1], answer="2\u2028"), EXAMPLES[2]]
    lines = [json.dumps({"index": 2, "turn": turn, "text": "x"}) for turn in (1, 0, 7)]
    rows = [json.loads(line) for line in with_questions(lines, examples).split("\n")[:-1]]
    first = {"index": 2, "turn": 1, "question": "And 2 + 2?", "reference": "4", "text": "x"}
    assert rows[0] == first
    assert len(rows) == 2
    assert (rows[1]["question"], rows[1]["reference"]) == ("1 + 1?", "2\u2028")
