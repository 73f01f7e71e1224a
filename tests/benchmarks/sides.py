"""The two sides of a comparison: TRL's own trainer, and sftkey's, on copies of one model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from models import Shape, adapted_model
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sftkey.data.collator import KeyCollator
from sftkey.data.labels import weights_by_segment
from sftkey.data.response import Segment
from sftkey.training.trainer import KeyTrainer

PROMPT_SHARE = 0.2


@dataclass(frozen=True)
class Batch:
    """Rows of one length, so many tokens of each in the key."""

    num_rows: int
    length: int
    num_key: int

    def rows(self, vocabulary: int) -> Dataset:
        """Make the rows: random tokens, and the segments one after another."""
        dice = random.Random(self.length)
        tag = self.num_key // 2
        prompt = round(self.length * PROMPT_SHARE)
        thinking = self.length - prompt - self.num_key
        counts = (prompt, thinking, tag, self.num_key - tag - 1, 1)
        segments = [int(s) for s, n in zip(Segment, counts, strict=True) for _ in range(n)]
        ids = [[dice.randrange(vocabulary) for _ in segments] for _ in range(self.num_rows)]
        return Dataset.from_dict({"input_ids": ids, "segment_ids": [segments] * self.num_rows})


class Sides:
    """Plain TRL and sftkey.

    Args:
        shape: The model's.
        device: `cpu` or `cuda`.
        folder: Where the trainers would write.
        methods: What will be asked for: `trl`, `exact`, `detached`.
    """

    rate = 0.0

    def __init__(
        self,
        shape: Shape,
        device: str,
        folder: Path,
        methods: Sequence[str] = ("trl", "exact", "detached"),
    ) -> None:
        self.shape, self.device, self.folder = shape, device, folder
        self.losses: dict[tuple[Batch, str], float] = {}
        if "trl" in methods:
            assert _facts(self.trl) == _facts(self.ours), "the sides must not differ"

    @cached_property
    def trl(self) -> Any:
        """Make TRL's trainer; our collator hands it the labels that ours gets."""
        return self.ready(
            SFTTrainer(
                adapted_model(self.shape, self.device),
                args=self.arguments(),
                data_collator=KeyCollator(0, "key"),
                train_dataset=Batch(1, 16, 4).rows(self.shape.vocabulary),
                processing_class=tokenizer(),
            )
        )

    @cached_property
    def ours(self) -> Any:
        """Make sftkey's trainer."""
        rows = Batch(1, 16, 4).rows(self.shape.vocabulary)
        model = adapted_model(self.shape, self.device)
        arguments = self.arguments()
        return self.ready(
            KeyTrainer(model, arguments, "key", tokenizer(), rows, rows, context="detached")
        )

    def step(self, method: str, batch: Batch, loss_on: str = "key") -> None:
        """Take one whole step, optimizer included; its loss is that of all others on the batch."""
        trainer = self.trl if method == "trl" else self.ours
        if method != "trl":
            trainer.context = method
        self.compare(batch, loss_on, self.train(trainer, batch, loss_on))

    def train(self, trainer: Any, batch: Batch, loss_on: str) -> float:
        """Take one step of any trainer, and return its loss."""
        if trainer is not self.trl:
            trainer._step_weights = weights_by_segment(loss_on)  # it was made for another
        collate = KeyCollator(0, loss_on, for_key_trainer=trainer is not self.trl)
        inputs = collate(list(batch.rows(self.shape.vocabulary)))
        assert inputs["input_ids"].shape == (batch.num_rows, batch.length)
        count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        loss = float(trainer.training_step(trainer.model, inputs, num_items_in_batch=count))
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss

    def compare(self, batch: Batch, loss_on: str, loss: float) -> None:
        """See that the loss is what the others had on this batch."""
        expected = self.losses.setdefault((batch, loss_on), loss)
        assert abs(loss - expected) < (2e-2 if self.shape.quantized else 1e-4), (loss, expected)

    def arguments(self) -> SFTConfig:
        """Return the settings of all trainers."""
        return SFTConfig(
            output_dir=str(self.folder),
            bf16=self.device == "cuda",
            use_cpu=self.device == "cpu",
            gradient_checkpointing=self.shape.checkpointing,
            report_to="none",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=self.rate,  # whole steps, and yet the same losses in all of them
        )

    def ready(self, trainer: Any) -> Any:
        """Make a trainer ready for steps outside of `train`."""
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL rounds adapters on 4-bit weights to bfloat16
                parameter.data = parameter.data.float()
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare(trainer.model)  # autocast, on CUDA
        if self.shape.checkpointing:  # as `train` would
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        return trainer


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer for the trainers to hold; the rows are ids already."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    names = dict.fromkeys(("pad_token", "eos_token", "unk_token"), "<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _facts(trainer: Any) -> dict[str, Any]:
    """Say what both sides must have in common."""
    model = trainer.model
    return {
        "dtypes": {f"{p.dtype}, trained: {p.requires_grad}" for p in model.parameters()},
        "attention": model.config._attn_implementation,
        "checkpointing": model.is_gradient_checkpointing,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "autocast": trainer.accelerator.mixed_precision,
    }
