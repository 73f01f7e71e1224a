import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock

from sftkey.commands.study import study, study_run
from sftkey.errors import RecipeError, RunError, RunLocked
from sftkey.files import write_json
from sftkey.recipe.load import RECIPES, load_recipe
from sftkey.recipe.stages import num_stage_steps, prefix_key
from sftkey.study.cells import recipe_hash, take_over
from sftkey.study.choose import StudyChoices, validation_loss
from sftkey.study.plan import to_choose
from sftkey.study.schema import STRATEGIES, load_study, strategy_recipe
from sftkey.study.tasks import StudyFolder, arm_recipe, matched_steps, tasks_of
from sftkey.training.made_from import fingerprints, made_from
from sftkey.training.run import read_rows
from sftkey.training.run_folder import open_run
from sftkey.training.trainer import KeyTrainer
from tests.support.model_folders import write_rows
from tests.support.tiny import made_rows
from tests.training.test_run import Killed

STEPS = 2
STUDY: dict[str, Any] = {
    "name": "small",
    "recipes": ["task.yaml"],
    "seeds": [1, 2],
    "control": "sft_twice",
    "arms": ["sft_twice", "sftkey"],
}


def write_study(folder: Path, model: Path, **sections: Any) -> Path:
    """Write a recipe on the tiny model and a study of it."""
    rows = folder / "rows.jsonl"
    write_rows(rows, made_rows(24))
    recipe = {
        "name": "task",
        "model": {"name_or_path": str(model), "quantization": "none"},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        "data": {"source": str(rows), "validation": 4, "test": 4},
        "trainer": {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 1},
        "stages": [
            {"name": "completion", "loss_on": "completion"},
            {"name": "key", "loss_on": "key", "trainer": {"learning_rate": 5e-4}},
        ],
        "eval": {"num_questions": 3, "max_new_tokens": 4, "grader": "number"},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(recipe))
    file = folder / "study-small.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **sections}, sort_keys=False))
    return file


@dataclass
class Finished:
    """A study that was killed in its second cell, and run again to its end."""

    folder: Path
    file: Path
    trained: Counter[str]  # stage trainings that came to their end, by run folder and stage
    asked: Counter[str]  # answers that were written
    before: dict[str, int]  # the cells that were whole at the kill, and when they were written

    def cell(self, arm: str, seed: int) -> dict[str, Any]:
        """Read a cell's file."""
        file = self.folder / "cells" / "task" / arm / f"seed-{seed}.json"
        cell: dict[str, Any] = json.loads(file.read_text())
        return cell

    def written(self) -> dict[str, int]:
        """Return all cells and when each was written."""
        files = self.folder.glob("cells/*/*/*.json")
        return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Run the study, kill it while the second cell of seed 1 trains its own stage, go on."""
    folder = tmp_path_factory.mktemp("study")
    file = write_study(folder, tiny_folder)
    done = Finished(folder / "runs" / "small", file, Counter(), Counter(), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        watch(patch, done)
        with pytest.MonkeyPatch.context() as kill:
            kill_in(kill, "key")
            with pytest.raises(Killed):
                study(file)
        done.before = done.written()
        study(file)
        yield done


def watch(patch: pytest.MonkeyPatch, done: Finished) -> None:
    """Count what is trained and asked."""
    from sftkey.training import answers

    train, generate = KeyTrainer.train, answers.generate_to_file

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        stage = Path(self.args.output_dir).parent
        if stage.parent.name == "stages":  # a rehearsal's lies elsewhere
            done.trained[f"{stage.parent.parent.name}/{stage.name}"] += 1
        return result

    def asked(model: Any, tokenizer: Any, prompts: Any, file: Path, **settings: Any) -> Any:
        done.asked[f"{file.parent.parent.name}/{file.name.partition('.')[0]}"] += 1
        return generate(model, tokenizer, prompts, file, **settings)

    patch.setattr(KeyTrainer, "train", counted)
    patch.setattr(answers, "generate_to_file", asked)


def kill_in(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Let training die after the first step of a stage."""
    from sftkey.training.log import StageLog

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record.name == stage and state.global_step == 1:
            raise Killed

    patch.setattr(StageLog, "on_step_begin", die, raising=False)


@pytest.mark.fault("a kill")
def test_a_killed_study_goes_on_and_runs_no_cell_twice(finished: Finished) -> None:
    """What was whole at the kill stays untouched; in the end every cell is there once."""
    after = finished.written()
    assert len(finished.before) == 1
    assert finished.before.items() <= after.items()
    assert len(after) == 4
    assert set(finished.trained.values()) == {1}


def test_a_shared_stage_is_trained_once(finished: Finished) -> None:
    """Stage 1 of a seed is trained in one run; the ledgers of the others say which, and own it."""
    assert finished.trained == {
        f"{run}-seed{seed}/{stage}": 1
        for seed in (1, 2)
        for run, stage in [
            ("sft_twice", "1-completion"),
            ("sft_twice", "2-again"),
            ("sftkey", "2-key"),
        ]
    }
    adapters = {}
    for arm in ("sftkey", "sft_twice"):
        run = finished.folder / "task" / f"{arm}-seed1"
        (first, *_) = json.loads((run / "ledger.json").read_text())["stages"]
        assert first["status"] == "trained"
        assert first["shared_from"] == (None if arm == "sft_twice" else "sft_twice-seed1")
        weights = run / "stages" / "1-completion" / "adapter" / "adapter_model.safetensors"
        adapters[arm] = weights.read_bytes()
    assert adapters["sftkey"] == adapters["sft_twice"]
    shared = finished.cell("sftkey", 2)["shared_from"]
    assert shared == {"completion": "sft_twice-seed2", "key": None}


def test_the_test_rows_are_read_once_an_arm(finished: Finished) -> None:
    """Only an arm's last stage answers; the base model answers once for all arms of a seed."""
    assert finished.asked == {
        f"{run}-seed{seed}/{stage}": 1
        for seed in (1, 2)
        for run, stage in [("sft_twice", "base"), ("sft_twice", "again"), ("sftkey", "key")]
    }
    bases = [finished.cell(arm, 1)["base"] for arm in STUDY["arms"]]
    assert bases[0] == bases[1]


def test_the_control_takes_exactly_the_steps_of_the_key_stage(finished: Finished) -> None:
    """`sft_twice` has as many optimizer steps, in the plan and in the log, as the key stage."""
    for seed in (1, 2):
        control, key = (finished.cell(arm, seed) for arm in ("sft_twice", "sftkey"))
        assert control["steps"]["again"] == key["steps"]["key"] == STEPS
        assert control["tokens"]["again"] == key["tokens"]["key"]
        assert control["trained_tokens"]["again"] > key["trained_tokens"]["key"]


