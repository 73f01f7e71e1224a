"""The device of this process and the type that it computes well in."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from sftkey.errors import DeviceError, first_line
from sftkey.recipe.schema import ModelSection

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONTROL_GROUP = Path("/sys/fs/cgroup")
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"  # a plain RuntimeError of torch's
UNQUANTIZED = "write model.quantization=none"


@dataclass(frozen=True)
class Device:
    """Where a process computes, and in what."""

    kind: Literal["cuda", "mps", "cpu"]  # the backend
    index: int  # which GPU of the machine is this process's own; 0 elsewhere
    # The type of matrix products. Adapter weights are float32 whatever it is.
    compute_dtype: torch.dtype

    @property
    def torch_device(self) -> torch.device:
        """Return the device as torch takes it."""
        return torch.device(f"cuda:{self.index}" if self.kind == "cuda" else self.kind)

    @property
    def bf16(self) -> bool:
        """Say whether the trainer computes in bfloat16 (its own argument of this name)."""
        return self.compute_dtype == torch.bfloat16

    @property
    def fp16(self) -> bool:
        """Say whether the trainer computes in float16 (its own argument of this name)."""
        return self.compute_dtype == torch.float16


def choose_device(
    section: ModelSection, *, use_cpu: bool = False, env: Mapping[str, str] = os.environ
) -> Device:
    """Choose CUDA before MPS before the CPU, and the type that this device computes well in.

    bfloat16 on GPUs that have it in hardware (compute capability 8.0 and later), float16 on older
    ones. float32 on MPS, where nobody has measured another type with us, and on the CPU, where
    autocast costs more than it saves. `model.dtype` overrides.

    Args:
        section: Its `quantization` and `dtype` must be possible on the device.
        use_cpu: The trainer's argument of this name: take the CPU even where there is a GPU.
        env: `LOCAL_RANK` chooses the GPU; `ACCELERATE_USE_CPU` is how `accelerate launch --cpu`
            says `use_cpu`.

    Raises:
        DeviceError: The device can't do what the recipe asks; the hint says what to write instead.
    """
    use_cpu = use_cpu or launched_with("CPU", env)
    device = Device("cpu", 0, torch.float32)
    if not use_cpu and torch.cuda.is_available():
        device = _own_gpu(env)
    elif not use_cpu and torch.backends.mps.is_available():
        device = Device("mps", 0, torch.float32)
    refuse_fsdp(device.kind, env)
    if section.quantization == "nf4":
        _refuse_nf4(device.kind)
    if section.dtype in DTYPES:
        _refuse_dtype(section.dtype, device)
        return replace(device, compute_dtype=DTYPES[section.dtype])
    return device


def _own_gpu(env: Mapping[str, str]) -> Device:
    """Return this process's GPU; of several, transformers would split each batch over all."""
    count = torch.cuda.device_count()
    if count > 1 and "LOCAL_RANK" not in env:
        raise DeviceError(
            "cuda",
            f"expected one GPU for this process; it sees {count}",
            "launch with `accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m "
            "sftkey.train RECIPE`, or set CUDA_VISIBLE_DEVICES=0",
        )
    index = int(env.get("LOCAL_RANK", "0"))
    modern = torch.cuda.get_device_capability(index) >= (8, 0)
    return Device("cuda", index, torch.bfloat16 if modern else torch.float16)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device has no more memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_MESSAGE in str(error)


def has_cuda() -> bool:
    """Tell whether this machine has a GPU with CUDA, the one kind on which NF4 is quick."""
    return torch.cuda.is_available()


def launched_with(what: str, env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the launcher says `CPU`, `FSDP` or `DEEPSPEED` to its processes."""
    return env.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true", "yes")


def sharded() -> bool:
    """Tell whether no process holds the whole model (FSDP, DeepSpeed)."""
    return launched_with("FSDP") or launched_with("DEEPSPEED")


def free_bytes(env: Mapping[str, str] = os.environ, group: Path = CONTROL_GROUP) -> int:
    """Return the main memory that this process may take: its share, within a container's limit.

    `env` says how many processes share the machine, `group` what a container may use, and uses.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit: its text is "max"
        pass
    return free // int(env.get("LOCAL_WORLD_SIZE", "1"))


def refuse_fsdp(kind: str, env: Mapping[str, str]) -> None:
    """Refuse FSDP where accelerate would go on without it, and without a word."""
    if kind != "cuda" and launched_with("FSDP", env):
        raise DeviceError(
            kind,
            "expected GPUs: accelerate's FSDP shards nothing here, and each process would hold the "
            "whole model",
            "launch with `torchrun`, or with accelerate_configs/cpu.yaml",
        )


def _refuse_nf4(kind: str) -> None:
    if kind == "mps":
        raise DeviceError("mps", "model.quantization: nf4 needs CUDA or a CPU", UNQUANTIZED)
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        what = "model.quantization: nf4 needs bitsandbytes, which can't be imported here"
        raise DeviceError(kind, f"{what}: {first_line(error)}", UNQUANTIZED) from error


def _refuse_dtype(dtype: str, device: Device) -> None:
    if dtype == "bfloat16" and device.fp16:
        what = "model.dtype: bfloat16 needs a GPU of compute capability 8.0 or later"
        raise DeviceError(device.kind, what, "write model.dtype=float16")
    if dtype == "float16" and device.kind == "cpu":
        what = "model.dtype: float16 can't be trained on a CPU"
        raise DeviceError(device.kind, what, "write model.dtype=float32, or bfloat16")
