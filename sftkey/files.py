"""Files and folders that get their name only when they are whole; hashes, free names, the cache."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from typing import Any

from sftkey.errors import DiskError, RunError, Told

CHUNK_BYTES = 1 << 20
GIB = 2**30


@contextmanager
def appearing(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a free place beside `path`; what is written there gets this name when it is whole.

    It may be a file or a folder, and replaces what has the name. It is on the disk before it is
    renamed, so that no power cut leaves a name without its content. After an error nothing is left;
    what a killed process left is removed by the next one that writes the same. Its folder is made
    if there is none; `num_bytes`, if they are known, stand in a full disk's error.

    Raises:
        DiskError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with explained_disk(path.parent, num_bytes, litter=temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left(path.parent.glob(f".{glob.escape(path.name)}.*"))
            remove(temporary)  # a killed process's that had this one's number
            yield temporary
            for file in files_below(temporary):
                _let_others_read(file)
                sync(file)
            _put(temporary, path)
    finally:
        remove(temporary)


def _put(temporary: Path, path: Path) -> None:
    """Rename, after moving a folder of this name away: none can be replaced at once.

    Where several processes put the same, the last one wins.
    """
    old = temporary.with_name(f"{temporary.name}.old")
    while True:
        if path.is_dir():
            remove(old)
            with suppress(FileNotFoundError):  # another process has moved it away
                path.rename(old)
        try:
            temporary.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise
            continue  # another process has put its own there
        break
    remove(old)
    sync(path.parent)


def _let_others_read(file: Path) -> None:
    """Let everybody read a file whom the umask lets: safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    mode = file.stat().st_mode
    file.chmod(mode | (0o444 & ~mask))


def remove_litter(folder: Path) -> None:
    """Remove what killed processes left half written anywhere in a folder that is ours alone.

    Processes of other hosts are gone, too: a container or a machine may have a new name.
    """
    _remove_left(folder.rglob(".*.tmp*"), of_others=True)


def _remove_left(files: Iterable[Path], of_others: bool = False) -> None:
    """Remove of files what processes of this machine that are gone, or `of_others`, half wrote."""
    for left in files:
        if found := re.fullmatch(r"\..+-(\d+)\.tmp(\.old)?", left.name):
            here = f".{_host()}-{found[1]}.tmp" in left.name
            if not is_alive(int(found[1])) if here else of_others:
                remove(left)


def _host() -> str:
    return node() or "host"


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and is somebody else's
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems sync no folder
            raise
    finally:
        os.close(handle)


def files_below(path: Path) -> list[Path]:
    """List a file, or all files of a folder, in the order of their names."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def num_bytes_below(path: Path) -> int:
    """Count the bytes of a file, or of all files of a folder; 0 where nothing is there."""
    return sum(file.stat().st_size for file in files_below(path))


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def value_hash(value: Any) -> str:
    """Return the sha256 of plain data, the same in whatever order its keys stand."""
    return text_hash(json.dumps(value, sort_keys=True))


def changed_files(known: Mapping[Path, str]) -> dict[Path, str]:
    """Return what became of files, by their hashes, that are no longer as they were written."""
    found: dict[Path, str] = {}
    for path, digest in known.items():
        if not path.is_file():
            found[path] = "it is gone"
        elif file_hash(path) != digest:
            found[path] = "it has changed since it was written"
    return found


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where a folder lies or will lie."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


# What keeps a file from being written whole, and what makes room.
FULL = "the disk is full", "free some space"
TOO_LARGE = "no file may grow so large here", "raise `ulimit -f`, or write to another disk,"
NO_ROOM = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: TOO_LARGE}
# Libraries in Rust write the system's number into their texts, torch's writer says nothing of it.
NUMBER = re.compile(r"\(os error (\d+)\)")
OF_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.* unexpected pos|basic_ios")


def _number(error: BaseException) -> int | None:
    """Return the system's number of an error; None where it has none."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := NUMBER.search(text):
        return int(found[1])
    if OF_TORCH.search(text):
        return errno.ENOSPC
    return next((number for number in NO_ROOM if os.strerror(number) in text), None)


