"""What the plan says that a batch needs is what autograd keeps, and what is measured."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from sftkey.memory_plan import activations as plan_activations
from sftkey.memory_plan.activations import Batch, kept_bytes, passing
from sftkey.memory_plan.held import Setting
from sftkey.memory_plan.shape import FAMILIES, ModelShape, shape_of
from sftkey.training import detached, losses

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LENGTH = 96
WITHOUT_SDPA = {"gemma2"}  # its attention caps its logits


def made(family: str, **fields: Any) -> tuple[Any, ModelShape]:
    """Make a family's config, and the shape that is read from what would be its config.json."""
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    return config, shape_of({**config.to_diff_dict(), "model_type": family}, family)


def setting_for(shape: ModelShape, **changed: Any) -> Setting:
    """Give the setting of a LoRA adapter on all modules, on a CPU in float32."""
    plain = Setting(
        kind="cpu",
        quantized=False,
        weight_bytes=4,
        compute_bytes=4,
        mixed=False,
        attention="eager" if shape.family in WITHOUT_SDPA else "sdpa",
        context="exact",
        checkpointing=False,
        full=False,
        adapted=shape.linears,
        rank=4,
        dropout=False,
        trained_rows=0,
        members=1,
        context_rank=0,
        optimizer="adamw_torch_fused",
        accumulated=True,
    )
    return replace(plain, **changed)


