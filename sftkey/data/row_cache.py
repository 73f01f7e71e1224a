"""Rows of tokens that are kept between runs: one entry for each content."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sftkey import __version__
from sftkey.activity import activity, tell
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Refusal, Row, fit, tokenize_batches
from sftkey.errors import DataError
from sftkey.files import appearing, cache_folder, file_hash, unwritable_cache, write_json

LIBRARIES = ("tokenizers", "transformers", "jinja2")  # what renders and tokenizes


def content_key(
    examples: Sequence[Example], renderer: Renderer, settings: Mapping[str, Any]
) -> str:
    """Return a hash of examples, frame, tokenizer, template, settings, and what works on them."""
    about = {
        "sftkey": [__version__, _sources()],
        "libraries": {name: version(name) for name in LIBRARIES},
        "frame": _frame_content(renderer),
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
    for example in examples:
        parts = (example.prompt, example.thinking, example.answer, example.index)
        digest.update(repr(parts).encode())
    return digest.hexdigest()


def _frame_content(renderer: Renderer) -> dict[str, Any]:
    tokenizer = renderer.tokenizer
    template = tokenizer.chat_template if renderer.kind == "chat" else None
    # Some templates write the date (Llama 3.2's, gpt-oss's): rows of yesterday are other rows.
    dated = "strftime_now" in str(template)
    return {
        "kind": renderer.kind,
        "response": vars(renderer.response),
        "assistant_prefix": renderer.assistant_prefix,
        "end": [renderer.end, renderer.end_id],
        "header": [renderer.header, renderer.tail],
        "bos": [tokenizer.bos_token, *renderer.bos_ids],
        "template": template,
        "template_kwargs": dict(renderer.chat_template_kwargs),
        "date": date.today().isoformat() if dated else None,
        "tokenizer": [type(tokenizer).__qualname__, renderer.backend_state()],
        "special": [renderer.special_ids, tokenizer.special_tokens_map],
    }


@cache
def _sources() -> str:
    """Hash the code that makes rows: in a checkout it changes while the version stays."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


ROWS, ABOUT = "rows.arrow", "about.json"
# What is kept: the entries that were used last, so many of them and of such a size together.
MOST_ENTRIES, MOST_BYTES = 64, 8 * 2**30
ABANDONED_SECONDS = 24 * 3600  # a folder in the making that is so old was left by a killed process
SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "segment_ids": pa.list_(pa.uint8()), "index": pa.int64()}
)


@dataclass
class CachedRows:
    """What became of examples; places count in them from 0."""

    refused: list[tuple[int, str, str]]  # place, reason and code of each that gave no row
    long: list[tuple[int, int]]  # place and tokens of each row over the recipe's length
    trimmed: list[int]  # the places of those that were shortened
    tokens: dict[str, int]  # in the rows, by segment
    # Place, what is worth knowing of that row, and an example of it or nothing.
    noted: list[tuple[int, str, str]] = field(default_factory=list)


@activity("tokenizing the rows")
def tokenized_rows(
    examples: Sequence[Example], renderer: Renderer, max_length: int, trim: bool
) -> tuple[Dataset, CachedRows]:
    """Return the rows of a split's examples, from the cache if they lie there.

    Rows of more than `max_length` tokens are refused, or shortened where `trim` is true.

    Returns:
        Rows with `input_ids`, `segment_ids` (lists of one length a row) and `index`; and the rest.
    """
    key = content_key(examples, renderer, {"max_length": max_length, "trim": trim})
    folder = cache_folder() / "rows" / key
    found = _read(folder)
    for _ in range(2):  # another process may be at mending the same entry
        if found is None:
            try:
                _make(folder, examples, renderer, max_length, trim)
            except OSError as error:
                raise DataError(*unwritable_cache(error)) from error
            found = _read(folder)
    if found is None:
        raise DataError(str(folder), "what was written there can't be read back")
    return found


def _read(folder: Path) -> tuple[Dataset, CachedRows] | None:
    """Read an entry; None where there is none that is whole."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if file_hash(folder / ROWS) != about.pop("sha256"):
            return None
        outcome, rows = CachedRows(**about), Dataset.from_file(str(folder / ROWS))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    with suppress(OSError):  # somebody else's cache, which this process only reads
        os.utime(folder / ABOUT)
    return rows, outcome


def _make(
    folder: Path, examples: Sequence[Example], renderer: Renderer, max_length: int, trim: bool
) -> None:
    """Tokenize, and write the entry."""
    with appearing(folder) as made:
        made.mkdir()
        outcome = _write_rows(made / ROWS, examples, renderer, max_length, trim)
        write_json(made / ABOUT, {**asdict(outcome), "sha256": file_hash(made / ROWS)})
    _tidy(folder)


def _write_rows(
    path: Path, examples: Sequence[Example], renderer: Renderer, max_length: int, trim: bool
) -> CachedRows:
    """Write the rows batch by batch: never more than a few batches of them are in memory."""
    outcome = CachedRows([], [], [], {})
    counts = np.zeros(len(Segment), dtype=np.int64)
    start = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for whole in tokenize_batches(examples, renderer):
            batch = examples[start : start + len(whole)]
            fitted = fit(whole, batch, renderer, max_length, trim)
            _note(outcome, whole, fitted, start, max_length)
            start += len(batch)
            tell(f"{start} of {len(examples)} rows")
            rows = [row for row in fitted if isinstance(row, Row)]
            columns = [
                _column([getattr(row, each.name) for row in rows], each.type) for each in SCHEMA
            ]
            written = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
            counts += np.bincount(written["segment_ids"].flatten(), minlength=len(Segment))
            writer.write_batch(written)
    outcome.tokens = {segment.name: int(counts[segment]) for segment in Segment}
    return outcome


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Make a column of numbers or of lists of them; pyarrow alone takes ten times as long."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    number = kind.value_type.to_pandas_dtype()
    return pa.ListArray.from_arrays(offsets, np.fromiter(chain.from_iterable(values), number))


def _note(
    outcome: CachedRows,
    whole: Sequence[Row | Refusal],
    fitted: Sequence[Row | Refusal],
    start: int,
    max_length: int,
) -> None:
    """Note what became of a batch, the first of which has the place `start`."""
    for place, (before, after) in enumerate(zip(whole, fitted, strict=True), start):
        if isinstance(before, Row) and len(before.input_ids) > max_length:
            outcome.long.append((place, len(before.input_ids)))
        if isinstance(after, Refusal):
            outcome.refused.append((place, after.reason, after.code))
            continue
        if after is not before:
            outcome.trimmed.append(place)
        outcome.noted += [(place, what, shown) for what, shown in after.notes]


def _tidy(used: Path) -> None:
    """Remove the entries that were used longest ago, and what killed processes left."""
    entries: list[tuple[float, Path]] = []
    for entry in used.parent.iterdir():
        with suppress(OSError):  # another process may tidy up as well
            making = entry.name.startswith(".")
            changed = (entry if making else entry / ABOUT).stat().st_mtime
            if not making:
                entries.append((changed, entry))
            elif time.time() - changed > ABANDONED_SECONDS:
                shutil.rmtree(entry)
    total = 0
    for number, (_, entry) in enumerate(sorted(entries, reverse=True)):
        with suppress(OSError):
            total += sum(file.stat().st_size for file in entry.iterdir())
            if entry != used and (number >= MOST_ENTRIES or total > MOST_BYTES):
                shutil.rmtree(entry)
