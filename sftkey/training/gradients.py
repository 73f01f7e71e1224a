"""How strongly each segment pulls as a stage begins: the gradient that its loss gives."""

from __future__ import annotations

import torch
from datasets import Dataset

from sftkey.data.response import Segment
from sftkey.training.losses import token_losses
from sftkey.training.trainer import KeyTrainer

NUM_ROWS = 16  # validation rows: half a minute of a small model on two cores


def gradient_norms(trainer: KeyTrainer) -> dict[str, float]:
    """Give by segment the norm of its loss's gradient, summed over rows, on what is trained.

    Every segment of the completion is measured, trained by the stage or not, on the first
    validation rows, without dropout. Nothing of the trainer changes.

    Args:
        trainer: One process, before its first step; the model isn't sharded.
    """
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    norms = {
        segment.name.lower(): _norm(trainer, segment)
        for segment in Segment
        if segment is not Segment.PROMPT
    }
    model.train(was_training)
    return norms


def _norm(trainer: KeyTrainer, segment: Segment) -> float:
    """Go through the rows for one segment alone: one gradient is held at a time, not four."""
    model, rows = trainer.model_wrapped, trainer.eval_dataset
    assert isinstance(rows, Dataset)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in trained]
    size, num_rows = trainer.args.eval_batch_size, min(NUM_ROWS, len(rows))
    for start in range(0, num_rows, size):
        chosen = [rows[place] for place in range(start, min(start + size, num_rows))]
        batch = trainer._prepare_inputs(trainer.data_collator(chosen))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        inputs["labels"] = batch["input_ids"].masked_fill(batch["segment_ids"] != segment, -100)
        with trainer.compute_loss_context_manager():
            loss = token_losses(model, inputs).sum()
        for added, gradient in zip(
            sums, torch.autograd.grad(loss, trained, allow_unused=True), strict=True
        ):
            if gradient is not None:
                added += gradient
    return sum(float(gradient.double().square().sum()) for gradient in sums) ** 0.5
