"""The rows of a recipe: split, tokenized, fitted to the length, cached, counted."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sftkey import __version__
from sftkey.activity import activity
from sftkey.data.labels import weights_by_segment
from sftkey.data.refused import NUM_SHOWN, refuse_left_out
from sftkey.data.renderer import Renderer, probe_renderer
from sftkey.data.response import Example, Segment
from sftkey.data.splits import Splits, load_splits
from sftkey.data.tokenization import Refusal, Row, fit, refuse_long, tokenize, tokenize_batches
from sftkey.errors import DataError, Problem, RecipeError
from sftkey.files import appearing, cache_folder, file_hash, write_json
from sftkey.recipe.schema import DataSection, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def dataset_of(examples: Sequence[Example], renderer: Renderer) -> Dataset:
    """Tokenize examples to the rows of a data set, which `KeyCollator` makes batches of.

    Args:
        examples: Prompt, thinking and answer of each; rows have their order.
        renderer: Of the model's tokenizer: `Renderer.read(tokenizer)`.

    Returns:
        `input_ids` and `segment_ids`, (T,) token ids and values of `Segment`, and `index`.

    Raises:
        DataError: Examples can't be a row; it names each by its place, from 0, and says why.
        FrameError: The template drops or raises on a system message.

    >>> examples = [sftkey.Example("2 + 2?", "2 and 2 make 4.", "4")]
    >>> rows = sftkey.tokenize(examples, sftkey.Renderer.read(tokenizer))
    >>> rows.column_names, len(rows)
    (['input_ids', 'segment_ids', 'index'], 1)
    """
    made = tokenize(examples, renderer)
    problems = [
        Problem(f"examples[{place}]", row.reason)
        for place, row in enumerate(made)
        if isinstance(row, Refusal)
    ]
    if problems:
        raise DataError("examples", problems)
    return Dataset(pa.Table.from_pylist([vars(row) for row in made], schema=SCHEMA))


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
class CachedRows:
    """What became of examples; places count in them from 0.

    Args:
        refused: Place, reason and code of each example that gave no row.
        long: Place and tokens of each row that was longer than the recipe allows.
        trimmed: The places of those that were shortened.
        tokens: The number of tokens in the rows by segment.
    """

    refused: list[tuple[int, str, str]]
    long: list[tuple[int, int]]
    trimmed: list[int]
    tokens: dict[str, int]


@activity("tokenizing the rows")
def tokenized_rows(
    examples: Sequence[Example], renderer: Renderer, max_length: int, trim: bool
) -> tuple[Dataset, CachedRows]:
    """Return the rows of examples, from the cache if they lie there.

    Args:
        examples: All of one split.
        renderer: The run's renderer.
        max_length: Tokens that a row may have.
        trim: Whether longer rows are shortened, and not refused.

    Returns:
        Rows with `input_ids`, `segment_ids` (lists of one length a row) and `index`; and the rest.

    Raises:
        DataError: The cache can't be written.
        FrameError: The template drops or raises on a system message.
    """
    too_long = "trim_thinking" if trim else "drop"
    key = content_key(examples, renderer, {"max_length": max_length, "too_long": too_long})
    folder = cache_folder() / "rows" / key
    found = _read(folder)
    for _ in range(2):  # another process may be at mending the same entry
        if found is None:
            try:
                _make(folder, examples, renderer, max_length, too_long)
            except OSError as error:
                where, hint = str(cache_folder()), "set SFTKEY_CACHE to a folder of yours"
                what = f"the cache can't be written: {error.strerror or error}"
                raise DataError(where, what, hint) from error
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
        outcome = CachedRows(**about)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    with suppress(OSError):  # somebody else's cache, which this process only reads
        os.utime(folder / ABOUT)
    return Dataset.from_file(str(folder / ROWS)), outcome


def _make(
    folder: Path, examples: Sequence[Example], renderer: Renderer, max_length: int, too_long: str
) -> None:
    """Tokenize, and write the entry."""
    with appearing(folder) as made:
        made.mkdir()
        outcome = _write_rows(made / ROWS, examples, renderer, max_length, too_long)
        write_json(made / ABOUT, {**asdict(outcome), "sha256": file_hash(made / ROWS)})
    _tidy(folder)


def _write_rows(
    path: Path, examples: Sequence[Example], renderer: Renderer, max_length: int, too_long: str
) -> CachedRows:
    """Write the rows batch by batch: never more than a few batches of them are in memory."""
    outcome = CachedRows([], [], [], {})
    counts = np.zeros(len(Segment), dtype=np.int64)
    start = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for whole in tokenize_batches(examples, renderer):
            batch = examples[start : start + len(whole)]
            fitted = fit(whole, batch, renderer, max_length, too_long)
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
        elif after is not before:
            outcome.trimmed.append(place)


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


@dataclass(frozen=True)
class Prepared:
    """The rows of a run.

    Args:
        train: Columns `input_ids`, `segment_ids` (lists of one length a row) and `index`.
        validation: The same columns; None where the recipe names no validation rows.
        test: Examples to answer; their prompts become ids with `Renderer.prompt_ids`.
        renderer: What stands around each completion.
        counts: JSON: rows by split; `dropped` and `trimmed` by "split: reason" with `count`, the
            first 20 `rows` and, of what was dropped, `code`; `tokens` by split and segment.
        refusals: The rows of train and validation that were dropped here.
        validation_examples: Those that the rows of `validation` were made from, in their order.
        train_examples: The same of `train`.
    """

    train: Dataset
    validation: Dataset | None
    test: list[Example]
    renderer: Renderer
    counts: dict[str, Any]
    refusals: list[Refusal]
    validation_examples: list[Example] = field(default_factory=list)
    train_examples: list[Example] = field(default_factory=list)

    @property
    def answers_only(self) -> bool:
        """Whether no row of train has a reasoning: the model writes what the stages read."""
        return not any(example.thinking.strip() for example in self.train_examples)

    def questions(self, recipe: Recipe) -> list[Example]:
        """Return the test rows that are asked: always the same ones, drawn by the recipe's seed."""
        count = min(recipe.eval.num_questions, len(self.test))
        drawn = random.Random(recipe.seed).sample(range(len(self.test)), count)
        return [self.test[number] for number in sorted(drawn)]


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, need_test: bool = True) -> Prepared:
    """Load the recipe's data and tokenize what is trained and validated on.

    Raises:
        DataError: The data can't be read or split as the recipe says, a row can't be tokenized and
            the recipe doesn't let such rows drop, or no rows are left.
        FrameError: The tokenizer or its template can't carry the response.
    """
    renderer = probe_renderer(tokenizer, recipe.response, recipe.model.chat_template_kwargs)
    splits = load_splits(
        recipe.data, recipe.seed, need_test, recipe.response.turns, recipe.needs_reasoning
    )
    return prepare_splits(recipe, splits, renderer)


