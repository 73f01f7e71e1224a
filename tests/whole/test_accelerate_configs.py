"""Every config is read by accelerate's own loader and holds no key that would do nothing."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "accelerate_configs"
KINDS = {
    "cpu": DistributedType.NO,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
    "mps": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "single_gpu": DistributedType.NO,
}


def load(file: Path) -> Any:
    """Read a config as `accelerate launch --config_file` does."""
    return load_config_from_file(str(file))


def uncommented_variant(text: str) -> dict[str, Any]:
    """Read the commented `key: value  # what it is` lines of a config as if they were none."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and "  # " in line]
    return dict(yaml.safe_load("\n".join(lines)))


def test_the_configs_are_these_seven() -> None:
    """No config is added or lost without its kind standing here."""
    assert sorted(file.stem for file in FOLDER.glob("*")) == sorted(KINDS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_reads_the_config(name: str) -> None:
    """The loader takes every key, and the config is of the kind that its name says."""
    assert load(FOLDER / f"{name}.yaml").distributed_type == KINDS[name]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_launcher_knows_every_nested_key(name: str) -> None:
    """A misspelt key under `fsdp_config` or `deepspeed_config` would do nothing: none is there."""
    known = {action.dest for action in launch_command_parser()._actions}
    config = load(FOLDER / f"{name}.yaml")
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_run_chooses_the_precision(name: str) -> None:
    """A config that mixed in bf16 would override a device or a recipe that wants float32."""
    assert load(FOLDER / f"{name}.yaml").mixed_precision == "no"


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_head_says_how_to_use_it(name: str) -> None:
    """Each file begins with when to use it, and with its own command."""
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"--config_file accelerate_configs/{name}.yaml" in text


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("fsdp2", "ACCELERATE_USE_FSDP", "true"),
        ("deepspeed_zero2", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        ("deepspeed_zero3", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"),
    ],
)
def test_a_process_is_told_how_it_is_launched(name: str, flag: str, value: str) -> None:
    """The launcher hands its processes the variables from which sftkey knows what is sharded."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "2", "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ""  # the launcher sets it on the way
    deepspeed = name.startswith("deepspeed")
    env = prepare_deepspeed_cmd_env(args)[1] if deepspeed else prepare_multi_gpu_env(args)
    assert env[flag] == value
    assert env.get("ACCELERATE_USE_DEEPSPEED", "false") == str(deepspeed).lower()


def test_two_nodes_are_a_variant_of_multi_gpu(tmp_path: Path) -> None:
    """The commented lines of multi_gpu.yaml, taken in, make a config for two nodes."""
    text = (FOLDER / "multi_gpu.yaml").read_text()
    variant = {**yaml.safe_load(text), **uncommented_variant(text)}
    file = tmp_path / "two_nodes.yaml"
    file.write_text(yaml.safe_dump(variant))
    config = load(file)
    assert (config.num_machines, config.num_processes) == (2, 16)
    assert (config.main_process_ip, config.main_process_port) == ("10.0.0.1", 29500)


def test_a_config_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """The loader that the tests above rely on does fail on a misspelt key."""
    file = tmp_path / "wrong.yaml"
    file.write_text("distributed_type: 'NO'\nnum_proceses: 2\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load(file)
