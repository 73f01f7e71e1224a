"""A file or folder has its name only when it is whole, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sftkey import files
from sftkey.errors import DiskError, RunError
from sftkey.files import (
    appearing,
    explained_full_disk,
    irregular,
    is_full_disk,
    read_json,
    write_text,
)
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
    ],
    ids=["quota", "safetensors", "torch"],
)
@pytest.mark.fault("disk full")
def test_a_full_disk_is_known_by_each_librarys_words(error: Exception, tmp_path: Path) -> None:
    """Also where it is only the cause of another error; other errors pass through."""

    def write(raised: Exception) -> None:
        with explained_full_disk(tmp_path):
            raise ValueError("wrapped") from raised

    with pytest.raises(DiskError):
        write(error)
    assert not is_full_disk(OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(ValueError, match="wrapped"):
        write(KeyError("another"))


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
