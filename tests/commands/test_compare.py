"""`sftkey compare` lays graded runs side by side."""

import json
from pathlib import Path

import pytest

from sftkey.commands.results import compare
from sftkey.errors import RunError
from sftkey.evaluation.results import StageResult, write_result
from sftkey.study.report import report
from sftkey.study.results import read_cells, read_results_file, write_results
from sftkey.study.summary import summarize
from tests.evaluation.test_comparison import BASE, COMPLETION, KEY
from tests.support.cells import made_cells, write_cells


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make two graded runs: one with both stages, one that stopped after the first."""
    monkeypatch.chdir(tmp_path)
    graded: dict[str, list[StageResult]] = {
        "both": [BASE, COMPLETION, KEY],
        "one": [BASE, COMPLETION],
    }
    for name, results in graded.items():
        (tmp_path / name / "evaluation").mkdir(parents=True)
        for result in results:
            write_result(tmp_path / name / "evaluation", result)
    return [Path("both"), Path("one")]


def test_the_table_has_every_stage_of_every_run(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each stage, two for its thinking, then a sentence for each difference."""
    compare(runs)
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith(("both ", "one "))]
    expected = [
        ["both", "base"],
        ["both", "completion"],
        ["both", "key"],
        ["one", "base"],
        ["one", "completion"],
    ]
    assert rows == expected * 3
    assert "The difference between both key and one completion is -2.0 points" in out


def test_json_is_one_object(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are those of the files, with the alpha that was asked for."""
    compare(runs[:1], as_json=True, alpha=0.5)
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["stage"], stage["acc"], stage["score"]) for stage in stages] == [
        ("base", 0.05, 0.525),
        ("completion", 0.6, 0.8),
        ("key", 0.62, 0.81),
    ]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Make a study's results from cells that nobody ran."""
    folder = tmp_path / "study"
    write_cells(folder, made_cells())
    cells = read_cells(folder)
    write_results(folder, summarize(cells, "sft_twice", ["sft_tag", "sftkey", "sft_twice"]))
    return folder


def test_a_study_is_read_as_its_report_has_it(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder or its file; Score, if it is asked for, is a column more."""
    results = read_results_file(study / "results.json")
    for path in (study, study / "results.json"):
        compare([path])
        assert capsys.readouterr().out == report(results, pictures=None, title=str(path))
    compare([study], alpha=0.5)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| sftkey |"))
    arm = next(arm for arm in results.arms if arm.name == "sftkey")
    assert row.endswith(f"| {(arm.acc + arm.fmt) / 2:.3f} |")


def test_runs_and_studies_stand_in_one_object(
    runs: list[Path], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs come first, with their table; a study adds its results as they are."""
    compare([study, *runs], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [stage["run"] for stage in found["stages"]] == ["both"] * 3 + ["one"] * 2
    (added,) = found["studies"]
    assert added.pop("study") == str(study)
    assert added == json.loads((study / "results.json").read_text())
    compare([study], as_json=True, alpha=0.5)
    arm = json.loads(capsys.readouterr().out)["studies"][0]["arms"][0]
    assert arm["score"] == pytest.approx((arm["acc"] + arm["fmt"]) / 2)
    compare([study, *runs])
    out = capsys.readouterr().out
    assert out.index("both") < out.index(f"# {study}")


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    """Whoever compares what was never evaluated is told how to evaluate it."""
    with pytest.raises(RunError) as error:
        compare([tmp_path])
    assert str(error.value) == (
        f"{tmp_path}: expected evaluation/<stage>.json; got none\n"
        "hint: `sftkey train` on its recipe evaluates a run; `sftkey evaluate` does so again"
    )
