"""`sftkey evaluate` grades again, writes what is missing, and grades another engine's text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sftkey.training.stage_model
from sftkey.commands.results import evaluate
from sftkey.commands.train import train
from sftkey.errors import DataError, RunError
from sftkey.evaluation.answers import read_answers
from sftkey.evaluation.grading import grade
from sftkey.evaluation.stage import note_thinking
from sftkey.recipe.load import load_recipe
from sftkey.training.run import start
from tests.support.tiny import made_rows, train_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Train one step of the key on the tiny model, evaluated on four questions."""
    folder = tmp_path_factory.mktemp("trained")
    train_tiny(folder, tiny_folder, grader="number")
    return folder / "runs" / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the run, and stand where its folder is `runs/tiny`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "tiny")
    return Path("runs", "tiny")


def refuse(*arguments: Any, **named: Any) -> None:
    """Stand for the loading of weights where none are needed."""
    raise AssertionError("weights were loaded")


def figures(out: str, stage: str) -> list[str]:
    """Return the cells of a stage's row in the table of answers, the first of the two."""
    row, *_ = (line for line in out.splitlines() if line.startswith(f"{stage} "))
    return row.split()


def test_grading_again_needs_no_weights(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is answered already is graded from its files, in the order of the stages."""
    monkeypatch.setattr(sftkey.training.stage_model, "load_model", refuse)
    for file in (run / "evaluation").glob("*.json"):
        file.unlink()
    (run / "evaluation" / "key.graded.jsonl").unlink()
    evaluate(run)
    out = capsys.readouterr().out
    assert out.index("base ") < out.index("key ")
    assert sorted(file.name for file in (run / "evaluation").glob("*.json")) == [
        "base.json",
        "key.json",
    ]
    (answer, *_) = read_answers(run, "key")
    row = json.loads((run / "evaluation" / "key.jsonl").read_text().partition("\n")[0])
    assert set(row) >= {"question", "reference", "text"}
    assert answer.question.startswith("Count on from ")
    assert answer.expected.isdigit()


def test_answers_that_are_missing_are_written(run: Path) -> None:
    """A trained stage answers again, as it did before; the others' answers stay."""
    before = (run / "evaluation" / "key.jsonl").read_text()
    (run / "evaluation" / "key.jsonl").unlink()
    base = (run / "evaluation" / "base.jsonl").stat()
    evaluate(run)
    assert (run / "evaluation" / "key.jsonl").read_text() == before
    assert (run / "evaluation" / "base.jsonl").stat().st_mtime_ns == base.st_mtime_ns


def test_another_engines_answers_are_graded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with the right answers to the run's questions has Acc and Fmt 1."""
    right = [
        {"index": index, "text": f"<Thinking>\n.\n</Thinking>\n<Answer>\n{answer}\n</Answer>"}
        for index, answer in enumerate(row["answer"] for row in made_rows(20))
    ]
    lines = (run / "evaluation" / "key.jsonl").read_text().splitlines()
    asked = [json.loads(line)["index"] for line in lines]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(right[index]) + "\n" for index in asked))
    evaluate(run, generations=file, stage="key", alpha=0.5)
    result = json.loads((run / "evaluation" / "key.json").read_text())
    assert (result["acc"], result["fmt"], result["num_never_stopped"]) == (1.0, 1.0, None)
    assert figures(capsys.readouterr().out, "key")[:2] == ["key", "4"]
    with pytest.raises(DataError, match="absent: can't be read: No such file or directory"):
        evaluate(run, generations=tmp_path / "absent", stage="key")


def test_training_says_what_each_stage_did_to_the_thinking(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log compares with the stage before; a loss that rose comes with the remedy."""
    shutil.copy(trained.parent.parent / "tiny.yaml", "tiny.yaml")
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["stages"][0]["validation"] = {"start": {"thinking": 1.5}, "end": {"thinking": 1.75}}
    del ledger["sha256"], ledger["files"]  # as a ledger of before there were hashes
    (run / "ledger.json").write_text(json.dumps(ledger))
    train(Path("tiny.yaml"))
    captured = capsys.readouterr()
    (told,) = (line for line in captured.err.splitlines() if line.startswith("key: thinking"))
    assert told == (
        "key: thinking against base: 4 of 4 identical, mean length none -> none tokens, "
        "right 0 -> 0 of 4 (0 right ones turned wrong, 0 wrong right), "
        "valid thinkings went from 0 to 0 (0 lost, 0 gained, one-sided p 1.000), "
        "validation loss 1.5000 -> 1.7500"
    )
    warning = (
        "key harmed the thinking: its validation loss rose by 0.2500 nats a token (more than "
        "0.02). In a key stage `loss_on: {thinking: 0.1, key: 1.0}` holds the thinking, and "
        "`context: frozen` can't change it."
    )
    assert warning in captured.err.splitlines()
    assert warning in " ".join(captured.out.split())


def test_without_questions_the_losses_alone_are_told(run: Path) -> None:
    """A run that nobody asked anything still says that the thinking's loss rose."""
    started = start(load_recipe(run / "recipe.yaml"), run, grade=grade)
    started.ledger.stages[0].validation = {"start": {"thinking": 1.5}, "end": {"thinking": 1.501}}
    (run / "evaluation" / "key.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        notes: list[str] = []
        patch.setattr(started.progress, "note", notes.append)
        note_thinking(started, "base")
        note_thinking(started, "key")
    assert notes == ["key: thinking: validation loss 1.5000 -> 1.5010"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """A folder without a resolved recipe is no run."""
    with pytest.raises(RunError) as error:
        evaluate(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: expected a run folder; it holds no recipe.yaml\nhint: runs lie in runs/<name>"
    )


def test_an_unknown_stage_is_refused(run: Path, tmp_path: Path) -> None:
    """The message names the stages that there are."""
    with pytest.raises(RunError) as error:
        evaluate(run, generations=tmp_path / "other.jsonl", stage="kee")
    assert str(error.value) == "runs/tiny: --stage: expected one of base, key; got 'kee'"


@pytest.mark.parametrize("given", [{"stage": "key"}, {"generations": Path("other.jsonl")}])
def test_a_stage_and_its_generations_go_together(run: Path, given: dict[str, Any]) -> None:
    """One without the other doesn't say what is to be graded."""
    with pytest.raises(RunError) as error:
        evaluate(run, **given)
    assert str(error.value) == (
        "runs/tiny: expected --generations and --stage together; got one without the other\n"
        "hint: the stages are base, key"
    )
