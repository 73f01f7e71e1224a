"""Chat templates from strangers: read as text, and tried once within bounds of time and memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftkey.errors import ModelError
from sftkey.files import irregular

MOST_BYTES = 1 << 20  # of a template, and of what one makes of four short messages
SECONDS = 5.0
MEMORY_BYTES = 512 << 20
CONVERSATION = [
    {"role": "user", "content": "How many are 2 and 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "5"},
]


def read_template(path: Path) -> str:
    """Read a template file.

    Raises:
        ModelError: It is no file, isn't text, or is longer than any template.
    """
    try:
        if kind := irregular(path):
            what = f": expected a file; got {kind}"
        elif path.stat().st_size > MOST_BYTES:
            what = f": expected at most {MOST_BYTES:,} bytes"
        else:
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        what = ": expected text in UTF-8; got other bytes"
    except OSError as error:
        what = f" can't be read: {error.strerror}"
    raise ModelError(str(path), f"model.chat_template{what}")


class _Late(BaseException):
    """The template takes too long; no `except Exception` on the way may take it for an error."""


@contextmanager
def bounded(seconds: float = SECONDS, num_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Bound what the code inside takes, where the system can: on Linux, in the main thread.

    Raises:
        _Late: After so many seconds.
        MemoryError: It asks for so many bytes more than the process has.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _Late

    with _memory(num_bytes):
        before = signal.signal(signal.SIGALRM, late)
        # Again and again: raised where Python drops errors, in a destructor say, one is lost.
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(num_bytes: int) -> Iterator[None]:
    """Bound the address space to what the process has and so many bytes more."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + num_bytes
    except (ImportError, OSError):  # no Linux
        yield
        return
    bounds = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a template that doesn't end, or fills the memory, on a short conversation.

    What else is wrong with it is said where the frame is read.

    Raises:
        ModelError: Names what it does.
    """
    if not tokenizer.chat_template:
        return
    for messages, generation in ((CONVERSATION, False), (CONVERSATION[:1], True)):
        try:
            with bounded():
                text: Any = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation
                )
            if len(text) <= MOST_BYTES:
                continue
            what = f"makes {len(text):,} characters"
        except _Late:
            what = f"takes more than {SECONDS:g} seconds"
        except (MemoryError, OverflowError):
            what = "takes memory without end"
        except Exception:  # an error of the template's own
            continue
        raise ModelError(
            where,
            f"its chat template {what} of a conversation of {len(messages)} short messages",
            "write a template of your own: model.chat_template",
        )
