"""Each command's help ends with examples that the command line takes; shells complete words."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sftkey.cli import COMMANDS as DECLARED
from sftkey.cli import app, main
from sftkey.recipe.load import load_recipe

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command prints that ends well."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_every_command_has_examples() -> None:
    """Whoever adds a command shows how it is called."""
    assert all(DECLARED.values())


@pytest.mark.parametrize("example", [each for examples in DECLARED.values() for each in examples])
def test_an_example_is_taken_as_it_stands(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It parses, its changes fit a recipe that ships, and the help shows it on one line."""
    program, name, *arguments = shlex.split(example)
    assert program == "sftkey"
    lines = printed(capsys, name, "--help").splitlines()
    assert f"    {example}" in lines
    assert max(map(len, lines)) <= 80
    monkeypatch.chdir(tmp_path)
    Path("runs", "mine").mkdir(parents=True)
    context = COMMANDS[name].make_context(name, arguments)
    recipe = context.params.get("recipe")
    if recipe is not None and recipe.exists():
        load_recipe(recipe, context.params.get("overrides") or ())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sftkey ev", ["evaluate"]),
        ("sftkey show qwen3-8b/", ["qwen3-8b/gsm8k"]),
        ("sftkey adapt some/model --like qwen3-8b/", ["qwen3-8b/gsm8k"]),
        ("sftkey diagnose qwen3-8b/", ["qwen3-8b/gsm8k"]),
        ("sftkey prompts qwen3-8b/", ["qwen3-8b/gsm8k"]),
        ("sftkey check my.y", []),
        ("sftkey merge runs/mine --st", ["--stage"]),
    ],
)
def test_a_shell_completes(
    words: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands, options and recipes' names; where nothing is offered the shell offers files."""
    monkeypatch.setenv("_SFTKEY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert printed(capsys).split() == expected
