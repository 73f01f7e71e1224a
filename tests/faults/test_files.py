"""A file or folder has its name only when it is whole, whatever happens while it is written."""

import ast
import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sftkey import files
from sftkey.errors import DiskError, RunError
from sftkey.evaluation.judge import Verdicts
from sftkey.evaluation.page import empty_figure
from sftkey.files import (
    appearing,
    explained_disk,
    irregular,
    read_json,
    remove_litter,
    write_text,
)
from sftkey.recipe.yaml_io import write_new
from tests.support.leftovers import left_by_a_kill


@pytest.mark.fault("a write cut short")
def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a folder is synced, then the folder is renamed, then the name is synced."""
    seen: list[tuple[str, bool]] = []
    place = tmp_path / "folder"
    monkeypatch.setattr(files, "sync", lambda path: seen.append((path.name, place.exists())))
    with appearing(place) as making:
        making.mkdir()
        (making / "a").write_text("1")
        (making / "b").write_text("2")
    assert seen == [("a", False), ("b", False), (tmp_path.name, True)]
    assert {file.name for file in place.iterdir()} == {"a", "b"}


@pytest.mark.fault("a write cut short")
def test_an_error_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    """The same for a file and for a folder that is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("1")

    def cut_short() -> None:
        with appearing(tmp_path / "folder") as making:
            making.mkdir()
            (making / "half").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert [str(file.relative_to(tmp_path)) for file in files.files_below(tmp_path)] == [
        "folder/old"
    ]
    with appearing(tmp_path / "folder") as making:
        making.mkdir()
    assert files.files_below(tmp_path) == []


@pytest.mark.fault("a write cut short")
def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Another process that writes the same file keeps its own."""
    file = tmp_path / "ledger.json"
    dead, alive = (
        left_by_a_kill(file),
        tmp_path / f".ledger.json.{files._host()}-{os.getppid()}.tmp",
    )
    dead.write_text("half")
    alive.write_text("half")
    write_text(file, "whole")
    assert {each.name for each in tmp_path.iterdir()} == {"ledger.json", alive.name}


@pytest.mark.fault("a write cut short")
def test_what_a_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A container that is started again gives the same numbers."""
    left = tmp_path / f".adapter.{files._host()}-{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").write_text("half")
    with appearing(tmp_path / "adapter") as making:
        making.mkdir()
    assert files.files_below(tmp_path) == []


@pytest.mark.fault("a write cut short")
def test_litter_goes_where_nobody_else_writes(tmp_path: Path) -> None:
    """Of dead processes, and of hosts by another name; a running process's stays."""
    (tmp_path / "stages").mkdir()
    dead = left_by_a_kill(tmp_path / "stages" / "adapter")
    dead.mkdir()
    (dead / "half").write_text("half")
    host = files._host()
    names = [f".x.not-{host}-1.tmp", f".x.not.{host}.x-{os.getppid()}.tmp.old"]
    kept = [f".x.{host}-{os.getppid()}.tmp", ".running.json", "x.tmp", ".lock", ".x.tmp"]
    for name in names + kept:
        (tmp_path / name).write_text("half")
    remove_litter(tmp_path)
    assert sorted(each.name for each in files.files_below(tmp_path)) == sorted(kept)


REPLACING = """
import os, sys
from pathlib import Path
from sftkey.files import appearing
for _ in range(2):
    os.fork()
for _ in range(100):
    with appearing(Path(sys.argv[1])) as making:
        making.mkdir()
        (making / "whole").write_text("1")
os.write(1, b"done ")
os._exit(0)
"""


