"""Every recipe that ships is right: on rows of its data's schema, with its family's tokenizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import FAMILIES, Family

from sftkey.data import sources
from sftkey.data.frame import probe_frame
from sftkey.data.prepare import prepare
from sftkey.data.rules import make_rule
from sftkey.data.splits import load_splits
from sftkey.data.tokenization import tokenize
from sftkey.errors import FrameError
from sftkey.ls import RECIPES, describe, recipe_files
from sftkey.model import load_tokenizer
from sftkey.planning.proof import judge, prove
from sftkey.recipe import DataSection, Recipe, load_recipe

FILES = [str(file.relative_to(RECIPES)) for file in recipe_files(RECIPES)]
REAL = [file for file in FILES if FAMILIES[Path(file).parts[0]].real]
NUM_ROWS = {"train": 760, "validation": 30, "test": 30}
NUM_HARD_ROWS = 300


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


HUB = {
    "openai/gsm8k": ("main", {"train", "test"}, gsm8k),
    "open-r1/OpenR1-Math-220k": ("default", {"train"}, openr1),
    "allenai/openbookqa": ("additional", {"train", "validation", "test"}, openbookqa),
}


def hub_rows(data: DataSection, split: str) -> list[dict[str, Any]]:
    """Give rows as the hub would: of the configs and splits that it has."""
    config, splits, row = HUB[data.source]
    name = re.sub(r"\[:\d+\]$", "", split)
    assert data.config == config
    assert name in splits
    first = 100_000 * sorted(splits).index(name)
    return [row(first + number) for number in range(NUM_ROWS[name])]


def run(command: str, folder: Path) -> None:
    """Run a command of a recipe's head, as `python -c "…"`."""
    (code,) = re.findall(r'^#\s+python -c "(.*)"$', command, re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def loaded(file: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Load a recipe with made rows behind the hub, and a model folder in place of the model."""
    monkeypatch.setattr(sources, "hub_rows", hub_rows)
    model = yaml.safe_load((RECIPES / file).read_text(encoding="utf-8"))["model"]
    packaged = {"file", "sha256"}
    model = {k: v for k, v in model.items() if k not in packaged} | {"name_or_path": str(folder)}
    overrides = [f"model={json.dumps(model)}"]
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


@pytest.fixture
def family(file: str) -> Family:
    """Give the family of a recipe's model."""
    return FAMILIES[Path(file).parts[0]]


def assert_rows_right(recipe: Recipe) -> Any:
    """Prepare the recipe's data: no row is lost, and an oracle that only decodes finds no fault."""
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe, tokenizer)
    # The demo's task asks a question again at times; nothing else may be dropped.
    assert [why for why in prepared.counts["dropped"] if ": prompt also in" not in why] == []
    assert len(prepared.train) > 20
    assert len(prepared.validation or ()) > 20
    assert len(prepared.test) > 20
    examples = load_splits(recipe.data, recipe.seed).train[:60]
    proof = judge(prepared.frame, examples, tokenize(examples, prepared.frame))
    assert (proof.right, proof.wrong) == (len(examples), [])
    return prepared


@pytest.mark.parametrize("file", FILES)
def test_recipe_on_rows_of_its_schema(
    file: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its family's template and control tokens every row is built, and its masks are right."""
    family.save(family.standing_in(), tmp_path)
    prepared = assert_rows_right(loaded(file, tmp_path, monkeypatch))
    assert prepared.frame.end_token == family.end


@pytest.mark.network
@pytest.mark.parametrize("file", REAL)
def test_recipe_on_its_real_tokenizer(
    file: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the published vocabulary, and on rows that are hard on it."""
    family.save(family.real_one(), tmp_path)
    recipe = loaded(file, tmp_path, monkeypatch)
    prepared = assert_rows_right(recipe)
    assert prepared.frame.end_token == family.end
    proof = prove(prepared.frame, NUM_HARD_ROWS, seed=7)
    assert proof.wrong == []
    assert proof.num_refused_otherwise <= NUM_HARD_ROWS / 100


def test_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """At least twenty recipes, over fifteen families, fourteen proven on a real tokenizer."""
    families = {FAMILIES[Path(file).parts[0]].name for file in FILES}
    with capsys.disabled():
        print(f"\n{len(FILES)} recipes, {len(families)} families,", end=" ")
        print(f"{len(REAL)} recipes with a tokenizer of their family in the tests", end=" ")
    assert len(FILES) >= 20
    assert len(families) >= 15
    assert len(REAL) >= 14
    assert {Path(file).parts[0] for file in FILES} == FAMILIES.keys()


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_says_how_it_is_run(file: str) -> None:
    """Its head has its own command, with a config that is there; its name is that of its path."""
    text = (RECIPES / file).read_text(encoding="utf-8")
    assert text.startswith("# ")
    command = re.search(r"^# Run:  accelerate launch (.*)-m sftkey.train recipes/(.*)$", text, re.M)
    assert command is not None
    assert command[2] == file
    config = re.match(r"--config_file (\S+) $", command[1])
    assert not command[1] or (config and (RECIPES.parent / config[1]).is_file())
    assert describe(RECIPES / file)["name"] == file.removesuffix(".yaml").replace("/", "-")


def test_traces_are_split_at_their_tags_and_last_box() -> None:
    """The rule for OpenR1's traces takes what the last box holds, braces in it or not."""
    recipe = load_recipe(RECIPES / "qwen2.5-1.5b" / "openr1-math-220k.yaml")
    rule = make_rule(str(recipe.data.split_rule))
    text = "<think>\nIs it \\boxed{7}?\n</think>\n\nIt is \\boxed{x^{2}}, so \\boxed{%s}."
    assert rule(text % "5") == ("Is it \\boxed{7}?", "5")
    nested = "\\frac{1}{\\sqrt{2}}"
    assert rule(text % nested) == ("Is it \\boxed{7}?", nested)
    assert rule("<think>\nIt is \\boxed{7}.\n</think>\n\nIt is 7.") == (
        "the regular expression doesn't match"
    )


def test_the_papers_setting() -> None:
    """What the paper says of its set-up stands in its recipe."""
    recipe = load_recipe(RECIPES / "qwen2.5-1.5b" / "paper.yaml")
    assert recipe.lora is None
    assert recipe.model.quantization == "none"
    settings = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size")
    assert [recipe.trainer[key] for key in settings] == [5e-6, 0.1, 3, 32]
    assert recipe.trainer["warmup_steps"] * recipe.trainer["num_train_epochs"] == pytest.approx(
        0.5, abs=1e-3
    )
    assert [stage.loss_on for stage in recipe.stages] == ["completion", "key"]


def test_a_recipe_with_a_wrong_frame_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What judges the recipes does find a fault: tags that the family's prompt has opened."""
    family = FAMILIES["deepseek-r1-distill-qwen-1.5b"]
    family.save(family.standing_in(), tmp_path)
    recipe = loaded("qwen3-4b/gsm8k.yaml", tmp_path, monkeypatch)
    with pytest.raises(FrameError, match="opens the thinking already"):
        probe_frame(load_tokenizer(recipe.model), recipe.response)
