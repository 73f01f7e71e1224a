"""Rows from files, folders, the hub and built-in makers, and the examples made of them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftkey.data import synthetic
from sftkey.data.examples import Loaded, Template, Turns, make_examples
from sftkey.data.synthetic import made_rows
from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection


def hub_rows(data: DataSection, split: str) -> list[dict[str, Any]]:
    """Load a split from the hub, or from its cache where there is no network.

    Raises:
        DataError: It can't be reached or opened, or has no such config or split.
    """
    import datasets

    try:
        with _quiet():
            dataset = datasets.load_dataset(data.source, data.config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explained(data, error) from error
    # By batches: row by row takes seconds for 100,000 rows.
    return [
        dict(zip(batch, values, strict=True))
        for batch in dataset.iter(batch_size=1000)
        for values in zip(*batch.values(), strict=True)
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars of `datasets` off the terminal, where the run has its own."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _explained(data: DataSection, error: Exception) -> DataError:
    """Say what a failed load means and what to do about it."""
    import datasets
    from huggingface_hub.constants import ENDPOINT

    source = data.source
    text = str(error).partition("\n")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "gated dataset" in text:
        return DataError(
            source,
            "the hub refuses access: the data set is gated, and this account hasn't been let in",
            hint=f"accept its conditions on {ENDPOINT}/datasets/{source}, then `hf auth login`",
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return DataError(
            source,
            "expected a file, a folder or a data set of the hub; there is none, or it is private",
            hint="check the spelling; for a private one: `hf auth login`",
        )
    if isinstance(error, ConnectionError):
        return DataError(
            source,
            "the hub can't be reached, and the data set isn't in the cache",
            hint="where there is a network, "
            f"`hf download {source} --repo-type dataset --local-dir FOLDER`; "
            f"then write under `data`: {_as_local(data)}",
        )
    return DataError(source, f"can't be loaded: {text}")


def _as_local(data: DataSection) -> str:
    """Write the section for a folder of the same files, where no built-in gives its values."""
    names = ("config", "prompt", "thinking", "answer", "response", "split_rule")
    values = {name: getattr(data, name) for name in names if getattr(data, name) is not None}
    return json.dumps({"source": "FOLDER", **values})


# A built-in source is nothing but values for the recipe's fields, where the recipe gives none.
BUILT_IN: dict[str, dict[str, str]] = {
    "gsm8k": {  # columns question and answer: https://huggingface.co/datasets/openai/gsm8k
        "source": "openai/gsm8k",
        "config": "main",
        "prompt": "{question}",
        "response": "answer",
        "split_rule": "hash_marks",
    },
}
MADE: dict[str, Callable[[DataSection, int], Any]] = {
    "reasoning_gym": made_rows,
    synthetic.SOURCE: synthetic.task_rows,
}
SHARD = re.compile(r"-\d+-of-\d+\Z")

Rows = list[dict[str, Any]]


def with_defaults(data: DataSection) -> DataSection:
    """Give the section with a built-in source's values where it has none of its own."""
    values = BUILT_IN.get(data.source, {})
    open_fields = {name: value for name, value in values.items() if getattr(data, name) is None}
    if data.thinking is not None or data.answer is not None:  # templates instead of a rule
        open_fields = {k: v for k, v in open_fields.items() if k not in ("response", "split_rule")}
    source = values.get("source", data.source)
    return data.model_copy(update={**open_fields, "source": source})


def has_splits(data: DataSection) -> bool:
    """Tell whether the source has splits of its own: one file and made rows have none."""
    return data.source not in MADE and not _is_file(data.source)


def load_examples(
    data: DataSection,
    seed: int,
    split: str = "train",
    turns: Turns = "last",
    reasoning: bool = True,
) -> Loaded:
    """Read one split and make its examples.

    Args:
        data: The recipe's section on data.
        seed: What made rows depend on.
        split: The name of a split, or a file.
        turns: Which assistant turns of a conversation become examples.
        reasoning: Whether rows without a reasoning are refused; else it is empty.

    Raises:
        DataError: The source can't be read, holds no rows, or lacks columns that the section names.
    """
    data = with_defaults(data)
    rows = load_rows(data, seed, split)
    # A row may lack what others have (JSON): the columns are all that occur, in their order.
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return make_examples(rows, data, columns, turns, reasoning)


def load_rows(data: DataSection, seed: int, split: str) -> Rows:
    """Read the rows of one split as they are, before anything becomes an example.

    Raises:
        DataError: The source can't be read, or holds no rows.
    """
    rows = _rows(with_defaults(data), seed, split)
    if not rows:
        raise DataError(data.source, f"expected rows in `{split}`; got none")
    return rows


