"""What a frozen stage's start is measured by, in bfloat16: healthy runs pass, each fault falls."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.errors import RunError
from sftkey.training import frozen, stage_model, validating
from sftkey.training.losses import token_losses
from sftkey.training.soundness import check_behind_cache
from tests.support.tiny import made_model, write_recipe
from tests.training.test_run import Killed, done, kill_at_step

STAGES = [
    {"name": "completion", "loss_on": "completion"},
    {"name": "key", "loss_on": "key", "context": "frozen"},
]


@pytest.fixture(scope="module")
def before_key(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run up to the frozen stage's first step in bfloat16, on a model with large weights."""
    folder = tmp_path_factory.mktemp("before-key")
    model = made_model(tiny_tokenizer, hidden_size=128, intermediate_size=256)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    half = {"name_or_path": str(folder / "model"), "quantization": "none", "dtype": "bfloat16"}
    recipe = write_recipe(folder, folder / "model", model=half, stages=STAGES)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(patch, "key", 0)
        with pytest.raises(Killed):
            done(recipe, folder / "runs")
    return folder


@pytest.fixture
def again(before_key: Path, tmp_path: Path) -> Callable[[], Any]:
    """Return a function that goes on with a copy of that run."""
    runs = shutil.copytree(before_key / "runs", tmp_path / "runs")
    return lambda: done(before_key / "tiny.yaml", runs)


def test_a_healthy_stage_starts_and_says_how_the_two_ways_compare(before_key: Path) -> None:
    """The full pass is the one before, bit for bit; behind the cache rounding moves each token."""
    ledger = json.loads((before_key / "runs/tiny/ledger.json").read_text())
    first, second = ledger["stages"]
    behind = second["behind_cache"]
    assert abs(behind["loss"] - behind["full_pass"]) <= behind["bound"]
    assert behind["noise"] < 0.1 * behind["spread"]
    assert second["validation"]["start"]["thinking"] == first["validation"]["end"]["thinking"]


def noisy(where: str) -> Callable[..., torch.Tensor]:
    """Return a `token_losses` that rounds as a large model does in 16 bits, in contexts `where`."""
    dice = torch.Generator().manual_seed(5)

    def read(model: Any, inputs: Any, context: Any = "exact") -> torch.Tensor:
        losses = token_losses(model, inputs, context)
        noise = torch.randn(losses.shape, generator=dice).abs() * 0.06 - 0.04
        return losses + noise * (losses != 0) if context == where else losses

    return read


def test_noise_behind_the_cache_stops_no_healthy_stage(
    again: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as a large model's in 16 bits: the start is judged by a pass that has none.

    The noise's mean over the key's tokens is more than the tolerance of the hand-off.
    """
    monkeypatch.setattr(frozen, "token_losses", noisy("frozen"))
    behind = again().ledger.stages[1].behind_cache
    assert abs(behind["loss"] - behind["full_pass"]) > 1e-3


def scaled(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter half as strong again."""
    adapted = load(model, *args, **kwargs)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.mul_(1.5)
    return adapted


def swapped(model: Any, adapter: Any, base: Any, **kwargs: Any) -> Any:
    """Load an adapter that another run might have written."""
    adapted = load(model, adapter, base, **kwargs)
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_" in name:
                each.copy_(
                    each.flatten()[torch.randperm(each.numel(), generator=dice)].view_as(each)
                )
    return adapted


load = stage_model.load_adapter


@pytest.mark.parametrize("fault", [scaled, swapped])
def test_another_adapter_falls(
    fault: Any, again: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full pass without the key adapter tells it, token for token."""
    monkeypatch.setattr(stage_model, "load_adapter", fault)
    with pytest.raises(RunError, match="expected to start where the previous stage ended"):
        again()


def test_other_batches_stop_no_healthy_stage(
    before_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are validated one at a time are rounded otherwise than several at once.

    How much so depends on the processor; here it is more than the same batches may differ by. An
    adapter half as strong again falls all the same.
    """
    monkeypatch.setattr(validating, "token_losses", noisy("exact"))
    key = "{name: key, loss_on: key, trainer: {per_device_eval_batch_size: 1}}"
    one = f"stages=[{{name: completion, loss_on: completion}}, {key}]"
    runs = shutil.copytree(before_key / "runs", tmp_path / "healthy")
    first, second = done(before_key / "tiny.yaml", runs, one).ledger.stages
    end, start = first.validation["end"], second.validation["start"]
    assert max(abs(start[name] - end[name]) for name in start) > 1e-3

    monkeypatch.setattr(stage_model, "load_adapter", scaled)
    with pytest.raises(RunError, match="expected to start where the previous stage ended"):
        done(before_key / "tiny.yaml", shutil.copytree(before_key / "runs", tmp_path / "bad"), one)


@pytest.mark.parametrize("places", [1, -1])
def test_a_key_shifted_by_one_token_falls(
    places: int, again: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read behind the cache is then another key, whatever its losses are."""
    starts = frozen.key_starts
    monkeypatch.setattr(frozen, "key_starts", lambda ids: starts(ids) + places)
    with pytest.raises(RunError, match=r"and [1-9]\d* lie on the wrong side of it"):
        again()


def test_a_small_bias_falls_with_many_tokens_and_noise_passes_with_few() -> None:
    """The bound is six standard errors; noise as large as the losses' spread is no rounding."""
    told = {"loss": 1.02, "full_pass": 1.0, "spread": 1.5, "tokens": 100.0, "misplaced": 0.0}
    check_behind_cache({**told, "noise": 0.06, "bound": 0.036}, 1e-3, "stage")
    with pytest.raises(RunError):
        check_behind_cache({**told, "noise": 0.06, "bound": 0.0114}, 1e-3, "stage")
    with pytest.raises(RunError):
        check_behind_cache({**told, "noise": 0.6, "bound": 0.36}, 1e-3, "stage")
    with pytest.raises(RunError, match="and 8 lie on the wrong side"):
        check_behind_cache({**told, "noise": 0.06, "bound": 0.036, "misplaced": 8.0}, 1e-3, "stage")
