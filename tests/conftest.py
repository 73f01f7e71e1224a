"""Small models and tokenizers made in-process: no test of the default run needs a download."""

import functools
import gc
import importlib.metadata
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from sftkey.files import cache_folder

# Tiny models on one thread: with more, OpenMP's threads spin against whatever else runs, and
# pytest-xdist uses the other cores. Set before torch is imported, and inherited by processes that
# tests start. A launcher's own "1" would be undone by `use_all_cores`; "01" is the user's.
os.environ["OMP_NUM_THREADS"] = "01"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.support.tiny import made_model, made_tokenizer, write_recipe

# No example has a deadline: on a machine that others use, any may take a second.
settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path, None, None]:
    """Keep the tests' rows out of the user's cache; models that were fetched are taken from it."""
    users, own = cache_folder(), tmp_path_factory.mktemp("cache")
    for fetched in ("models", "wheels"):
        (users / fetched).mkdir(parents=True, exist_ok=True)
        (own / fetched).symlink_to(users / fetched, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SFTKEY_CACHE", str(own))
        yield own


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Generator[None, None, None]:
    """Compile peft's card, and read what is installed, once: upstream does it in every save."""
    import jinja2

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        metadata = functools.cache(importlib.metadata.metadata)
        patched.setattr(importlib.metadata, "metadata", metadata)
        yield


@pytest.fixture
def in_float64() -> Generator[None, None, None]:
    """Run a test in float64, where an equality can be proven to ten digits on every machine."""
    from tests.support.models import float64

    with float64():
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Return the byte-level tokenizer of the tests."""
    return made_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer: Any) -> Any:
    """Return a fresh two-layer Llama of random weights, always the same ones."""
    return made_model(tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Return a model folder as `save_pretrained` writes it: weights, config, tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    made_model(tiny_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_folder: Path) -> Callable[..., Path]:
    """Return a factory of recipe files in a test's folder: `write_recipe` on the tiny model."""
    return functools.partial(write_recipe, tmp_path, tiny_folder)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of later searches for garbage: every stage makes some."""
    gc.collect()
    gc.freeze()


NEVER_SKIPPED = ("slow", "network", "kill")


def no_skips() -> bool:
    """Say whether a skip is a failure: in CI nothing that these tests need may be missing."""
    return os.environ.get("SFTKEY_NO_SKIPS") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Turn the skip of a marked test into a failure where SFTKEY_NO_SKIPS=1."""
    report = yield
    marked = any(item.get_closest_marker(name) for name in NEVER_SKIPPED)
    if no_skips() and marked and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and SFTKEY_NO_SKIPS=1: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Turn the skip of a whole module into a failure where SFTKEY_NO_SKIPS=1."""
    report = yield
    if no_skips() and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped whole, and SFTKEY_NO_SKIPS=1: {report.longrepr[2]}"
    return report
