"""`sftkey errors` prints a stage's wrong answers from the run's files."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftkey.commands.results import errors
from sftkey.errors import RunError
from sftkey.evaluation.answers import GradedAnswer, write_answers
from tests.support.tiny import write_recipe


def answer(index: int, got: str | None, **more: Any) -> GradedAnswer:
    """Make an answer to which 7 is the reference."""
    about: dict[str, Any] = {
        "turn": 0,
        "question": f"Question [{index}]?",
        "expected": "7",
        "read": got,
        "thinking": "it\nis",
        "text": None,
        "right": got == "7",
        "kinds": () if got == "7" else ("wrong",) if got else ("unparsed",),
    }
    return GradedAnswer(index=index, got=got, **{**about, **more})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run of which two stages and the base are graded."""
    write_recipe(tmp_path, tmp_path).rename(tmp_path / "recipe.yaml")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    stages = {
        "base": [answer(1, None)],
        "completion": [answer(1, "7"), answer(2, "8")],
    }
    for name, answers in stages.items():
        write_answers(folder, name, answers)
        (folder / f"{name}.json").write_text("{}")
    return tmp_path


def test_the_last_graded_stages_wrong_answers_are_printed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Question, reference, answer and thinking on stdout, the counts on stderr."""
    errors(run)
    printed = capsys.readouterr()
    assert printed.out == (
        "row 2: wrong\n  question:\n    Question [2]?\n  expected:\n    7\n  got:\n    8\n"
        "  thinking:\n    it\n    is\n\n"
    )
    assert printed.err == "completion: 1 of 2 answers aren't right (wrong 1)\n"
    errors(run, stage="base")
    assert "  got:\n    nothing\n" in capsys.readouterr().out


def test_ten_are_shown_and_json_has_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left out is said; `--json` prints an object a line, as many as are asked for."""
    write_answers(run / "evaluation", "completion", [answer(n, str(8 + n)) for n in range(12)])
    errors(run)
    printed = capsys.readouterr()
    assert printed.out.count("row ") == 10
    assert printed.err.endswith("10 of 12 are shown; --rows 12 shows all\n")
    errors(run, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["got"], row["expected"]) for row in rows[:2]] == [("8", "7"), ("9", "7")]
    assert len(rows) == 12
    errors(run, as_json=True, num_rows=3, pattern=r"\[1")
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()] == [
        1,
        10,
        11,
    ]


def test_a_stage_that_is_not_there_is_refused(run: Path) -> None:
    """A name that the recipe doesn't have, and a stage whose answers aren't graded."""
    with pytest.raises(RunError, match="--stage: expected one of base, completion, key; got 'x'"):
        errors(run, stage="x")
    with pytest.raises(RunError, match="expected graded answers of key; got none"):
        errors(run, stage="key")
