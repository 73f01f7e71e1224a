"""On the demo's model, 100 questions: a frozen key stage leaves every thinking as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftkey.evaluation.grading import grade
from sftkey.evaluation.results import read_results
from sftkey.evaluation.stage import grade_stage
from sftkey.evaluation.thinking_change import ThinkingChange, thinking_change
from sftkey.recipe.load import load_recipe
from sftkey.study.cells import take_over
from sftkey.training.run import Run, start
from tests.training.test_frozen_run import thinkings

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "demo.yaml"
NUM_QUESTIONS = 100
SHORT = (
    "model.quantization=none",  # float32: on a CPU as fast as NF4 to train
    "data.num_rows=400",
    "data.validation=16",
    "trainer.max_steps=20",
    f"eval.num_questions={NUM_QUESTIONS}",
)
KEY = "loss_on: key, trainer: {learning_rate: 1.0e-3, max_steps: 8}"  # a plain one's is 2.0e-4


def arm(folder: Path, context: str) -> tuple[Run, ThinkingChange]:
    """Train the key behind a first stage that both arms share; say what became of the thinking."""
    first = "{name: completion, loss_on: completion}"
    stages = f"stages=[{first}, {{name: key, context: {context}, {KEY}}}]"
    run = start(load_recipe(DEMO, (*SHORT, stages)), folder / context, grade=grade)
    take_over(run.ledger)
    run.answers.asked = ("completion", "key")  # the base model's are nobody's here
    for name in run.stages():
        grade_stage(run, name)
    before, after = read_results(run.ledger.folder)
    return run, thinking_change(before, after)


def texts(run: Run, name: str) -> str:
    """Return all that a stage has written."""
    return run.ledger.generations(name).read_text(encoding="utf-8")


def test_a_frozen_key_stage_changes_no_thinking_and_a_plain_one_does(tmp_path: Path) -> None:
    """Of 100 thinkings all are the same character for character, beside a key that has learned.

    The same key stage with `context: exact`, from the same first stage, changes some.
    """
    frozen, change = arm(tmp_path, "frozen")
    plain, plain_change = arm(tmp_path, "exact")
    assert plain.ledger.stages[0].shared_from == "frozen"
    assert texts(plain, "completion") == texts(frozen, "completion")

    assert thinkings(frozen.ledger.folder, "key") == thinkings(frozen.ledger.folder, "completion")
    assert (change.num_identical, change.num_questions) == (NUM_QUESTIONS, NUM_QUESTIONS)
    assert texts(frozen, "completion").count("</Thinking>") >= 90, "few rows switched"
    assert texts(frozen, "key") != texts(frozen, "completion"), "the key adapter did nothing"
    loss = frozen.ledger.stages[1].validation
    assert loss["end"]["thinking"] == loss["start"]["thinking"]
    assert loss["end"]["answer"] < loss["start"]["answer"]

    assert plain_change.num_questions == NUM_QUESTIONS
    assert plain_change.num_identical is not None
    assert plain_change.num_identical <= 95
