"""`sftkey cp` copies a recipe to edit, and every command that takes a recipe takes its name."""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from sftkey.cli import app, main
from sftkey.recipe.load import RECIPES, load_recipe

NAME = "qwen3-8b/gsm8k"
FILE = RECIPES / "qwen3-8b" / "gsm8k.yaml"


def ended(*arguments: str) -> int:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_a_copy_says_the_same_and_names_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the command in its head is the recipe's text; folders are made."""
    monkeypatch.chdir(tmp_path)
    assert ended("cp", NAME, "mine/q.yaml") == 0
    captured = capsys.readouterr()
    assert captured.out == "mine/q.yaml: written\n"
    assert "runs/qwen3-8b-gsm8k" in captured.err
    text = Path("mine/q.yaml").read_text(encoding="utf-8")
    assert "-m sftkey.train mine/q.yaml\n" in text
    assert text == FILE.read_text(encoding="utf-8").replace(f"recipes/{NAME}.yaml", "mine/q.yaml")
    assert load_recipe("mine/q.yaml") == load_recipe(FILE)


def test_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a folder or a broken link under the name stays."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("mine")
    Path("b").mkdir()
    Path("c.yaml").symlink_to("nowhere")
    for taken in ("a.yaml", "b", "c.yaml"):
        assert ended("cp", NAME, taken) == 2
        assert capsys.readouterr().err == (
            f"error: {taken}: exists already, and nothing is overwritten\n"
            "hint: give another name, or move it aside\n"
        )
    assert Path("a.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", NAME),
        ("check", NAME),
        ("show", NAME),
        ("prompts", NAME),
        ("cp", NAME, "q.yaml"),
        ("adapt", "some/model", "--like", NAME),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_take_a_short_name(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the user stands, each gets the file of that name."""
    monkeypatch.chdir(tmp_path)
    got: list[Any] = []
    name = arguments[0]
    (command,) = (each for each in app.registered_commands if each.callback.__name__ == name)
    noting = wraps(command.callback)(lambda **given: got.extend(given.values()))
    monkeypatch.setattr(command, "callback", noting)
    assert ended(*arguments) == 0
    assert FILE in got


@pytest.mark.parametrize("model", [NAME, "mine.yaml"])
def test_adapt_takes_no_recipe_for_a_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No hub is asked for what it can't have; the option that takes a recipe is named."""
    assert ended("adapt", model, "--data", "rows.jsonl") == 2
    assert capsys.readouterr().err == (
        f"error: {model}: a recipe; expected a model\n"
        f"hint: write the model's name or folder; --like {model} takes over the recipe's settings\n"
    )


def test_diagnose_takes_a_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target may be a model too, so a name is looked for, and a near one told."""
    from sftkey.diagnosis import run
    from sftkey.errors import RecipeError

    monkeypatch.setattr(run, "_of_recipe", lambda target, recipe, *rest: (target, recipe.name))
    subject: Any = run.choose_subject(NAME, (), None, None, 9)()
    assert subject == (NAME, "qwen3-8b-gsm8k")
    with pytest.raises(RecipeError, match="did you mean `qwen3-8b/gsm8k`"):
        run.choose_subject("qwen3-8b/gsm8", (), None, None, 9)
