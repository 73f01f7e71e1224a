"""A run that is killed and told to end again and again.

SFTKEY_SOAK says how many SIGKILLs and SIGTERMs a run gets, as one process and again as two:
`SFTKEY_SOAK=15,5 python -m pytest -m kill -n 0 -s tests/faults/test_soak.py` tries 30 and 10, and
prints each.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftkey.evaluation.grading import grade
from sftkey.recipe.load import load_recipe
from sftkey.training.log import RunProgress
from sftkey.training.run import read_rows, start
from tests.faults.test_processes import MOST_SECONDS, ended, ranks, wait_for
from tests.support.tiny import write_recipe
from tests.training.test_run_folder import finish

KILLS, TERMS = (int(each) for each in os.environ.get("SFTKEY_SOAK", "2,1").split(","))
STEPS, QUESTIONS = 12, 4
# What a run writes, in its order: the file, how many lines, and what it is called when it is whole.
WRITTEN = (
    ("evaluation/base.part0of{}.jsonl", QUESTIONS, "evaluation/base.jsonl"),
    ("stages/1-completion/log.jsonl", STEPS, ""),
    ("evaluation/completion.part0of{}.jsonl", QUESTIONS, "evaluation/completion.jsonl"),
    ("stages/2-key/thinkings.part0of{}.jsonl", 16, ""),
    ("stages/2-key/log.jsonl", STEPS, ""),
    ("evaluation/key.part0of{}.jsonl", QUESTIONS, "evaluation/key.jsonl"),
)
Moment = tuple[int, int]  # which of the files, and how many of its lines


def soaked_recipe(folder: Path, model: Path) -> Path:
    """Write a recipe of two stages, the second frozen and over its own thinking, and its model."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    key = {"name": "key", "loss_on": "key", "context": "frozen", "thinking": "own"}
    recipe = write_recipe(
        folder,
        folder / "model",
        lora=lora,
        trainer={
            **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": STEPS},
            **{"logging_steps": 1, "save_steps": 3, "ddp_timeout": 120},
        },
        stages=[{"name": "completion", "loss_on": "completion"}, key],
        eval={"num_questions": QUESTIONS, "max_new_tokens": 48, "batch_size": 1},
    )
    rows = [
        {"prompt": f"Count on from {n}.", "thinking": "One more.", "answer": str(n + 1)}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teach(recipe, model)
    return recipe


def teach(recipe: Path, model: Path) -> None:
    """Teach a model the form of a recipe's rows, so that it closes its thinkings."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    taught: Any = AutoModelForCausalLM.from_pretrained(model)
    target = recipe.parent / "model"
    for each in (tokenizer, taught):
        each.save_pretrained(target)
    rows = [torch.tensor(ids) for ids in read_rows(load_recipe(recipe)).train["input_ids"][:8]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=1e-2)
    for _ in range(60):
        taught(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    taught.save_pretrained(target)


def moments(dice: random.Random, num: int) -> list[Moment]:
    """Draw moments of a run in their order: one out of each of so many equal parts."""
    lines = [
        (place, line + 1) for place, (_, most, _) in enumerate(WRITTEN) for line in range(most)
    ]
    edges = [len(lines) * each // num for each in range(num + 1)]
    return [lines[dice.randrange(*each)] for each in pairwise(edges)]


def reached(run: Path, moment: Moment, world: int) -> bool:
    """Tell whether a run has written so much."""
    name, _, whole = WRITTEN[moment[0]]
    part = run / name.format(world)
    lines = part.read_bytes().count(b"\n") if part.exists() else 0
    share = 1 if name.endswith("log.jsonl") else world  # of the first process
    return lines * share >= moment[1] or bool(whole and (run / whole).exists())


def has_begun(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a process is in its run, where it takes signals itself (of Linux alone)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def interrupt(
    processes: list[subprocess.Popen[bytes]], number: int, folder: Path, dice: random.Random
) -> None:
    """Kill one of the processes, or tell all to end; the others of a killed one end by themselves.

    With one process alone nothing is left to end.
    """
    time.sleep(dice.random() / 4)
    killed = [dice.choice(processes)] if number == signal.SIGKILL else []
    for each in killed or processes:
        each.send_signal(number)
    said = ended(processes, folder, 60)
    others = 2 if killed else 128 + number
    codes = [-number if each in killed else others for each in processes]
    assert [each.returncode for each in processes] == codes, said
    assert "Traceback" not in said


def finished(recipe: Path, folder: Path, world: int) -> Path:
    """Let a run end; return its folder."""
    processes = ranks(recipe, folder, world)
    said = ended(processes, folder, MOST_SECONDS)
    assert all(each.returncode == 0 for each in processes), said
    return folder / "runs" / "tiny"


def outcome(run: Path) -> dict[str, object]:
    """Read what a run is made for: weights, answers, grades, and the losses of all steps."""
    found: dict[str, object] = {}
    for part in ("stages/*/adapter/*.safetensors", "evaluation/*.json", "evaluation/*.jsonl"):
        found |= {str(each.relative_to(run)): each.read_bytes() for each in run.glob(part)}
    for log in run.glob("stages/*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found[str(log)[-20:]] = [(line["step"], line["loss"]) for line in lines]
    return found


@pytest.mark.kill
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.fault("a kill")
def test_a_run_that_is_killed_at_random_ends_as_an_uninterrupted_one(
    world: int,
    tiny_folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Adapters bit for bit, answers and tables equal, each step logged once."""
    record_property("tries", KILLS + TERMS)
    recipe, dice = soaked_recipe(tmp_path, tiny_folder), random.Random(world)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    expected = outcome(finished(recipe, tmp_path / "whole", world))
    cut = tmp_path / "cut" / "runs" / "tiny"
    numbers = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS
    dice.shuffle(numbers)
    for number, moment in zip(numbers, moments(dice, len(numbers)), strict=True):
        processes = ranks(recipe, tmp_path / "cut", world)
        wait_for(lambda: all(map(has_begun, processes)), processes)  # noqa: B023
        wait_for(partial(reached, cut, moment, world), processes)
        interrupt(processes, number, tmp_path / "cut", dice)
        print(f"{number.name}, {world} processes, at {moment}: held", flush=True)
    assert outcome(finished(recipe, tmp_path / "cut", world)) == expected


MOST_GROWTH = 1.02  # of the resident memory, behind the first tenth


@pytest.mark.kill
@pytest.mark.fault("memory that grows")
def test_memory_stays_flat(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 500 steps, and over 2,000 answers of the base model and as many of the stage's."""
    recipe = write_recipe(
        tmp_path,
        tiny_folder,
        rows=2100,
        data={"source": str(tmp_path / "rows.jsonl"), "validation": 8, "test": 2000},
        stages=[{"name": "key", "loss_on": "key"}],
        trainer={"per_device_train_batch_size": 2, "max_steps": 500, "logging_steps": 10},
        eval={"num_questions": 2000, "max_new_tokens": 8, "batch_size": 8},
    )
    seen: dict[str, list[int]] = {}

    def look(what: str) -> None:
        seen.setdefault(what, []).append(psutil.Process().memory_info().rss)

    monkeypatch.setattr(RunProgress, "step", lambda self: look("steps"))
    monkeypatch.setattr(RunProgress, "answers", lambda self, stage, *counts: look(stage))
    finish(start(load_recipe(recipe), tmp_path / "runs" / "tiny", grade=grade))
    assert len(seen["steps"]) == 500
    growth = {what: max(sizes) / sizes[len(sizes) // 10] for what, sizes in seen.items()}
    print(growth, {what: sizes[-1] >> 20 for what, sizes in seen.items()})
    assert all(each <= MOST_GROWTH for each in growth.values()), growth
