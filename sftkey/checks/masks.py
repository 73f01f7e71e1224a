"""What the gate reads off the batches: is what each stage would train what the recipe says?

Every row goes through the collator that training uses; then rows from all over train are judged by
an oracle that decodes them and knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from sftkey.activity import activity
from sftkey.checks.findings import Finding, of_rows
from sftkey.checks.mask_proof import judge
from sftkey.data.collator import KeyCollator
from sftkey.data.labels import COMPLETION, IGNORED, KEY, PADDING, weights_by_segment
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import tokenize
from sftkey.models.facts import num_embeddings
from sftkey.recipe.schema import Recipe, StageSection

NUM_JUDGED = 200  # rows of train that the oracle judges
BATCH_SIZE = 64
BUG = "no recipe mends this: it is a bug of sftkey, please report it with the tokenizer's name"
NO_ROW = "take the tokenizer that belongs to the model, with a pad_token that its embedding has"
HINTS = {
    "nothing-trained": "leave these rows out, or choose another loss_on",
    "no-embedding": NO_ROW,
    "no-key": "the answer melts into the thinking: choose other tags as response.answer",
}


@dataclass
class Masks:
    """What the batches of one split show.

    Args:
        faults: Rows by code and by what is wrong with them.
        key_shares: Of each row, the key's share of its completion's tokens.
    """

    faults: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    key_shares: list[float] = field(default_factory=list)

    def findings(self, split: str) -> Iterator[Finding]:
        """Return a finding for each fault."""
        for (code, what), rows in self.faults.items():
            yield of_rows(code, f"{split}: {what}", rows, HINTS.get(code, BUG))

    def note(self, code: str, what: str, wrong: torch.Tensor, rows: Sequence[int]) -> None:
        """Note the rows of a batch of which a (B,) tensor of booleans says that they are wrong."""
        if bool(wrong.any()):
            numbers = [rows[place] for place in wrong.nonzero().flatten().tolist()]
            self.faults.setdefault((code, what), []).extend(numbers)


@activity("checking the masks")
def read_masks(recipe: Recipe, renderer: Renderer, dataset: Dataset) -> Masks:
    """Collate all rows of a split for every stage, and compare with what the recipe says."""
    masks = Masks()
    closing = _closing(renderer)
    pad, num_ids = renderer.tokenizer.pad_token_id, num_embeddings(recipe.model)
    with _one_thread():
        for rows in dataset.iter(batch_size=BATCH_SIZE):
            items = [
                {"input_ids": ids, "segment_ids": segments}
                for ids, segments in zip(rows["input_ids"], rows["segment_ids"], strict=True)
            ]
            for stage in recipe.stages:
                batch = KeyCollator(pad, stage.loss_on, for_key_trainer=True)(items)
                _note_stage_faults(masks, stage, batch, renderer, rows["index"])
            _note_ids(masks, batch["input_ids"], num_ids, rows["index"])
            _note_row_faults(masks, batch["segment_ids"], rows, closing, renderer)
    return masks


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: on small batches several only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _note_stage_faults(
    masks: Masks,
    stage: StageSection,
    batch: Mapping[str, torch.Tensor],
    renderer: Renderer,
    rows: Sequence[int],
) -> None:
    """Look for rows of which a stage trains nothing, or not the end of turn."""
    ids, segments, labels = batch["input_ids"], batch["segment_ids"], batch["labels"]
    where = f"stages.{stage.name}"
    masks.note("nothing-trained", f"{where}: trains no token", (labels == IGNORED).all(1), rows)
    last = (segments != PADDING).sum(1, keepdim=True) - 1
    end = ids.gather(1, last) == renderer.end_id
    if weights_by_segment(stage.loss_on)[Segment.END]:
        end &= labels.gather(1, last) == renderer.end_id
    what = f"{where}: doesn't train {renderer.end_token!r} as the last token"
    masks.note("end-untrained", what, ~end.squeeze(1), rows)


def _note_ids(masks: Masks, ids: torch.Tensor, num_ids: int | None, rows: Sequence[int]) -> None:
    """Look for ids, padding's among them, that the model's embedding has no row for."""
    if num_ids is not None:
        what = f"an id of {int(ids.max())}, and the embedding has {num_ids} rows"
        masks.note("no-embedding", what, (ids >= num_ids).any(1), rows)


def _note_row_faults(
    masks: Masks, segments: torch.Tensor, rows: Mapping[str, Any], closing: str, renderer: Renderer
) -> None:
    """Look for rows whose answer is missing or cut, and measure the key."""
    without = (segments != Segment.ANSWER).all(1)
    masks.note("no-key", "no token of an answer", without, rows["index"])
    longest = len(closing.encode()) + 1
    tails = _decode(renderer, [ids[-longest:] for ids in rows["input_ids"]])
    cut = torch.tensor([not tail.endswith(closing) for tail in tails])
    masks.note("answer-cut", f"doesn't end in {closing!r}", cut, rows["index"])
    key, completion = (torch.isin(segments, torch.tensor(it)).sum(1) for it in (KEY, COMPLETION))
    masks.key_shares += (key / completion.clamp(min=1)).tolist()


def _closing(renderer: Renderer) -> str:
    """Return the text that every row ends in, as the tokenizer decodes it."""
    (encoding,) = renderer.encode([renderer.response.answer_close + renderer.end])
    return _decode(renderer, [encoding.ids])[0].lstrip()


def _decode(renderer: Renderer, rows: Sequence[Sequence[int]]) -> list[str]:
    backend = renderer.tokenizer.backend_tokenizer
    return list(backend.decode_batch([list(ids) for ids in rows], skip_special_tokens=False))


def id_findings(recipe: Recipe, renderer: Renderer) -> Iterator[Finding]:
    """Find tokens of the frame that the model's embedding has no row for.

    Raises:
        ModelError: The model's config can't be read.
    """
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
