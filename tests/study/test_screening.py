"""A study in two phases: a screening on validation rows, then the test questions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftkey.commands.study import phases, study
from sftkey.errors import RecipeError, RunError
from sftkey.study.schema import load_study
from tests.study.test_run import write_study

PHASES: dict[str, Any] = {
    "arms": ["sft_tag", "sft_long", "weighted"],
    "control": "sft_tag",
    "seeds": [1, 2],
    "screen": 7,
}


def asked(cell: Path) -> list[int]:
    """Return the rows that a cell answered."""
    return [each["index"] for each in json.loads(cell.read_text())["questions"]]


def test_a_screening_reads_no_test_question(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All arms answer validation rows once; then the named ones answer the test's, with seeds."""
    monkeypatch.chdir(tmp_path)
    one = {**PHASES, "seeds": [1]}
    file = write_study(tmp_path, tiny_folder, **one)
    study(file)
    out, err = capsys.readouterr()
    assert "name the arms that go on under `confirm`" in err
    (proposed,) = re.findall(r"confirm: \[(.*)\]", err)
    assert set(proposed.split(", ")) == {"sft_long", "weighted"}
    assert "Of one seed, so of these two runs" in out
    root = tmp_path / "runs" / "small"
    assert not (root / "cells").exists()
    cells = sorted((root / "screen" / "cells" / "task").glob("*/*.json"))
    assert [cell.parent.name for cell in cells] == ["sft_long", "sft_tag", "weighted"]
    (run,) = phases(load_study(file), file)
    prepared = run.read(next(iter(run.cells())).recipe)
    validation = {each.index for each in prepared.validation_examples}
    for cell in cells:
        assert asked(cell)
        assert set(asked(cell)) <= validation
    file = write_study(tmp_path, tiny_folder, **one, confirm=["sft_long"])
    study(file)
    confirmed = sorted((root / "cells" / "task").glob("*/*.json"))
    assert [(each.parent.name, each.stem) for each in confirmed] == [
        (arm, "seed-1") for arm in ("sft_long", "sft_tag")
    ]
    for each in confirmed:  # row 8 is a validation row of seed 7, and a test row of seed 1
        assert not set(asked(each)) & set(asked(cells[0]))
    file = write_study(tmp_path, tiny_folder, **one, confirm=["weighted"])
    with pytest.raises(RunError, match="expected the arms that were confirmed before any answer"):
        study(file)


def test_the_plan_shows_both_phases(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The screening promises nothing; what is confirmed says which difference it would show."""
    monkeypatch.chdir(tmp_path)
    file = write_study(tmp_path, tiny_folder, **PHASES, confirm=["weighted"])
    study(file, plan_only=True)
    out = capsys.readouterr().out
    first, _, second = out.partition("a screening: each arm once, on validation rows")
    assert "3 cells, 0 of them finished" in first
    assert "points would be shown" not in first
    assert "4 cells, 0 of them finished" in second
    assert "task: 3 questions, seeds: 2, comparisons: 1; a difference of " in second


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"screen": 2}, "screen: expected a seed that isn't among `seeds`; got 2"),
        ({"confirm": ["zzz"]}, "confirm[0]: expected one of the arms beside the control; got "
         "'zzz'"),
        ({"confirm": ["sft_tag"]}, "confirm[0]: expected one of the arms beside the control; got "
         "'sft_tag'"),
        ({"confirm": ["weighted"], "screen": None}, "confirm: only after a screening: write "
         "`screen`, a seed"),
        ({"confirm": ["weighted"], "primary": "sft_long"}, "primary: expected one of the arms in "
         "`confirm`"),
        ({"primary": "sft_tag"}, "primary: expected one of the arms beside the control; got "
         "'sft_tag'"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_are_refused(
    sections: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """Each with its place in the file."""
    file = tmp_path / "study.yaml"
    whole = {"name": "small", "recipes": ["task.yaml"], **PHASES, **sections}
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_study(file)
    assert [f"{each.where}: {each.what}" for each in caught.value.problems] == [problem]
