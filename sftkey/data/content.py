"""A name for tokenized rows by all that they depend on: another content has another name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sftkey import __version__
from sftkey.data.frame import Frame
from sftkey.data.response import Example

LIBRARIES = ("tokenizers", "transformers", "jinja2")  # what renders and tokenizes


def content_key(examples: Sequence[Example], frame: Frame, settings: Mapping[str, Any]) -> str:
    """Give a hash of examples, frame, tokenizer, template, settings, and of what works on them."""
    about = {
        "sftkey": [__version__, _sources()],
        "libraries": {name: version(name) for name in LIBRARIES},
        "frame": _frame_content(frame),
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
    for example in examples:
        parts = (example.prompt, example.thinking, example.answer, example.index)
        digest.update(repr(parts).encode())
    return digest.hexdigest()


def _frame_content(frame: Frame) -> dict[str, Any]:
    tokenizer = frame.tokenizer
    template = tokenizer.chat_template if frame.kind == "chat" else None
    # Some templates write the date (Llama 3.2's, gpt-oss's): rows of yesterday are other rows.
    dated = "strftime_now" in str(template)
    return {
        "kind": frame.kind,
        "response": vars(frame.response),
        "bridge": frame.bridge,
        "end": [frame.end, frame.end_id],
        "bos": [tokenizer.bos_token, *frame.bos_ids],
        "template": template,
        "template_kwargs": dict(frame.chat_template_kwargs),
        "date": date.today().isoformat() if dated else None,
        "tokenizer": [type(tokenizer).__qualname__, frame.backend_state()],
        "special": [frame.special_ids, tokenizer.special_tokens_map],
    }


@cache
def _sources() -> str:
    """Hash the code that makes rows: in a checkout it changes while the version stays."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
