"""A stage with `kl`, step by step, against whole logits of the model and of a copy of its start."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from sftkey.data.response import Segment
from sftkey.errors import DeviceError, RecipeError
from sftkey.recipe.load import load_recipe
from sftkey.training import losses as losses_module
from sftkey.training import stage as stage_module
from sftkey.training.losses import thinking_targets
from sftkey.training.stage import refuse_unfit
from sftkey.training.trainer import KeyTrainer
from tests.support.models import EQUAL
from tests.support.tiny import made_model
from tests.training.test_trainer import config, made_rows, training_lines

KL = 0.7
MakeRecipe = Callable[..., Path]


def adapted(model: Any) -> Any:
    """Put an adapter on a model that changes it from the start, as a later stage's does."""
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))


def whole(model: Any) -> Any:
    """Train all weights."""
    return model


class Oracle(TrainerCallback):
    """Computes each step's loss, divergence and gradient from whole logits, row by row."""

    def __init__(self, start: Any, rows: Any) -> None:
        self.start, self.rows = start, rows
        self.found: list[tuple[float, float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the model as it is now."""
        model, step = kwargs["model"], state.global_step
        nll = kl = torch.zeros(())
        num_key = num_thinking = 0
        for place in range(4 * (step % 2), 4 * (step % 2) + 4):
            ids = torch.tensor([self.rows[place]["input_ids"]])
            segments = torch.tensor(self.rows[place]["segment_ids"][1:])
            now, then = (
                m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (model, self.start)
            )
            key, thinking = segments >= Segment.ANSWER_TAG, segments == Segment.THINKING
            nll = nll - now.gather(-1, ids[0, 1:, None])[:, 0][key].sum()
            kl = kl + (then.exp() * (then - now)).sum(-1)[thinking].sum()
            num_key, num_thinking = num_key + int(key.sum()), num_thinking + int(thinking.sum())
        loss = nll / num_key + KL * kl / num_thinking
        trained = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norm = sum(float(each.square().sum()) for each in gradients if each is not None) ** 0.5
        self.found.append((loss.item(), kl.item() / num_thinking, norm))


def stage(tokenizer: Any, folder: Path, make: Any, **settings: Any) -> tuple[KeyTrainer, Oracle]:
    """Make the trainer of a key stage, four rows a step in two micro-batches, and its oracle."""
    rows, model = made_rows(len(tokenizer)), make(made_model(tokenizer))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings}
    oracle = Oracle(copy.deepcopy(model).eval(), rows)
    args = config(folder, **settings)
    return KeyTrainer(model, args, "key", tokenizer, rows, rows, [oracle], kl=KL), oracle


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("make", [adapted, whole])
@pytest.mark.parametrize("logits", [2**24, 2**12])  # one tile, and several
def test_a_stage_is_held_by_its_start(
    make: Any, logits: int, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, divergence and gradient of three steps; the divergence is 0 at the first alone."""
    monkeypatch.setattr(losses_module, "BESIDE_LOGITS", logits)
    trainer, oracle = stage(tiny_tokenizer, tmp_path, make)
    trainer.train()
    lines = [(x["loss"], x["kl"], x["grad_norm"]) for x in training_lines(trainer)]
    assert len(lines) == len(oracle.found) == 3
    for line, expected in zip(lines, oracle.found, strict=True):
        assert line == pytest.approx(expected, rel=EQUAL, abs=1e-12)
    assert lines[0][1] == pytest.approx(0, abs=1e-12)
    assert lines[2][1] > 1e-5


@pytest.mark.usefixtures("in_float64")
def test_a_resumed_stage_is_held_by_the_same_start(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Not by the checkpoint that it goes on from."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    first, _ = stage(tiny_tokenizer, tmp_path, adapted, **saving)
    first.train()
    second, _ = stage(tiny_tokenizer, tmp_path, adapted, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = (training_lines(each)[-1] for each in (second, first))
    for name in ("kl", "loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


def test_a_packs_first_tokens_have_none_before_them() -> None:
    """The last token of another row doesn't predict them."""
    segments, positions = torch.tensor([[1, 3, 1, 1, 4]]), torch.tensor([[0, 1, 0, 1, 2]])
    found = thinking_targets({"position_ids": positions}, segments)
    assert found.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kl": 0.1, "context": "detached"}, "stages[0].kl: detached gives no gradient to the "
         "thinking, where this acts; write context: exact"),
        ({"kl": 0.1, "context": "frozen"}, "stages[0].kl: frozen gives no gradient to the "
         "thinking, where this acts; write context: exact"),
        ({"kl": -1}, "stages[0].kl: expected 0 or more; got -1"),
    ],
)  # fmt: skip
def test_a_kl_that_cannot_act_is_refused(
    fields: dict[str, Any], problem: str, tiny_recipe: MakeRecipe
) -> None:
    """With its place in the recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(stages=[{"name": "one", "loss_on": "key", **fields}]))
    assert [f"{each.where}: {each.what}" for each in caught.value.problems] == [problem]


@pytest.mark.parametrize(
    ("setting", "where"), [({"kl": 0.1}, "kl"), ({"thinking": "own"}, "thinking: own")]
)
def test_a_sharded_model_neither_answers_nor_has_a_copy_of_its_start(
    setting: dict[str, Any], where: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is trained."""
    recipe = load_recipe(tiny_recipe(stages=[{"name": "one", "loss_on": "key", **setting}]))
    monkeypatch.setattr(stage_module, "sharded", lambda: True)
    with pytest.raises(
        DeviceError, match=f"{where}: expected processes that hold the whole model each"
    ):
        refuse_unfit(None, recipe, packed=False)
