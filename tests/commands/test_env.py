"""`sftkey env` says what a bug report needs, on a machine whose torch is broken, too."""

import json
from typing import Any

import pytest
import torch

import sftkey
from sftkey.commands import env as command
from sftkey.commands.env import PACKAGES, env, lines, surroundings


def test_versions_processor_memory_and_disk_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has them all; the text has a line of each, and shows no path."""
    env(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["sftkey"] == sftkey.__version__
    assert list(found["packages"]) == list(PACKAGES)
    assert found["packages"]["torch"] == torch.__version__
    assert found["free_disk_gib"] > 0
    assert found["free_memory_gib"] > 0
    assert found["vectors"] == torch.backends.cpu.get_cpu_capability()
    env()
    out = capsys.readouterr().out
    assert f"\ntorch: {found['packages']['torch']}\n" in out
    assert out.splitlines()[0] == f"sftkey: {sftkey.__version__}"


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where importing torch fails, the rest is still said, with the first line of the error."""

    def broken() -> dict[str, Any]:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(command, "_seen_by_torch", broken)
    found = surroundings()
    assert found["torch"] == "can't be used: libcudart.so.12: cannot open shared object file"
    assert found["packages"]["trl"]


def test_a_gpu_and_a_missing_package_are_written_out() -> None:
    """Each GPU is a line with its memory; what isn't installed is said to be so."""
    gpu = {"name": "H200", "memory_gib": 139.8, "free_gib": 139.2, "capability": "9.0"}
    found = {"packages": {"trl": None}, "gpus": [gpu], "cuda": None, "mps": False}
    assert list(lines(found)) == [
        "trl: not installed",
        "GPU 0: H200, 139.8 GiB, 139.2 free, capability 9.0",
        "cuda: none",
        "mps: no",
    ]
    assert list(lines({"gpus": []})) == ["GPUs: none"]


def test_a_number_is_no_word() -> None:
    """One core is 1, and a full disk has 0.0 GiB left."""
    assert list(lines({"cores": 1, "free_disk_gib": 0.0})) == ["cores: 1", "free disk: 0.0 GiB"]
