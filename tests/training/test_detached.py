import contextlib
import doctest
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from sftkey.errors import ModelError
from sftkey.training import detached
from sftkey.training.losses import add_token_losses, token_losses
from tests.benchmarks.measuring import peak_bytes
from tests.support.models import (
    EQUAL,
    FAMILIES,
    ROUNDED,
    SHAPE,
    STARTS,
    VOCABULARY,
    differences,
    float64,
    gradients,
    made_batch,
    made_family,
    nf4,
    plain_losses,
    with_lora,
)


@contextmanager
def constant_contexts(model: Any) -> Iterator[None]:
    """Let every layer's attention take the context's keys and values as constants.

    This is the oracle: one pass over whole rows, one graph, which has nothing of a cache.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = sys.modules[type(getattr(model, "base_model", model)).__module__]
    if hasattr(model, "peft_config"):
        module = sys.modules[type(model.get_base_model()).__module__]
    name = model.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name, module.eager_attention_forward)

    def attend(
        layer: Any, query: Any, keys: torch.Tensor, values: torch.Tensor, mask: Any, **rest: Any
    ) -> Any:
        constant = (torch.arange(keys.shape[2]) < STARTS[:, None])[:, None, :, None]
        keys = torch.where(constant, keys.detach(), keys)
        values = torch.where(constant, values.detach(), values)
        return plain(layer, query, keys, values, mask, **rest)

    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS[name])
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("oracle")
    try:
        yield
    finally:
        base.set_attn_implementation(name)


def distances(model: Any) -> tuple[float, float]:
    """Compare detached losses and gradients with the oracle's."""
    batch = made_batch()
    with constant_contexts(model):
        expected = plain_losses(model, batch).detach()
        expected_gradients = gradients(model, lambda: plain_losses(model, batch))
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    add_token_losses(base, "detached")
    loss = (token_losses(model, batch, "detached") - expected).abs().max().item()
    found = gradients(model, lambda: token_losses(model, batch, "detached"))
    return loss, differences(found, expected_gradients)


