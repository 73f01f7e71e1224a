"""What README and docs show is what comes: the tokens of the demo, the script of a trainer."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sftkey.commands.recipes import show
from sftkey.errors import ModelError
from sftkey.study.report import table
from sftkey.study.results import read_cells, read_results_file
from sftkey.study.schema import load_study
from sftkey.study.seeds import estimate
from sftkey.study.summary import summarize

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
HELP = (ROOT / "docs" / "does-it-help.md").read_text(encoding="utf-8")
ANSWERS = (ROOT / "docs" / "answers-only.md").read_text(encoding="utf-8")
PAGES = {"answers-only": ANSWERS, "wrong-thinkings": ANSWERS}  # the others' is does-it-help.md
FOLDER = '"out"'
RESULTS = sorted(file.parent for file in ROOT.glob("recipes/*/results/*/results.json"))


def test_the_docs_script_runs(tiny_folder: Path, tmp_path: Path) -> None:
    """Run as it stands (but on the CPU, and once), it trains on the key of its row and no more."""
    section = LIBRARY.partition("## In a trainer of your own\n")[2]
    script = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert script.count(FOLDER) == 1
    here = f"{str(tmp_path)!r}, use_cpu=True, bf16=False, max_steps=1, report_to='none'"
    names: dict[str, Any] = {"model": str(tiny_folder)}
    exec(script.replace(FOLDER, here), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1
    (batch,) = trainer.get_train_dataloader()
    labels = batch["labels"][0]
    assert trainer.processing_class.decode(labels[labels != -100]) == (
        "\n<Answer>\n4\n</Answer><|im_end|>"
    )


@pytest.mark.network
def test_the_readmes_row_is_the_demos(capsys: pytest.CaptureFixture[str]) -> None:
    """`sftkey show` prints the README's example, character by character."""
    (example,) = re.findall(r"```\n(stage completion:\n.*?)```", README, re.DOTALL)
    try:
        show(ROOT / "recipes" / "smollm2-135m" / "demo.yaml", num_rows=1)
    except ModelError as error:
        pytest.skip(f"the demo's model can't be fetched: {error}")
    assert example in capsys.readouterr().out


def test_the_demos_figures_are_the_same_on_both_pages() -> None:
    """The README's table has the figures of docs/does-it-help.md, row by row."""
    rows = re.findall(r"^\| (?:base model|stage \d|instead).*$", README, re.MULTILINE)
    assert len(rows) == 4
    assert all(f"\n{row}\n" in HELP for row in rows)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_docs_results_are_those_of_the_files(folder: Path) -> None:
    """Its tables are what `sftkey study STUDY.yaml --report FOLDER` makes of the cells."""
    results = read_results_file(folder / "results.json")
    study = load_study(folder.parent.parent / f"study-{folder.name}.yaml")
    again = summarize(read_cells(folder), study.control, study.arms)
    assert list(_leaves(again.model_dump())) == list(map(_about, _leaves(results.model_dump())))
    (task,) = {arm.task for arm in results.arms}
    assert table(results, task) in PAGES.get(folder.name, HELP)


@pytest.mark.parametrize(
    ("folder", "arm", "other"),
    [
        ("answers-only", "masked", "base"),
        ("answers-only", "own_exact", "base"),
        ("answers-only", "own_frozen", "base"),
        ("answers-only", "own_exact", "masked"),
        ("answers-only", "own_frozen", "masked"),
        ("answers-only", "own_exact", "own_frozen"),
        ("answers-only", "own_exact", "reference"),
        ("answers-only", "own_frozen", "reference"),
        ("answers-only", "own_right", "base"),
        ("answers-only", "own_right", "own_exact"),
        ("answers-only", "own_anchored", "own_right"),
        ("answers-only", "own_hint", "own_right"),
        ("answers-only", "own_hint", "own_exact"),
        ("answers-only", "own_hint", "reference"),
        ("long", "weighted_long", "sft_long"),
    ],
)
def test_differences_beside_a_studys_table(folder: str, arm: str, other: str) -> None:
    """They are the paired ones of the committed cells, with their intervals."""
    cells = read_cells(ROOT / "recipes" / "smollm2-135m" / "results" / folder)

    def right(name: str) -> list[list[bool]]:
        asked = [
            each.base.questions if name == "base" and each.base else each.questions
            for each in sorted(cells, key=lambda each: each.seed)
            if each.arm == ("empty" if name == "base" else name)
        ]
        return [[question.correct for question in questions] for questions in asked]

    found = estimate(right(arm), right(other), same_questions=False)
    low, high = (f"{100 * end:+.1f}" for end in found.interval)
    said = f"{abs(100 * found.value):.1f} [{low}, {high}]"
    assert said in PAGES.get(folder, HELP).replace(" points [", " [")


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Return every figure and word of nested mappings and lists, with its place."""
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(child, f"{place}.{key}")
    else:
        yield place, node


def _about(leaf: tuple[str, Any]) -> tuple[str, Any]:
    """Let another version of numpy or scipy round differently."""
    place, value = leaf
    return place, pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
