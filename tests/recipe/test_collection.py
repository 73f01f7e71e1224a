"""Recipes are found by short names; a path that exists comes first."""

from pathlib import Path

import pytest

from sftkey.errors import RecipeError
from sftkey.recipe.load import RECIPES, find_recipe, recipe_files, short_name, short_names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a collection of one recipe, with a study beside it, far from where the user stands."""
    (tmp_path / "recipes" / "qwen3-0.6b").mkdir(parents=True)
    for name in ("sums.yaml", "study-sums.yaml"):
        (tmp_path / "recipes" / "qwen3-0.6b" / name).write_text("name: sums")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "recipes"


def test_every_recipe_that_ships_is_found_by_its_name() -> None:
    """Each short name is a folder and a name without a suffix, and leads to its file."""
    names = short_names()
    assert len(names) == len(list(recipe_files(RECIPES))) >= 20
    assert "qwen3-8b/gsm8k" in names
    assert all(find_recipe(Path(name)).samefile(file) for name, file in names.items())


def test_a_short_name_leads_to_its_file(folder: Path) -> None:
    """Dots in a model's name are no suffix; a study has no short name."""
    assert find_recipe(Path("qwen3-0.6b/sums"), folder) == folder / "qwen3-0.6b" / "sums.yaml"
    assert short_name(folder / "qwen3-0.6b" / "sums.yaml", folder) == "qwen3-0.6b/sums"
    assert short_name(Path("my.yaml"), folder) == "my.yaml"
    with pytest.raises(RecipeError):
        find_recipe(Path("qwen3-0.6b/study-sums"), folder)


def test_a_path_that_exists_comes_first(folder: Path) -> None:
    """What the user has under that name is what is meant."""
    own = Path("qwen3-0.6b", "sums")
    own.parent.mkdir()
    own.write_text("name: own")
    assert find_recipe(own, folder) == own


@pytest.mark.parametrize(
    "written",
    ["qwen3-0.6b/sum", "qwen3-06b/sums", "recipes/qwen3-0.6b/sums.yaml", "qwen3-0.6b/sums.yaml"],
)
def test_what_is_near_a_name_is_told(written: str, folder: Path) -> None:
    """A slip, or the path that the name has in another folder, is answered with the name."""
    with pytest.raises(RecipeError) as raised:
        find_recipe(Path(written), folder)
    assert str(raised.value) == (
        f"{written}: expected a recipe's file, or a name of `sftkey ls`; there is none; "
        "did you mean `qwen3-0.6b/sums`?\nhint: `sftkey ls` shows the recipes that there are"
    )


def test_a_missing_file_of_ones_own_stays_a_file(folder: Path) -> None:
    """A YAML file that resembles no name is left to its reader; any other word is refused."""
    assert find_recipe(Path("my.yaml"), folder) == Path("my.yaml")
    with pytest.raises(RecipeError, match=r"^mine: expected a recipe's file, .*; there is none\n"):
        find_recipe(Path("mine"), folder)
