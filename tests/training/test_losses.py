import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer import utils as trl_utils

from sftkey.training import losses as losses_module
from sftkey.training.losses import Beside, add_token_losses, in_tiles, token_losses
from tests.benchmarks.measuring import peak_bytes
from tests.support.models import (
    EQUAL,
    FAMILIES,
    KEYS,
    ROUNDED,
    differences,
    float64,
    gradients,
    made_batch,
    made_family,
    nf4,
    plain_losses,
    with_lora,
)


def distances(model: Any, context: Any = "exact") -> tuple[float, float]:
    """Compare losses and gradients with those from the model's own, whole logits."""
    batch = made_batch()
    expected = plain_losses(model, batch).detach()
    expected_gradients = gradients(model, lambda: plain_losses(model, batch))
    add_token_losses(model.get_base_model() if hasattr(model, "peft_config") else model)
    found = token_losses(model, batch)
    loss = (found - expected).abs().max().item()
    return loss, differences(
        gradients(model, lambda: token_losses(model, batch)), expected_gradients
    )


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the positions that reach TRL's head and the width of its tiles, call by call."""
    original = trl_utils._ChunkedLogProbFunction
    seen: list[tuple[int, int]] = []

    class Recorder:
        @staticmethod
        def apply(hidden: Any, weight: Any, bias: Any, labels: Any, heat: Any, *rest: Any) -> Any:
            seen.append((hidden.shape[0], rest[0]))
            return original.apply(hidden, weight, bias, labels, heat, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Recorder)
    return seen


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_equal_those_of_whole_logits(name: str) -> None:
    """Tied and untied heads, soft-capping, scaling, windows, experts."""
    loss, gradient = distances(made_family(name))
    assert loss < EQUAL
    assert gradient < EQUAL


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_computed_beside_sees_the_models_own_logits(name: str) -> None:
    """At the places that are asked for, else at labels; nothing of the losses changes."""
    model, batch = made_family(name), made_batch()
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        expected = model(**inputs).logits.square().sum(-1)[:, :-1]
    add_token_losses(model)
    losses = token_losses(model, batch)
    places = torch.zeros_like(batch["labels"], dtype=torch.bool)
    places[:, 2:5] = True

    def squares(states: torch.Tensor, logits: Any) -> torch.Tensor:
        return in_tiles(lambda tile: logits(tile).square().sum(-1), 2**22, states)

    for beside, at in [(Beside(squares), losses != 0), (Beside(squares, places), places[:, :-1])]:
        found = token_losses(model, {**batch, "beside": [beside]})
        assert torch.equal(found[0], losses)
        assert torch.equal(found[1] != 0, at)
        assert torch.allclose(found[1][at], expected[at], rtol=1e-9)
    again = model(**inputs).logits  # nothing is left of it
    assert torch.allclose(again.square().sum(-1)[:, :-1], expected, rtol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("context", ["exact", "detached"])
def test_values_beside_stand_at_the_place_that_predicts(context: Any) -> None:
    """Behind a cache as in a whole pass."""
    model, batch = made_family("qwen3"), made_batch()
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        expected = model(**inputs).logits.square().sum(-1)[:, :-1]
    add_token_losses(model, context)
    beside = Beside(lambda states, logits: logits(states).square().sum(-1))
    found = token_losses(model, {**batch, "beside": [beside]}, context)
    at = batch["labels"][:, 1:] != -100
    assert torch.equal(found[1] != 0, at)
    assert torch.allclose(found[1][at], expected[at], rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "numbers", "bound"),
    [(with_lora, float64, EQUAL), (nf4, nullcontext, ROUNDED)],
    ids=["lora", "qlora"],
)
def test_adapters_train_on_the_same_losses(
    make: Any, numbers: Any, bound: float, tmp_path: Path
) -> None:
    """LoRA on plain and on NF4 weights: losses and gradients equal those of whole logits."""
    with numbers():
        assert max(distances(make("qwen3", tmp_path))) < bound


