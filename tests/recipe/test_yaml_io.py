"""A recipe is written so that YAML reads the very values back, each beside its reason."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from sftkey.recipe.yaml_io import Line, inline, write_recipe

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
