"""`sftkey train` and `python -m sftkey.train` check a recipe's form before anything heavy."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sftkey.cli import main
from sftkey.commands.train import what_next

ROOT = Path(__file__).parents[2]
DEMO = "recipes/smollm2-135m/demo.yaml"
SFTKEY = [sys.executable, "-m", "sftkey", "train"]
MODULE = [sys.executable, "-m", "sftkey.train"]


@pytest.mark.parametrize("way", [SFTKEY, MODULE], ids=["sftkey", "module"])
def test_a_misspelt_key_is_refused_before_torch_is_loaded(way: list[str], tmp_path: Path) -> None:
    """Exit code 2, both names in the message, no traceback; an import of torch would fail."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*way, DEMO, "stages.key.trainer.learning_rte=1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {DEMO}: 1 problem\n"
        "  override stages.key.trainer.learning_rte=1: unknown key; did you mean `learning_rate`?\n"
    )


def test_a_missing_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that there isn't is named, with the command that shows the ones that there are."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "no.yaml"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no.yaml: expected a recipe file; ")
    assert "`sftkey ls`" in said


@pytest.mark.parametrize(
    ("lora", "context", "what", "following"),
    [
        (
            None,
            "exact",
            "model",
            ["merge 'runs/a b' -o a-merged", "evaluate 'runs/a b' --model a-"],
        ),
        ({"r": 4}, "frozen", "adapter", ["card 'runs/a b'", "push 'runs/a b' OWNER/NAME"]),
    ],
)
def test_what_comes_next_can_be_done(
    lora: dict[str, int] | None, context: str, what: str, following: list[str]
) -> None:
    """A model that was trained whole is called so; a frozen stage, which can't merge, isn't."""
    stages = [SimpleNamespace(name="key", context=context)]
    recipe = SimpleNamespace(name="a", lora=lora, stages=stages)
    folder = Path("runs/a b")
    trained = {"key": SimpleNamespace(adapter=folder / "adapter")}
    run: Any = SimpleNamespace(folder=folder, recipe=recipe, stages=trained)
    first, _, *commands = what_next(run)
    assert first == f"key: its {what} is runs/a b/adapter"
    expected = ["generate 'runs/a b' \"a question\"", *following]
    assert len(commands) == 3
    for command, each in zip(commands, expected, strict=True):
        assert command.startswith(f"  sftkey {each}")


def trained(printed: str, said: str) -> None:
    """Read what a training of one step a stage has printed: the table, and what comes next."""
    assert "completion 1 steps, key 1 steps" in said
    assert said.endswith(
        "key: its adapter is runs/tiny/stages/2-key/adapter\n"
        "next:\n"
        '  sftkey generate runs/tiny "a question"\n'
        "  sftkey merge runs/tiny -o tiny-merged\n"
        "  sftkey evaluate runs/tiny --model tiny-merged\n"
    )
    stages = [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()]
    assert stages[1:4] == ["base", "completion", "key"]


def test_the_module_trains(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python -m sftkey.train RECIPE a.b=c` trains and prints the table."""
    recipe = tiny_recipe(eval={"num_questions": 2, "max_new_tokens": 4})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", str(recipe), "trainer.max_steps=1"])
    monkeypatch.delitem(sys.modules, "sftkey.train", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sftkey.train", run_name="__main__")
    assert ended.value.code in (None, 0)
    trained(*capsys.readouterr())


@pytest.mark.slow
def test_the_launcher_trains_as_the_readme_says(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """`accelerate launch -m sftkey.train RECIPE a.b=c` does the same."""
    recipe = tiny_recipe(eval={"num_questions": 2, "max_new_tokens": 4})
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command = [*launch, "-m", "sftkey.train", str(recipe), "trainer.max_steps=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained(done.stdout, done.stderr)
