"""What the commands print is readable on a terminal of any width."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from sftkey.adapt import adapt as adapting
from sftkey.checks import gate
from sftkey.cli import main
from sftkey.commands import check as diagnosing
from sftkey.diagnosis.rule import recommend
from sftkey.evaluation.answers import write_answers
from sftkey.evaluation.results import write_result
from sftkey.study.results import read_cells, write_results
from sftkey.study.summary import summarize
from tests.commands.test_errors import answer
from tests.diagnosis.test_rule import made
from tests.evaluation.test_comparison import BASE, COMPLETION, KEY
from tests.support.cells import made_cells, write_cells
from tests.support.tiny import write_recipe

# A block has no name above its rows, and the lines of a column's head are one there.
NOT_IN_BLOCKS = {"recipe", "arm", "parsed", "memory"}
LONG = "a question of many words that goes on, " * 9
COMMANDS = {
    "ls": ["ls"],
    "env": ["env"],
    "show": ["show", "tiny.yaml"],
    "check": ["check", "tiny.yaml", "--gpu", "24GB"],
    "check refused": ["check", "tiny.yaml", "stages.key.loss_on=answers", "trainer.lr=1", "x=1"],
    "adapt": ["adapt", "{model}", "--data", "rows.jsonl", "-o", "new.yaml"],
    "adapt asks": ["adapt", "{model}", "--data", "odd.jsonl", "-o", "new.yaml"],
    "diagnose": ["diagnose", "tiny.yaml"],
    "errors": ["errors", "run"],
    "compare": ["compare", "run"],
    "compare study": ["compare", "study"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Make a recipe, a graded run and a study in a folder."""
    folder = tmp_path_factory.mktemp("a-folder-whose-name-is-longer-than-a-terminal-of-80" * 2)
    write_recipe(folder, tiny_folder)
    lines = '{"question": "' + LONG + '", "context": "c", "reasoning": "r", "answer": "1"}\n'
    (folder / "odd.jsonl").write_text(lines * 9)
    graded = folder / "run" / "evaluation"
    graded.mkdir(parents=True)
    write_recipe(folder / "run", tiny_folder).rename(folder / "run" / "recipe.yaml")
    for result in (BASE, COMPLETION, KEY):
        write_result(graded, result)
    write_answers(graded, KEY.stage, [answer(2, "8 " * 99, question=LONG, thinking=LONG)])
    write_cells(folder / "study", made_cells())
    write_results(folder / "study", summarize(read_cells(folder / "study"), "sft_tag"))
    return folder


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is found out be printed at several widths without finding it out again."""
    found: list[Any] = []

    def call(*arguments: Any, **settings: Any) -> Any:
        found[:] = found or [function(*arguments, **settings)]
        return found[0]

    return call


@pytest.fixture
def printed(
    home: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Return what runs a command and returns what it printed, on both streams."""
    monkeypatch.chdir(home)
    for module, name in ((adapting, "adapt"), (gate, "check_recipe"), (diagnosing, "with_plan")):
        monkeypatch.setattr(module, name, once(getattr(module, name)))
    figures = made(0.60, 0.85, 0.20)
    monkeypatch.setattr(diagnosing, "look", lambda *_: (figures, recommend(figures)))

    def run(arguments: Sequence[str], width: int = 0) -> str:
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: width > 0)
        monkeypatch.setenv("COLUMNS", str(width))
        (home / "new.yaml").unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            main([each.format(model=tiny_folder) for each in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        text = re.sub(r"\x1b\[[\d;]*m", "", said.out + said.err)
        return re.sub(r"(?m)^… .*\n", "", text)  # what a slow machine is at

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_no_terminal_breaks_what_a_command_prints(
    command: str, printed: Callable[..., str]
) -> None:
    """No line is longer than the terminal, but for a single word, and every word is whole."""
    whole = set(printed(COMMANDS[command]).split())
    for width in (80, 100, 160):
        text = printed(COMMANDS[command], width)
        lines = [line for line in text.splitlines() if " " in line.strip()]
        assert max(map(cell_len, lines)) <= width
        lost = {word for word in whole - set(text.split()) if word.isalnum()}
        assert lost <= NOT_IN_BLOCKS
