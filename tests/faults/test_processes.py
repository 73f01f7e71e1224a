"""Several processes: where one is gone or answers no more, the others end."""

from __future__ import annotations

import os
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

from sftkey.errors import DeviceError
from sftkey.recipe.load import load_recipe
from sftkey.training import processes
from sftkey.training.processes import explained_lost_process, patience

MakeRecipe = Callable[..., Path]


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
    monkeypatch.setattr(processes, "PartialState", lambda: ours)

    def lose(said: str) -> None:
        with explained_lost_process(tmp_path):
            raise RuntimeError(said)

    expected = RuntimeError if num_processes == 1 else DeviceError
    with pytest.raises(expected, match="Connection closed by peer"):
        lose("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        lose("shape mismatch")


def ranks(recipe: Path, folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Start two processes of a run by hand: no launcher looks after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sftkey.train", str(recipe), *overrides],
            cwd=folder,
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.kill
@pytest.mark.fault("a process of several gone")
def test_a_killed_rank_ends_the_other_within_a_minute(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """With one error that says how the run goes on."""
    stages = [{"name": "key", "loss_on": "key"}]
    recipe = tiny_recipe(stages=stages, eval={"num_questions": 1, "max_new_tokens": 1})
    long = ["trainer.max_steps=100000", "trainer.save_steps=20", "trainer.ddp_timeout=15"]
    first, second = ranks(recipe, tmp_path, *long)
    try:
        checkpoints = tmp_path / "runs/tiny/stages/1-key/checkpoints"
        while not list(checkpoints.glob("checkpoint-*/whole.json")):
            assert first.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        since = time.monotonic()
        _, said = first.communicate(timeout=60)
        assert time.monotonic() - since < 60
    finally:
        for each in (first, second):
            each.kill()
            each.wait()
    assert first.returncode == 2, said
    assert "another process of this run is gone, or answers no more" in said
    assert "Traceback" not in said
