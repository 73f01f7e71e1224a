"""Chat templates from strangers: read as text, and tried once within bounds of time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftkey.bounds import SECONDS, Late, bounded
from sftkey.errors import ModelError
from sftkey.files import irregular

MOST_BYTES = 1 << 20  # of a template, and of what one makes of four short messages
CONVERSATION = [
    {"role": "user", "content": "How many are 2 and 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "5"},
]


def read_template(path: Path) -> str:
    """Read a template file."""
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


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a template that doesn't end, or fills the memory, on a short conversation.

    What else is wrong with it is said where the frame is read.
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
        except Late:
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
