"""`sftkey ls` lists the recipes that ship, and nothing that lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from sftkey.commands.recipes import ls, print_table
from sftkey.errors import RecipeError
from sftkey.recipe.collection import RECIPES, describe, recipe_files, short_names

QLORA = """# A recipe.
# Fits: H100, 7.4 GiB, 2413 tokens/s, 0123abc
name: one
model: {name_or_path: some/model}
lora: {r: 16}
data: {source: some/data, config: main}
stages: [{name: completion, loss_on: completion}, {name: key, loss_on: key}]
# Fits: 1 GiB, which isn't in the head
"""
FULL = """name: two
model: {name_or_path: other/model, quantization: none}
lora: null
data: {source: reasoning_gym, task: leg_counting, num_rows: 50}
stages: [{name: key, loss_on: key}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of two recipes, with a study and its results beside them."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "b/two.yaml": FULL,
        "a/one.yaml": QLORA,
        "a/study-seeds.yaml": "recipes: []",
        "a/results/one.yaml": "rows: []",
    }.items():
        file = tmp_path / "recipes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr("sftkey.commands.recipes.RECIPES", tmp_path / "recipes")
    return tmp_path / "recipes"


def test_json_says_all_that_the_table_shows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object a recipe in the order of the paths; memory that wasn't measured is null."""
    ls(as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {
            "recipe": "a/one",
            "file": "recipes/a/one.yaml",
            "name": "one",
            "model": "some/model",
            "data": "some/data main",
            "method": "QLoRA",
            "stages": ["completion", "key"],
            "gpu_memory_gib": 7.4,
        },
        {
            "recipe": "b/two",
            "file": "recipes/b/two.yaml",
            "name": "two",
            "model": "other/model",
            "data": "reasoning_gym leg_counting",
            "method": "full",
            "stages": ["key"],
            "gpu_memory_gib": None,
        },
    ]


def test_the_table_is_whole_in_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where stdout is no terminal each recipe stands on one line, however long."""
    ls()
    captured = capsys.readouterr()
    head, _, one, two = (" ".join(line.split()) for line in captured.out.splitlines())
    assert head == "recipe model data method stages GPU memory"
    assert one == "a/one some/model some/data main QLoRA completion, key 7.4 GiB"
    assert two == "b/two other/model reasoning_gym leg_counting full key"
    assert "--plan-only" in captured.err


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_terminal_breaks_the_list(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the recipes that ship, each name and model stands whole on a line that fits."""
    narrow = Console(width=width, markup=False, highlight=False)
    monkeypatch.setattr("sftkey.commands.recipes.stdout_console", lambda: narrow)
    print_table([describe(file) for file in recipe_files(RECIPES)])
    out = capsys.readouterr().out
    assert all(name in out.split() for name in short_names())
    assert "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in out.split()
    assert max(map(len, out.splitlines())) <= width


def test_lora_without_quantization_is_named_so(folder: Path) -> None:
    """An adapter over whole weights isn't QLoRA."""
    file = folder / "b" / "two.yaml"
    file.write_text(FULL.replace("lora: null", "lora: {r: 8}"))
    assert describe(file)["method"] == "LoRA"


def test_a_path_that_leads_upwards_is_written_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a plain install the recipes lie far from where the user stands."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert describe(folder / "b" / "two.yaml")["file"] == str(folder / "b" / "two.yaml")


def test_a_wrong_recipe_is_an_error(folder: Path) -> None:
    """A recipe that can't be read isn't left out in silence."""
    (folder / "b" / "two.yaml").write_text(FULL.replace("lora:", "lorra:"))
    with pytest.raises(RecipeError):
        ls()


def test_every_recipe_that_ships_is_found() -> None:
    """The shipped folder is there, and each recipe in it is listed under its own name."""
    files = list(recipe_files(RECIPES))
    assert RECIPES / "smollm2-135m" / "demo.yaml" in files
    assert len(files) >= 20
    assert len({describe(file)["name"] for file in files}) == len(files)