def prepare_splits(recipe: Recipe, splits: Splits, renderer: Renderer) -> Prepared:
    """Tokenize what is trained and validated on, of rows that are loaded already.

    Raises:
        DataError: A row can't be tokenized and the recipe doesn't let such rows drop, no rows are
            left, or a stage finds nothing to train in them.
        FrameError: The template drops or raises on a system message.
    """
    counts: dict[str, Any] = {"dropped": splits.dropped(), "trimmed": {}, "tokens": {}}
    datasets: dict[str, Dataset | None] = {}
    refusals: list[Refusal] = []
    kept: dict[str, list[Example]] = {}
    for name, examples in (("train", splits.train), ("validation", splits.validation)):
        counts[name], counts["tokens"][name] = 0, {segment.name: 0 for segment in Segment}
        datasets[name], kept[name] = None, []
        if examples:
            rows, outcome = _fitted_rows(examples, renderer, recipe.data)
            refused = _count_outcome(outcome, examples, recipe.data, name, counts)
            datasets[name], counts[name] = rows, len(rows)
            places = {place for place, _, _ in outcome.refused}
            kept[name] = [each for place, each in enumerate(examples) if place not in places]
            refusals += refused
    refuse_left_out(recipe.data, counts["dropped"])
    counts["test"] = len(splits.test)
    _check_stages(recipe, counts["tokens"]["train"])
    train, validation = datasets["train"], datasets["validation"]
    assert train is not None  # else _fitted_rows has raised
    made_from = (kept["validation"], kept["train"])
    return Prepared(train, validation, splits.test, renderer, counts, refusals, *made_from)