def test_doctests_hold() -> None:
    """The example of aligned rows is what the code gives."""
    assert doctest.testmod(detached).failed == 0


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("chunk_tokens", [4096, 24], ids=["one-pass", "chunks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_equal_the_oracles(
    name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unequal contexts, windows shorter than these, chunked or not."""
    monkeypatch.setattr(detached, "CHUNK_TOKENS", chunk_tokens)
    loss, gradient = distances(made_family(name))
    assert loss < EQUAL
    assert gradient < EQUAL


@pytest.mark.parametrize(
    ("make", "numbers", "bound"),
    [(with_lora, float64, EQUAL), (nf4, contextlib.nullcontext, ROUNDED)],
    ids=["lora", "qlora"],
)
def test_adapters_get_the_oracles_gradients(
    make: Any, numbers: Any, bound: float, tmp_path: Path
) -> None:
    """LoRA on plain and on NF4 weights."""
    with numbers():
        assert max(distances(make("qwen3", tmp_path))) < bound


@pytest.mark.usefixtures("in_float64")
def test_checkpointed_layers_keep_the_context() -> None:
    """One that computes its activations anew finds the context, and the key once."""
    model = made_family("llama")
    model.gradient_checkpointing_enable()
    model.train()
    loss, gradient = distances(model)
    assert loss < EQUAL
    assert gradient < EQUAL
    assert model.is_gradient_checkpointing


def test_no_gradient_reaches_a_token_of_the_context_alone() -> None:
    """The embedding of a token that stands in contexts only has no gradient; exact gives it one."""
    model, batch = made_family("llama"), made_batch()
    places = torch.arange(batch["input_ids"].shape[1])
    before = (places < STARTS[:, None]) & batch["attention_mask"].bool()
    behind = set(batch["input_ids"][~before].tolist())
    alone = [token for token in range(VOCABULARY) if token not in behind]
    add_token_losses(model, "detached")
    found = {
        context: gradients(model, lambda context=context: token_losses(model, batch, context))
        for context in ("exact", "detached")
    }
    embeddings = {name: each["model.embed_tokens.weight"] for name, each in found.items()}
    assert not embeddings["detached"][alone].any()
    assert embeddings["exact"][alone].any()
    assert embeddings["detached"][batch["input_ids"][0, STARTS[0]]].any()


def test_an_oracle_of_the_exact_gradient_would_differ() -> None:
    """The gradients through the reasoning are no small thing in these models."""
    model, batch = made_family("llama"), made_batch()
    exact = gradients(model, lambda: plain_losses(model, batch))
    with constant_contexts(model):
        assert differences(exact, gradients(model, lambda: plain_losses(model, batch))) > 0.1


@pytest.mark.usefixtures("in_float64")
def test_constant_keys_of_the_key_itself_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's gradients differ where the key's own keys and values are constants, too."""
    update = DynamicLayer.update

    def constant(
        self: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        return update(self, keys.detach(), values.detach(), *rest, **more)

    monkeypatch.setattr(DynamicLayer, "update", constant)
    loss, gradient = distances(made_family("llama"))
    assert loss < EQUAL
    assert gradient > 0.1


def test_a_key_that_begins_one_token_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses differ where the token that predicts the key's first one is in the context."""
    align = detached.align

    def late(ids: Any, mask: Any, labels: torch.Tensor, *rest: Any) -> detached.Aligned:
        first = (labels != -100).int().argmax(1, keepdim=True)
        return align(ids, mask, labels.scatter(1, first, -100), *rest)

    monkeypatch.setattr(detached, "align", late)
    assert distances(made_family("llama"))[0] > 0.1


def growth(length: int) -> float:
    """Return what doubling a context of `length` adds to the peak, in multiples of its cache."""
    fields = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    model = made_family("llama", **fields, num_hidden_layers=6)
    add_token_losses(model, "detached")
    peaks = []
    for num_tokens in (length, 2 * length):
        ids = torch.randint(2, VOCABULARY, (1, num_tokens))
        labels = ids.clone()
        labels[:, :-16] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        step = functools.partial(token_losses, model, batch, "detached")
        peaks.append(peak_bytes(lambda step=step: step().sum().backward()))
    return (peaks[1] - peaks[0]) / (
        length * 2 * 2 * 64 * 4 * 6
    )  # keys and values, heads, bytes, layers


def test_memory_grows_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads share each head of keys: kept copies would cost four times the cache more."""
    monkeypatch.setattr(detached, "CHUNK_TOKENS", 256)
    assert 1 <= growth(512) < 2.5
    monkeypatch.setattr(detached, "shared_keys", contextlib.nullcontext)
    assert growth(512) > 4


HINT = "\nhint: write context: exact in the stage"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (
            {
                "model_type": "qwen3_next",
                "layer_types": ["linear_attention", "linear_attention", "full_attention"],
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
            "LinearAttentionLayer",
        ),
        (
            {"model_type": "mamba2", "num_heads": 8, "head_dim": 8, "state_size": 8},
            "LinearAttentionLayer",
        ),
        ({"model_type": "rwkv", "attention_hidden_size": 32}, "a state of its own"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_models_that_keep_states_are_refused(fields: dict[str, Any], kept: str) -> None:
    """A state has no keys to be constants: refused before anything is trained."""
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    with torch.device("meta"):
        config = AutoConfig.for_model(**{**shape, **fields})
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError) as caught:
        add_token_losses(model, "detached")
    what = f"a model of this family keeps of a context more than keys and values: {kept}"
    assert str(caught.value) == f"{fields['model_type']}: {what}{HINT}"


def test_a_model_that_leaves_the_cache_aside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train the key on no context at all, without a word."""
    model = made_family("llama")
    add_token_losses(model, "detached")
    monkeypatch.setattr(detached, "cache_name", lambda backbone: "no_cache")
    with pytest.raises(ModelError) as caught:
        token_losses(model, made_batch(), "detached")
    what = "a model of this family doesn't keep its context in transformers' cache"
    assert str(caught.value) == f"llama: {what}{HINT}"


def ranks_gradients(rank: int, folder: str) -> None:
    """Take backward passes as one of two processes, which read unequal numbers of chunks."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    detached.CHUNK_TOKENS = 24
    with float64():
        grads = dict(both_gradients(rank))
    for name, found in grads.items():
        torch.save(found, f"{folder}/{name}{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking a gloo group down may wait for ever on a thread that wants the GIL


def both_gradients(rank: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Return a rank's gradients under DDP and FSDP2, exact and detached."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rows = [0] if rank == 0 else [1, 2]
    batch = {name: each[rows] for name, each in made_batch().items()}
    for kind in ("ddp", "fsdp"):
        model = made_family("qwen3")
        add_token_losses(model, "detached")
        if kind == "fsdp":
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for layer in (*model.model.layers, model):
                fully_shard(layer, mesh=mesh)
        wrapped = DistributedDataParallel(model) if kind == "ddp" else model
        for context in ("exact", "detached"):
            model.zero_grad()
            (2 * token_losses(wrapped, batch, context).sum()).backward()  # both take the mean
            found = {name: each.grad for name, each in model.named_parameters()}
            if kind == "fsdp":
                found = {name: each.full_tensor() for name, each in found.items()}
            yield f"{kind}-{context}", found


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """DDP and FSDP2 over gloo: both ranks have the whole batch's gradients, exact and detached."""
    torch.multiprocessing.spawn(ranks_gradients, (str(tmp_path),), nprocs=2)
    with float64():
        model, batch = made_family("qwen3"), made_batch()
        add_token_losses(model, "detached")
    for context in ("exact", "detached"):
        model.zero_grad()
        with float64():
            token_losses(model, batch, context).sum().backward()
        expected = {name: each.grad for name, each in model.named_parameters()}
        for name in (f"{kind}-{context}{rank}" for kind in ("ddp", "fsdp") for rank in (0, 1)):
            assert differences(torch.load(tmp_path / f"{name}.pt"), expected) < EQUAL, name
