"""What a frozen stage reads of its contexts is kept in files, and is what the model would read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.recipe.load import load_recipe
from sftkey.training import context_cache, detached
from sftkey.training.context_cache import ContextCache, bytes_a_token
from sftkey.training.detached import align
from sftkey.training.losses import add_token_losses, token_losses
from tests.support.models import STARTS, made_batch, made_family
from tests.training.test_frozen import adapted, lora
from tests.training.test_run import adapter_of, done

MANY = 2**30


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the tokens of each context that a model reads."""
    counted: list[int] = []
    real = detached._read_context

    def counting(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(batch.num_context)
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(detached, "_read_context", counting)
    return counted


def model_of(family: str) -> Any:
    """Make a model with an adapter of the context and one of the key."""
    model = adapted(made_family(family), key=lora(r=2))
    add_token_losses(model.get_base_model(), "frozen")
    return model


def losses(model: Any, cache: ContextCache | None) -> torch.Tensor:
    """Return a frozen stage's losses on a batch."""
    inputs: dict[str, Any] = made_batch() | {"key_starts": STARTS}
    inputs["context_cache"] = cache.read if cache else None
    return token_losses(model, inputs, "frozen").detach()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_file_holds_is_what_the_model_reads(
    family: str, read: list[int], tmp_path: Path
) -> None:
    """Bit for bit the same losses, from full and from sliding layers, in another process, too."""
    model = model_of(family)
    expected = losses(model, None)
    cache = ContextCache(tmp_path, model, MANY, must_pay=False)
    read.clear()
    for each in (cache, cache, ContextCache(tmp_path, model, MANY, must_pay=False)):
        assert torch.equal(losses(model, each), expected)
    assert len(read) == 1


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_torn_file_is_written_again(read: list[int], tmp_path: Path) -> None:
    """A file that is cut short, or has other bytes than were written, is read by the model."""
    model = model_of("llama")
    expected = losses(model, ContextCache(tmp_path, model, MANY, must_pay=False))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for torn in (whole[:-100], whole[:-8] + bytes(8), b""):
        file.write_bytes(torn)
        read.clear()
        cache = ContextCache(tmp_path, model, MANY, must_pay=False)
        assert torch.equal(losses(model, cache), expected)
        again = ContextCache(tmp_path, model, MANY, must_pay=False)
        assert torch.equal(losses(model, again), expected)
        assert len(read) == 1


def test_another_context_has_other_files(read: list[int], tmp_path: Path) -> None:
    """Where the adapter before has changed by one number, its old files aren't used."""
    model = model_of("llama")
    losses(model, ContextCache(tmp_path, model, MANY, must_pay=False))
    for name, changed in model.named_parameters():
        if (".default." in name or ".key." in name) and ".layers.1." not in name:
            changed.data.view(-1)[-1] += 1
            read.clear()
            losses(model, ContextCache(tmp_path, model, MANY, must_pay=False))
            assert len(read) == (1 if ".default." in name else 0), name


def test_files_stay_within_the_limit(read: list[int], tmp_path: Path) -> None:
    """A context for which there is no room is read as ever."""
    model = model_of("llama")
    batch = align(*(made_batch()[name] for name in ("input_ids", "attention_mask", "labels")))
    size = bytes_a_token(model) * batch.input_ids[:, : batch.num_context].numel()
    for limit, files in ((size // 2, 0), (2 * size, 1)):
        cache = ContextCache(tmp_path, model, limit, must_pay=False)
        assert torch.equal(losses(model, cache), losses(model, cache))
        assert len(list(tmp_path.iterdir())) == files


@pytest.mark.parametrize("slow", [False, True])
def test_files_that_do_not_pay_are_given_up(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After three batches it is decided by what they took."""
    steps = (1, 5) if slow else (5, 1)  # of the model; of the files
    times = iter([0, steps[0], sum(steps)] * 10)
    monkeypatch.setattr(context_cache.time, "perf_counter", lambda: next(times))
    model = model_of("llama")
    cache = ContextCache(tmp_path / "contexts", model, MANY, must_pay=True)
    with caplog.at_level("INFO", logger="sftkey"):
        for number in range(3):
            assert cache.active
            inputs: dict[str, Any] = made_batch() | {"key_starts": STARTS}
            inputs["context_cache"] = cache.read
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][:, 0] = number
            token_losses(model, inputs, "frozen")
    assert cache.active != slow
    assert (tmp_path / "contexts").exists() != slow
    expected = ["contexts are read anew in each epoch: files would take longer here"]
    assert caplog.messages == (expected if slow else [])


def test_a_stage_trains_the_same_adapter_from_files(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    read: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three epochs with dropout: one reading of each batch, the same adapter, no file left."""
    trainer = {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "no"}
    stage = {"name": "key", "loss_on": "key", "context": "frozen", "trainer": trainer}
    recipe = tiny_recipe(
        rows=28, lora={"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}, stages=[stage]
    )
    found, readings = {}, {}
    for setting in ("off", "1GB"):
        read.clear()
        with caplog.at_level("INFO", logger="sftkey"):
            run = done(recipe, tmp_path / setting, f"stages.key.context_cache={setting}")
        found[setting], readings[setting] = adapter_of(run, 0), len(read)
        assert not (run.ledger.stage_folder(0) / "contexts").exists()
    assert all(torch.equal(each, found["off"][name]) for name, each in found["1GB"].items())
    num_batches = 6  # of 12 training rows
    assert readings["off"] - readings["1GB"] == 2 * num_batches
    (line,) = [each for each in caplog.messages if "contexts are read" in each]
    assert line.startswith("contexts are read once: 0 KiB a token, 0.00 GiB of contexts, kept in ")


def test_settings_of_the_cache(tiny_recipe: Callable[..., Path]) -> None:
    """`off` is false to YAML; a size has a unit."""
    stages = [{"name": "key", "loss_on": "key", "context": "frozen"}]
    recipe = tiny_recipe(stages=stages)
    for given, kept in (("off", "off"), ("1.5GB", "1.5GB"), ("auto", "auto")):
        loaded = load_recipe(recipe, [f"stages.key.context_cache={given}"])
        assert loaded.stages[0].context_cache == kept
