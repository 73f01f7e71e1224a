"""The command line: what it lists, and how it ends."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from typer import Argument, Option

import sftkey
from sftkey.cli import app, main
from sftkey.errors import RunError

COMMANDS = (
    *("train", "check", "ls", "cp", "show", "adapt", "evaluate", "errors", "report", "compare"),
    *("diagnose", "study", "generate", "chat", "merge", "export", "card", "push", "prompts"),
    "env",
)


def ended(*arguments: str) -> int:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def failing(error: BaseException) -> Any:
    """Make a command that raises."""

    def command() -> None:
        raise error

    return command


def interrupted(
    folder: Annotated[Path | None, Argument()] = None,
    as_json: Annotated[bool, Option("--json")] = False,
) -> None:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


def replace_command(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    """Let a command of this name do what a function does."""
    (command,) = (each for each in app.registered_commands if each.callback.__name__ == name)
    function.__name__ = name
    monkeypatch.setattr(command, "callback", function)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists the commands, each with a sentence that isn't cut."""
    assert ended("--help") == 0
    lines = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def seconds(*arguments: str) -> float:
    """Measure the seconds of a core that a Python process takes."""
    before = os.times().children_user
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return os.times().children_user - before


def test_help_is_quick() -> None:
    """`sftkey --help`, the best of three, takes a third of what torch alone takes to import."""
    quickest = min(seconds("-m", "sftkey", "--help") for _ in range(3))
    assert quickest < seconds("-c", "import torch") / 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command's help says how it is called."""
    assert ended(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"Usage: sftkey {command} ")


def test_an_error_of_the_user_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an error goes to stderr whole, without a traceback, and nothing goes to stdout."""
    error = RunError("runs/x", "expected a run's folder; got nothing", hint="train first")
    replace_command(monkeypatch, "ls", failing(error))
    assert ended("ls") == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: runs/x: expected a run's folder; got nothing\nhint: train first\n"
    )
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [("--debug", "ls"), ("ls", "--debug")])
def test_debug_shows_the_traceback(
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --debug, before or after the command, the traceback comes first; the code stays 2."""
    replace_command(monkeypatch, "ls", failing(RunError("runs/x", "wrong")))
    assert ended(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Traceback (most recent call last):\n")
    assert captured.err.endswith("error: runs/x: wrong\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "many"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("LOCAL_WORLD_SIZE", "²")],
)
def test_a_launchers_number_is_one(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever reads it would fail in its own words."""
    monkeypatch.setenv(name, value)
    assert ended("ls") == 2
    assert capsys.readouterr().err == (
        f"error: ${name}: expected a number from {int('WORLD' in name)} on, as a launcher sets it; "
        f"got {value!r}\nhint: unset {name}, or start with accelerate launch\n"
    )


@pytest.mark.fault("a folder or file that the system refuses")
@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EROFS]
)
def test_what_the_system_refuses_is_one_error_with_the_file(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Permissions, a folder in a file's place, a loop of links, a broken or read-only disk."""
    refused = OSError(number, os.strerror(number), "runs/x/log.jsonl")
    replace_command(monkeypatch, "ls", failing(refused))
    assert ended("ls") == 2
    assert capsys.readouterr().err == (
        f"error: runs/x/log.jsonl: can't be read or written: {os.strerror(number)}\n"
        "hint: mend that, and run the same command again\n"
    )


def test_another_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't the user's mistake isn't dressed up as one."""
    for error in (ZeroDivisionError("a bug"), OSError("a library's")):
        replace_command(monkeypatch, "ls", failing(error))
        with pytest.raises(type(error), match=str(error)):
            main(["ls"])


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("ls", "--json", "nothing was kept, and the same command starts anew"),
        ("evaluate", "runs/x", "the same command goes on"),
    ],
)
def test_ctrl_c_ends_with_130(
    command: str,
    argument: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An interrupted command ends as shells expect it, and says what comes next."""
    replace_command(monkeypatch, command, interrupted)
    assert ended(command, argument) == 130
    assert capsys.readouterr().err == f"stopped; {said}\n"


def test_a_misspelt_command_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that there isn't is the user's mistake too."""
    assert ended("trian") == 2
    assert "No such command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`sftkey --version` prints it alone."""
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"sftkey {sftkey.__version__}\n"


def test_bitsandbytes_advises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It does when it is imported, which any command may be the first to do."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)
    ended("--version")
    assert not logger.isEnabledFor(logging.WARNING)


def test_no_telemetry_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command tells huggingface_hub, and so TRL, to report nothing."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    ended("ls", "--help")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
