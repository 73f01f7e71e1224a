"""Validation: the loss of every segment, counted token by token, and that of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from sftkey.data.collator import row_lengths
from sftkey.data.labels import IGNORED, PADDING
from sftkey.data.response import Segment
from sftkey.generation.generate import inferring
from sftkey.recipe.schema import CONTEXT_OF_KEY
from sftkey.training.losses import token_losses


class ValidatingTrainer(SFTTrainer):
    """TRL's trainer with validation by segment.

    `segment_weights` are those of the stage's own loss, in the order of `Segment`.
    """

    segment_weights: tuple[float, ...]
    row_losses: list[float]  # the stage's own, of each validation row; NaN where it trains none

    def _get_eval_sampler(self, eval_dataset: Dataset) -> None:
        """Return none: `evaluation_loop` chooses its own order."""

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Return the validation loss of every segment, trained or not, counted token by token.

        Every process takes its share of the rows; none counts twice, as rows would that a
        distributed sampler repeats to fill the last batch.
        """
        prefix = kwargs.get("metric_key_prefix", "eval")
        dataset = dataloader.dataset
        sums = torch.zeros(1, device=self.args.device)
        places, of_rows = [], []
        self.callback_handler.eval_dataloader = dataloader
        with inferring(self.model_wrapped), torch.no_grad():
            for rows, numbers in self._validation_batches(dataset):
                batch = self._prepare_inputs(self.data_collator(rows))
                numbers = numbers.to(self.args.device)
                segment_ids = batch["segment_ids"].masked_fill(numbers[:, None] < 0, PADDING)
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                inputs["labels"] = batch["input_ids"].masked_fill(segment_ids == PADDING, IGNORED)
                with self.compute_loss_context_manager():
                    found = self._validation_sums(inputs, segment_ids)
                sums = sums + found.sum(-3)
                places.append(numbers)
                of_rows.append(found.movedim(-3, 0))
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums = self._reported(self.accelerator.reduce(sums, reduction="sum").cpu())
        gathered = self.accelerator.gather((torch.cat(places), torch.cat(of_rows)))
        numbers, of_all = (each.cpu() for each in gathered)
        order = numbers.argsort()[(numbers < 0).sum() :]  # what only fills a batch comes first
        self.row_losses = self._weighted(self._kept_of_rows(of_all[order])).tolist()
        metrics = {f"{prefix}_loss": self._weighted(sums).item()}
        metrics |= {f"{prefix}_loss_{name}": value for name, value in segment_means(sums).items()}
        for segment in Segment:
            if sums[1, segment] > 0:
                metrics[f"{prefix}_tokens_{segment.name.lower()}"] = sums[1, segment].item()
        return EvalLoopOutput(np.empty(0), None, metrics, num_samples=len(dataset))

    def _validation_sums(
        self, inputs: dict[str, torch.Tensor], segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the sums of each of a batch of validation rows, `(B, 2, 5)`."""
        return row_sums(token_losses(self.model_wrapped, inputs), segment_ids[:, 1:])

    def _reported(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sums of all validation rows that are reported, `(2, 5)`."""
        return sums

    def _kept_of_rows(self, sums: torch.Tensor) -> torch.Tensor:
        """Return those of the sums of each row, `(R, …, 2, 5)`, that are reported: `(R, 2, 5)`."""
        return sums

    def _weighted(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the stage's own loss, from sums `(…, 2, 5)`; NaN where it trains none of them."""
        weights = torch.tensor(self.segment_weights)
        above, below = (sums * weights).sum(-1).unbind(-1)
        return above / below

    def _validation_batches(
        self, dataset: Dataset
    ) -> Iterator[tuple[list[dict[str, Any]], torch.Tensor]]:
        """Yield this process's batches, longest rows first, and the rows' numbers `(B,)`.

        All processes get equally many batches (FSDP hangs otherwise); what fills up has number -1.
        """
        size, world = self.args.eval_batch_size, self.accelerator.num_processes
        lengths = row_lengths(dataset)
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        order += [-1] * (-len(order) % (size * world))
        for start in range(self.accelerator.process_index * size, len(order), size * world):
            batch = order[start : start + size]
            yield [dataset[max(row, 0)] for row in batch], torch.tensor(batch)


def row_sums(losses: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sum losses and count tokens of each row by segment.

    Args:
        losses: `(B, T)`, nats.
        segment_ids: `(B, T)`; `PADDING` where a token doesn't count.

    Returns:
        `(B, 2, 5)`: for each `Segment` the sum of its losses, and its number of tokens.

    >>> row_sums(torch.tensor([[0.5, 1.5, 9.0]]), torch.tensor([[3, 3, -1]]))[0, :, Segment.ANSWER]
    tensor([2., 2.])
    """
    member = torch.nn.functional.one_hot((segment_ids + 1).long(), len(Segment) + 1)[..., 1:]
    member = member.to(losses.dtype if losses.dtype == torch.float64 else torch.float32)
    return torch.stack([(losses[..., None] * member).sum(1), member.sum(1)], dim=1)


def segment_means(sums: torch.Tensor) -> dict[str, float]:
    """Name the mean loss of each segment that has tokens, from the `(2, 5)` sums of rows."""
    return {
        segment.name.lower(): (sums[0, segment] / sums[1, segment]).item()
        for segment in Segment
        if sums[1, segment] > 0
    }


def key_starts(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the places `(B,)` of the tokens that predict each row's first key token: T of Eq. 4.

    >>> key_starts(torch.tensor([[0, 0, 1, 1, 2, 3, 4], [0, 1, 3, 4, -1, -1, -1]]))
    tensor([3, 1])
    """
    return (segment_ids >= Segment.ANSWER_TAG).int().argmax(1) - 1


@dataclass(frozen=True)
class KeyBatch:
    """The size of a pass over keys."""

    rows: int  # with the copies of a grid
    context: int  # columns before the keys
    keys: int  # columns of the keys

    @classmethod
    def of(cls, segment_ids: torch.Tensor, copies: int) -> KeyBatch:
        """Return the size of a micro-batch `(B, T)`, filled up with -1; `copies` of each row."""
        starts = key_starts(segment_ids)
        keys = (segment_ids != PADDING).sum(1) - starts
        return cls(len(segment_ids) * copies, int(starts.max()), int(keys.max()))

    def __add__(self, other: KeyBatch) -> KeyBatch:
        """Return the size of both in one pass: each is filled up to the longer one."""
        return KeyBatch(
            self.rows + other.rows, max(self.context, other.context), max(self.keys, other.keys)
        )

    def fits(self, most_tokens: int) -> bool:
        """Tell whether keys, and the contexts that are held for them, are no more tokens."""
        contexts = self.rows * self.context
        return self.rows * self.keys <= most_tokens and contexts <= most_tokens * CONTEXT_OF_KEY


def pass_ends(batches: Sequence[KeyBatch], most_tokens: int) -> list[bool]:
    """Return of each micro-batch of a step whether it is the last one of a pass over keys.

    A pass takes as many as fit, and one that doesn't fit alone.

    >>> short, long = KeyBatch(rows=2, context=30, keys=4), KeyBatch(rows=2, context=30, keys=9)
    >>> pass_ends([short, short, short, long], most_tokens=20)
    [False, True, True, True]
    """
    if not batches:
        return [True]
    ends, together = [], batches[0]
    for following in batches[1:]:
        joined = together + following
        ends.append(not joined.fits(most_tokens))
        together = following if ends[-1] else joined
    return [*ends, True]