def test_a_cell_holds_figures_and_flags_and_no_row_or_path(finished: Finished) -> None:
    """What is committed tells nothing of the data set or of this machine."""
    cell = finished.cell("sftkey", 2)
    assert [cell["task"], cell["arm"], cell["seed"]] == ["task", "sftkey", 2]
    assert cell["stages"] == ["completion", "key"]
    for answered in (cell, cell["base"]):
        assert len(answered["questions"]) == 3
        right = [question["correct"] for question in answered["questions"]]
        assert answered["acc"] == sum(right) / 3
    assert set(cell["questions"][0]) == {
        "index",
        "turn",
        "correct",
        "form",
        "strict",
        "parsed",
        "stopped",
        "thinking_right",
        "thinking_sha256",
    }
    assert [len(lengths) for lengths in cell["reference_tokens"].values()] == [3, 3]
    assert cell["validation"]["key"]["start"] == cell["validation"]["completion"]["end"]
    assert cell["segment_tokens"].keys() == cell["validation"]["key"]["end"].keys()
    assert cell["gradient_norm"].keys() == {"completion", "key"}  # that of stage 1 was taken over
    for norms in cell["gradient_norm"].values():
        assert norms.keys() == {"thinking", "answer_tag", "answer", "end"}
        assert min(norms.values()) > 0
    assert cell["command"] == "sftkey study study-small.yaml"
    text = json.dumps(cell)
    assert str(finished.folder.parent.parent) not in text
    assert "Count on from" not in text
    assert not list(finished.folder.glob("task/*/stages/*/checkpoints"))


def test_the_same_command_again_trains_and_reads_nothing(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished study is told by its files."""
    monkeypatch.setattr("sftkey.study.run.start", None)
    before = finished.written()
    report = (finished.folder / "report.md").read_text()
    results = (finished.folder / "results.json").read_text()
    study(finished.file)
    assert finished.written() == before
    assert (finished.folder / "report.md").read_text() == report
    assert (finished.folder / "results.json").read_text() == results


def test_a_report_comes_from_cells_alone(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--report` on a folder that holds nothing but cells writes what the study wrote."""
    shutil.copytree(finished.folder / "cells", tmp_path / "cells")
    study(finished.file, report_folder=tmp_path)
    report = (finished.folder / "report.md").read_text()
    assert capsys.readouterr().out == report
    for name in ("report.md", "results.json"):
        assert (tmp_path / name).read_text() == (finished.folder / name).read_text()


def test_a_finished_cell_of_another_recipe_is_refused(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed recipe can't go on among the cells of the old one; the keys are named."""
    text = finished.file.read_text()
    other = finished.file.with_name("other.yaml")
    other.write_text(f"{text}overrides: [trainer.learning_rate=0.5]\n")
    hint = (
        "\nhint: another `name` begins another study; without its run's folder and its file in "
        "cells/ a cell is run anew"
    )
    with pytest.raises(RunError) as caught:
        study(other)
    assert str(caught.value) == (
        "runs/small/task/sft_twice-seed1: 1 problem\n"
        "  trainer.learning_rate: was None when this run began; got 0.5" + hint
    )
    run = finished.folder / "task" / "sft_twice-seed1"
    run.rename(run.with_name("away"))
    with pytest.raises(RunError) as caught:
        study(other)
    run.with_name("away").rename(run)
    cell = "runs/small/cells/task/sft_twice/seed-1.json"
    assert str(caught.value) == f"{cell}: this cell is of another recipe" + hint


def test_a_key_that_a_cell_did_not_know_changes_nothing() -> None:
    """A later release's key at its default leaves the hash as it was; another value doesn't."""
    recipe = load_recipe(RECIPES / "smollm2-135m" / "orders.yaml")
    old = recipe_hash(recipe)
    packed = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"unpack": "never"})}
    )
    assert "unpack" not in recipe.model_dump(exclude_defaults=True)["model"]
    assert recipe_hash(packed) != old
    fewer = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"batch_size": 1})})
    assert recipe_hash(fewer) == old


@pytest.mark.parametrize("study_name", ["orders", "answers-only", "long"])
def test_committed_cells_are_of_todays_recipes(
    study_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they lie in runs/, `sftkey study` goes on from them and trains none again."""
    here = RECIPES / "smollm2-135m"
    monkeypatch.chdir(tmp_path)
    file = here / f"study-{study_name}.yaml"
    read = load_study(file)
    shutil.copytree(here / "results" / study_name, tmp_path / "runs" / read.name)
    run = study_run(read, file)
    cells = list(run.cells(choose=False))
    committed = [cell for cell in cells if run.folder.record(cell).exists()]
    assert len(committed) >= 12
    assert [cell.name for cell in committed if not run.finished(cell)] == []


def test_the_plan_counts_what_is_left(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells, steps and tokens; the time comes from what finished cells took; nothing is trained."""
    monkeypatch.setattr("sftkey.study.run.start", None)
    cell = finished.folder / "cells" / "task" / "sftkey" / "seed-2.json"
    kept = cell.read_text()
    cell.unlink()
    study(finished.file, plan_only=True)
    cell.write_text(kept)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:-3]]
    assert [row[:3] for row in rows] == [
        ["task", arm, seed] for seed in "12" for arm in ("sft_twice", "sftkey")
    ]
    assert [row[-1] for row in rows[:3]] == ["finished"] * 3
    assert rows[3][3:7] == ["completion", "shared,", "key", str(STEPS)]
    assert re.fullmatch(
        r"memory on a GPU: 0\.\d\d GiB at the peak of task sftkey, the largest of those planned "
        r"\(1 of 1 arms\), and 1\.00 GiB set aside",
        lines[-2],
    )
    assert lines[-3].startswith(
        f"4 cells, 3 of them finished; {STEPS} steps and {rows[3][-2]} tokens to train; time: 0:0"
    )


