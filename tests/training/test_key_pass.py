"""Keys of several micro-batches in one pass, checkpointed or not, give what each gives alone."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftkey.memory_plan import held
from sftkey.models.adapters import add_lora
from sftkey.recipe.stages import KeyAdapterSpec
from sftkey.training import detached, validating
from sftkey.training.frozen import FrozenTrainer
from sftkey.training.losses import add_token_losses, joint_losses, token_losses
from sftkey.training.validating import KeyBatch, pass_ends
from tests.support.models import EQUAL, STARTS, differences, made_batch, made_family
from tests.support.tiny import made_model
from tests.training.test_frozen import adapted, gradients, lora
from tests.training.test_trainer import config, made_rows, made_trainer, training_lines


def micro_batches(context: str) -> list[dict[str, Any]]:
    """Make micro-batches of one and of two rows, of unequal lengths."""
    whole: dict[str, Any] = made_batch()
    if context == "frozen":
        whole["key_starts"] = STARTS
    cut = [{name: each[rows] for name, each in whole.items()} for rows in ([0], [1, 2])]
    for name in ("input_ids", "attention_mask", "labels"):
        cut[1][name] = cut[1][name][:, :31]
    return cut


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("family", "anew"), [("llama", False), ("gemma3", False), ("gemma3", True)]
)
@pytest.mark.parametrize("context", ["detached", "frozen", "grid"])
def test_joint_pass_equals_separate_ones(family: str, context: str, anew: bool) -> None:
    """Losses and gradients, full and sliding layers, a grid, layers computed anew."""
    keys = {"key_0": lora(r=2), "key_1": lora(r=3)} if context == "grid" else {"key": lora(r=2)}
    model = adapted(made_family(family), **keys)
    kind: Any = "detached" if context == "detached" else "frozen"
    if kind == "detached":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".default." in name
    add_token_losses(model.get_base_model(), kind)
    first, second = micro_batches(kind)
    alone = [token_losses(model, each, kind) for each in (first, second)]
    expected = gradients(model, torch.cat([each.flatten() for each in alone]))
    if anew:
        model.get_base_model().gradient_checkpointing_enable()
        model.train()
    together = joint_losses(model, [first, second], kind)
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() < EQUAL
    found = gradients(model, torch.cat([each.flatten() for each in together]))
    assert differences(found, expected) < EQUAL


def test_doctests_hold() -> None:
    """The examples of joined batches and of what goes together are what the code gives."""
    assert [doctest.testmod(each).failed for each in (detached, validating, held)] == [0, 0, 0]


def test_a_pass_takes_what_fits() -> None:
    """Keys count with what fills them up, contexts 16 times as many; a large batch goes alone."""
    narrow, wide = KeyBatch(1, 10, 2), KeyBatch(1, 10, 5)
    assert pass_ends([narrow] * 4, 8) == [False, False, False, True]
    assert pass_ends([narrow, narrow, wide], 8) == [False, True, True]  # 3 x 5 columns
    assert pass_ends([KeyBatch(1, 65, 2)] * 3, 8) == [True, True, True]  # 130 of 128 tokens
    assert pass_ends([narrow, KeyBatch(9, 10, 2), narrow], 8) == [True, True, True]
    assert pass_ends([], 8) == [True]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    copies=st.integers(1, 2),
    most_tokens=st.integers(1, 40),
)
def test_no_pass_is_larger_than_planned(
    sizes: list[tuple[int, int]], rows: int, copies: int, most_tokens: int
) -> None:
    """Whatever goes together, of rows no longer than the longest and keys no longer either."""
    context, keys = (max(each) for each in zip(*sizes, strict=True))
    largest = held.Batch(rows, context + keys, keys - 1)
    planned = held.joint_pass(largest, len(sizes), copies, most_tokens)
    together = None
    found = [KeyBatch(rows * copies, *size) for size in sizes]
    for batch, ends in zip(found, pass_ends(found, most_tokens), strict=True):
        together = batch if together is None else together + batch
        assert together.rows * together.context <= planned.rows * copies * planned.context
        assert together.rows * together.keys <= planned.rows * copies * planned.keys
        together = None if ends else together


def trainer_of(kind: str, tokenizer: Any, folder: Path, tokens: int) -> Any:
    """Make a detached stage's trainer, a frozen one's, or one of a grid of two."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,  # of an epoch's four batches: the second step has one
        "max_steps": 2,
    }
    model: Any = made_model(tokenizer)
    if kind == "detached":
        made: Any = made_trainer(model, tokenizer, folder, "key", "detached", **settings)
        made.key_batch_tokens = tokens
        return made
    fields = {"r": 2, "target_modules": "all-linear"}
    names = ["key"] if kind == "frozen" else ["key-0", "key-1"]
    members = [KeyAdapterSpec(name, {}, fields, None, number) for number, name in enumerate(names)]
    model.requires_grad_(False)
    for member in members:
        model = add_lora(model, fields, member.seed, member.name)
    rows = made_rows(len(tokenizer))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".key" in name
    return FrozenTrainer(
        members,
        model=model,
        args=config(folder, **settings),
        loss_on="key",
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows,
        key_batch_tokens=tokens,
    )


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", ["detached", "frozen", "grid"])
def test_a_step_passes_over_its_keys_once(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What is logged and trained is what one pass a micro-batch gives."""
    runs = []
    for tokens, num_passes in ((1, [3, 1]), (2048, [1, 1])):
        trainer = trainer_of(kind, tiny_tokenizer, tmp_path, tokens)
        passes: list[int] = []

        def passed(module: Any, args: Any, trainer: Any = trainer, passes: Any = passes) -> None:
            if torch.is_grad_enabled():
                passes.append(trainer.state.global_step)

        base = trainer.model if kind == "detached" else trainer.model.get_base_model()
        base.base_model.register_forward_pre_hook(passed)
        trainer.train()
        assert [passes.count(step) for step in (0, 1)] == num_passes
        weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        runs.append((training_lines(trainer), weights))
    (alone, one), (together, other) = runs
    for a, b in zip(alone, together, strict=True):
        names = {name for name in a if name.startswith("loss_")}
        for name in (*names, "loss", "grad_norm", "trained_tokens", "tokens", "epoch"):
            assert a[name] == pytest.approx(b[name], rel=EQUAL), name
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=EQUAL, atol=EQUAL)
