"""What the gate reads off the rows: is what each stage would train what the recipe says?

Every row is labelled by the function that the collator calls, many rows at once; then rows from all
over train are judged by an oracle that decodes them and knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset

from sftkey.activity import activity, tell
from sftkey.checks.findings import Finding, of_rows
from sftkey.checks.mask_proof import judge
from sftkey.data.labels import COMPLETION, IGNORED, KEY, labels_for, weights_by_segment
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import tokenize
from sftkey.models.facts import num_embeddings
from sftkey.recipe.schema import Recipe, StageSection

NUM_JUDGED = 200  # rows of train that the oracle judges
ROWS_AT_ONCE = 1000
BUG = "no recipe mends this: it is a bug of sftkey, please report it with the tokenizer's name"
NO_ROW = "take the tokenizer that belongs to the model, with a pad_token that its embedding has"
HINTS = {
    "nothing-trained": "leave these rows out, or choose another loss_on",
    "no-embedding": NO_ROW,
    "no-key": "the tokenizer merges the answer's first characters into the thinking's last token: "
    "choose other tags as response.answer",
}


@dataclass
class Masks:
    """What the rows of one split show."""

    # Rows by code and by what is wrong with them.
    faults: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    # Of each row, the key's share of its completion's tokens.
    key_shares: list[float] = field(default_factory=list)

    def findings(self, split: str) -> Iterator[Finding]:
        """Return a finding for each fault."""
        for (code, what), rows in self.faults.items():
            yield of_rows(code, f"{split}: {what}", rows, HINTS.get(code, BUG))

    def note(self, code: str, what: str, wrong: npt.NDArray[np.bool_], rows: _Rows) -> None:
        """Note the rows of which a (B,) array says that they are wrong."""
        if wrong.any():
            self.faults.setdefault((code, what), []).extend(rows.numbers[wrong].tolist())


@dataclass(frozen=True)
class _Rows:
    """Rows behind one another, without padding."""

    ids: npt.NDArray[np.int64]  # (N,) token ids of all rows
    segments: npt.NDArray[np.int64]  # (N,) values of `Segment`
    starts: npt.NDArray[np.int64]  # (B,) places of the rows' first tokens
    numbers: npt.NDArray[np.int64]  # (B,) the rows' numbers in source order

    @classmethod
    def of(cls, table: pa.Table) -> _Rows:
        """Take the rows of a table out of its buffers."""
        ids, segments = (table[name].combine_chunks() for name in ("input_ids", "segment_ids"))
        lengths = ids.value_lengths().to_numpy().astype(np.int64)
        flat, which = (it.flatten().to_numpy().astype(np.int64) for it in (ids, segments))
        return cls(flat, which, np.cumsum(lengths) - lengths, table["index"].to_numpy())

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """The places behind the rows' last tokens, (B,)."""
        return np.append(self.starts[1:], len(self.ids))

    def count(self, tokens: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Count in each row the tokens of which a (N,) array says so, (B,)."""
        return np.add.reduceat(tokens, self.starts, dtype=np.int64)


@activity("checking the masks")
def read_masks(recipe: Recipe, renderer: Renderer, dataset: Dataset) -> Masks:
    """Label all rows of a split for every stage, and compare with what the recipe says."""
    masks = Masks()
    (closing,) = renderer.encode([renderer.response.answer_close + renderer.end])
    num_ids, pad = num_embeddings(recipe.model), renderer.tokenizer.pad_token_id
    with _one_thread():
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            rows = _Rows.of(table)
            for stage in recipe.stages:
                _note_stage_faults(masks, stage, rows, renderer)
            _note_missing_rows(masks, rows, num_ids, pad)
            _note_row_faults(masks, rows, closing.ids, renderer)
            tell(f"{len(masks.key_shares)} of {len(dataset)} rows")
    return masks


def read_ids(recipe: Recipe, renderer: Renderer, dataset: Dataset) -> Masks:
    """Compare the ids of rows that are asked alone with the rows of the model's embedding."""
    masks = Masks()
    num_ids, pad = num_embeddings(recipe.model), renderer.tokenizer.pad_token_id
    if num_ids is not None and max(renderer.tokenizer.get_vocab().values()) >= num_ids:
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            _note_missing_rows(masks, _Rows.of(table), num_ids, pad)
    return masks


def _note_missing_rows(masks: Masks, rows: _Rows, num_ids: int | None, pad: int) -> None:
    """Look for ids, of rows or of padding, that the embedding has no row for."""
    most = max(int(rows.ids.max()), pad)
    if num_ids is not None and most >= num_ids:
        what = f"an id of {most}, and the embedding has {num_ids} rows"
        wrong = rows.count(rows.ids >= num_ids) > 0
        masks.note("no-embedding", what, wrong | (pad >= num_ids), rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: on few tokens several only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _note_stage_faults(masks: Masks, stage: StageSection, rows: _Rows, renderer: Renderer) -> None:
    """Look for rows of which a stage trains nothing, or not the end of turn."""
    ids, segments = torch.from_numpy(rows.ids), torch.from_numpy(rows.segments)
    labels = labels_for(ids, segments, stage.loss_on)[0].numpy()
    where, last = f"stages.{stage.name}", rows.ends - 1
    nothing = rows.count(labels != IGNORED) == 0
    masks.note("nothing-trained", f"{where}: trains no token", nothing, rows)
    trains_end = weights_by_segment(stage.loss_on)[Segment.END]
    ends = (labels if trains_end else rows.ids)[last]  # a label is its token's own id
    what = f"{where}: doesn't train {renderer.end_token!r} as the last token"
    masks.note("end-untrained", what, ends != renderer.end_id, rows)


def _note_row_faults(
    masks: Masks, rows: _Rows, closing_ids: Sequence[int], renderer: Renderer
) -> None:
    """Look for rows whose answer is missing or cut, and measure the key."""
    without = rows.count(rows.segments == Segment.ANSWER) == 0
    masks.note("no-key", "no token of an answer", without, rows)
    closing = _decode(renderer, [closing_ids])[0].lstrip()
    tokens = rows.ends[:, None] - np.arange(len(closing_ids), 0, -1)
    same = rows.ids[tokens.clip(min=0)] == np.array(closing_ids)
    cut = ~(same & (tokens >= rows.starts[:, None])).all(1)  # (B,): other ids come last
    places = cut.nonzero()[0]
    longest = len(closing.encode()) + 1
    spans = zip(rows.starts[places], rows.ends[places], strict=True)
    tails = [rows.ids[max(start, end - longest) : end].tolist() for start, end in spans]
    texts = _decode(renderer, tails)
    cut[places] = [not text.endswith(closing) for text in texts]
    masks.note("answer-cut", f"doesn't end in {closing!r}", cut, rows)
    key, completion = (rows.count(np.isin(rows.segments, it)) for it in (KEY, COMPLETION))
    masks.key_shares += (key / completion.clip(min=1)).tolist()


def _decode(renderer: Renderer, rows: Sequence[Sequence[int]]) -> list[str]:
    backend = renderer.tokenizer.backend_tokenizer
    return list(backend.decode_batch([list(ids) for ids in rows], skip_special_tokens=False))


def id_findings(recipe: Recipe, renderer: Renderer) -> Iterator[Finding]:
    """Find tokens of the frame that the model's embedding has no row for."""
    size, tokenizer = num_embeddings(recipe.model), renderer.tokenizer
    tags = renderer.encode([renderer.response.render("", "")])[0].ids
    own = {"pad": tokenizer.pad_token_id, "begin of text": tokenizer.bos_token_id}
    own |= {"end of turn": max(renderer.end_ids), "tag": max(tags, default=None)}
    for name, number in own.items():
        if size is not None and number is not None and number >= size:
            token = tokenizer.convert_ids_to_tokens(number)
            what = f"the {name} token {token!r} has the id {number}, and the embedding {size} rows"
            yield Finding("no-embedding", (), f"{recipe.model.name_or_path}: {what}", NO_ROW)


def judged_findings(renderer: Renderer, examples: Sequence[Example]) -> Iterator[Finding]:
    """Let the oracle judge rows from all over a split."""
    chosen = examples[:: max(1, len(examples) // NUM_JUDGED)]
    wrong = judge(renderer, chosen, tokenize(chosen, renderer)).wrong
    if wrong:
        what = f"train: an oracle that decodes finds masks wrong, at first: {wrong[0].what}"
        yield of_rows("masks", what, [each.example.index for each in wrong], BUG)
