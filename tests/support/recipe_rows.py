"""Made rows with the columns of the data sets in recipes/, and recipes that read those rows.

The names of columns, configs and splits are those of the data sets' cards, which the recipes cite.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftkey.data import sources
from sftkey.recipe.load import RECIPES, load_recipe
from sftkey.recipe.schema import DataSection, Recipe

NUM_TRAINED, NUM_OTHERS = 60, 30  # beside the rows of train that a recipe holds out


def gsm8k(number: int) -> dict[str, Any]:
    """Make a row with the columns of openai/gsm8k."""
    total = 3 * number + 4
    return {
        "question": f"Natalia has {number} boxes of 3 clips, and 4 more. How many clips?",
        "answer": f"The boxes hold {number} * 3 = <<{number}*3={3 * number}>>{3 * number} clips.\n"
        f"With the others there are {total}.\n#### {total:,}",
    }


def openr1(number: int) -> dict[str, Any]:
    """Make a row with the columns of open-r1/OpenR1-Math-220k that recipes or people read."""
    problem = f"Compute $\\frac{{{number}}}{{7}}$."
    answer = f"\\frac{{{number}}}{{7}}"
    trace = f"<think>\nOkay, {number} over 7: is it \\boxed{{7}}? No.\n</think>\n\n"
    trace += f"The fraction stays.\n\n$$\\boxed{{{answer}}}$$"
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": trace}]
    given = {"problem": problem, "solution": f"It is ${answer}$.", "answer": answer}
    return {**given, "source": "olympiads", "generations": [trace, trace], "messages": turns}


def openbookqa(number: int) -> dict[str, Any]:
    """Make a row with the columns of allenai/openbookqa, config additional."""
    texts = [f"thing {number}", "the sun", "a stone", "water"]
    return {
        "id": str(number),
        "question_stem": f"Which of these gives light to {number} planets?",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
        "fact1": "the sun is a source of light",
    }


def cot_collection(number: int) -> dict[str, Any]:
    """Make a row with the columns of kaist-ai/CoT-Collection."""
    return {
        "source": f"Premise: {number} dogs run. Does it follow that animals move? Yes or no?",
        "target": "Yes",
        "rationale": f"Dogs are animals, and to run is to move, so {number} animals move.",
        "task": "snli",
        "type": "CoT",
    }


def creak(number: int) -> dict[str, Any]:
    """Make a row with the columns of amydeng2000/CREAK."""
    return {
        "ex_id": f"train_{number}",
        "sentence": f"A bird with {number} feathers can't fly.",
        "explanation": f"Most birds with {number} feathers do.",
        "label": "false",
        "entity": "Bird",
    }


HUB = {
    "openai/gsm8k": ("main", {"train", "test"}, gsm8k),
    "open-r1/OpenR1-Math-220k": ("default", {"train"}, openr1),
    "amydeng2000/CREAK": (None, {"train", "validation"}, creak),
    "allenai/openbookqa": ("additional", {"train", "validation", "test"}, openbookqa),
}


def hub_rows(data: DataSection, split: str) -> list[dict[str, Any]]:
    """Return rows as the hub would: of the configs and splits that it has."""
    config, splits, row = HUB[data.source]
    name = re.sub(r"\[:\d+\]$", "", split)
    assert data.config == config
    assert name in splits
    first = 100_000 * sorted(splits).index(name)
    held_out = sum(each for each in (data.validation, data.test) if isinstance(each, int))
    num_rows = NUM_TRAINED + held_out if name == "train" else NUM_OTHERS
    return [row(first + number) for number in range(num_rows)]


def run(command: str, folder: Path) -> None:
    """Run a command of a recipe's head, as `python -c "…"`."""
    (code,) = re.findall(r'^#\s+python -c "(.*)"$', command, re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def loaded(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str] = ()
) -> Recipe:
    """Load a recipe with made rows behind the hub, and a model folder in place of the model."""
    monkeypatch.setattr(sources, "hub_rows", hub_rows)
    model = yaml.safe_load((RECIPES / file).read_text(encoding="utf-8"))["model"]
    packaged = {"file", "sha256"}
    model = {k: v for k, v in model.items() if k not in packaged} | {"name_or_path": str(folder)}
    overrides = [f"model={json.dumps(model)}", *overrides]
    if file == "qwen2.5-1.5b/cot-collection.yaml":
        overrides.append(f"data.source={sampled_cot_collection(folder)}")
    return load_recipe(RECIPES / file, overrides)


def sampled_cot_collection(folder: Path) -> Path:
    """Write a data file as the hub's, an object of rows, and draw the sample as the head says."""
    whole = folder / "CoT-Collection" / "data" / "CoT_collection_en.json"
    whole.parent.mkdir(parents=True)
    whole.write_text(json.dumps({str(n): cot_collection(n) for n in range(1200)}))
    head = (RECIPES / "qwen2.5-1.5b" / "cot-collection.yaml").read_text(encoding="utf-8")
    assert "50000)" in head
    run(head.replace("50000)", "1100)"), folder)
    return folder / "CoT-Collection" / "sample.json"
