"""The process and its terminal: threads, quiet libraries, and where data goes."""

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from sftkey.activity import current
from sftkey.errors import RunError
from sftkey.tables import FittedTable, broken

SILENCE_SECONDS = 10.0  # of nothing said on stderr, after which it is said what goes on
PIPE_WIDTH = 10_000  # no line of ours is as long, so a pipe gets it unbroken


class WordConsole(Console):
    """A console that breaks lines between words alone; markup is off, since data hold brackets."""

    def __init__(self, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if terminal else PIPE_WIDTH
        super().__init__(stderr=stderr, width=width, markup=False, highlight=False)

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print each object on lines of its own."""
        for each in objects:
            if isinstance(each, Group):
                self.print(*each.renderables)
            else:
                text = Text(each) if isinstance(each, str) else each
                fitted = broken(text, self.width) if isinstance(text, Text) else text
                super().print(fitted, **{"crop": False, **settings})


def ready_streams() -> None:
    """Let neither a closed stream end a command, nor a letter that it can't write.

    In what isn't UTF-8, as a file on Windows, such a letter stands as its number.
    """
    sys.stdout, sys.stderr = (
        open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    if isinstance(sys.stdout, TextIOWrapper):  # stderr does it by itself
        sys.stdout.reconfigure(errors="backslashreplace")


def stdout_console() -> Console:
    """Return the console of the data."""
    return WordConsole()


def print_markdown(text: str) -> None:
    """Print Markdown as it is, or for a terminal, which its tables would be too wide for."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    console = stdout_console()
    for in_table, lines in groupby(text.splitlines(), lambda line: line.startswith("| ")):
        if not in_table:
            console.print("\n".join(lines))
            continue
        head, _, *rows = (line.strip("|").split("|") for line in lines)
        table = FittedTable(head[0].strip(), map(str.strip, head[1:]))
        for row in rows:
            table.add([cell.strip() for cell in row])
        console.print(table)


class StderrHandler(logging.Handler):
    """Prints what sftkey logs: a warning of the gate's as a note, the rest as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, to the stderr of this moment."""
        note = "note: " if record.levelno >= logging.WARNING else ""
        say(f"{note}{record.getMessage()}")


def say(text: str) -> None:
    """Print to stderr; on a terminal lines break between words, never inside a path or option."""
    if sys.stderr.isatty():
        text = broken(Text(text), shutil.get_terminal_size().columns).plain
    print(text, file=sys.stderr, flush=True)


def said() -> None:
    """Tell `never_silent` that something was said on stdout."""
    sys.stderr.write("")


class _Watched:
    """A stream that knows when it was last written to."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, time.monotonic()

    def write(self, text: str) -> int:
        """Write, and note the time."""
        self.last = time.monotonic()
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def never_silent(seconds: float = SILENCE_SECONDS) -> Iterator[None]:
    """Say what goes on whenever stderr has been silent for so many seconds.

    Of several processes the first one does.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    before, ended = sys.stderr, threading.Event()
    watched = _Watched(before)

    def watch() -> None:
        while not ended.wait(seconds / 10):
            now, doing = time.monotonic(), current()
            if doing is not None and now - max(watched.last, doing.since) >= seconds:
                say(f"… {doing}, {now - doing.since:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    sys.stderr = watched
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sys.stderr = before


def log_to_stderr() -> None:
    """Let a command show what the library logs; a second call changes nothing."""
    logger = logging.getLogger("sftkey")
    logger.setLevel(logging.INFO)
    if not any(isinstance(each, StderrHandler) for each in logger.handlers):
        logger.addHandler(StderrHandler())
    # On a CPU bitsandbytes advises to install a package that then asks the hub at run time.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def require_numbers() -> None:
    """Refuse what a launcher sets, where it is no number."""
    for name, least in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        value = os.environ.get(name, "1")
        if not value.isdecimal() or int(value) < least:
            what = f"expected a number from {least} on, as a launcher sets it; got {value!r}"
            raise RunError(f"${name}", what, f"unset {name}, or start with accelerate launch")


def set_up() -> None:
    """Use all cores, and keep the libraries quiet; torch and transformers are imported here."""
    use_all_cores()
    quiet_libraries()


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off a run's progress; their warnings stay."""
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # TRL switches gradient checkpointing on by its old name, which transformers reports.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def use_all_cores() -> None:
    """Give this process its share of the physical cores that it may use.

    The launchers set `OMP_NUM_THREADS=1`, which leaves all cores but one idle. Another value is
    the user's own and stays. The variable is set for libraries that load an OpenMP of their own
    (bitsandbytes does), the call for a torch that is loaded already.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def available_cores() -> int:
    """Count the physical cores, or the ones that this process is bound to if these are fewer."""
    import psutil  # accelerate's dependency

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return min(cores, len(os.sched_getaffinity(0)))
    return cores
