import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.models import ROUNDED

MakeRecipe = Callable[..., Path]
ROOT = Path(__file__).parents[2]
STAGES = ("1-completion", "2-key")
RANKS = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# Rows of one step differ in trained tokens by more than five times, between ranks too.
STEADY = {
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.5,
    "optim": "sgd",
    "max_steps": 4,
    "logging_steps": 1,
    "save_steps": 2,
}


def launch(
    command: list[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def log_lines(run: Path, stage: str) -> list[dict[str, Any]]:
    """Read a stage's log."""
    text = (run / "stages" / stage / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def adapter(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """Read what a stage has written."""
    (file,) = (run / "stages" / stage / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_trained_alike(runs: Path, stage: str) -> None:
    """Compare the steps and the weights of the runs `one` and `two`, up to the order of sums."""
    one, two = runs / "one", runs / "two"
    pairs = list(zip(log_lines(one, stage), log_lines(two, stage), strict=True))
    assert [a["step"] for a, _ in pairs] == [1, 2, 3, 4]
    for a, b in pairs:
        assert b["loss"] == pytest.approx(a["loss"], rel=ROUNDED)
        assert b["segments"] == pytest.approx(a["segments"], rel=ROUNDED)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=ROUNDED)
        assert (b["trained_tokens"], b["tokens"]) == (a["trained_tokens"], a["tokens"])
    weights, others = adapter(one, stage), adapter(two, stage)
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(tensor, weights[name], rtol=ROUNDED, atol=ROUNDED)


def assert_measured_alike(runs: Path) -> None:
    """Compare the validation losses and the answers of the runs `one` and `two`."""
    records = [
        json.loads((runs / name / "ledger.json").read_text())["stages"] for name in ("one", "two")
    ]
    for a, b in zip(*records, strict=True):
        for moment in ("start", "end"):
            assert b["validation"][moment] == pytest.approx(a["validation"][moment], rel=ROUNDED)
    answers = [
        sorted((runs / name / "evaluation" / "key.jsonl").read_text().splitlines())
        for name in ("one", "two")
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """Two gloo ranks of 2 rows take the very steps of one process of 4 rows; one run folder."""
    recipe = str(tiny_recipe(rows=48, trainer={**STEADY, "per_device_train_batch_size": 2}))
    one = launch(
        ["sftkey.train", recipe, "name=one", "trainer.per_device_train_batch_size=4"],
        tmp_path,
    )
    assert one.returncode == 0, one.stderr
    two = launch([*RANKS, "-m", "sftkey.train", recipe, "name=two"], tmp_path)
    assert two.returncode == 0, two.stderr
    assert "world size 1," in one.stderr
    assert "world size 2," in two.stderr
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["one", "two"]
    for stage in STAGES:
        assert_trained_alike(tmp_path / "runs", stage)
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        folder = tmp_path / "runs" / "two" / "stages" / stage / "adapter"
        in_plain_peft = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder))
        saved = adapter(tmp_path / "runs" / "two", stage)
        assert in_plain_peft.keys() == saved.keys()
        assert all(torch.equal(in_plain_peft[name], saved[name]) for name in saved)
    assert_measured_alike(tmp_path / "runs")
    assert two.stdout.count("completion") >= 1
    assert one.stdout == two.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["lora.r=4", "lora=null"])
def test_two_sharded_ranks_train_as_one_process_does(
    lora: str, tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """FSDP2 with the config that ships; what it saves loads anywhere, and answers afterwards."""
    trainer = {**STEADY, "learning_rate": 0.1, "per_device_train_batch_size": 2}
    recipe = str(tiny_recipe(rows=48, trainer=trainer))
    single = [recipe, "name=one", lora, "trainer.per_device_train_batch_size=4"]
    one = launch(["sftkey.train", *single], tmp_path)
    assert one.returncode == 0, one.stderr
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    told = {key.upper(): str(value).lower() for key, value in config["fsdp_config"].items()}
    told["FSDP_AUTO_WRAP_POLICY"] = config["fsdp_config"]["fsdp_auto_wrap_policy"]
    told["FSDP_STATE_DICT_TYPE"] = config["fsdp_config"]["fsdp_state_dict_type"]
    told |= {"ACCELERATE_USE_FSDP": "true", "PYTHONPATH": str(ROOT)}
    command = [*RANKS, "-m", "tests.support.fsdp_on_cpu", recipe, "name=two", lora]
    two = launch(command, tmp_path, **told)
    assert two.returncode == 0, two.stderr
    assert "key: not evaluated; run `sftkey evaluate runs/two`" in two.stderr
    for stage in STAGES:
        assert_trained_alike(tmp_path / "runs", stage)
        folder = tmp_path / "runs" / "two" / "stages" / stage / "adapter"
        if lora == "lora=null":
            loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        else:
            base = AutoModelForCausalLM.from_pretrained(tiny_folder)
            loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder))
        saved = adapter(tmp_path / "runs" / "two", stage)
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    evaluated = launch(["sftkey", "evaluate", "runs/two"], tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert_measured_alike(tmp_path / "runs")