def test_only_labelled_positions_reach_the_head(tiles: list[tuple[int, int]]) -> None:
    """Of 120 positions, padding included, the head sees those that predict the key."""
    model, batch = made_family("llama"), made_batch()
    add_token_losses(model)
    losses = token_losses(model, batch)
    assert [count for count, _ in tiles] == [sum(KEYS)]
    assert torch.equal(losses != 0, batch["labels"][:, 1:] != -100)


@pytest.mark.usefixtures("in_float64")
def test_a_device_with_triton_leaves_it_to_trl(
    tiles: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There TRL's own head takes labelled positions only, in its own tiles; the same losses."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
    monkeypatch.setattr(losses_module, "_tiles_for", None)
    loss, gradient = distances(made_family("gemma2"))
    assert loss < EQUAL
    assert gradient < EQUAL
    assert set(tiles) == {(sum(KEYS), trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_losses_are_the_same() -> None:
    """TRL's Triton kernels give the losses that the CPU gives."""
    model, batch = made_family("gemma3"), made_batch()
    add_token_losses(model)
    expected = token_losses(model, batch)
    found = token_losses(model.cuda(), {key: value.cuda() for key, value in batch.items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=ROUNDED, atol=ROUNDED)


def test_logits_take_bounded_memory() -> None:
    """1,024 labelled positions with a vocabulary of 152k: 622 MB of logits in less than 60 MB."""
    fields = {"vocab_size": 152_000, "hidden_size": 8, "num_hidden_layers": 1, "pad_token_id": None}
    model = made_family("llama", **fields)
    model.requires_grad_(False)
    ids = torch.randint(152_000, (2, 513), generator=torch.Generator().manual_seed(0))
    add_token_losses(model)
    states = torch.zeros(8, requires_grad=True)
    model.model.norm.register_forward_hook(lambda module, args, output: output + states)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert peak_bytes(lambda: token_losses(model, inputs).sum().backward()) < 60e6
    assert states.grad is not None


@pytest.mark.parametrize(
    ("positions", "width"), [(1, 32768), (64, 16384), (1024, 1024), (9999, 256)]
)
def test_tiles_fit_a_cpus_cache_and_others_keep_trls(positions: int, width: int) -> None:
    """A tile holds 2^20 logits on a CPU, whatever the batch; afterwards TRL's width is back."""
    before = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with losses_module._tiles_for(positions, torch.device("cpu")):
        assert width == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with losses_module._tiles_for(positions, torch.device("meta")):
        assert before == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert before == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE


@pytest.mark.parametrize("context", ["exact", "detached"])
def test_rows_without_labels_give_zeros_that_have_gradients(context: Any) -> None:
    """A process whose rows train nothing still takes part in the backward pass of all."""
    model, batch = made_family("llama"), made_batch()
    batch["labels"][:] = -100
    add_token_losses(model)
    losses = token_losses(model, batch, context)
    assert losses.shape == (3, 39)
    assert not losses.any()
    losses.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_without_the_keyword_the_model_is_what_it_was() -> None:
    """Logits and the signature that `generate` checks stay."""
    model, batch = made_family("llama"), made_batch()
    logits, signature = model(batch["input_ids"]).logits, inspect.signature(model.forward)
    add_token_losses(model)
    assert torch.equal(model(batch["input_ids"]).logits, logits)
    assert inspect.signature(model.forward) == signature


def test_a_head_that_forgets_soft_capping_is_found() -> None:
    """The comparison with whole logits fails where the head doesn't know of soft-capping."""
    model = made_family("gemma2")
    forgetful = made_family("gemma2", final_logit_softcapping=None)
    batch = made_batch()
    add_token_losses(forgetful)
    distance = token_losses(forgetful, batch) - plain_losses(model, batch)
    assert distance.abs().max() > 0.1


def test_a_head_that_leaves_out_the_last_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with whole logits fails where each row's last label isn't projected."""
    original = losses_module._labelled_losses

    def shortened(backbone: Any, fused: Any, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        places = torch.arange(labels.shape[1])
        last = (places * (labels != -100)).argmax(1)
        return original(backbone, fused, labels.scatter(1, last[:, None], -100), **inputs)

    monkeypatch.setattr(losses_module, "_labelled_losses", shortened)
    loss, gradient = distances(made_family("llama"))
    assert loss > 0.1
    assert gradient > 1e-3