def kept_by_autograd(config: Any, setting: Setting, batch: Batch, quantized: Any = None) -> int:
    """Run a model's layers and add up what autograd keeps beside the weights."""
    model = quantized or AutoModelForCausalLM.from_config(
        config, attn_implementation=setting.attention
    )
    if setting.mixed and not setting.full and not quantized:
        model = model.bfloat16()
    if not setting.full:
        dropout = 0.1 if setting.dropout else 0.0
        targets = [each.name.rpartition(".")[2] for each in setting.adapted]
        lora = LoraConfig(r=setting.rank, lora_dropout=dropout, target_modules=targets)
        model = get_peft_model(model, lora).get_base_model()
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.enable_input_require_grads()  # else the first layer keeps a little less than the others
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    ids = torch.randint(2, 90, (batch.rows, batch.length))
    mask = torch.ones_like(ids)
    if batch.padded:
        mask[0, -5:] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed),
    ):
        held = model.train().base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert held.last_hidden_state.requires_grad
    return sum(each.untyped_storage().nbytes() for each in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_as_the_model_has_them(family: str) -> None:
    """Every parameter counts once: tied heads, biases, norms of heads, fused matrices."""
    known = AutoConfig.for_model(family).to_dict()
    biases = {key: True for key in ("attention_bias", "mlp_bias") if key in known}
    for fields in ({}, biases, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        config, shape = made(family, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        assert shape.numel == sum(each.numel() for each in model.parameters())
        windows = [
            getattr(each, "sliding_window", None) for each in DynamicCache(config=config).layers
        ]
        assert list(shape.windows) == windows


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "dropout": {"dropout": True},
    "eager": {"attention": "eager"},
    "eager, dropout": {"attention": "eager", "dropout": True},
    "eager, full": {"attention": "eager", "full": True, "adapted": ()},
    "bfloat16": {"mixed": True, "compute_bytes": 2, "weight_bytes": 2},
    "bfloat16, dropout": {"mixed": True, "compute_bytes": 2, "weight_bytes": 2, "dropout": True},
    "bfloat16, eager": {
        "mixed": True,
        "compute_bytes": 2,
        "weight_bytes": 2,
        "attention": "eager",
    },
    "full": {"full": True, "adapted": ()},
    "full, bfloat16": {"full": True, "adapted": (), "mixed": True, "compute_bytes": 2},
}


@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_activations_are_what_autograd_keeps(family: str, name: str, padded: bool) -> None:
    """In every setting, for rows of one length and of several."""
    config, shape = made(family)
    setting = setting_for(shape, **SETTINGS[name])
    batch = Batch(2, LENGTH, LENGTH, padded)
    measured = kept_by_autograd(config, setting, batch)
    assert kept_bytes(shape, setting, batch) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_every_family(family: str) -> None:
    """A family's own norms, biases and matrices keep what is planned."""
    config, shape = made(family)
    setting = setting_for(shape)
    batch = Batch(1, LENGTH, LENGTH)
    measured = kept_by_autograd(config, setting, batch)
    assert kept_bytes(shape, setting, batch) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("method", ["plain", "checkpointed", "detached"])
def test_peak_is_what_is_measured(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the toy shape rises as planned, and holds what is planned, to the byte."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import plan

    (row,) = plan.measured("cpu", "toy", method, (256,), 0.0, nullcontext())
    assert abs(row.error) < plan.LIMITS["cpu"]
    assert row.planned_held == row.measured_held


@pytest.mark.parametrize("on_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_nf4_modules_share_their_inputs_on_cuda(
    family: str, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There peft finds autocast on, and hands inputs on as they come."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from models import Shape, made_model

    model = made_model(Shape(family, {**SIZES, "model_type": family}, quantized=True), "cpu")
    config, shape = made(family)
    kind = "cuda" if on_cuda else "cpu"
    setting = setting_for(shape, **SETTINGS["bfloat16"], quantized=True, kind=kind)
    batch = Batch(2, LENGTH, LENGTH)
    asked = torch.is_autocast_enabled

    def enabled(*device: str) -> bool:
        return asked(*device) if device else on_cuda  # without a device, CUDA is meant

    monkeypatch.setattr(torch, "is_autocast_enabled", enabled)
    measured = kept_by_autograd(config, setting, batch, model)
    assert kept_bytes(shape, setting, batch) == pytest.approx(measured, rel=0.03)


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURED = BENCHMARKS / "plan_h100.jsonl"
UNSEEN = BENCHMARKS / "key_stage_h100.jsonl"  # whole steps, which fitted nothing


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("plan")


@pytest.mark.parametrize("line", MEASURED.read_text().splitlines())
def test_the_plan_is_what_a_gpu_measured(line: str, plan: Any) -> None:
    """The step's peak and all memory lie within 6% of what `plan.py --device cuda` measured."""
    row = json.loads(line)
    method, length = row["method"], row["length"]
    shape = replace(
        plan.SHAPES[row["shape"]], quantized=True, checkpointing=method == "checkpointed"
    )
    rows = plan.Batch(1, length, plan.NUM_KEY)
    held, peak = plan.planned("cuda", shape, method, rows, plan.labelled(rows, method))
    assert peak == pytest.approx(row["measured_peak"], rel=0.06)
    assert held + peak == pytest.approx(row["measured_held"] + row["measured_peak"], rel=0.06)


@pytest.mark.parametrize("line", [x for x in UNSEEN.read_text().splitlines() if '"trl"' not in x])
def test_the_plan_is_what_a_gpu_measured_later(line: str, plan: Any) -> None:
    """All memory of a 7B step, keys and rows four times as long, lies within 3%.

    The peak of `key_stage.py --device cuda` is above weights and optimizer: gradients count.
    """
    row, shape = json.loads(line), plan.SHAPES["7b"]
    rows = plan.Batch(row["rows"], row["tokens"], row["key_tokens"])
    whole = row["loss_on"] == "completion"
    num_labelled = plan.labelled(rows, "exact" if whole else "detached")
    held, peak = plan.planned("cuda", shape, row["method"], rows, num_labelled)
    model = shape_of(shape.config, shape.name)
    gradients = 4 * 16 * model.layers * sum(each.inputs + each.outputs for each in model.linears)
    assert held + peak == pytest.approx(held - gradients + row["peak_gib"] * 2**30, rel=0.03)


@pytest.mark.parametrize("context", ["exact", "detached", "frozen"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_more_needs_more(family: str, context: str) -> None:
    """Neither longer rows nor more of them ever need less, so what fits can be searched."""
    _, shape = made(family, sliding_window=64)
    for kind in ("cpu", "cuda"):
        setting = setting_for(shape, context=context, kind=kind, checkpointing=True)
        for rows in (1, 2, 3):
            sizes = [_total(shape, setting, rows, 64 * n) for n in range(1, 130)]
            assert sizes == sorted(sizes)
        sizes = [_total(shape, setting, rows, 640) for rows in range(1, 40)]
        assert sizes == sorted(sizes)


def _total(shape: ModelShape, setting: Setting, rows: int, length: int) -> float:
    labelled = length if setting.context == "exact" else min(60, length - 2)
    needs = passing(shape, setting, Batch(rows, length, labelled, rows > 1))
    return needs.activations + needs.logits + needs.cache


def test_tiles_are_those_of_the_losses() -> None:
    """The plan repeats sizes of the training room, whose import would cost it seconds."""
    assert plan_activations.TILE_LOGITS == losses.TILE_LOGITS
    assert plan_activations.TILE_ROWS == losses.TILE_ROWS
    assert plan_activations.WIDEST_TILE == losses.WIDEST_TILE
    assert plan_activations.CONTEXT_TOKENS == detached.CHUNK_TOKENS
