"""Rows from files, folders, the hub and built-in makers, and the examples made of them."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftkey.data import synthetic
from sftkey.data.examples import USUAL, Loaded, RowOptions, make_examples
from sftkey.data.folders import SLICE, is_glob, read_folder, read_matching, sliced
from sftkey.data.readers import Rows, is_data_file, table_rows
from sftkey.data.response import as_messages
from sftkey.data.synthetic import made_rows
from sftkey.data.values import Template
from sftkey.errors import DataError, first_line
from sftkey.recipe.schema import DataSection


def hub_rows(data: DataSection, split: str) -> list[dict[str, Any]]:
    """Load a split from the hub, or from its cache where there is no network."""
    import datasets

    try:
        with _quiet():
            dataset = datasets.load_dataset(data.source, data.config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explained(data, error) from error
    return table_rows(dataset.with_format("arrow")[:], Path(data.source))


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
    text = first_line(error)
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
    names = ("config", "prompt", "thinking", "answer", "response", "split_rule", "system_column")
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
    }
}
MADE: dict[str, Callable[[DataSection, int], Any]] = {
    "reasoning_gym": made_rows,
    synthetic.SOURCE: synthetic.task_rows,
}


def with_defaults(data: DataSection) -> DataSection:
    """Return the section with a built-in source's values where it has none of its own."""
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
    data: DataSection, seed: int, split: str = "train", options: RowOptions = USUAL
) -> Loaded:
    """Read one split, given by its name or as a file, and make its examples."""
    return make_examples(load_rows(data, seed, split), with_defaults(data), options)


def load_rows(data: DataSection, seed: int, split: str) -> Rows:
    """Read the rows of one split as they are, before anything becomes an example."""
    rows = _rows(with_defaults(data), seed, split)
    if not rows:
        raise DataError(data.source, f"expected rows in `{split}`; got none")
    return rows


def _rows(data: DataSection, seed: int, split: str) -> Rows:
    """Find out what kind of source this is, and read it."""
    if address := next((text for text in (data.source, split) if "://" in text), None):
        found = re.search(r"(?:huggingface\.co/|hf://)datasets/([\w.-]+(?:/[\w.-]+)?)", address)
        hint = f"write its hub id: {found[1]}" if found else "download it, and name the file"
        what = "expected a file, a folder or a hub id; got an address"
        raise DataError(address, what, hint=hint)
    match = SLICE.match(split)
    if match and (data.source in MADE or _is_file(data.source)):
        return sliced(_rows(data, seed, match["split"]), match["start"], match["stop"])
    if split != "train" and _is_file(split):
        return read_matching(split)
    if data.source in MADE or _is_file(data.source):
        if split != "train":
            what = f"expected a count, a share or a file as split; got {split!r}"
            raise DataError(data.source, what, hint="this source has no splits of its own")
        make = MADE.get(data.source)
        return make(data, seed) if make else read_matching(data.source)
    folder = Path(data.source).expanduser()
    if folder.is_dir():
        return read_folder(folder, split, data.config)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.source) or data.source.startswith("."):
        raise DataError(data.source, "expected a file, a folder or a hub id; there is no such file")
    return hub_rows(data, split)


def _is_file(text: str) -> bool:
    """Tell whether this names files: by its ending, by a glob's signs, or since it is there."""
    path = Path(text).expanduser()
    return not path.is_dir() and (is_data_file(text) or is_glob(text) or path.exists())


Prompt = str | tuple[dict[str, str], ...]


def num_columns(data: DataSection) -> int:
    """Count the columns that the recipe puts together for a prompt."""
    return len(set(_template(data).columns))


def question_prompt(data: DataSection, question: str) -> Prompt:
    r"""Return the prompt that a row with this question would have.

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


def chat_prompt(
    data: DataSection, turns: Sequence[tuple[str, str]], question: str
) -> tuple[dict[str, Any], ...] | str:
    """Return the prompt of a question behind earlier ones, as a conversation's row would have it.

    The answers in `turns`, pairs of an earlier question and its answer, have no thinking or tags.

    >>> chat_prompt(DataSection(source="my.jsonl"), [("1 + 1?", "2")], "And 1 more?")[1:]
    ({'role': 'assistant', 'content': '2'}, {'role': 'user', 'content': 'And 1 more?'})
    """
    if not turns:
        return question_prompt(data, question)
    messages: list[dict[str, Any]] = []
    for asked, answer in [*turns, (question, "")]:
        prompt = as_messages(question_prompt(data, asked))
        messages += prompt[-1:] if messages else prompt
        messages.append({"role": "assistant", "content": answer})
    return tuple(messages[:-1])


def _template(data: DataSection) -> Template:
    return Template(with_defaults(data).prompt or "{prompt}", ())
