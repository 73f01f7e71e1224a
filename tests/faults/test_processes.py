"""Several processes: where one is gone or answers no more, the others end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sftkey.errors import DeviceError, ProcessLost
from sftkey.models.device import Device
from sftkey.recipe.load import load_recipe
from sftkey.training import machine
from sftkey.training.machine import explained_faults, join, patience

MakeRecipe = Callable[..., Path]
SLURM = Path(__file__).parents[2] / "docs" / "several-gpus.md"
MOST_SECONDS = 900.0  # for what processes are waited for, beside other programs


@pytest.mark.fault("a process of several gone")
def test_processes_wait_as_long_as_the_recipe_says(tiny_recipe: MakeRecipe) -> None:
    """There is one group for all stages: the most patient one decides; else upstream's default."""
    recipe = tiny_recipe()
    assert patience(load_recipe(recipe)) == timedelta(seconds=1800)
    both = ["trainer.ddp_timeout=20", "stages.key.trainer.ddp_timeout=40"]
    assert patience(load_recipe(recipe, both)) == timedelta(seconds=40)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.fault("a process of several gone")
def test_a_lost_process_is_one_error(
    num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one process alone such words mean something else."""
    ours = SimpleNamespace(num_processes=num_processes)
    monkeypatch.setattr(machine, "PartialState", lambda: ours)

    def lose(said: str) -> None:
        with explained_faults(tmp_path):
            raise RuntimeError(said)

    expected = RuntimeError if num_processes == 1 else DeviceError
    with pytest.raises(expected, match="Connection closed by peer"):
        lose("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        lose("shape mismatch")


def started(
    command: list[str], folder: Path, environments: list[dict[str, str]]
) -> list[subprocess.Popen[bytes]]:
    """Start a command once for each environment, all of one group; `ended` ends them.

    What each says on stderr goes into a file of the folder: a pipe might fill.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for number, environment in enumerate(environments):
        with (folder / f"said-{number}.txt").open("w") as said:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, **group, **environment},
                    stderr=said,
                    stdout=subprocess.DEVNULL,
                )
            )
    return processes


def ranks(recipe: Path, folder: Path, world: int = 2) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a run by hand: no launcher looks after them."""
    environments = [
        {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world)
    ]
    command = [sys.executable, "-m", "sftkey.train", str(recipe), "--yes"]
    return started(command, folder, environments if world > 1 else [{}])


def ended(processes: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> str:
    """Wait for processes, and kill them if they don't end; return what they said on stderr."""
    until = time.monotonic() + seconds
    for each in processes:
        try:
            each.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            each.kill()
            each.wait()
    return "".join(file.read_text() for file in sorted(folder.glob("said-*.txt")))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Timed out after 21 seconds waiting for clients. 1/2 clients joined.", ProcessLost),
        ("The client socket has timed out after 20000ms while trying to connect", ProcessLost),
        ("The server socket has failed to listen. code: -98, name: EADDRINUSE", DeviceError),
        ("shape mismatch", RuntimeError),
    ],
)
@pytest.mark.fault("a process of several gone")
def test_processes_that_do_not_meet_are_one_error(
    said: str,
    error: type[Exception],
    tiny_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One has died before it came, or the port is another program's."""

    def fail(**kwargs: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(machine, "PartialState", fail)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RuntimeError) as raised:
        join(load_recipe(tiny_recipe()), Device("cpu", 0, torch.float32), tmp_path)
    assert type(raised.value) is error
    expected = {
        ProcessLost: f"{tmp_path}: another process of this run is gone, or answers no more: {said}",
        DeviceError: "$MASTER_PORT=29500: expected a port where a run's processes meet; another",
        RuntimeError: said,
    }
    assert str(raised.value).startswith(expected[error])


@pytest.mark.kill
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.fault("a process of several gone")
def test_a_rank_that_dies_before_it_came_ends_the_other(
    killed: int, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """It waits as long as `ddp_timeout` says, and ends with the same error as later."""
    recipe = tiny_recipe(trainer={"max_steps": 1, "ddp_timeout": 10})
    processes = ranks(recipe, tmp_path)
    processes[killed].kill()
    said = ended(processes, tmp_path, 120)  # the imports take long beside other programs
    assert processes[1 - killed].returncode == 2, said
    assert "another process of this run is gone, or answers no more" in said


@pytest.mark.kill
@pytest.mark.fault("a process of several gone")
def test_a_killed_rank_ends_the_other_within_a_minute(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """With one error that says how the run goes on."""
    long = {"max_steps": 100000, "save_steps": 20, "ddp_timeout": 15}
    recipe = tiny_recipe(
        stages=[{"name": "key", "loss_on": "key"}],
        trainer={"per_device_train_batch_size": 2, "learning_rate": 1e-3, **long},
        eval={"num_questions": 1, "max_new_tokens": 1},
    )
    first, second = ranks(recipe, tmp_path)
    checkpoints = tmp_path / "runs/tiny/stages/1-key/checkpoints"
    wait_for(lambda: bool(list(checkpoints.glob("checkpoint-*/whole.json"))), [first, second])
    second.kill()
    said = ended([first, second], tmp_path, 60)
    assert first.returncode == 2, said
    assert "another process of this run is gone, or answers no more" in said
    assert "Traceback" not in said


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for something that processes do; they may not end before."""
    until = time.monotonic() + MOST_SECONDS
    try:
        while not condition():
            assert all(each.poll() is None for each in processes), "a process ended before"
            assert time.monotonic() < until
            time.sleep(0.002)
    except AssertionError:
        for each in processes:
            each.kill()
            each.wait()
        raise


@pytest.mark.kill
@pytest.mark.fault("signals")
def test_slurms_warning_ends_two_ranks_and_the_same_command_goes_on(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the page's script, with the variables that srun sets for each process."""
    (line,) = re.findall(r"^srun bash -c '(.*)'$", SLURM.read_text(), re.MULTILINE)
    tiny_recipe(
        stages=[{"name": "key", "loss_on": "key"}],
        trainer={
            **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 60},
            **{"save_steps": 50, "logging_steps": 1},
        },
        eval={"num_questions": 1, "max_new_tokens": 1},
    ).rename(tmp_path / "recipe.yaml")
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "runs/tiny/stages/1-key/log.jsonl"
    processes = tasks(line, tmp_path)
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, processes)
    for each in processes:
        each.send_signal(signal.SIGUSR1)
    said = ended(processes, tmp_path, 60)
    assert [each.returncode for each in processes] == [138, 138], said
    assert "stopped by SIGUSR1; what was reached is kept" in said
    processes = tasks(line, tmp_path)
    said = ended(processes, tmp_path, MOST_SECONDS)
    assert [each.returncode for each in processes] == [0, 0], said
    assert re.search(r"key: going on from checkpoint-\d+", said)
    assert [json.loads(each)["step"] for each in log.read_text().splitlines()] == [*range(1, 61)]


def tasks(command: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start a command twice, as srun does on one node."""
    told = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    environments = [
        {**told, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)
    ]
    return started(["bash", "-c", command], folder, environments)
