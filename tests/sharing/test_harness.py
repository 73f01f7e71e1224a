"""`sftkey export --to lm-eval` writes the run's prompts and verdicts for the harness."""

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftkey.commands.sharing import export
from sftkey.errors import RunError
from sftkey.training.run_folder import run_recipe
from tests.support.runs import asking_run, frame_of


class Loader(yaml.SafeLoader):
    """Reads the harness's `!function module.name` as that text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Path]:
    """Return a run with four questions, and the task that is written of it."""
    folder = tmp_path_factory.mktemp("task")
    run = asking_run(folder, tiny_folder, num_questions=4, grader="number")
    export(run, "lm-eval", folder / "task")
    return run, folder / "task"


def utils(folder: Path) -> Any:
    """Import the task's utils.py as the harness does."""
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_prompts_are_the_runs_own(task: tuple[Path, Path]) -> None:
    """Each row is a whole prompt; its ids are those that the run feeds."""
    run, folder = task
    renderer = frame_of(run_recipe(run))
    rows = list(utils(folder).load(version=1.0)["test"])
    assert len(rows) == 4
    for row in rows:
        question = f"Count on from {row['index']}."
        messages = [
            {"role": "system", "content": "You count."},
            {"role": "user", "content": question},
        ]
        ids = renderer.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert ids == renderer.prompt_ids(messages)
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)


def test_the_verdicts_are_the_runs_own(task: tuple[Path, Path]) -> None:
    """By the recipe's tags and grader; what an engine leaves of the end of turn doesn't count."""
    _, folder = task
    grade = utils(folder).process_results
    whole = "<Thinking>\nso\n</Thinking>\n<Answer>\n{}\n</Answer>"
    doc = {"answer": "16"}
    assert grade(doc, [whole.format("16.0") + "<|im_end|>"]) == {"acc": 1.0, "fmt": 1.0}
    assert grade(doc, [whole.format("17")]) == {"acc": 0.0, "fmt": 1.0}
    assert grade(doc, ["It is <Answer>16"]) == {"acc": 1.0, "fmt": 0.0}


def test_the_task_is_the_harnesses(
    task: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its YAML has the run's stop, length and greedy choice; the command names base and adapter."""
    run, folder = task
    written = yaml.load((folder / "sftkey_tiny.yaml").read_text(), Loader)
    assert written["task"] == "sftkey_tiny"
    assert written["custom_dataset"] == "utils.load"
    assert written["process_results"] == "utils.process_results"
    assert written["generation_kwargs"] == {
        "until": ["<|im_end|>"],
        "max_gen_toks": 12,
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
    assert [each["metric"] for each in written["metric_list"]] == ["acc", "fmt"]
    export(run, "lm-eval", tmp_path / "again")
    words = shlex.split(capsys.readouterr().out)
    base = run_recipe(run).model.name_or_path
    assert words[:5] == [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={base},peft={run}/stages/1-completion/adapter",
    ]
    assert words[5:9] == ["--tasks", "sftkey_tiny", "--include_path", str(tmp_path / "again")]
    with pytest.raises(RunError, match="exists already, and nothing is overwritten"):
        export(run, "lm-eval", tmp_path / "again")
