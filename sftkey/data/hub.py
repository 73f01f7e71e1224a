"""Data sets of the hub, through `datasets`, and what its errors mean to a user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
