"""Tokenized rows in the user's cache: made once of the same content, read from there ever after.

An entry is a folder that is named by its content's hash: the rows as an Arrow file, which is mapped
into memory and not read into it, and a small file on what became of the others. It appears under
its name only when it is whole, and is made anew where its rows are not those that were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sftkey.data.content import content_key
from sftkey.data.fitting import fit
from sftkey.data.frame import Frame
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Refusal, Row, tokenize_batches
from sftkey.errors import DataError
from sftkey.files import cache_folder, write_json

ROWS, ABOUT = "rows.arrow", "about.json"
# What is kept: the entries that were used last, so many of them and of such a size together.
MOST_ENTRIES, MOST_BYTES = 64, 8 * 2**30
ABANDONED_SECONDS = 24 * 3600  # a folder in the making that is so old was left by a killed process
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "segment_ids": pa.list_(pa.uint8()),
        "index": pa.int64(),
    }
)


@dataclass
class Outcome:
    """What became of examples; places count in them from 0.

    Args:
        refused: Place and reason of each example that gave no row.
        long: Place and tokens of each row that was longer than the recipe allows.
        trimmed: The places of those that were shortened.
        tokens: The number of tokens in the rows by segment.
    """

    refused: list[tuple[int, str]]
    long: list[tuple[int, int]]
    trimmed: list[int]
    tokens: dict[str, int]


def tokenized_rows(
    examples: Sequence[Example], frame: Frame, max_length: int, trim: bool
) -> tuple[Dataset, Outcome]:
    """Give the rows of examples, from the cache if they lie there.

    Args:
        examples: All of one split.
        frame: The run's frame.
        max_length: Tokens that a row may have.
        trim: Whether longer rows are shortened, and not refused.

    Returns:
        Rows with `input_ids`, `segment_ids` (lists of one length a row) and `index`; and the rest.

    Raises:
        DataError: The cache can't be written.
        FrameError: The template drops or raises on a system message.
    """
    too_long = "trim_thinking" if trim else "drop"
    key = content_key(examples, frame, {"max_length": max_length, "too_long": too_long})
    folder = cache_folder() / "rows" / key
    found = _read(folder)
    for _ in range(2):  # another process may be at mending the same entry
        if found is None:
            try:
                _make(folder, examples, frame, max_length, too_long)
            except OSError as error:
                where, hint = str(cache_folder()), "set SFTKEY_CACHE to a folder of yours"
                what = f"the cache can't be written: {error.strerror or error}"
                raise DataError(where, what, hint) from error
            found = _read(folder)
    if found is None:
        raise DataError(str(folder), "what was written there can't be read back")
    return found


def _read(folder: Path) -> tuple[Dataset, Outcome] | None:
    """Read an entry; None where there is none that is whole."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if _sha256(folder / ROWS) != about.pop("sha256"):
            return None
        outcome = Outcome(**about)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    with suppress(OSError):  # somebody else's cache, which this process only reads
        os.utime(folder / ABOUT)
    return Dataset.from_file(str(folder / ROWS)), outcome


def _make(
    folder: Path, examples: Sequence[Example], frame: Frame, max_length: int, too_long: str
) -> None:
    """Tokenize, and write the entry."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        made = Path(making) / folder.name
        made.mkdir()
        outcome = _write_rows(made / ROWS, examples, frame, max_length, too_long)
        write_json(made / ABOUT, {**asdict(outcome), "sha256": _sha256(made / ROWS)})
        if folder.exists() and _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            made.rename(folder)
    _tidy(folder)


def _write_rows(
    path: Path, examples: Sequence[Example], frame: Frame, max_length: int, too_long: str
) -> Outcome:
    """Write the rows batch by batch: never more than a few batches of them are in memory."""
    outcome = Outcome([], [], [], {})
    counts = np.zeros(len(Segment), dtype=np.int64)
    start = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for whole in tokenize_batches(examples, frame):
            batch = examples[start : start + len(whole)]
            fitted = fit(whole, batch, frame, max_length, too_long)
            _note(outcome, whole, fitted, start, max_length)
            start += len(batch)
            rows = [row for row in fitted if isinstance(row, Row)]
            columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
            written = pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
            counts += np.bincount(written["segment_ids"].flatten(), minlength=len(Segment))
            writer.write_batch(written)
    outcome.tokens = {segment.name: int(counts[segment]) for segment in Segment}
    return outcome


def _note(
    outcome: Outcome,
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
            outcome.refused.append((place, after.reason))
        elif after is not before:
            outcome.trimmed.append(place)


def _tidy(used: Path) -> None:
    """Remove the entries that were used longest ago, and what killed processes left."""
    entries: list[tuple[float, Path]] = []
    for entry in used.parent.iterdir():
        with suppress(OSError):  # another process may tidy up as well
            making = entry.name.startswith(".making-")
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


def _sha256(path: Path) -> str:
    digest: Any = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return str(digest.hexdigest())
