"""`sftkey evaluate RUN --model FOLDER` grades a folder beside the stage that it was made from."""

import json
from pathlib import Path

import pytest

import sftkey.sharing.folder
from sftkey.cli import main
from sftkey.commands.results import evaluate
from sftkey.commands.sharing import merge
from sftkey.errors import RunError
from tests.support.runs import asking_run, made_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Return a run with an adapter that matters, its answers to six questions graded."""
    folder = tmp_path_factory.mktemp("graded")
    run = asking_run(folder, tiny_folder, num_questions=6, batch_size=4)
    evaluate(run)
    return run


def test_a_merged_folder_answers_as_its_stage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six texts of six are equal, the difference is said, and nothing is asked twice."""
    merge(run, tmp_path / "merged")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run), "--model", str(tmp_path / "merged")])
    assert not end.value.code
    captured = capsys.readouterr()
    assert captured.out.endswith("Both wrote the same text to 6 of 6.\n")
    assert f"The difference between {run} completion and {tmp_path}/merged completion is +0.0" in (
        captured.out
    )
    assert captured.err.endswith("merged: 6 of 6 questions answered\n")
    (written,) = (run / "evaluation" / "models").glob("*.json")
    assert json.loads(written.read_text())["num_questions"] == 6
    monkeypatch.delattr(sftkey.sharing.folder, "load_model")  # the answers lie there
    evaluate(run, model=tmp_path / "merged")
    evaluate(run)  # the run's own table doesn't take the folder for a stage
    assert "merged" not in capsys.readouterr().out.rpartition("stage")[2]


def test_the_folders_own_template_is_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose template was changed answers otherwise: it isn't taken for the run's."""
    merge(run, tmp_path / "merged")
    template = tmp_path / "merged" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>model"))
    capsys.readouterr()
    evaluate(run, model=tmp_path / "merged", stage="completion")
    assert not capsys.readouterr().out.endswith("to 6 of 6.\n")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """A stage without graded answers, and two kinds of answers at once."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1)
    with pytest.raises(RunError) as raised:
        evaluate(folder, model=tiny_folder)
    assert str(raised.value) == (
        f"{folder}: completion has no graded answers, which the folder's are compared with\n"
        f"hint: sftkey evaluate {folder}"
    )
    with pytest.raises(RunError, match="expected --model or --generations; got both"):
        evaluate(folder, generations=tmp_path / "x.jsonl", model=tiny_folder)
