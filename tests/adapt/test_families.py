"""The nearest recipe is of the same family, and the differences are those of model and response."""

from pathlib import Path

import pytest

from sftkey.adapt.adapt import Nearest, find_nearest
from sftkey.recipe.load import RECIPES, load_recipe, recipe_files
from sftkey.recipe.schema import Recipe


def recipe(tmp_path: Path, model: str, response: str = "{}") -> Recipe:
    """Load a recipe for a model."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: x\nmodel: {{name_or_path: {model}}}\nlora: {{r: 8, target_modules: all-linear}}\n"
        f"data: {{source: gsm8k}}\nresponse: {response}\n"
        "stages: [{name: key, loss_on: key}]\n"
    )
    return load_recipe(file)


def nearest(new: Recipe, model_type: str) -> Nearest:
    """Find the nearest of the recipes that ship."""
    found = find_nearest(new, model_type, recipe_files(RECIPES))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "model_type", "response", "file"),
    [
        ("Qwen/Qwen3-14B", "qwen3", "{}", "qwen3-8b/gsm8k.yaml"),
        (
            "Qwen/Qwen3-14B",
            "qwen3",
            '{thinking: ["<think>\\n", "\\n</think>"], answer: ["\\n\\n", ""]}',
            "qwen3-4b/gsm8k.yaml",
        ),
        ("my/finetune", "gemma3", "{}", "gemma-3-1b-it/gsm8k.yaml"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama", "{}", "llama-3.2-1b-instruct/gsm8k.yaml"),
    ],
)
def test_the_nearest_is_of_the_family(
    tmp_path: Path, model: str, model_type: str, response: str, file: str
) -> None:
    """The family by its name or its architecture's, then frame and tags, then the rest."""
    found = nearest(recipe(tmp_path, model, response), model_type)
    assert (found.file, found.same_family) == (RECIPES / file, True)


def test_without_its_family_the_frame_decides(tmp_path: Path) -> None:
    """For a model that nobody knows, the nearest recipe frames its answers alike."""
    found = nearest(recipe(tmp_path, "some/mamba", "{frame: plain}"), "mamba2")
    assert not found.same_family
    assert load_recipe(found.file).response.frame == "plain"


def test_differences_are_of_model_lora_and_response(tmp_path: Path) -> None:
    """Names and data differ anyway; what is listed is what matters to a mask or an adapter."""
    found = nearest(recipe(tmp_path, "mine/Qwen3-8B", '{answer: ["\\n", ""]}'), "qwen3")
    assert found.file == RECIPES / "qwen3-8b" / "gsm8k.yaml"
    assert found.differences == [
        ("model.chat_template_kwargs.enable_thinking", "false", "null"),
        ("lora.r", "16", "8"),
        ("lora.lora_alpha", "32", "null"),
        ("lora.lora_dropout", "0.05", "null"),
        ("response.answer", '["\\n<Answer>\\n", "\\n</Answer>"]', '["\\n", ""]'),
    ]


def test_without_recipes_there_is_none(tmp_path: Path) -> None:
    """An installation may come without the collection."""
    assert find_nearest(recipe(tmp_path, "some/model"), "llama", []) is None
