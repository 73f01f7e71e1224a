"""README.md and docs/ say what is so: examples run, commands exist, nothing is stale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftkey.data.response import Example
from sftkey.data.sources import with_defaults
from sftkey.data.splits import Splits, load_splits
from sftkey.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Layout:
    """One example of the gallery: files, the recipe's lines, and what is read from them."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    shown: dict[str, str] = field(default_factory=dict)


def layouts() -> Iterator[Layout]:
    """Read the gallery; a section may have several examples one after another."""
    text = (DOCS / "data-formats.md").read_text(encoding="utf-8")
    for section in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
        layout = Layout(section.partition("\n")[0])
        for kind, title, body in FENCE.findall(section):
            if layout.recipe and not (kind == "text" and title in ("read as", "rows")):
                yield layout
                layout = Layout(layout.title)
            if kind == "yaml":
                layout.recipe = body
            elif title in ("read as", "rows"):
                layout.shown[title] = body
            else:
                layout.files[title] = body
        if layout.recipe:
            yield layout


ALL = list(layouts())
HUB = [layout for layout in ALL if layout.title == "A data set of the hub"]
GALLERY = [layout for layout in ALL if layout not in HUB]


def recipe_with(lines: str) -> Recipe:
    """Load a recipe that has these lines of an example."""
    recipe: dict[str, Any] = {
        "name": "gallery",
        "model": {"name_or_path": "model"},
        "lora": {},
        "stages": [{"name": "key", "loss_on": "key"}],
        **yaml.safe_load(lines),
    }
    Path("gallery.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe("gallery.yaml")


def read(layout: Layout) -> Splits:
    """Write an example's files into this folder, and read its rows."""
    for name, body in layout.files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(body, encoding="utf-8")
    recipe = recipe_with(layout.recipe)
    return load_splits(recipe.data, recipe.seed, need_test=False, turns=recipe.response.turns)


def written(example: Example) -> str:
    """Write an example as the gallery does."""
    prompt = example.prompt
    messages = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    lines = [f"{each['role']}: {each['content']}" for each in messages]
    return "\n".join([*lines, f"thinking: {example.thinking}", f"answer: {example.answer}\n"])


@pytest.mark.parametrize("layout", GALLERY, ids=lambda layout: layout.title)
def test_every_layout_of_the_gallery_is_read_as_it_says(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and recipe lines give the very examples, or counts, that stand below them."""
    monkeypatch.chdir(tmp_path)
    if "reasoning_gym" in layout.recipe:
        pytest.importorskip("reasoning_gym")
    splits = read(layout)
    if "rows" in layout.shown:
        counts = ", ".join(f"{name} {count}" for name, count in splits.counts["rows"].items())
        assert counts + "\n" == layout.shown["rows"]
    else:
        assert "\n".join(map(written, splits.train)) == layout.shown["read as"]


def test_the_gallery_is_whole() -> None:
    """Every example is found, and shows what is read from it."""
    assert (len(GALLERY), len(HUB)) == (23, 2)
    assert all(layout.shown for layout in GALLERY)


def test_the_short_name_of_a_hub_data_set_is_the_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source: gsm8k` stands for the lines beside it, the number of rows left out."""
    monkeypatch.chdir(tmp_path)
    long, short = (recipe_with(layout.recipe).data for layout in HUB)
    assert with_defaults(short) == long.model_copy(update={"num_rows": None})
