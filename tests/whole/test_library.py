"""What `import sftkey` gives: lazy names, each there and documented."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import sftkey

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sftkey.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    """A name of the face leads to an object that says what it is."""
    assert getattr(sftkey, name).__doc__
    assert name in dir(sftkey)


def test_an_unknown_name_is_none_of_ours() -> None:
    """A name that isn't there raises what Python's own modules raise."""
    with pytest.raises(AttributeError, match=r"^module 'sftkey' has no attribute 'load_recipes'$"):
        _ = sftkey.load_recipes


def test_reading_a_recipe_loads_no_torch() -> None:
    """The import, and a recipe's check of form, load nothing that takes seconds."""
    code = (
        "import sys, sftkey\n"
        "sftkey.load_recipe('recipes/smollm2-135m/demo.yaml')\n"
        "print({'torch', 'transformers', 'trl', 'datasets'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_doctest_holds() -> None:
    """The example in the package's docstring is true."""
    assert doctest.testmod(sftkey) == (0, 3)


def test_types_are_shipped() -> None:
    """A type checker reads our annotations."""
    assert (ROOT / "sftkey" / "py.typed").is_file()
    assert '"sftkey" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