def _rows(data: DataSection, seed: int, split: str) -> Rows:
    """Find out what kind of source this is, and read it."""
    if _is_file(split):
        return _read(Path(split))
    if data.source in MADE or _is_file(data.source):
        if split != "train":
            what = f"expected a count, a share or a file as split; got {split!r}"
            raise DataError(data.source, what, hint="this source has no splits of its own")
        make = MADE.get(data.source)
        return make(data, seed) if make else _read(Path(data.source))
    folder = Path(data.source)
    if folder.is_dir():
        configured = folder / (data.config or "")
        return _read_folder(configured if configured.is_dir() else folder, split)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.source) or data.source.startswith("."):
        raise DataError(data.source, "expected a file, a folder or a hub id; there is no such file")
    return hub_rows(data, split)


def _is_file(text: str) -> bool:
    """Tell whether this names a file of a kind that we read; that it exists is asked on reading."""
    return Path(text).suffix in READERS and not Path(text).is_dir()


def _read_folder(folder: Path, split: str) -> Rows:
    """Read the files of a split: `train.jsonl`, or `train-00000-of-00002.parquet` and its like."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in READERS:
            files.setdefault(SHARD.sub("", file.stem), []).append(file)
    if split not in files:
        found = ", ".join(files) or f"no file that ends in {', '.join(READERS)}"
        raise DataError(str(folder), f"expected a file of the split {split!r}; found {found}")
    kinds = {file.suffix for file in files[split]}
    if len(kinds) > 1:
        what = (
            f"expected one kind of file for the split {split!r}; found {', '.join(sorted(kinds))}"
        )
        raise DataError(str(folder), what)
    return [row for file in files[split] for row in _read(file)]


def _read(file: Path) -> Rows:
    """Read a file with the plain reader of its kind.

    `datasets` guesses types where a file has text: "2023-01-01" comes out as a time, 5 beside 5.5
    as 5.0, 007 as 7, NA as nothing. What is trained is text, so it must come out as it was written.
    """
    try:
        return READERS[file.suffix](file)
    except FileNotFoundError as error:
        raise DataError(str(file), "no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(file), f"expected {file.suffix[1:]} in UTF-8; got {error}") from error
    except OSError as error:
        raise DataError(str(file), f"can't be read: {error.strerror or error}") from error


def _read_jsonl(file: Path) -> Rows:
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_object(_parse(line, file, number), file, f"line {number}"))
    return rows


def _read_json(file: Path) -> Rows:
    items = _parse(file.read_text(encoding="utf-8-sig"), file, None)
    if not isinstance(items, list):
        raise DataError(str(file), f"expected a list of objects; got {type(items).__name__}")
    return [_object(item, file, f"item {number}") for number, item in enumerate(items)]


def _parse(text: str, file: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise DataError(str(file), f"{place}: expected JSON; got {error.msg!r}") from error


def _object(item: Any, file: Path, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(str(file), f"{place}: expected an object; got {type(item).__name__}")
    return item


def _read_csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses responses of more than 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        for row in reader:
            if None in row:
                expected = f"expected {len(reader.fieldnames or ())} cells; got more"
                raise DataError(str(file), f"line {reader.line_num}: {expected}")
            rows.append(row)
    return rows


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(str(file), "expected parquet; got something else") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


Prompt = str | tuple[dict[str, str], ...]


def num_columns(data: DataSection) -> int:
    """Count the columns that the recipe puts together for a prompt."""
    return len(set(_template(data).columns))


def question_prompt(data: DataSection, question: str) -> Prompt:
    r"""Give the prompt that a row with this question would have.

    A recipe that puts several columns together can't know which part is which: there the question
    is taken as the whole text.

    >>> question_prompt(DataSection(source="gsm8k", system="You calculate."), "2 + 2?")
    ({'role': 'system', 'content': 'You calculate.'}, {'role': 'user', 'content': '2 + 2?'})
    >>> question_prompt(DataSection(source="my.jsonl", prompt="Q: {question}\n"), "2 + 2?")
    'Q: 2 + 2?\n'
    """
    text = question
    if num_columns(data) == 1:
        parts = _template(data).parts
        text = "".join(literal + (question if field else "") for literal, field in parts)
    if data.system is None:
        return text
    return ({"role": "system", "content": data.system}, {"role": "user", "content": text})


def _template(data: DataSection) -> Template:
    return Template(with_defaults(data).prompt or "{prompt}", ())