def test_without_a_finished_cell_the_time_is_unknown(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No time is made up."""
    monkeypatch.chdir(tmp_path)
    study(write_study(tmp_path, tiny_folder, seeds=[1]), plan_only=True)
    *_, last, _memory, promise = capsys.readouterr().out.splitlines()
    assert promise.startswith(
        "task: 3 questions, seeds: 1, comparisons: 1; one seed shows nothing of the ways of "
        "training; for a difference of 5 points it takes more than 50 seeds (supposing that the "
        "difference varies by 2.0 points from seed to seed: a guess)"
    )
    assert last.startswith(f"2 cells, 0 of them finished; {3 * STEPS} steps and ")
    assert last.endswith(" tokens to train; time: unknown")
    assert not (tmp_path / "runs").exists()


def test_choices_are_made_on_validation_rows_alone(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lowest loss of the key is taken, from the same grid for all; no question is asked."""
    monkeypatch.chdir(tmp_path)
    choose = {"learning_rate": [1e-9, 1e-1], "num_rows": 6, "by": "key", "max_rounds": 0}
    arms = ["sft_tag", "sft_twice", "sftkey"]
    file = write_study(tmp_path, tiny_folder, choose=choose, seeds=[1], arms=arms)
    run = study_run(load_study(file), file)
    monkeypatch.setattr("sftkey.training.answers.generate_to_file", None)
    choices = run.choices(run.tasks[0])
    assert choices.of("sft_tag", choose=False) == [{}]
    assert to_choose(run) == [
        "task: 6 more runs, on up to 6 rows each, choose on the validation rows first"
    ]
    study(file, plan_only=True)
    assert to_choose(run)[0] in capsys.readouterr().out.splitlines()
    picked = choices.of("sft_tag")
    assert choices.num_left() == 4  # `again` and `key`, with two values each
    record = json.loads((tmp_path / "runs/small/choices/task.json").read_text())
    (stage,) = record["stages"].values()
    losses = {each["learning_rate"]: each["loss"] for each in stage["tried"]}
    assert losses.keys() == {1e-9, 1e-1}
    assert picked == [{"learning_rate": min(losses, key=lambda rate: losses[rate])}]
    assert stage["at_edge"] == ["learning_rate"]
    kept = list((tmp_path / "runs/small/choices/task").iterdir())
    assert len(kept) == 2  # later stages start from the chosen one
    cell = run.cell(run.tasks[0], "sftkey", 1, [*picked, {}])
    assert cell.recipe.stages[0].trainer["learning_rate"] == picked[0]["learning_rate"]
    assert cell.chosen == {"completion": picked[0]}
    other = write_study(tmp_path, tiny_folder, choose={**choose, "num_rows": 7}, arms=arms)
    changed = study_run(load_study(other), other)
    with pytest.raises(RunError) as caught:
        changed.choices(changed.tasks[0]).of("sft_tag")
    asked: dict[str, Any] = {
        "learning_rate": [1e-9, 1e-1],
        "weight": [],
        "seed": 1,
        "num_rows": 6,
        "by": "key",
    }
    assert str(caught.value) == (
        "runs/small/choices/task.json: expected the values that were chosen from, "
        f"{asked}; got { {**asked, 'num_rows': 7} }\n"
        "hint: another `name` begins another study; without this file it is chosen again"
    )


@pytest.mark.parametrize(
    ("arm", "num_right", "chosen"),
    [("sftkey", [3, 1], 1e-9), ("sft_tag", [1, 3], 1e-1), ("sft_tag", [0, 0], None)],
)
def test_values_are_chosen_by_the_answers_to_validation_rows(
    arm: str,
    num_right: list[int],
    chosen: float | None,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The most right answers win, of equal ones the lower loss; no test row is asked."""
    monkeypatch.chdir(tmp_path)
    rates = [1e-9, 1e-1]
    choose = {"learning_rate": rates, "num_rows": 6, "max_rounds": 0}
    arms = ["sft_tag", "sft_twice", "sftkey"]
    file = write_study(tmp_path, tiny_folder, choose=choose, arms=arms)
    run = study_run(load_study(file), file)
    recipe = arm_recipe(run.study, run.tasks[0], arm, 1)
    prepared = run.rows(recipe)
    examples = {each.index: each for each in prepared.validation_examples}
    asked: list[tuple[str, float, list[Any]]] = []

    def answer(_model: Any, _tokenizer: Any, prompts: Any, part: Path, **_settings: Any) -> None:
        stage = load_recipe(part.parents[1] / "recipe.yaml").stages[-1]
        rate = float(stage.trainer["learning_rate"])
        asked.append((stage.name, rate, list(prompts)))
        right = list(prompts)[: num_right[rates.index(rate)]]
        rows = [
            {"index": key.row, "text": tagged(examples[key.row].answer if key in right else "?")}
            for key in prompts
        ]
        write_rows(part, rows)

    def tagged(answer: str) -> str:
        return f"<Thinking>\n1\n</Thinking>\n<Answer>\n{answer}\n</Answer>"

    monkeypatch.setattr("sftkey.training.answers.generate_to_file", answer)
    picked = run.choices(run.tasks[0]).of(arm)
    stages = json.loads((tmp_path / "runs/small/choices/task.json").read_text())["stages"].values()
    for values, stage in zip(picked, stages, strict=True):
        losses = {each["learning_rate"]: each["loss"] for each in stage["tried"]}
        lowest = min(losses, key=lambda rate: losses[rate])
        assert values == {"learning_rate": chosen or lowest}
        assert [each["acc"] for each in stage["tried"]] == [right / 3 for right in num_right]
    assert [(name, rate) for name, rate, _ in asked] == [
        (stage.name, rate) for stage in recipe.stages for rate in rates
    ]
    for *_, indexes in asked:
        assert len(indexes) == 3
        assert {key.row for key in indexes} <= examples.keys()


@pytest.mark.parametrize(("best", "edge"), [(1e-5, True), (1e-4, False), (1e-3, True)])
def test_a_choice_at_either_edge_of_the_grid_is_told(
    best: float,
    edge: bool,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the lowest value, as beyond the highest, a better one may lie."""
    monkeypatch.chdir(tmp_path)

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        return {"loss": float(picked[-1]["learning_rate"] != best)}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    choose = {"learning_rate": [1e-4, 1e-5, 1e-3], "num_rows": 6, "max_rounds": 0}
    file = write_study(tmp_path, tiny_folder, choose=choose)
    run = study_run(load_study(file), file)
    assert run.choices(run.tasks[0]).of("sftkey") == [{"learning_rate": best}] * 2
    stages = json.loads((tmp_path / "runs/small/choices/task.json").read_text())["stages"].values()
    assert [each["at_edge"] for each in stages] == [["learning_rate"] if edge else []] * 2


@pytest.mark.parametrize(
    ("best", "rounds", "tried_too", "edge"),
    [
        (1e-4, 2, [], False),
        (1e-2, 2, [1e-2, 1e-1], False),  # the second shows that the first is no edge
        (1e-6, 1, [1e-6], True),
        (1e-9, 2, [1e-6, 1e-7], True),
    ],
)
def test_a_grid_widens_until_its_best_lies_inside(
    best: float,
    rounds: int,
    tried_too: list[float],
    edge: bool,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One value a round, a step beyond the edge, and no more rounds than asked; each is told."""
    monkeypatch.chdir(tmp_path)
    rates: list[float] = []

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        rates.append(picked[-1]["learning_rate"])
        return {"loss": abs(math.log(rates[-1] / best))}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    choose = {"learning_rate": [1e-5, 1e-4, 1e-3], "max_rounds": rounds}
    file = write_study(tmp_path, tiny_folder, choose=choose, arms=["sft_tag", "sft_twice"])
    run = study_run(load_study(file), file)
    (picked,) = run.choices(run.tasks[0]).of("sft_tag")
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, *tried_too])
    assert picked["learning_rate"] == min(rates, key=lambda rate: abs(math.log(rate / best)))
    (stage,) = json.loads((tmp_path / "runs/small/choices/task.json").read_text())[
        "stages"
    ].values()
    assert stage["at_edge"] == (["learning_rate"] if edge else [])
    assert capsys.readouterr().err.count("at an edge; tried too: ") == len(tried_too)


def test_processes_that_share_a_study_keep_each_others_choices(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another has written while this one trained stays, and the first choice counts."""
    monkeypatch.chdir(tmp_path)
    choose = {"learning_rate": [1e-4, 1e-3], "max_rounds": 0}
    file = write_study(tmp_path, tiny_folder, choose=choose)
    run = study_run(load_study(file), file)
    choices, written = run.choices(run.tasks[0]), tmp_path / "runs/small/choices/task.json"
    places = [("sftkey", 0), ("sft_twice", 1), ("sftkey", 1)]
    first, again, key = (choices._key(*place) for place in places)
    theirs = {"chosen": {"learning_rate": 7.0}}

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        if len(picked) == 1:  # another process is done with two choices, one of them this one's
            stages = {first: theirs, again: theirs}
            write_json(written, {**self._record(choice), "stages": stages})
        return {"loss": 1.0}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    assert choices.of("sftkey") == [{"learning_rate": 7.0}, {"learning_rate": 1e-4}]
    stages = json.loads(written.read_text())["stages"]
    rates = [stages[name]["chosen"]["learning_rate"] for name in (first, again, key)]
    assert rates == [7.0, 7.0, 1e-4]


def test_a_choice_that_another_process_works_on_is_waited_for(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A value is tried when its run is free; what the other chose meanwhile isn't chosen again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sftkey.study.choose.WAIT_SECONDS", 0)
    file = write_study(tmp_path, tiny_folder, choose={"learning_rate": [1e-4, 1e-3]})
    run = study_run(load_study(file), file)
    choices, written = run.choices(run.tasks[0]), tmp_path / "runs/small/choices/task.json"
    tries: list[list[dict[str, float]]] = []

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        tries.append(picked)
        if len(tries) == 4:
            theirs = {choices._key("sft_twice", 0): {"chosen": {"learning_rate": 7.0}}}
            write_json(written, {**self._record(choice), "stages": theirs})
        if len(tries) in (1, 2, 4):
            raise RunLocked("runs/x", "another process works on this run: pid 7 on a")
        return {"loss": 1.0}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    study = run.study.model_copy(update={"arms": ("sft_tag",)})
    monkeypatch.setattr(run, "study", study)
    assert choices.of("sft_tag") == [{"learning_rate": 7.0}]
    assert [picked[0]["learning_rate"] for picked in tries] == [1e-4] * 3 + [1e-3]
    said = "task, sft_tag, completion: waiting for another process: another process works on this "
    assert capsys.readouterr().err.splitlines() == [f"{said}run: pid 7 on a"] * 2


def test_runs_of_choices_that_another_process_works_on_stay(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are removed as soon as all is chosen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StudyChoices, "_try", lambda *_: {"loss": 1.0})
    file = write_study(tmp_path, tiny_folder, choose={"learning_rate": [1e-4]}, arms=["sft_twice"])
    run = study_run(load_study(file), file)
    runs = [tmp_path / "runs/small/choices/task" / name for name in "ab"]
    for folder in runs:
        folder.mkdir(parents=True)
    with FileLock(runs[1] / ".lock"):
        run.choices(run.tasks[0]).of("sft_twice")
    assert [folder.exists() for folder in runs] == [False, True]
    (tmp_path / "runs/small/choices/task.json").unlink()
    run.choices(run.tasks[0]).of("sft_twice")
    assert not runs[0].parent.exists()


def test_a_weight_is_chosen_where_a_stage_has_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `weighted_then_sft` the first stage has one, and shares it with `weighted`."""
    monkeypatch.chdir(tmp_path)
    asked: list[list[dict[str, float]]] = []

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        asked.append(picked)
        return {"loss": abs(picked[0]["weight"] - 5.0)}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    choose = {"learning_rate": [1e-4], "weight": [2.0, 5.0, 10.0]}
    arms = ["sft_twice", "weighted", "weighted_then_sft"]
    file = write_study(tmp_path, tiny_folder, choose=choose, arms=arms)
    run = study_run(load_study(file), file)
    choices = run.choices(run.tasks[0])
    first = {"learning_rate": 1e-4, "weight": 5.0}
    assert choices.of("weighted") == [first]
    assert choices.of("weighted_then_sft") == [first, {"learning_rate": 1e-4}]
    assert len(asked) == 3 + 1


def test_a_kl_is_chosen_where_a_stage_has_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It widens as a learning rate does, and stands in the cell's recipe; no first stage has it."""
    monkeypatch.chdir(tmp_path)

    def tried(self: StudyChoices, choice: Any, arm: str, picked: list[dict[str, float]]) -> Any:
        return {"loss": abs(picked[-1].get("kl", 8.0) - 8.0)}

    monkeypatch.setattr(StudyChoices, "_try", tried)
    arms = ["sft_twice", "sftkey_kl"]
    file = write_study(tmp_path, tiny_folder, choose={"kl": [0.5, 2.0]}, arms=arms)
    run = study_run(load_study(file), file)
    picked = run.choices(run.tasks[0]).of("sftkey_kl")
    assert picked == [{}, {"kl": 8.0}]
    recipe = run.cell(run.tasks[0], "sftkey_kl", 1, picked).recipe
    assert [stage.kl for stage in recipe.stages] == [0.0, 8.0]


def test_a_choice_weighs_segments_by_their_tokens() -> None:
    """8 nats on 3 tokens and 2 on 1 are 6.5 a token, not 5; a segment without tokens has none."""
    tokens = {"PROMPT": 9, "THINKING": 9, "ANSWER_TAG": 3, "ANSWER": 1, "END": 0}
    prepared: Any = SimpleNamespace(counts={"tokens": {"validation": tokens}})
    losses = {"prompt": 1.0, "thinking": 0.5, "answer_tag": 8.0, "answer": 2.0}
    assert validation_loss(losses, prepared, "key") == (3 * 8 + 2) / 4
    assert validation_loss(losses, prepared, "completion") == (9 * 0.5 + 3 * 8 + 2) / 13


def test_a_choice_over_own_thinking_reads_no_more_rows_than_it_may(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of the sixteen training rows are asked, and they are the first six."""
    monkeypatch.chdir(tmp_path)
    choose = {"learning_rate": [1e-4], "num_rows": 6}
    arms = ["sft_twice", "sftkey_own"]
    file = write_study(tmp_path, tiny_folder, choose=choose, arms=arms)
    asked: list[Any] = []

    def own_rows(stage: Any, prepared: Any, *_others: Any) -> Any:
        asked.append([each.index for each in prepared.train_examples])
        assert asked[-1] == prepared.train["index"][:]
        return prepared.train

    monkeypatch.setattr("sftkey.training.run.make_own_rows", own_rows)
    run = study_run(load_study(file), file)
    run.choices(run.tasks[0]).of("sftkey_own")
    recipe = arm_recipe(run.study, run.tasks[0], "sftkey_own", 1)
    first = [each.index for each in run.rows(recipe).train_examples]
    assert (asked, len(first)) == ([first[:6]], 16)


def test_matched_steps_train_as_many_tokens_as_the_key_stage() -> None:
    """Full SFT reads fewer rows, so that it trains the key stage's tokens, to half a step."""
    tokens = {"PROMPT": 900, "THINKING": 800, "ANSWER_TAG": 100, "ANSWER": 80, "END": 20}
    prepared: Any = SimpleNamespace(train=range(100), counts={"tokens": {"train": tokens}})
    trainer = {"per_device_train_batch_size": 5, "num_train_epochs": 3}
    steps = matched_steps(trainer, prepared, None)
    assert abs(steps * 5 * 10 - 3 * 200) <= 25
    assert matched_steps({**trainer, "max_steps": 40}, prepared, None) == 8
    assert matched_steps({**trainer, "num_train_epochs": 0.01}, prepared, None) == 1


@pytest.fixture
def task(tmp_path: Path, tiny_folder: Path) -> Path:
    """Return a recipe of two stages."""
    return write_study(tmp_path, tiny_folder).with_name("task.yaml")


STAGES: dict[str, list[tuple[Any, ...]]] = {
    "sft": [("completion", "completion")],
    "sft_tag": [("completion", "completion")],
    "key_tag": [("key", "key")],
    "sftkey": [("completion", "completion"), ("key", "key")],
    "sft_twice": [("completion", "completion"), ("again", "completion")],
    "sft_matched": [("completion", "completion"), ("matched", "completion")],
    "weighted": [("weighted", {"completion": 1.0, "key": 5.0})],
    "weighted_twice": [
        ("weighted", {"completion": 1.0, "key": 5.0}),
        ("weighted-again", {"completion": 1.0, "key": 5.0}),
    ],
    "weighted_then_sft": [
        ("weighted", {"completion": 1.0, "key": 5.0}),
        ("again", "completion"),
    ],
    "annealed": [("annealed", {"completion": 1.0, "key": 1.0})],
    "balanced": [("balanced", {"completion": 1.0, "key": 1.0})],
    "dft": [("dft", "completion")],
    "eaft": [("eaft", "completion")],
    "sftkey_detached": [("completion", "completion"), ("key", "key")],
    "rft": [("completion", "completion"), ("rft", "completion")],
    "sftkey_anchored": [("completion", "completion"), ("key", {"thinking": 0.1, "key": 1.0})],
    "sftkey_frozen": [("completion", "completion"), ("key", "key")],
    "sftkey_kl": [("completion", "completion"), ("key", "key")],
    "sftkey_frozen_long": [("completion", "completion"), ("key", "key")],
}
FILLED = {
    "num_train_epochs": 60.0,
    "max_steps": -1,
    "lr_scheduler_type": "constant",
}  # upstream's 3


@pytest.mark.parametrize("name", STAGES)
def test_a_strategy_is_a_list_of_stages(name: str, task: Path) -> None:
    """Each has the recipe's trainer at its place; what it adds are the stages' own keys."""
    recipe = strategy_recipe(task, STRATEGIES[name])
    assert [(stage.name, stage.loss_on) for stage in recipe.stages] == STAGES[name]
    last = recipe.stages[-1]
    filled = FILLED if name == "sftkey_frozen_long" else {}
    assert [stage.trainer for stage in recipe.stages] == [{}, {"learning_rate": 5e-4, **filled}][
        : len(recipe.stages)
    ]
    assert (last.early_stop is not None) == bool(filled)
    contexts = {"sftkey_detached": "detached", "sftkey_frozen": "frozen"}
    assert last.context == (contexts | {"sftkey_frozen_long": "frozen"}).get(name, "exact")
    assert last.loss == (name if name in ("dft", "eaft") else "nll")
    assert last.kl == (1.0 if name == "sftkey_kl" else 0.0)
    tags = (*recipe.response.thinking, *recipe.response.answer)
    assert ("".join(tags).strip() == "") == (name == "sft")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("name=other", True),
        ("eval.num_questions=1", True),
        ("stages.key.loss_on=answer", True),
        ("trainer.learning_rate=0.5", False),
        ("stages.completion.trainer.max_steps=9", False),
        ("stages.completion.loss=dft", False),
        ("seed=3", False),
        ("data.max_length=99", False),
        ("lora.r=3", False),
    ],
)
def test_a_first_stage_is_shared_where_all_that_makes_it_is_the_same(
    override: str, same: bool, task: Path
) -> None:
    """Neither the name nor the evaluation nor a later stage changes what a stage trains."""
    key = prefix_key(load_recipe(task), 1)
    assert (prefix_key(load_recipe(task, [override]), 1) == key) == same


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("eval.grader=exact", False),
        ("eval.max_new_tokens=5", False),
        ("eval.num_questions=1", True),
    ],
)
def test_own_thinking_is_shared_where_it_is_graded_and_written_alike(
    override: str, same: bool, task: Path
) -> None:
    """`keep: right` asks the grader; a stage before it doesn't."""
    own = "stages.key.thinking=own"
    keys = [prefix_key(load_recipe(task, [own, *more]), 2) for more in ([], [override])]
    assert (keys[0] == keys[1]) == same
    first = [prefix_key(load_recipe(task, [own, *more]), 1) for more in ([], [override])]
    assert first[0] == first[1]


@pytest.mark.fault("a second process, a dead one's lock")
def test_a_cell_that_another_process_works_on_is_left_to_it(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is run."""
    run = study_run(load_study(write_study(tmp_path, tiny_folder)), tmp_path / "study-small.yaml")
    said: list[str] = []
    run.note, run.folder = said.append, StudyFolder(tmp_path / "runs")
    tried: list[str] = []

    def run_cell(cell: Any) -> None:
        tried.append(cell.name)
        if cell.arm == "sftkey":
            raise RunLocked("runs/x", "another process works on this run: pid 7 on a")

    monkeypatch.setattr(run, "run_cell", run_cell)
    monkeypatch.setattr(run, "refuse_early", lambda: None)
    monkeypatch.setattr(run, "matched", lambda *args: [{}, {}])
    done = [cell.name for cell in run.run()]
    assert len(tried) == 4
    assert done == [name for name in tried if not name.startswith("sftkey")]
    assert said.count("left to another process: another process works on this run: pid 7 on a") == 2


@pytest.mark.parametrize(
    ("override", "other_rows", "num_answers"),
    [("name=b", None, 1), ("eval.alpha=0.5", None, 0), ("name=b", "test", 0)],
)
def test_a_shared_stage_brings_its_answers_along(
    override: str, other_rows: str | None, num_answers: int, task: Path, tmp_path: Path
) -> None:
    """They are linked where evaluation and questions are the same, the stage either way."""
    first, second = load_recipe(task), load_recipe(task, [override])
    giver, taker = open_run(first, tmp_path / "a"), open_run(second, tmp_path / "b")
    for place in ("adapter", "checkpoints"):
        (giver.stage_folder(0) / place).mkdir(parents=True)
        (giver.stage_folder(0) / place / "weights").write_text("trained")
    giver.generations("completion").write_text("answers")
    giver.stages[0].status = "trained"
    prepared = read_rows(second)
    giver.rows = fingerprints(made_from(first, prepared))
    giver.rows |= {other_rows: "others"} if other_rows else {}
    giver.save()
    take_over(taker, prepared)
    assert [record.shared_from for record in taker.stages] == ["a", None]
    assert [record.status for record in taker.stages] == ["trained", "open"]
    assert [file.name for file in taker.stage_folder(0).iterdir()] == ["adapter"]
    assert (taker.adapter(0) / "weights").samefile(giver.adapter(0) / "weights")
    assert len(list((tmp_path / "b" / "evaluation").iterdir())) == num_answers


@pytest.mark.parametrize("split", ["train", "validation", "template"])
def test_a_stage_of_other_rows_is_not_taken_over(split: str, task: Path, tmp_path: Path) -> None:
    """The recipe is the same to the last letter; its file has other rows now."""
    recipe = load_recipe(task)
    giver, taker = open_run(recipe, tmp_path / "a"), open_run(recipe, tmp_path / "b")
    giver.adapter(0).mkdir(parents=True)
    giver.stages[0].status = "trained"
    prepared = read_rows(recipe)
    giver.rows = fingerprints(made_from(recipe, prepared)) | {split: "others"}
    giver.save()
    take_over(taker, prepared)
    assert [record.status for record in taker.stages] == ["open", "open"]


def test_a_broken_run_beside_stops_nothing(task: Path, tmp_path: Path) -> None:
    """Another process may be removing it: its recipe, or its ledger, is gone."""
    recipe = load_recipe(task)
    first, second, taker = (open_run(recipe, tmp_path / name) for name in "abc")
    (first.folder / "recipe.yaml").unlink()
    for name in ("ledger.json", "ledger.copy.json"):
        (second.folder / name).write_text("torn")
    take_over(taker, read_rows(recipe))
    assert [record.status for record in taker.stages] == ["open", "open"]


def test_every_strategy_of_the_issue_is_there() -> None:
    """The table above leaves out none but the one whose key comes later."""
    assert STRATEGIES.keys() == {*STAGES, *LONG, "sftkey_own"}


LONG = {"sft_long": ("completion", "completion"), "weighted_long": STAGES["weighted"][0]}


@pytest.mark.parametrize("name", LONG)
def test_a_long_stage_is_one_schedule_over_the_length_of_two(name: str, task: Path) -> None:
    """Two and two steps make four, epochs as well; all else is as in the first stage."""
    (stage,) = strategy_recipe(task, STRATEGIES[name]).stages
    assert (stage.name, stage.loss_on) == LONG[name]
    assert stage.trainer == {"max_steps": 2 * STEPS}
    epochs = ["trainer.max_steps=-1", "stages.key.trainer.num_train_epochs=2"]
    recipe = strategy_recipe(task, STRATEGIES[name], epochs)
    assert recipe.stages[0].trainer == {"num_train_epochs": 5.0}  # upstream's 3 and 2
    twice = strategy_recipe(task, STRATEGIES["sft_twice"], epochs)
    steps = [num_stage_steps(twice.stage_trainer(stage), 24, 1) for stage in twice.stages]
    assert num_stage_steps(recipe.stage_trainer(recipe.stages[0]), 24, 1) == sum(steps)
    with pytest.raises(RecipeError, match=r"max_steps in both or in none; got \[2, -1\]"):
        strategy_recipe(task, STRATEGIES[name], ["stages.key.trainer.max_steps=-1"])


def test_a_filled_stage_ends_by_the_time_of_as_long_full_sft(task: Path) -> None:
    """Of its second stage's length, which is measured in steps or epochs of the first."""
    for overrides, times in [
        ([], 1.0),
        (["stages.key.trainer.max_steps=5"], 2.5),
        (["trainer.max_steps=-1", "stages.key.trainer.num_train_epochs=6"], 2.0),
    ]:
        recipe = strategy_recipe(task, STRATEGIES["sftkey_frozen_long"], overrides)
        stop = recipe.stages[1].early_stop
        assert stop is not None
        assert (stop.as_long_as, stop.times) == ("completion", times)


def test_a_balanced_stage_weighs_thinking_and_key_alike(
    task: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight times the key's tokens is the number of the thinking's, over the training rows."""
    monkeypatch.chdir(task.parent)
    file = write_study(task.parent, tiny_folder, arms=["sft_twice", "balanced"])
    run = study_run(load_study(file), file)
    cell = run.cell(run.tasks[0], "balanced", 1, [{}])
    tokens = run.rows(cell.recipe).counts["tokens"]["train"]
    weights = cell.recipe.stages[0].loss_on
    assert isinstance(weights, dict)
    key = sum(tokens[name] for name in ("ANSWER_TAG", "ANSWER", "END"))
    assert weights["completion"] == 1.0
    assert weights["key"] * key == pytest.approx(tokens["THINKING"], rel=1e-5)
    assert weights["key"] != 1.0


def test_arms_may_be_written_out_where_they_are_named(task: Path, tiny_folder: Path) -> None:
    """One under `arms` is what it would be under `strategies`, and its errors have its line."""
    mine = {"stages": [{"name": "one", "loss_on": "answer", "trainer": {}}]}
    inline = {"arms": ["sft_twice", {"name": "mine", **mine}]}
    file = write_study(task.parent, tiny_folder, **inline)
    study = load_study(file)
    assert study.arms == ("sft_twice", "mine")
    named = {"arms": ["sft_twice", "mine"], "strategies": {"mine": mine}}
    assert load_study(write_study(task.parent, tiny_folder, **named)) == study
    inline["arms"][1] = {"name": "mine", "stagse": []}
    with pytest.raises(RecipeError) as caught:
        load_study(write_study(task.parent, tiny_folder, **inline))
    text = file.read_text().splitlines()
    number = next(n for n, line in enumerate(text, 1) if "stagse" in line)
    assert f"line {number}, strategies.mine.stagse: unknown key" in str(caught.value)


def test_a_recipe_without_a_second_stage_has_no_settings_for_one(task: Path) -> None:
    """A strategy doesn't make settings up."""
    overrides = ["stages=[{name: completion, loss_on: completion}]"]
    with pytest.raises(RecipeError) as caught:
        strategy_recipe(task, STRATEGIES["sftkey"], overrides)
    assert str(caught.value) == (
        f"{task}: expected 2 stages, whose trainer settings the strategy's stages take over; "
        "got 1\nhint: write a second stage into the recipe"
    )


def test_an_arm_that_a_recipe_cannot_do_is_named(task: Path, tiny_folder: Path) -> None:
    """The error says which arm, and what is wrong with its stages."""
    stages = [{"name": "one", "loss_on": "completion"}, {"name": "two", "loss_on": "anwser"}]
    strategies = {"mine": {"stages": stages}}
    file = write_study(task.parent, tiny_folder, arms=["sft_twice", "mine"], strategies=strategies)
    run = study_run(load_study(file), file)
    with pytest.raises(RecipeError) as caught:
        run.cell(run.tasks[0], "mine", 1, [{}, {}])
    assert str(caught.value) == (
        f"{task}, arm mine: 1 problem\n  stages[1].loss_on: expected completion, key, answer or "
        "weights; got 'anwser'; did you mean `answer`?"
    )


@pytest.mark.parametrize("trainer", [5, None, ["max_steps"]])
def test_settings_of_an_arm_that_are_no_mapping_are_refused(
    trainer: Any, task: Path, tiny_folder: Path
) -> None:
    """The error says where they stand, like that of a recipe."""
    strategies = {"mine": {"stages": [{"name": "one", "loss_on": "key", "trainer": trainer}]}}
    file = write_study(task.parent, tiny_folder, arms=["sft_twice", "mine"], strategies=strategies)
    run = study_run(load_study(file), file)
    with pytest.raises(RecipeError, match=r"arm mine: 1 problem\n  stages\[0\].trainer: expected"):
        run.cell(run.tasks[0], "mine", 1, [{}])


def test_a_study_needs_test_rows(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is trained."""
    from sftkey.errors import DataError

    monkeypatch.chdir(tmp_path)
    file = write_study(tmp_path, tiny_folder, overrides=["data.test=null"])
    with pytest.raises(DataError) as caught:
        study(file)
    assert str(caught.value) == (
        f"{file.with_name('task.yaml')}: a study asks test questions; expected test rows, got none"
        "\nhint: write data.test into the recipe"
    )


def test_a_launcher_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes would write one file."""
    file = write_study(tmp_path, tiny_folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError) as caught:
        study(file)
    assert str(caught.value) == (
        f"{file}: expected one process; got 2\nhint: start it as `sftkey study`, without a launcher"
    )


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("study-*.yaml")), ids=lambda file: file.name)
def test_a_study_that_ships_is_right(file: Path) -> None:
    """Its form, its recipes, and each arm on each of them."""
    checked = load_study(file)
    for task in tasks_of(checked, file.parent):
        for arm in checked.arms:
            arm_recipe(checked, task, arm, checked.seeds[0])


def test_the_papers_study_is_all_of_its_models_data_and_strategies() -> None:
    """80 cells, each with its own model, data, run and the paper's way to train."""
    file = RECIPES / "paper" / "study-paper.yaml"
    checked = load_study(file)
    names: dict[str, tuple[str, str]] = {}
    for task in tasks_of(checked, file.parent):
        for arm in checked.arms:
            recipe = arm_recipe(checked, task, arm, 42)
            names[recipe.name] = (recipe.model.name_or_path, recipe.data.source)
            assert (recipe.model.quantization, recipe.lora) == ("none", None)
            for stage in recipe.stages:
                trainer = recipe.stage_trainer(stage)
                assert (trainer["learning_rate"], trainer["num_train_epochs"]) == (5e-6, 3)
                sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
                assert math.prod(trainer[name] for name in sizes) == 256
            smol = "SmolLM3" in recipe.model.name_or_path
            assert recipe.response.end == ("<|end_of_text|>" if smol else "<|endoftext|>")
    assert len(names) == 80
    assert len(set(names.values())) == 20
    assert {model for model, _ in names.values()} == {
        *(f"Qwen/{name}" for name in ("Qwen3-8B-Base", "Qwen2.5-7B", "Qwen2.5-3B", "Qwen2.5-1.5B")),
        "HuggingFaceTB/SmolLM3-3B-Base",
    }
    for name, (model, _) in names.items():
        assert name.startswith(f"paper-{model.partition('/')[2].lower()}-")


def test_one_recipe_makes_several_tasks(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a name and changes of its own, which go above the study's; and runs of its own."""
    monkeypatch.chdir(tmp_path)
    short = {"recipe": "task.yaml", "name": "short", "overrides": ["trainer.max_steps=1"]}
    own = {"overrides": ["trainer.max_steps=9", "data.max_length=500"]}
    file = write_study(tmp_path, tiny_folder, recipes=["task.yaml", short], seeds=[1], **own)
    run = study_run(load_study(file), file)
    cells = list(run.cells())
    assert [(each.task, each.arm) for each in cells] == [
        (task, arm) for task in ("task", "short") for arm in ("sft_twice", "sftkey")
    ]
    assert [each.recipe.trainer["max_steps"] for each in cells] == [9, 9, 1, 1]
    assert {each.recipe.data.max_length for each in cells} == {500}
    assert cells[2].recipe.name == "small-short-sft_twice-seed1"
    assert str(run.folder.record(cells[2])) == "runs/small/cells/short/sft_twice/seed-1.json"
    run.run_cell(cells[2])
    assert json.loads(run.folder.record(cells[2]).read_text())["task"] == "short"
    wrong = {**short, "overrides": ["trainer.max_step=1"]}
    file = write_study(tmp_path, tiny_folder, recipes=[wrong])
    with pytest.raises(RecipeError, match=re.escape(f"{tmp_path}/task.yaml, task short, arm ")):
        list(study_run(load_study(file), file).cells())


def test_a_task_has_one_name_where_it_is_checked_and_where_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes whose tasks would share a folder are refused, however a task gets its name."""
    monkeypatch.setattr("sftkey.study.schema.task_name", lambda file, name: file[0])
    monkeypatch.setattr("sftkey.study.tasks.task_name", lambda file, name: file[0])
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "recipes": ["a.yaml", "b.yaml"]}))
    assert [task.name for task in tasks_of(load_study(file), tmp_path)] == ["a", "b"]
    file.write_text(yaml.safe_dump({**STUDY, "recipes": ["a.yaml", "ab.yaml"]}))
    with pytest.raises(RecipeError, match="another task has the name `a`"):
        load_study(file)


NAMES = ", ".join(STRATEGIES)
Sections = dict[str, Any]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"arms": ["sft_twice", "sftke"]}, "arms[1]: no strategy has the name `sftke`; did you "
         "mean `sftkey`?"),
        ({"arms": ["sft_twice", "zzz"]}, f"arms[1]: no strategy has the name `zzz`; there are "
         f"{NAMES}"),
        ({"arms": ["sft_twice", "sft_twice"]}, "arms[1]: `sft_twice` stands twice"),
        ({"seeds": [1, 2, 1]}, "seeds[2]: `1` stands twice"),
        ({"seeds": [-1]}, "seeds[0]: expected 0 or more; got -1"),
        ({"recipes": ["a/x.yaml", "b/x.yaml"]}, "recipes[1]: another task has the name `x`; write "
         "{recipe: b/x.yaml, name: OTHER}"),
        ({"recipes": ["x.yaml", {"recipe": "y.yaml", "name": "x"}]}, "recipes[1]: another task has "
         "the name `x`; write {recipe: y.yaml, name: OTHER}"),
        ({"recipes": ["a/x.yaml", "b/X.yaml"]}, "recipes[1]: another task has the name `X`; write "
         "{recipe: b/X.yaml, name: OTHER}"),
        ({"recipes": [{"recipe": "x.yaml", "name": 3}]}, "recipes[0].name: expected text; got 3 "
         "(text is written in quotes)"),
        ({"recipes": [{"recipe": "x.yaml", "naem": "y"}]}, "recipes[0].naem: unknown key; did you "
         "mean `name`?"),
        ({"recipes": [{"name": "y"}]}, "recipes[0].recipe: missing"),
        ({"recipes": [7]}, "recipes[0]: expected a mapping; got 7"),
        ({"control": "dft"}, "control: expected one of the arms; got 'dft'"),
        ({"overides": []}, "overides: unknown key; did you mean `overrides`?"),
        ({"choose": {"seed": 1}}, "choose: expected values of learning_rate, weight or kl to "
         "choose from; got none"),
        ({"choose": {"weight": [2]}}, "choose.weight: no stage of the arms weighs completion and "
         "key, as the arm `weighted` does"),
        ({"choose": {"kl": [2]}}, "choose.kl: no stage of the arms has a `kl`, as the arm "
         "`sftkey_kl` does"),
        ({"choose": {"learning_rate": [0.0]}}, "choose.learning_rate[0]: expected a number above "
         "0; got 0.0"),
        ({"choose": {"learning_rate": [1e-4, "1e-4"]}}, "choose.learning_rate[1]: `0.0001` stands "
         "twice"),
        ({"overrides": ["seed=3"]}, "overrides[0]: the study gives each run its seed, by its own "
         "`name` and `seeds`"),
        ({"strategies": {"mine": {"stages": [{"long": "yes"}]}}, "arms": ["sft_twice", "mine"]},
         "strategies.mine.stages[0].long: expected true or false; got 'yes'"),
        ({"choose": {"learning_rate": [1e-4], "zzz": 3}}, "choose.zzz: unknown key; the keys "
         "here are learning_rate, weight, kl, seed, max_rounds, num_rows, by"),
        ({"strategies": {"dft": {"stages": [{}]}}}, "strategies.dft: this name is a built-in "
         "strategy's; write another"),
        ({"strategies": {"mine": {"stages": [{}]}}}, "strategies.mine: no arm has this name"),
        ({"name": "a/b"}, "name: expected letters, digits, `.`, `-` and `_`, since a folder gets "
         "this name; got 'a/b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_study_is_said_with_its_line(
    sections: Sections, problem: str, tmp_path: Path
) -> None:
    """Every problem has the line and the place in the file."""
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **sections}, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_study(file)
    head, line = str(caught.value).splitlines()
    assert head == f"{file}: 1 problem"
    assert line.partition(", ")[2] == problem
    number = int(line.partition(",")[0].removeprefix("  line "))
    written = file.read_text().splitlines()[number - 1]
    words = problem.partition(":")[0].replace("[", ".").split(".")
    key = next((word for word in reversed(words) if not word.rstrip("]").isdecimal()), "")
    assert key in written or written.lstrip().startswith("- ")
