"""A template that comes with a model is text, and ends."""

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sftkey.bounds import Late
from sftkey.data import template as data_template
from sftkey.errors import ModelError
from sftkey.models import loading
from sftkey.models.loading import check_template, read_template
from tests.support.tiny import CHATML, made_tokenizer


def with_template(text: str) -> Any:
    """Make a tokenizer with a chat template."""
    tokenizer = made_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(NESTED, "takes more than 0.5 seconds", id="loops"),
        pytest.param("{% for a in range(10**9) %}{% endfor %}", "memory without end", id="range"),
        pytest.param("{{ 'x' * 10**10 }}", "takes memory without end", id="allocates"),
        pytest.param("{{ 'x' * 10**7 }}", "makes 10,000,000 characters", id="long"),
    ],
)
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_template_without_end_is_refused(
    text: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried on a short conversation within bounds, and named."""
    seconds = 0.5 if "seconds" in what else 60  # no clock decides where memory or length does
    monkeypatch.setattr(loading.bounded.__wrapped__, "__defaults__", (seconds, 1 << 30))
    monkeypatch.setattr(loading, "SECONDS", seconds)
    with pytest.raises(ModelError, match=what) as error:
        check_template(with_template(text), "model")
    assert "write a template of your own: model.chat_template" in str(error.value)


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_constant_in_a_branch_that_is_never_taken_is_not_made() -> None:
    """jinja2 computes constants while it reads, and goes on where that fails."""
    tracemalloc.start()
    try:
        read = data_template.read_template("{% if x is none %}{{ 'y' * 10**9 }}{% endif %}")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.variables == {"x"}
    assert peak < 1 << 29


def test_a_usual_template_passes_and_leaves_no_bound() -> None:
    """Alarm, handler and memory are as before; a template's own error is told elsewhere."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    check_template(with_template(CHATML), "model")
    check_template(with_template("{{ raise_exception('no') }}"), "model")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Slow:
    """What Python drops the errors of: a destructor that takes longer than the bound."""

    def __del__(self) -> None:
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_an_alarm_that_python_drops_comes_again() -> None:
    """Otherwise what follows the destructor would have no bound."""
    since = time.monotonic()

    def endless() -> None:
        with loading.bounded(0.05):
            Slow()
            while time.monotonic() - since < 5:
                pass

    with pytest.raises(Late):
        endless()
    assert time.monotonic() - since < 5


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_template_file_is_text(tmp_path: Path) -> None:
    """A pipe isn't waited for; bytes that are no text, and a huge file, are refused."""
    pipe, binary, huge = (tmp_path / name for name in ("pipe", "binary", "huge"))
    os.mkfifo(pipe)
    binary.write_bytes(b"\xff\xfe\x00")
    huge.write_text("x" * (loading.MOST_BYTES + 1))
    for file, what in (
        (pipe, "expected a file; got a pipe"),
        (binary, "expected text in UTF-8; got other bytes"),
        (huge, "expected at most 1,048,576 bytes"),
    ):
        with pytest.raises(ModelError, match=what):
            read_template(file)
