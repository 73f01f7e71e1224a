"""On the demo's model, 100 questions: a frozen key stage leaves every thinking as it was."""

import json
from pathlib import Path

import pytest

from sftkey.errors import RunError
from sftkey.evaluation.grading import grade
from sftkey.evaluation.results import read_results
from sftkey.evaluation.stage import ThinkingChange, grade_stage, thinking_change
from sftkey.recipe.load import load_recipe
from sftkey.study.cells import take_over
from sftkey.training import frozen
from sftkey.training.run import Run, start
from tests.training.test_frozen_run import thinkings
from tests.training.test_run import Killed, kill_at_step

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
    take_over(run.ledger, run.prepared)
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
    stopped = [json.loads(line)["stopped"] for line in texts(frozen, "completion").splitlines()]
    assert sum(stopped) >= 90, "few rows end with the end of turn that was trained"
    assert texts(frozen, "key") != texts(frozen, "completion"), "the key adapter did nothing"
    loss = frozen.ledger.stages[1].validation
    assert loss["end"]["thinking"] == loss["start"]["thinking"]
    assert loss["end"]["answer"] < loss["start"]["answer"]

    assert plain_change.num_questions == NUM_QUESTIONS
    assert plain_change.num_identical is not None
    assert plain_change.num_identical <= 95


HALF = (
    "model.quantization=none",
    "model.dtype=bfloat16",  # what recipes for GPUs compute in
    "data.num_rows=80",
    "data.validation=32",
    "data.test=2",
    "trainer.max_steps=3",
    "eval.num_questions=2",
    "stages=[{name: completion, loss_on: completion}, {name: key, loss_on: key, context: frozen}]",
)


def up_to_the_key(folder: Path, seed: int, *overrides: str) -> Run:
    """Train the first stage in bfloat16, and measure the start of the frozen one."""
    recipe = load_recipe(DEMO, (*HALF, f"seed={seed}", f"name=half-{seed}", *overrides))
    run = start(recipe, folder / recipe.name, grade=grade)
    run.answers.asked = ()
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(patch, "key", 0)
        with pytest.raises(Killed):
            list(run.stages())
    return run


def test_a_healthy_frozen_stage_starts_in_bfloat16_and_a_shifted_key_falls(tmp_path: Path) -> None:
    """Behind the cache rounding moves a token by hundredths of a nat, up and down."""
    run = up_to_the_key(tmp_path, seed=0)
    behind = run.ledger.stages[1].behind_cache
    assert behind is not None
    assert 0 < behind["noise"] < 0.1 * behind["spread"]
    assert abs(behind["loss"] - behind["full_pass"]) <= behind["bound"]
    starts = frozen.key_starts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "key_starts", lambda ids: starts(ids) + 1)
        again = start(run.recipe, run.ledger.folder, grade=grade)
        again.answers.asked = ()
        with pytest.raises(RunError, match="expected the key's loss behind the cache"):
            list(again.stages())
