"""Say what a bug report needs: versions, processor, GPUs, free memory and disk."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sftkey
from sftkey.commands.arguments import AsJSON
from sftkey.commands.terminal import available_cores, stdout_console
from sftkey.errors import first_line
from sftkey.files import GIB, free_bytes
from sftkey.recipe.upstream import LIBRARIES

PACKAGES = (*LIBRARIES, "datasets", "tokenizers", "huggingface_hub")


def env(as_json: AsJSON = False) -> None:
    """Print what a bug report needs: versions, GPUs, memory."""
    # No name, path or variable of the user's is printed.
    found = surroundings()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = stdout_console()
    for line in lines(found):
        console.print(line)


def surroundings() -> dict[str, Any]:
    """Return it as plain data; memory and disk are in GiB, a missing package is null.

    A torch that can't be imported is a finding, not an error: its message stands under `torch`.
    """
    found: dict[str, Any] = {
        "sftkey": sftkey.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": available_cores(),
        "free_disk_gib": _gib(free_bytes(Path())),
    }
    try:
        return found | _seen_by_torch()
    except Exception as error:  # a broken install fails in many ways, and is why somebody asks
        return found | {"torch": f"can't be used: {first_line(error)}"}


def _seen_by_torch() -> dict[str, Any]:
    """Return the processor's features, the free memory, and the GPUs with theirs."""
    import torch

    from sftkey.models.device import free_bytes as free_memory

    # Not every torch that sftkey runs with lists them.
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": features.get("cpu_name", platform.processor()),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": sorted(name for name, has in features.items() if has is True),
        "free_memory_gib": _gib(free_memory()),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "memory_gib": _gib(total),
        "free_gib": _gib(free),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Write it in lines of a name and a value."""
    for name, value in found.items():
        if name == "packages":
            for package, number in value.items():
                yield f"{package}: {number or 'not installed'}"
        elif name == "gpus":
            for number, gpu in enumerate(value):
                about = "{name}, {memory_gib} GiB, {free_gib} free, capability {capability}"
                yield f"GPU {number}: {about.format(**gpu)}"
            if not value:
                yield "GPUs: none"
        else:
            shown = " ".join(value) if isinstance(value, list) else value
            if value is None or isinstance(value, bool):
                shown = {None: "none", True: "yes", False: "no"}[value]
            unit = " GiB" if name.endswith("_gib") else ""
            yield f"{name.removesuffix('_gib').replace('_', ' ')}: {shown}{unit}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 1)
