import sys
from pathlib import Path

import pytest
import torch

from sftkey.errors import DeviceError
from sftkey.models.device import Device, choose_device, free_bytes
from sftkey.recipe.schema import ModelSection


def section(**settings: str) -> ModelSection:
    """Return a model section, unquantized unless asked for."""
    return ModelSection.model_validate(
        {"name_or_path": "some/model", "quantization": "none", **settings}
    )


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return a machine that has nothing but a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


@pytest.fixture
def two_gpus(no_device: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return a machine whose first GPU is new and whose second is old."""
    no_device.setattr(torch.cuda, "is_available", lambda: True)
    no_device.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    return no_device


@pytest.mark.usefixtures("no_device")
def test_cpu_computes_in_float32() -> None:
    """Where there is no GPU, the CPU computes in float32, NF4 or not."""
    for quantization in ("none", "nf4"):
        device = choose_device(section(quantization=quantization), env={})
        assert device == Device("cpu", 0, torch.float32)
        assert (device.bf16, device.fp16) == (False, False)
        assert device.torch_device == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_new_gpu_computes_in_bfloat16_and_old_one_in_float16() -> None:
    """Each process takes its own GPU and the 16-bit type that this GPU has in hardware."""
    new, old = (choose_device(section(), env={"LOCAL_RANK": rank}) for rank in "01")
    assert (new.torch_device, new.bf16, new.fp16) == (torch.device("cuda:0"), True, False)
    assert (old.torch_device, old.bf16, old.fp16) == (torch.device("cuda:1"), False, True)


@pytest.mark.usefixtures("two_gpus")
def test_cpu_on_request() -> None:
    """The trainer's `use_cpu` and the launcher's `--cpu` leave the GPU alone."""
    assert choose_device(section(), use_cpu=True, env={}).kind == "cpu"
    assert choose_device(section(), env={"ACCELERATE_USE_CPU": "True"}).kind == "cpu"
    assert choose_device(section(), env={"ACCELERATE_USE_CPU": "false"}).kind == "cuda"


@pytest.mark.usefixtures("two_gpus")
def test_dtype_overrides() -> None:
    """`model.dtype` overrides the device's own choice; `auto` speaks of the weights alone."""
    assert choose_device(section(dtype="float32"), env={}).compute_dtype == torch.float32
    assert choose_device(section(dtype="auto"), env={}).compute_dtype == torch.bfloat16


@pytest.mark.usefixtures("two_gpus")
def test_old_gpu_refuses_bfloat16() -> None:
    """An old GPU would emulate bfloat16, slowly."""
    with pytest.raises(DeviceError) as error:
        choose_device(section(dtype="bfloat16"), env={"LOCAL_RANK": "1"})
    assert str(error.value) == (
        "cuda: model.dtype: bfloat16 needs a GPU of compute capability 8.0 or later\n"
        "hint: write model.dtype=float16"
    )


@pytest.mark.usefixtures("no_device")
def test_cpu_refuses_float16() -> None:
    """Training in float16 needs loss scaling, which the CPU doesn't have."""
    with pytest.raises(DeviceError) as error:
        choose_device(section(dtype="float16"), env={})
    assert str(error.value) == (
        "cpu: model.dtype: float16 can't be trained on a CPU\n"
        "hint: write model.dtype=float32, or bfloat16"
    )


def test_mps_refuses_nf4(no_device: pytest.MonkeyPatch) -> None:
    """A Mac trains without quantization, and the message says how to ask for that."""
    no_device.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(section(), env={}) == Device("mps", 0, torch.float32)
    with pytest.raises(DeviceError) as error:
        choose_device(section(quantization="nf4"), env={})
    assert str(error.value) == (
        "mps: model.quantization: nf4 needs CUDA or a CPU\nhint: write model.quantization=none"
    )


def test_fsdp_without_gpus(no_device: pytest.MonkeyPatch) -> None:
    """Accelerate would go on without a word, each process with the whole model."""
    with pytest.raises(DeviceError) as error:
        choose_device(section(), env={"ACCELERATE_USE_FSDP": "true"})
    assert str(error.value) == (
        "cpu: expected GPUs: accelerate's FSDP shards nothing here, and each process would hold "
        "the whole model\nhint: launch with `torchrun`, or with accelerate_configs/cpu.yaml"
    )


def test_nf4_without_bitsandbytes(no_device: pytest.MonkeyPatch) -> None:
    """Where bitsandbytes doesn't import, the reason stands in the message."""
    no_device.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeviceError) as error:
        choose_device(section(quantization="nf4"), env={})
    assert str(error.value) == (
        "cpu: model.quantization: nf4 needs bitsandbytes, which can't be imported here: "
        "import of bitsandbytes halted; None in sys.modules\n"
        "hint: write model.quantization=none"
    )


def test_several_gpus_for_one_process_are_refused(two_gpus: pytest.MonkeyPatch) -> None:
    """Without a launcher, transformers would split each batch over all of them."""
    two_gpus.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(section(), env={"LOCAL_RANK": "1"}).index == 1
    with pytest.raises(DeviceError) as caught:
        choose_device(section(), env={})
    assert str(caught.value) == (
        "cuda: expected one GPU for this process; it sees 2\n"
        "hint: launch with `accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m "
        "sftkey.train RECIPE`, or set CUDA_VISIBLE_DEVICES=0"
    )


def test_free_memory_is_a_share_within_the_container(tmp_path: Path) -> None:
    """A container's limit counts where there is one, and processes share what is free."""
    free = free_bytes({}, tmp_path)
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_bytes({}, tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes({}, tmp_path) == 4000
    assert free_bytes({"LOCAL_WORLD_SIZE": "2"}, tmp_path) == 2000
