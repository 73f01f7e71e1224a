"""`sftkey ls` lists the recipes that ship, and nothing that lies beside them."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from sftkey.commands.recipes import ls, planned_gib, print_table
from sftkey.errors import RecipeError
from sftkey.recipe.load import RECIPES, describe, recipe_files, short_names
from tests.support.model_folders import SMALL

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


def test_planned_memory_is_shown_of_models_that_are_here(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder, the hub's cache, a converted package; one that would be fetched has none."""

    def fetch(*arguments: object, **more: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("sftkey.models.source.hf_hub_download", fetch)
    monkeypatch.setattr("sftkey.models.packaged._make", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path / "own"))
    hub = tmp_path / "hub" / "models--some--model"
    snapshot = hub / "snapshots" / "0123abc"
    packaged = tmp_path / "own" / "models" / f"llm-one-1.0-{'a' * 12}"
    for place in (tmp_path / "local", snapshot, packaged):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(SMALL))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123abc")
    package = f"pypi:llm-one==1.0, file: one.gguf, sha256: {'a' * 64}"
    for name, model in {"local": tmp_path / "local", "package": package, "away": "a/b"}.items():
        text = FULL.replace("other/model", str(model))
        (folder / "b" / f"{name}.yaml").write_text(text)
    ls(as_json=True, plan=True)
    captured = capsys.readouterr()
    planned = {row["recipe"]: row["planned_gib"] for row in json.loads(captured.out)}
    assert {name for name, gib in planned.items() if gib is None} == {"b/away", "b/two"}
    assert planned["b/local"] == planned["b/package"] > 0
    assert 0 < planned["a/one"] < 1
    assert captured.err.splitlines() == [f"{n}: planned" for n in ("a/one", "b/local", "b/package")]
    ls(plan=True)
    head, _, one, away, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["GPU", "memory", "planned"]
    assert one.endswith(f"{planned['a/one']:g} GiB")
    assert away.split()[-1] == "key"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    file = folder / "b" / "two.yaml"
    file.write_text(FULL.replace("other/model", str(tmp_path / "broken")))
    assert planned_gib(file) is None


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
