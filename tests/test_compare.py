"""`sftkey compare` lays graded runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_comparison import BASE, COMPLETION, KEY

from sftkey.compare import compare
from sftkey.errors import RunError
from sftkey.evaluation.results import StageResult, write_result


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
    """A row for each stage, one for its thinking, then a sentence for each difference."""
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
    assert rows == expected * 2
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


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    """Whoever compares what was never evaluated is told how to evaluate it."""
    with pytest.raises(RunError) as error:
        compare([tmp_path])
    assert str(error.value) == (
        f"{tmp_path}: expected evaluation/<stage>.json; got none\n"
        "hint: `sftkey train` on its recipe evaluates a run; `sftkey evaluate` does so again"
    )
