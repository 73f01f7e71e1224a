import copy
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken

from sftkey.checks.masks import id_findings, read_masks
from sftkey.data.labels import COMPLETION, KEY
from sftkey.data.prepare import dataset_of
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.recipe.schema import ResponseSection, StageSection
from tests.support.tokenizers import CHATML, made

EXAMPLES = [
    Example("2 + 2?", "2 and 2.", "4", 7),
    Example("Legs?", "3 cats: 12\n2 birds: 4", "16 legs", 8),
    Example("A?", "So.", "<legs>", 9),
]
RECIPE: Any = SimpleNamespace(
    model=SimpleNamespace(name_or_path="m"), stages=[StageSection(name="key", loss_on="key")]
)


def padded() -> Renderer:
    """Probe a tokenizer whose padding has the largest id of all, and `<legs>` the one below."""
    tokenizer = copy.deepcopy(made("byte_level", CHATML))
    tokenizer.add_tokens([AddedToken("<legs>")])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return Renderer.read(tokenizer, ResponseSection())


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_ids_without_a_row_of_the_embedding_are_found(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding's as well: no batch could be embedded. A row's own are named by its number."""
    renderer = padded()
    size = len(renderer.tokenizer) - missing
    monkeypatch.setattr("sftkey.checks.masks.num_embeddings", lambda _: size)
    found = [finding.message for finding in id_findings(RECIPE, renderer)]
    pad = f"the pad token '<|pad|>' has the id {len(renderer.tokenizer) - 1}, and the embedding"
    assert found == ([f"m: {pad} {size} rows"] if missing else [])
    faults = read_masks(RECIPE, renderer, dataset_of(EXAMPLES, renderer)).faults
    what = f"an id of {len(renderer.tokenizer) - 1}, and the embedding has {size} rows"
    assert faults == ({("no-embedding", what): [7, 8, 9]} if missing else {})
    renderer.tokenizer.pad_token = renderer.tokenizer.eos_token
    rows = [
        number
        for each in read_masks(RECIPE, renderer, dataset_of(EXAMPLES, renderer)).faults.values()
        for number in each
    ]
    assert rows == ([9] if missing == 2 else [])
    assert not list(id_findings(RECIPE, renderer))


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_the_key_s_share_is_each_row_s_own(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are read at once."""
    monkeypatch.setattr("sftkey.checks.masks.num_embeddings", lambda _: None)
    monkeypatch.setattr("sftkey.checks.masks.ROWS_AT_ONCE", at_once)
    renderer = padded()
    rows = dataset_of(EXAMPLES, renderer)
    masks = read_masks(RECIPE, renderer, rows)
    assert masks.faults == {}
    counts = [
        [sum(Segment(each) in group for each in row["segment_ids"]) for group in (KEY, COMPLETION)]
        for row in rows
    ]
    assert masks.key_shares == [key / completion for key, completion in counts]


def test_rows_that_end_in_the_middle_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their last ids, or their text where the closing tag is merged with the answer."""
    monkeypatch.setattr("sftkey.checks.masks.num_embeddings", lambda _: None)
    renderer = padded()

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        kept = len(row["input_ids"]) - 2 * (row["index"] == 8)
        return {name: row[name][:kept] for name in ("input_ids", "segment_ids")}

    faults = read_masks(RECIPE, renderer, dataset_of(EXAMPLES, renderer).map(cut)).faults
    assert {code: rows for (code, _), rows in faults.items()} == {
        "end-untrained": [8],
        "answer-cut": [8],
    }
