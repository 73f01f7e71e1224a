from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTTrainer

from sftkey.training.trainer import KeyTrainer
from tests.support.models import EQUAL
from tests.support.tiny import made_model
from tests.training.test_trainer import config, made_rows, training_lines


@pytest.mark.usefixtures("in_float64")
def test_dft_equals_the_dft_loss_of_trl(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """`loss: dft` over the completion takes the very steps of TRL's `loss_type="dft"`."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = made_rows(len(tiny_tokenizer))
    masks = [[int(s > 0) for s in segments] for segments in rows["segment_ids"]]
    theirs = SFTTrainer(
        model=made_model(tiny_tokenizer),
        args=config(
            tmp_path, dataset_kwargs=None, completion_only_loss=True, loss_type="dft", **settings
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows["input_ids"], "completion_mask": masks}),
        processing_class=tiny_tokenizer,
    )
    theirs.train()
    model, args = made_model(tiny_tokenizer), config(tmp_path, **settings)
    ours = KeyTrainer(model, args, "completion", tiny_tokenizer, rows, rows, loss="dft")
    ours.train()
    for a, b in zip(training_lines(ours), training_lines(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=EQUAL)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=EQUAL)
    likelihood = training_lines(ours)[0]["loss_answer"]
    assert likelihood > 1  # the log's losses by segment stay nats, whatever is trained