@pytest.mark.fault("a second process, a dead one's lock")
def test_processes_may_replace_a_folder_at_the_same_time(tmp_path: Path) -> None:
    """No name and no folder is free from one call to the next; the last process wins."""
    program = [sys.executable, "-c", REPLACING, str(tmp_path / "folder")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stdout == "done " * 4, done.stderr
    assert files.files_below(tmp_path) == [tmp_path / "folder" / "whole"]


@pytest.mark.fault("disk full")
def test_a_full_disk_is_one_error_with_folder_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written so far is removed before the free bytes are counted."""
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1234)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(DiskError) as error:
        write_text(tmp_path / "file", "x" * 5000)
    assert str(error.value) == (
        f"{tmp_path}: the disk is full: 5,000 bytes are needed; 1,234 are free\n"
        "hint: free some space and run the same command again: it goes on where it stopped"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["quota", "safetensors", "torch", "torch's end", "its stream"],
)
@pytest.mark.fault("disk full")
def test_a_full_disk_is_known_by_each_librarys_words(error: Exception, tmp_path: Path) -> None:
    """Also where it is only the cause of another error; other errors pass through."""

    def write(raised: Exception) -> None:
        with explained_disk(tmp_path):
            raise ValueError("wrapped") from raised

    with pytest.raises(DiskError):
        write(error)
    for other in (OSError(errno.EACCES, "Permission denied"), KeyError("another")):
        with pytest.raises(ValueError, match="wrapped"):
            write(other)


@pytest.mark.fault("a folder or file that the system refuses")
def test_a_librarys_own_error_of_the_disk_becomes_the_systems(tmp_path: Path) -> None:
    """So that the command line names the folder; ours stays as it is."""
    words = "Error while serializing: I/O error: Input/output error (os error 5)"
    with pytest.raises(OSError, match="Input/output error") as error, explained_disk(tmp_path):
        raise RuntimeError(words)
    assert (error.value.errno, error.value.filename) == (errno.EIO, str(tmp_path))
    with pytest.raises(RunError), explained_disk(tmp_path):
        raise RunError("file", words)


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow larger, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def keep_verdict(file: Path) -> None:
    """Write a judge's verdict, whose file lies in the cache."""
    verdicts = Verdicts("https://example.org/v1", "judge")
    verdicts.file = file
    verdicts.keep("prompt", True)


@pytest.mark.fault("disk full")
@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text(file, "x" * 5000),
        lambda file: write_new(file, "x" * 5000),
        lambda file: empty_figure(4, 3).savefig(file),
        lambda file: save_file({"weights": torch.ones(500)}, file),
        lambda file: torch.save(torch.ones(500), file),
        keep_verdict,
    ],
    ids=["text", "recipe", "picture", "safetensors", "torch", "verdict"],
)
def test_whatever_writes_a_full_disk_is_one_error(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    """The system refuses the bytes; the command line knows it, whoever writes."""
    with small_files(20), pytest.raises(DiskError) as error, explained_disk():
        write(tmp_path / "file")
    assert "bytes are needed; " in str(error.value)
    assert "run the same command again: it goes on where it stopped" in str(error.value)


@pytest.mark.fault("disk full")
def test_a_new_recipe_that_has_no_room_leaves_no_half_one(tmp_path: Path) -> None:
    """What is to be written next has the name for itself."""
    with small_files(20), pytest.raises(DiskError, match="no file may grow so large here"):
        write_new(tmp_path / "new.yaml", "x" * 5000)
    assert not list(tmp_path.iterdir())


# Functions that append, begin a file, write into a temporary folder or one that `appearing` moves.
APPEND = {"generate_to_file", "generated_in", "keep", "on_log", "_write"}
NEW, SCRATCH = {"write_new"}, {"_written", "_write_files", "_copy_adapter", "_unpacked"}
IN_A_WHOLE_FOLDER = {"convert", "_save_members", "_write_rows"}
WRITES = re.compile(
    r"""\.open\("(?:[wax]|r\+)b?"|\.write_(?:text|bytes)\(|OSFile\("""
    r"""|\b(?:savefig|save_file|save_pretrained|copyfile|copytree)\((?!NEW)"""
)


def test_every_write_of_the_package_is_whole_or_named_here() -> None:
    """A new one goes through `appearing`, which leaves no half and says what a full disk needs."""
    found: set[str] = set()
    for file in Path(files.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = ast.get_source_segment(text, node) or ""
                if WRITES.search(body) and "appearing(" not in body:
                    found.add(node.name)
    assert found == APPEND | NEW | SCRATCH | IN_A_WHOLE_FOLDER


@pytest.mark.fault("disk full")
def test_a_run_that_fills_the_disk_ends_with_that_error(tmp_path: Path) -> None:
    """Whatever of a run writes: a checkpoint, an optimizer, answers."""
    from sftkey.training.callbacks import StopRequest
    from sftkey.training.log import RunProgress
    from sftkey.training.run import Run

    class Full(Run):
        def __init__(self) -> None:
            self.ledger = SimpleNamespace(folder=tmp_path)  # type: ignore[assignment]
            self.progress = RunProgress({}, quiet=True)

        def _stages(self, train: bool, request: StopRequest) -> Iterator[str]:
            raise OSError(errno.ENOSPC, "No space left on device")
            yield ""

    with pytest.raises(DiskError, match="the disk is full"):
        list(Full().stages())


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is no JSON"),
        (b"\xff{}", "it is no JSON"),
        (b"[" * 99999, "it is no JSON"),
        (b"9" * 5000, "it is no JSON"),
        (b"[]", "it holds a list"),
        (None, "Is a directory"),
    ],
)
def test_json_of_a_run_that_is_something_else_is_one_error(
    content: bytes | None, what: str, tmp_path: Path
) -> None:
    """Whatever stands there, a folder too."""
    file = tmp_path / "data.json"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(RunError) as error:
        read_json(file)
    assert str(error.value) == (
        f"{file}: expected what a command wrote there; {what}\n"
        "hint: put it back from a copy; or move it aside, and run the command that wrote it again"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_what_may_never_end_is_no_file(tmp_path: Path) -> None:
    """A pipe, a device and a folder are named; a file and an absent one are not."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    kinds = [irregular(path) for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "file")]
    assert kinds == ["a pipe", "a device", None]
    assert irregular(tmp_path / "absent") is None
    assert irregular(tmp_path) == "a folder"
