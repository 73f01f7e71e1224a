"""How strongly each segment pulls as a stage begins."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sftkey.data.response import Segment
from sftkey.training import stage as gradients
from sftkey.training.stage import gradient_norms
from tests.support.models import EQUAL
from tests.support.tiny import made_model
from tests.training.test_trainer import made_rows, made_trainer, training_lines

NUM_ROWS = 7  # validation rows of `made_trainer`


def adapted(tokenizer: Any) -> Any:
    """Return a model with an adapter that does something already, and much dropout."""
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(made_model(tokenizer), config)
    dice = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.3, generator=dice)
    return model


def norm_by_hand(model: Any, tokenizer: Any, segment: Segment, num_rows: int) -> float:
    """Take whole logits of each row alone, and one gradient of all rows' sum."""
    losses = []
    for row in made_rows(len(tokenizer)).select(range(num_rows)):
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        every = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(every[torch.tensor(row["segment_ids"][1:]) == segment].sum())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(torch.stack(losses).sum(), trained)
    return float(torch.cat([gradient.flatten() for gradient in found]).norm())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("loss_on", ["key", "completion"])
@pytest.mark.parametrize("num_rows", [NUM_ROWS, 4])
def test_norms_are_those_of_whole_logits(
    loss_on: str,
    num_rows: int,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each segment of the completion has its own, whatever the stage trains and the batches are."""
    monkeypatch.setattr(gradients, "NUM_ROWS", num_rows)
    model = adapted(tiny_tokenizer)
    model.eval()
    expected = {
        segment.name.lower(): norm_by_hand(model, tiny_tokenizer, segment, num_rows)
        for segment in (Segment.THINKING, Segment.ANSWER_TAG, Segment.ANSWER, Segment.END)
    }
    model.train()
    trainer = made_trainer(model, tiny_tokenizer, tmp_path, loss_on, per_device_eval_batch_size=3)
    found = gradient_norms(trainer)
    assert found == pytest.approx(expected, rel=EQUAL)
    assert min(found.values()) > 0
    assert model.training


def test_measuring_changes_no_training(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """With dropout, a stage that was measured has the losses and weights of one that wasn't."""
    seen = []
    for measured in (False, True):
        torch.manual_seed(0)
        trainer = made_trainer(adapted(tiny_tokenizer), tiny_tokenizer, tmp_path, max_steps=3)
        if measured:
            gradient_norms(trainer)
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
        weights = [each.detach() for each in trainer.model.parameters() if each.requires_grad]
        seen.append(([line["loss"] for line in training_lines(trainer)], weights))
    (losses, weights), (others, other_weights) = seen
    assert losses == others
    assert all(map(torch.equal, weights, other_weights))
