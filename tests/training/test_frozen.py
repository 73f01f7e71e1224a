"""A frozen stage: adapters act on the key alone, and give what a pass over whole rows gives."""

import doctest
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sftkey.errors import ModelError
from sftkey.models.key_pass import act, acting, context_adapters, key_adapters
from sftkey.training import frozen
from sftkey.training.detached import read_context
from sftkey.training.losses import add_token_losses, token_losses
from tests.support.models import (
    EQUAL,
    STARTS,
    differences,
    float64,
    made_batch,
    made_family,
    nf4,
    plain_losses,
)

RANKS = {"key-0": 2, "key-1": 2, "key-2": 4}


def lora(**fields: Any) -> LoraConfig:
    """Return an adapter that does something: both of its factors are filled."""
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields,
        init_lora_weights=False,
    )


def adapted(model: Any, *, context: bool = True, **keys: LoraConfig) -> Any:
    """Put a previous adapter and key adapters on a model; these are trained."""
    torch.manual_seed(1)
    if context:
        model = get_peft_model(model, lora())
    for name, config in keys.items():
        torch.manual_seed(len(name) + ord(name[-1]))
        name = name.replace("_", "-")
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".key" in name
    act(model, context_adapters(model))
    return model


def gradients(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the losses' sum for all that is trained."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(losses.sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


def frozen_losses(model: Any) -> torch.Tensor:
    """Return the losses of a frozen stage, context cached and adapters switched between passes."""
    add_token_losses(model.get_base_model(), "frozen")
    return token_losses(model, made_batch() | {"key_starts": STARTS}, "frozen")


def test_doctests_hold() -> None:
    """The example of the key's first place is what the code gives."""
    assert doctest.testmod(frozen).failed == 0


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("context", [True, False], ids=["on-adapter", "on-base"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_losses_and_gradients_equal_one_pass_with_a_masked_adapter(
    name: str, context: bool
) -> None:
    """The activated LoRA of peft, told where the key begins in each row, is the oracle."""
    model = adapted(made_family(name), context=context, key=lora(r=2))
    found = frozen_losses(model)
    found_gradients = gradients(model, found)

    config = lora(r=2, alora_invocation_tokens=[1])
    oracle = adapted(made_family(name), context=context, key=config)
    batch = made_batch()
    offsets = (batch["input_ids"].shape[1] - STARTS).tolist()
    with acting(oracle, [*context_adapters(oracle), "key"]):
        expected = plain_losses(oracle, {**batch, "alora_offsets": offsets})
        expected_gradients = gradients(oracle, expected)
    assert (found - expected).abs().max() < EQUAL
    assert differences(found_gradients, expected_gradients) < EQUAL


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gemma2", "granite"])
def test_a_grid_gives_each_adapter_what_it_gets_alone(family: str) -> None:
    """Losses and gradients of three adapters in one pass, of unequal ranks, equal their own."""
    keys = {name.replace("-", "_"): lora(r=rank) for name, rank in RANKS.items()}
    together = frozen_losses(model := adapted(made_family(family), **keys))
    found = gradients(model, together)
    assert key_adapters(model) == list(RANKS)
    rows = together.view(3, *made_batch()["labels"][:, 1:].shape)
    for number, name in enumerate(RANKS):
        alone = adapted(made_family(family), **{name.replace("-", "_"): lora(r=RANKS[name])})
        losses = frozen_losses(alone)
        assert (rows[number] - losses).abs().max() < EQUAL
        expected = gradients(alone, losses)
        assert differences({key: found[key] for key in expected}, expected) < EQUAL


def test_a_frozen_context_is_read_without_dropout() -> None:
    """As the model reads it when it answers, while the key's own adapters drop."""
    dropping = get_peft_model(made_family("llama"), lora(lora_dropout=0.5))
    model = adapted(dropping, context=False, key=lora()).train()
    batch = made_batch()
    batch["labels"] = batch["labels"].roll(-1, 1)
    first, second = (read_context(model, **batch, key_starts=STARTS).cache for _ in range(2))
    assert model.training
    assert all(
        torch.equal(one.keys, other.keys)
        for one, other in zip(first.layers, second.layers, strict=True)
    )


def test_the_context_is_what_it_was_without_key_adapters() -> None:
    """A frozen pass leaves the acting adapters as they were, and no hook on the model."""
    model = adapted(made_family("llama"), key=lora(r=2))
    before = plain_losses(model, made_batch())
    frozen_losses(model)
    assert torch.equal(plain_losses(model, made_batch()), before)
    with acting(model, ["default", "key"]):
        assert not torch.allclose(plain_losses(model, made_batch()), before)
    assert key_adapters(model) == ["key"]


def test_a_grid_refuses_modules_that_see_no_rows() -> None:
    """Experts get the tokens that a router sends them: whose they are, nothing tells."""
    keys = {name: lora(r=2, target_modules=["gate_proj"]) for name in ("key_0", "key_1")}
    model = adapted(made_family("llama"), **keys)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "key-0" in m.lora_A)
    from sftkey.models.key_pass import joining

    with pytest.raises(ModelError) as error, joining(model, ["key-0", "key-1"]):
        layer(torch.zeros(6, 32))
    assert str(error.value) == (
        "stages[].grid: Linear gets other than (rows, tokens, features)\n"
        "hint: leave such modules out of the stage's lora.target_modules, or train without a grid"
    )


def test_an_adapter_that_acts_one_token_early_is_found() -> None:
    """The last but one token of the thinking belongs to the context: there it must not act."""
    model = adapted(made_family("llama"), key=lora(r=2))
    add_token_losses(model.get_base_model(), "frozen")
    found = token_losses(model, made_batch() | {"key_starts": STARTS}, "frozen")
    early = token_losses(model, made_batch() | {"key_starts": STARTS - 1}, "frozen")
    assert (found - early).abs().max() > 1e-2


def test_a_key_adapter_left_on_in_the_context_is_found() -> None:
    """The context is read with the previous adapters alone."""
    model = adapted(made_family("llama"), key=lora(r=2))
    found = frozen_losses(model)
    act(model, ["default", "key"])
    assert (frozen_losses(model) - found).abs().max() > 1e-2


def test_quantized_weights_carry_a_frozen_stage(tmp_path: Path) -> None:
    """On NF4, cached and in one pass: to 1e-5, as on plain weights."""

    def made(folder: Path, **fields: Any) -> Any:
        model = nf4("llama", folder)  # with a previous adapter, random
        torch.manual_seed(5)
        model.add_adapter("key", lora(r=2, **fields))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".key." in name
        act(model, ["default"])
        return model

    torch.manual_seed(3)
    model = made(tmp_path / "one")
    found = frozen_losses(model)
    found_gradients = gradients(model, found)
    torch.manual_seed(3)
    oracle = made(tmp_path / "two", alora_invocation_tokens=[1])
    batch = made_batch()
    offsets = (batch["input_ids"].shape[1] - STARTS).tolist()
    with acting(oracle, ["default", "key"]):
        expected = plain_losses(oracle, {**batch, "alora_offsets": offsets})
        expected_gradients = gradients(oracle, expected)
    assert (found - expected).abs().max() < 1e-4
    assert differences(found_gradients, expected_gradients) < 1e-4


def two_key_adapters() -> Any:
    """Make a model whose grid has two adapters."""
    return adapted(made_family("qwen3"), key_0=lora(r=2), key_1=lora(r=2))


def ranks_gradients(rank: int, folder: str) -> None:
    """Take a grid's backward pass as one of two processes."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = [0] if rank == 0 else [1, 2]
    batch = {name: each[rows] for name, each in made_batch().items()}
    with float64():
        model = two_key_adapters()
        add_token_losses(model.get_base_model(), "frozen")
        wrapped = DistributedDataParallel(model)
        batch["key_starts"] = STARTS[rows]
        (2 * token_losses(wrapped, batch, "frozen").sum()).backward()  # DDP takes the mean
    found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # as in tests/test_detached.py


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """DDP over gloo: both ranks have the whole batch's gradients for each adapter of a grid."""
    torch.multiprocessing.spawn(ranks_gradients, (str(tmp_path),), nprocs=2)
    with float64():
        model = two_key_adapters()
        expected = gradients(model, frozen_losses(model))
    for rank in (0, 1):
        assert differences(torch.load(tmp_path / f"{rank}.pt"), expected) < EQUAL