def no_room(error: BaseException | None) -> BaseException | None:
    """Return the error, or the one that it came from, that says that a disk takes no more."""
    while error is not None and _number(error) not in NO_ROOM:
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def explained_disk(
    folder: Path | None = None, num_bytes: int | None = None, litter: Path | None = None
) -> Iterator[None]:
    """Turn a full disk into one error with the folder, and the needed and the free bytes.

    A library's own error of another fault of the disk becomes the system's.

    Args:
        folder: Where is written; by default that of the file that the system names, or else what
            has least room of the folders that commands write to.
        num_bytes: What the whole takes; unknown, what was written before the disk was full counts.
        litter: Removed at such an error, before the free bytes are counted.

    Raises:
        DiskError: In place of the system's or a library's error.
        OSError: In place of a library's.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        fault = no_room(error)
        if fault is None:
            number = _number(error)
            if number is None or isinstance(error, OSError | Told):
                raise
            raise OSError(number, os.strerror(number), folder and str(folder)) from error
        written = 0
        if litter is not None:
            written = num_bytes_below(litter)
            remove(litter)
        folder = folder or _full_folder(fault)
        free = free_bytes(folder)
        needed = f"more than {max(written, free):,}" if num_bytes is None else f"{num_bytes:,}"
        what, way = NO_ROOM[_number(fault) or 0]
        raise DiskError(
            str(folder),
            f"{what}: {needed} bytes are needed; {free:,} are free",
            f"{way} and run the same command again: it goes on where it stopped",
        ) from error


def _full_folder(fault: BaseException) -> Path:
    """Return where a disk is full; the system doesn't always say so."""
    if isinstance(file := getattr(fault, "filename", None), str):
        return Path(file).parent
    return min((Path(), Path(tempfile.gettempdir()), cache_folder()), key=free_bytes).absolute()


def irregular(path: Path) -> str | None:
    """Say what stands under a file's name and is none: a folder, or what may never end.

    None of a file, and where nothing is.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device"}
    kinds |= {stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), None)


def read_text(path: Path, most_bytes: int) -> str:
    """Return a file's text, in UTF-8.

    Raises:
        ValueError: It says why there is none.
    """
    if kind := irregular(path):
        raise ValueError(f"expected a file; got {kind}")
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"expected at most {most_bytes:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("expected text in UTF-8; got other bytes") from None
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from error


def refuse_existing(path: Path) -> None:
    """Refuse to write where something lies already, be it a link to nothing."""
    if os.path.lexists(path):
        what = "exists already, and nothing is overwritten"
        raise RunError(str(path), what, "give another name, or move it aside")


def refuse_irregular(paths: Iterable[Path]) -> None:
    """Refuse a pipe or a device in a file's place: reading it may never end."""
    for path in paths:
        if not path.is_dir() and (kind := irregular(path)):
            raise RunError(str(path), f"expected a file; got {kind}", "put a file in its place")


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears under its name only when it is whole."""
    content = text.encode()
    with appearing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_text` writes."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote."""
    try:
        found = json.loads(path.read_bytes())
        what = f"it holds a {type(found).__name__}"
        if isinstance(found, dict):
            return found
    except OSError as error:
        what = error.strerror or str(error)
    except (ValueError, RecursionError):  # also of bytes that are no text
        what = "it is no JSON"
    raise RunError(
        str(path),
        f"expected what a command wrote there; {what}",
        "put it back from a copy; or move it aside, and run the command that wrote it again",
    )


def unwritable_cache(error: OSError, what: str = "the cache") -> tuple[str, str, str]:
    """Return where, what and hint of an error: something can't be written into the cache."""
    reason = f"{what} can't be written: {error.strerror or error}"
    return str(cache_folder()), reason, "set SFTKEY_CACHE to a folder of yours"


def free_name(path: Path) -> Path:
    """Return `path`, or the first of `path.1`, `path.2` … that doesn't exist."""
    count, free = 0, path
    while free.exists():
        count += 1
        free = path.with_name(f"{path.name}.{count}")
    return free


def cache_folder() -> Path:
    """Return the folder of what is fetched or made once: `SFTKEY_CACHE`, or in the user's cache."""
    if own := os.environ.get("SFTKEY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftkey"
