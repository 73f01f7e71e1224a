"""Finished cells of a study that nobody ran."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COMMIT, HARDWARE = "0123456789ab", "CPU, 2 threads, x86_64"
COMMAND = "sftkey study study-made.yaml"
STAGES = {
    "sft_tag": ["completion"],
    "sftkey": ["completion", "key"],
    "sft_twice": ["completion", "again"],
}
TOKENS = {"thinking": 30.0, "answer_tag": 6.0, "answer": 2.0, "end": 1.0}


def answered(right: Sequence[bool], sha: str = "t") -> dict[str, Any]:
    """Make the flags of some questions; every fifth thinking is another one where it is wrong."""
    questions = [
        {
            "index": number,
            "correct": bool(flag),
            "strict": number % 20 != 0,
            "parsed": number % 20 != 0 or bool(flag),
            "stopped": True,
            "thinking_right": number % 3 != 0,
            "thinking_sha256": f"{sha if number % 5 == 0 else 't'}{number}",
        }
        for number, flag in enumerate(right)
    ]
    return {"questions": questions, "mean_thinking_length": 31.5}


def cell(
    right: Sequence[bool],
    arm: str = "sftkey",
    seed: int = 1,
    task: str = "orders",
    **more: Any,
) -> dict[str, Any]:
    """Make one cell."""
    stages = STAGES[arm]
    num = len(right)
    start = {"prompt": 1.0, "thinking": 0.5, "answer_tag": 0.01, "answer": 1.5, "end": 0.01}
    losses = [
        {"start": start, "end": {**start, "thinking": 0.3, "answer": 0.5}},
        {"start": {**start, "thinking": 0.3, "answer": 0.5}, "end": {**start, "thinking": 0.35}},
    ]
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "stages": stages,
        **answered(right, sha=arm),
        "base": answered([number % 7 == 0 for number in range(num)], sha="base"),
        "reference_tokens": {"thinking": [20 + n % 16 for n in range(num)], "key": [8] * num},
        "segment_tokens": TOKENS,
        "validation": dict(zip(stages, losses, strict=False)),
        "steps": dict.fromkeys(stages, 100),
        "trained_tokens": dict.fromkeys(stages, 40_000),
        "seconds": dict.fromkeys(stages, 90.0),
        "chosen": {stages[-1]: {"learning_rate": 2e-4}},
        "questions_sha256": "same",
        "commit": COMMIT,
        "hardware": HARDWARE,
        "versions": {"torch": "2.13.0"},
        "command": COMMAND,
        **more,
    }


def made_flags(gains: Mapping[str, float], num_questions: int, seed: int) -> dict[str, list[bool]]:
    """Draw the flags of arms whose true shares are 0.5 and their gain; questions differ alike."""
    hard = np.random.default_rng(0).choice([0.1, 0.9], size=num_questions)
    dice = np.random.default_rng(seed)
    return {
        arm: list(map(bool, dice.random(num_questions) < hard + gain))
        for arm, gain in gains.items()
    }


def write_cells(folder: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write cells where a study has them."""
    for each in cells:
        file = folder / "cells" / each["task"] / each["arm"] / f"seed-{each['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(each))


def made_cells(
    gains: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    num_questions: int = 200,
    **more: Any,
) -> list[dict[str, Any]]:
    """Make the cells of a whole study."""
    gains = {"sft_tag": 0.0, "sftkey": 0.2, "sft_twice": 0.01} if gains is None else gains
    return [
        cell(flags, arm, seed, **more)
        for seed in seeds
        for arm, flags in made_flags(gains, num_questions, seed).items()
    ]