def _fitted_rows(
    examples: Sequence[Example], renderer: Renderer, data: DataSection
) -> tuple[Dataset, CachedRows]:
    """Tokenize a split, and deal with rows that are too long."""
    rows, outcome = tokenized_rows(
        examples, renderer, data.max_length, trim=data.too_long == "trim_thinking"
    )
    if data.too_long == "error":
        refuse_long([(examples[place].index, n) for place, n in outcome.long], data.max_length)
    return rows, outcome


def _count_outcome(
    outcome: CachedRows,
    examples: Sequence[Example],
    data: DataSection,
    split: str,
    counts: dict[str, Any],
) -> list[Refusal]:
    """Count what was dropped or trimmed, and give the refused rows."""
    refusals = [
        Refusal(examples[place].index, reason, code, split)
        for place, reason, code in outcome.refused
    ]
    for refusal in refusals:
        where = f"{split}: {refusal.reason}"
        _count(counts["dropped"], where, refusal.index)
        counts["dropped"][where]["code"] = refusal.code
    for place in outcome.trimmed:
        reason = f"{split}: longer than {data.max_length} tokens"
        _count(counts["trimmed"], reason, examples[place].index)
    counts["tokens"][split] = outcome.tokens
    if len(refusals) == len(examples):
        reasons = Counter(refusal.reason for refusal in refusals).most_common()
        listed = "; ".join(f"{reason} ({count} of {len(examples)})" for reason, count in reasons)
        too_long = any(refusal.code == "too-long" for refusal in refusals)
        hint = "raise data.max_length" if too_long else None
        raise DataError(data.source, f"no rows are left in {split}: {listed}", hint)
    return refusals


def _check_stages(recipe: Recipe, tokens: dict[str, int]) -> None:
    """Refuse a stage whose loss is on segments that no row has: empty tags, say."""
    problems = [
        Problem(f"stages.{stage.name}.loss_on", "no row of train has a token of these segments")
        for stage in recipe.stages
        if not any(
            weight and tokens[segment.name]
            for segment, weight in zip(Segment, weights_by_segment(stage.loss_on), strict=True)
        )
    ]
    if problems:
        raise DataError(recipe.data.source, problems, hint="see `sftkey show` for the segments")


def refuse_evaluation_without_rows(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse a stage that wants to look at validation rows when there are none.

    Raises:
        RecipeError: Names each such stage.
    """
    problems = [
        Problem(f"stages.{stage.name}.trainer.{key}", f"{value!r} needs validation rows; got none")
        for stage in recipe.stages
        for key, value in recipe.stage_trainer(stage).items()
        if key in ("eval_strategy", "load_best_model_at_end") and value not in (False, "no")
    ]
    if problems and prepared.validation is None:
        raise RecipeError(recipe.name, problems, "write data.validation: a number of rows of train")


def _count(counted: dict[str, Any], reason: str, index: int) -> None:
    entry = counted.setdefault(reason, {"count": 0, "rows": []})
    entry["count"] += 1
    if len(entry["rows"]) < NUM_SHOWN:
        entry["rows"].append(index)
