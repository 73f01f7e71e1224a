"""A frozen stage's contexts, read by the model once and kept in files until the stage ends."""

import hashlib
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from sftkey.generation.generate import inferring
from sftkey.models.key_pass import key_adapters
from sftkey.training.detached import Aligned

LOGGER = logging.getLogger("sftkey")
NUM_MEASURED = 3  # batches, before it is decided whether the files pay off
NUM_SAMPLES = 4096  # numbers of a base weight that its fingerprint is made from


class ContextCache:
    """Keys and values of each batch's context, one safetensors file a batch, memory-mapped.

    A file belongs to its batch and to the model that read it, by its name; the key's adapters don't
    count. It is checked when a process opens it for the first time, and written again if it is
    torn. Contexts beyond `limit_bytes` are read by the model as ever. With `must_pay` the files are
    given up if reading them and writing them takes longer than the model.
    """

    def __init__(
        self, folder: Path, model: torch.nn.Module, limit_bytes: int, must_pay: bool
    ) -> None:
        self.folder, self.limit_bytes, self.must_pay = folder, limit_bytes, must_pay
        self.active = True
        self._model = fingerprint(model)
        self._checked: set[str] = set()
        self._seconds: list[tuple[float, float]] = []  # of the model; of writing and reading
        folder.mkdir(parents=True, exist_ok=True)
        self._used = sum(file.stat().st_size for file in folder.iterdir())

    def read(self, batch: Aligned, config: Any, make: Callable[[], DynamicCache]) -> DynamicCache:
        """Return the cache of a batch's C columns of context: from its file, else from `make`."""
        if not self.active:
            return make()
        file = self.folder / f"{self._name(batch)}.safetensors"
        found = self._load(file, batch, config)
        if found is not None:
            return found
        start = time.perf_counter()
        made = make()
        if batch.input_ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if self._write(file, made) and self.must_pay and len(self._seconds) < NUM_MEASURED:
            self._checked.discard(file.stem)  # so that reading takes what it takes at most
            self._load(file, batch, config)
            self._seconds.append((seconds, time.perf_counter() - start - seconds))
            of_model, of_files = (sum(each) for each in zip(*self._seconds, strict=True))
            if len(self._seconds) == NUM_MEASURED and of_files >= of_model:
                LOGGER.info("contexts are read anew in each epoch: files would take longer here")
                self.remove()
        return made

    def remove(self) -> None:
        """Remove the files."""
        self.active = False
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, batch: Aligned) -> str:
        digest = hashlib.sha256(self._model)
        for each in (batch.input_ids, batch.attention_mask, batch.position_ids):
            context = each[:, : batch.num_context].contiguous().cpu()
            digest.update(str(tuple(context.shape)).encode())
            digest.update(context.numpy().tobytes())
        return digest.hexdigest()

    def _load(self, file: Path, batch: Aligned, config: Any) -> DynamicCache | None:
        """Return what a file holds; None where there is none, or it is torn."""
        if not file.exists():
            return None
        device = batch.input_ids.device
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                if file.stem not in self._checked and opened.metadata() != _sums(tensors):
                    return None
        except (SafetensorError, OSError):
            return None
        self._checked.add(file.stem)
        cache = DynamicCache(config=config)
        for number, each in enumerate(cache.layers):
            layer: Any = each
            if f"{number}.keys" in tensors:
                keys, values = tensors[f"{number}.keys"], tensors[f"{number}.values"]
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                if layer.is_sliding:  # it keeps its window alone, and counts what it saw
                    layer.cumulative_length = batch.num_context
        return cache

    def _write(self, file: Path, cache: DynamicCache) -> bool:
        """Write a cache, if there is room; the file appears when it is whole."""
        tensors: dict[str, torch.Tensor] = {}
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            if layer.is_initialized:
                tensors[f"{number}.keys"] = layer.keys.cpu().contiguous()
                tensors[f"{number}.values"] = layer.values.cpu().contiguous()
        size = sum(each.nbytes for each in tensors.values())
        if self._used + size > self.limit_bytes:
            return False
        temporary = file.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata=_sums(tensors))
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            LOGGER.info("contexts are read anew in each epoch: %s", error)
            self.remove()
            return False
        self._used += size
        self._checked.add(file.stem)
        return True


def _sums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return a checksum of each tensor's bytes."""
    return {
        name: str(zlib.crc32(each.cpu().view(torch.uint8).numpy().data))
        for name, each in tensors.items()
    }


def fingerprint(model: torch.nn.Module) -> bytes:
    """Hash what a context's keys and values depend on: libraries, weights, the context's adapters.

    Adapters are hashed whole, and of larger weights numbers from all over them.
    """
    digest = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    of_key = [f".{name}." for name in key_adapters(model)]
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name for part in of_key):
            continue
        numbers = each.detach().flatten()
        step = 1 if ".lora_" in name else max(numbers.numel() // NUM_SAMPLES, 1)
        sampled = numbers[::step].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
        digest.update(sampled.numpy().tobytes())
    return digest.digest()


@torch.no_grad()
def bytes_a_token(model: Any) -> int:
    """Return what the keys and values of a token take, in bytes, by reading two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with inferring(model):  # no dropout, whose random numbers would be missing later
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    read = [layer for layer in layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in read) // 2
