"""A recipe is written so that YAML reads the very values back, each beside its reason."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sftkey.errors import RecipeError
from sftkey.recipe.yaml_io import Line, inline, read, write_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(
    SCALAR.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(VALUE)
def test_what_is_written_is_read_back(value: object) -> None:
    """Whatever a value holds, one line of YAML holds it, too."""
    text = f"key: {inline(value)}"
    assert len(text.splitlines()) == 1
    assert yaml.safe_load(text) == {"key": value}


def test_values_are_written_as_people_write_them() -> None:
    """Names stand bare, rates as recipes have them, tags in quotes."""
    assert inline("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert [inline(rate) for rate in (1e-4, 2e-5, 0.05, 5.0)] == ["1.0e-4", "2.0e-5", "0.05", "5.0"]
    assert inline(["<think>\n", ""]) == '["<think>\\n", ""]'
    assert inline({"enable_thinking": False}) == "{enable_thinking: false}"
    assert inline("no") == '"no"'


def test_reasons_stand_beside_or_above() -> None:
    """A reason stands at its value's line, or in lines above where that would be too long."""
    long = "because " * 16 + "so"
    text = write_recipe(
        ["What it is."],
        [
            ("", [Line("name", "x")]),
            ("model", [Line("a", 1, "why"), Line("b", "B" * 40, "why"), Line("c", 2, long)]),
            ("eval", []),
            ("stages", [Line("", {"name": "key"}, "short")]),
        ],
    )
    assert text == (
        "# What it is.\n"
        "name: x\n"
        "model:\n"
        "  a: 1                            # why\n"
        f"  b: {'B' * 40}  # why\n"
        f"  # {('because ' * 14).strip()}\n"
        "  # because because so\n"
        "  c: 2\n"
        "stages:\n"
        "  - {name: key}                   # short\n"
    )


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(BOMB, "got more than 50,000 values, those of aliases counted", id="aliases"),
        pytest.param("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep", id="nested"),
        pytest.param("a: " + "[" * 5000, "nested more than 50 deep", id="nested for ever"),
        pytest.param("a: " + "9" * 4000, "a whole number of 4000 characters", id="digits"),
        pytest.param("a: " + ":".join("1" * 900), "number of 1799 characters", id="base 60"),
        pytest.param("# " + "x" * (1 << 20), "expected at most 1,048,576 bytes", id="long"),
    ],
)
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_recipe_that_would_take_all_time_or_memory_is_refused(
    text: str, what: str, tmp_path: Path
) -> None:
    """Each is told at once."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=what):
        read(file)


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_recipe_is_a_file(tmp_path: Path) -> None:
    """A pipe and a device are refused, not waited for."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(RecipeError, match=f"expected a file; got {kind}"):
            read(path)


def test_an_alias_that_repeats_a_little_is_read(tmp_path: Path) -> None:
    """Whoever writes a value once and uses it twice is not refused."""
    file = tmp_path / "recipe.yaml"
    file.write_text("a: &a [1, 2]\nb: *a\n")
    assert read(file).data == {"a": [1, 2], "b": [1, 2]}


def test_characters_that_json_writes_in_two_halves_are_one(tmp_path: Path) -> None:
    """Half of one is refused: nothing could write it."""
    file = tmp_path / "recipe.yaml"
    file.write_text('{"name": "\\ud83d\\ude00 \\u00e9"}')
    assert read(file).data == {"name": "\U0001f600 é"}
    file.write_text('{"name": "\\ud83d"}')
    with pytest.raises(RecipeError, match="line 1: expected YAML; got half a character"):
        read(file)
