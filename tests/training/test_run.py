import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sftkey.errors import DeviceError, ModelError, RecipeError, RunError
from sftkey.evaluation.grading import grade
from sftkey.models.adapters import add_lora
from sftkey.recipe.load import load_recipe
from sftkey.training.callbacks import is_whole, newest_whole, seal
from sftkey.training.log import read_log
from sftkey.training.machine import explained_faults
from sftkey.training.run import Run, start
from sftkey.training.soundness import check_handoff
from sftkey.training.validating import ValidatingTrainer
from tests.support.models import ROUNDED
from tests.support.tiny import write_recipe

MakeRecipe = Callable[..., Path]


def done(recipe: Path, runs: Path, *overrides: str, fresh: bool = False) -> Run:
    """Run all stages of a recipe."""
    loaded = load_recipe(recipe, overrides)
    run = start(loaded, runs / loaded.name, fresh, grade=grade)
    list(run.stages())
    return run


def adapter_of(run: Run, number: int) -> dict[str, torch.Tensor]:
    """Read the weights that a stage has written."""
    return load_file(run.ledger.adapter(number) / "adapter_model.safetensors")


class Killed(Exception):
    """Stands for a kill at a chosen moment."""


def kill_at_step(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Let training die when a stage begins its step after `step`."""
    from sftkey.training.log import StageLog

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record.name == stage and state.global_step == step:
            raise Killed

    monkeypatch.setattr(StageLog, "on_step_begin", die)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Run:
    """Run both stages once, for tests that read what came; the recipe lies beside `runs`."""
    folder = tmp_path_factory.mktemp("whole")
    return done(write_recipe(folder, tiny_folder), folder / "runs")


@pytest.fixture
def again(whole: Run, tmp_path: Path) -> tuple[Path, Path]:
    """Return the recipe of the whole run, and a copy of its `runs` for a test that changes them."""
    runs = whole.ledger.folder.parent
    return runs.parent / "tiny.yaml", shutil.copytree(runs, tmp_path / "runs")


def test_a_run_writes_both_stages_and_all_answers(whole: Run) -> None:
    """Adapters, logs, validation losses and generations lie where DESIGN.md says."""
    run, folder = whole, whole.ledger.folder
    assert folder.parts[-2:] == ("runs", "tiny")
    ledger = json.loads((folder / "ledger.json").read_text())
    assert [(s["name"], s["status"], s["num_steps"]) for s in ledger["stages"]] == [
        ("completion", "trained", 4),
        ("key", "trained", 4),
    ]
    for stage in ("1-completion", "2-key"):
        assert (folder / "stages" / stage / "adapter" / "adapter_model.safetensors").is_file()
        steps = [line["step"] for line in read_log(folder / "stages" / stage / "log.jsonl")]
        assert steps == [1, 2, 3, 4]
    for name in ("base", "completion", "key"):
        rows = (folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == 4
    assert not list((folder / "evaluation").glob("*.part*"))
    assert json.loads((folder / "data.json").read_text())["train"] == 24
    assert load_recipe(folder / "recipe.yaml") == run.recipe


def test_each_stage_starts_where_the_one_before_ended(whole: Run) -> None:
    """Every segment's validation loss agrees to 1e-4 nats across the hand-off, and then moves."""
    first, second = (record.validation for record in whole.ledger.stages)
    assert set(first["end"]) == {"prompt", "thinking", "answer_tag", "answer", "end"}
    for name, loss in first["end"].items():
        assert second["start"][name] == pytest.approx(loss, abs=1e-4)
    assert abs(second["end"]["answer_tag"] - second["start"]["answer_tag"]) > 1e-3
    one, two = adapter_of(whole, 0), adapter_of(whole, 1)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_second_stage_that_starts_elsewhere_is_stopped(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that begins from the base model, not from the adapter before it, ends the run."""

    def forget(model: Any, before: Any, base: Any, lora: dict[str, Any]) -> Any:
        return add_lora(model, lora, 7)

    monkeypatch.setattr("sftkey.training.stage_model.load_adapter", forget)
    recipe = tiny_recipe(
        trainer={"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4}
    )
    with pytest.raises(RunError, match="expected to start where the previous stage ended"):
        done(recipe, tmp_path / "runs")


def test_handoff_error_says_which_segment_is_off_and_by_how_much() -> None:
    """The message holds both losses."""
    with pytest.raises(RunError) as caught:
        check_handoff(
            {"answer": 1.0, "end": 2.0}, {"answer": 1.5, "end": 2.0}, 1e-4, "stages/2-key"
        )
    assert str(caught.value) == (
        "stages/2-key: expected to start where the previous stage ended; the answer loss was "
        "1.000000 then and is 1.500000 now (nats a token)\n"
        "hint: was the previous stage's adapter folder changed? `--fresh` begins anew"
    )


def test_the_same_command_again_trains_nothing(
    again: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is read, not repeated: not even a model is loaded."""
    recipe, runs = again
    monkeypatch.setattr("sftkey.training.stage_model.load_model", None)
    run = start(load_recipe(recipe), runs / "tiny", grade=grade)
    assert list(run.stages()) == ["base", "completion", "key"]


@pytest.mark.fault("settings changed, a stage added")
def test_a_changed_recipe_is_refused_and_fresh_moves_the_old_run_aside(
    again: tuple[Path, Path],
) -> None:
    """The refusal names the changed keys and both ways on; `--fresh` deletes nothing."""
    recipe, runs = again
    changes = ("trainer.max_steps=3", "stages.key.loss_on=answer")
    with pytest.raises(RunError) as caught:
        start(load_recipe(recipe, changes), runs / "tiny", grade=grade)
    assert str(caught.value) == (
        f"{runs}/tiny: 2 problems\n"
        "  trainer.max_steps: was 4 when this run began; got 3\n"
        "  stages.key.loss_on: was 'key' when this run began; got 'answer'\n"
        f"hint: `name=…` begins another run beside it; `--fresh` moves {runs}/tiny aside "
        "and begins anew"
    )
    run = done(recipe, runs, *changes, fresh=True)
    assert run.ledger.stages[0].num_steps == 3
    aside = [folder for folder in runs.iterdir() if folder.name.startswith("tiny.")]
    assert len(aside) == 1
    assert (aside[0] / "stages" / "2-key" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Run:
    """Run both stages with dropout; the recipe lies beside `runs`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    return done(write_recipe(folder, tiny_folder, lora=lora), folder / "runs")


@pytest.mark.parametrize(("stage", "step"), [("completion", 1), ("key", 3)])
@pytest.mark.fault("a kill")
def test_a_resumed_run_equals_an_uninterrupted_one(
    stage: str,
    step: int,
    uninterrupted: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit in float32, dropout included; logged steps have no gap and no repeat."""
    recipe = uninterrupted.ledger.folder.parent.with_name("tiny.yaml")
    with monkeypatch.context() as patch:
        kill_at_step(patch, stage, step)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "killed")
    resumed = done(recipe, tmp_path / "killed")
    for number in (0, 1):
        expected, got = adapter_of(uninterrupted, number), adapter_of(resumed, number)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        logs = [
            read_log(run.ledger.stage_folder(number) / "log.jsonl")
            for run in (uninterrupted, resumed)
        ]
        assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
        assert [line["loss"] for line in logs[1]] == [line["loss"] for line in logs[0]]


def test_the_newest_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    """10 comes after 9, though not as text."""
    for step in (9, 10, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").touch()
        seal(checkpoint)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"


def test_a_checkpoint_is_whole_where_every_byte_is_as_it_was(tmp_path: Path) -> None:
    """Also in its folders; seals of before there were hashes have sizes alone."""
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "shards").mkdir(parents=True)
    files = [checkpoint / "optimizer.pt", checkpoint / "shards" / "0.pt"]
    for file in files:
        file.write_bytes(b"12345678")
    seal(checkpoint)
    seal(checkpoint)  # what seals isn't sealed
    assert is_whole(checkpoint)
    for file in files:
        file.write_bytes(b"1234\0\0\0\0")  # as a power cut leaves it
        assert not is_whole(checkpoint)
        file.write_bytes(b"12345678")
    (checkpoint / "whole.json").write_text('{"optimizer.pt": 8}')
    assert is_whole(checkpoint)
    for broken in ("[]", "{", '{"optimizer.pt": 9}', '{"gone.pt": [8, null]}', '{"shards": "x"}'):
        (checkpoint / "whole.json").write_text(broken)
        assert not is_whole(checkpoint)


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_torn_checkpoint_is_set_aside(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that a kill left half written is passed over, and kept under another name."""
    trainer = {"max_steps": 4, "logging_steps": 1, "save_steps": 1}
    recipe = tiny_recipe(trainer=trainer, stages=[{"name": "completion", "loss_on": "completion"}])
    with monkeypatch.context() as patch:
        kill_at_step(patch, "completion", 3)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "runs")
    checkpoints = tmp_path / "runs" / "tiny" / "stages" / "1-completion" / "checkpoints"
    assert newest_whole(checkpoints) == checkpoints / "checkpoint-3"
    optimizer = checkpoints / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    assert newest_whole(checkpoints) == checkpoints / "checkpoint-2"
    assert (checkpoints / "torn-checkpoint-3" / "optimizer.pt").stat().st_size == 100
    run = done(recipe, tmp_path / "runs")
    assert [line["step"] for line in read_log(run.ledger.stage_folder(0) / "log.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


def test_nothing_of_a_trainer_stays_between_stages(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """When a stage's answers are written, one model's parameters live, and no optimizer."""

    def living() -> tuple[int, int]:
        gc.collect()
        things = gc.get_objects()
        parameters = [
            thing
            for thing in things  # those of a plan, on the meta device, hold no memory
            if isinstance(thing, torch.nn.Parameter) and not thing.is_meta
        ]
        optimizers = [thing for thing in things if isinstance(thing, torch.optim.Optimizer)]
        return len(parameters), len(optimizers)

    before = living()
    run = start(load_recipe(tiny_recipe()), tmp_path / "runs" / "tiny", grade=grade)
    alive = [tuple(a - b for a, b in zip(living(), before, strict=True)) for _ in run.stages()]
    num_parameters, _ = alive[0]  # base and adapter, loaded to write the base model's answers
    assert num_parameters > 0
    assert alive == [(num_parameters, 0)] * 3
    assert living()[0] - before[0] == 0


def test_key_stage_alone_goes_on_from_an_adapter(
    whole: Run, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """`model.adapter` starts the first stage, with the losses that this adapter ended with."""
    adapter = whole.ledger.adapter(0)
    key = [{"name": "key", "loss_on": "key"}]
    recipe = tiny_recipe(name="key-alone", stages=key)
    second = done(recipe, tmp_path / "runs", f"model.adapter={adapter}")
    end = whole.ledger.stages[0].validation["end"]
    assert second.ledger.stages[0].validation["start"] == pytest.approx(end, abs=1e-4)


def test_key_stage_alone_goes_on_from_a_merged_model(
    whole: Run, tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """Somebody's merged SFT model is a base like any other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = tmp_path / "merged"
    shutil.copytree(tiny_folder, merged)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    PeftModel.from_pretrained(base, whole.ledger.adapter(0)).merge_and_unload().save_pretrained(
        merged
    )
    recipe = tiny_recipe(name="from-merged", stages=[{"name": "key", "loss_on": "key"}])
    second = done(recipe, tmp_path / "runs", f"model.name_or_path={merged}")
    end = whole.ledger.stages[0].validation["end"]
    assert second.ledger.stages[0].validation["start"] == pytest.approx(end, abs=1e-4)


def test_an_adapter_of_another_base_is_refused(
    whole: Run, tiny_recipe: MakeRecipe, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Otherwise peft would take it without a word."""
    from tests.support.tiny import made_model

    other = tmp_path / "other-model"
    made_model(tiny_tokenizer, seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    recipe = tiny_recipe(name="other", stages=[{"name": "key", "loss_on": "key"}])
    overrides = (f"model.adapter={whole.ledger.adapter(0)}", f"model.name_or_path={other}")
    with pytest.raises(ModelError, match="trained for"):
        done(recipe, tmp_path / "runs", *overrides)


def test_full_fine_tuning_hands_its_whole_model_on(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """With `lora: null` a stage writes a model, and the next one starts from it.

    Other engines stop by the generation config: the trained end stands in it before the old one.
    """
    folder = tmp_path / "tiny-llama"
    shutil.copytree(tiny_folder, folder)
    # transformers saves no changed config that sets a temperature and doesn't sample.
    published = {"eos_token_id": 0, "do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(published))
    model = {"name_or_path": str(folder), "quantization": "none"}
    run = done(tiny_recipe(lora=None, model=model), tmp_path / "runs")
    first, second = (record.validation for record in run.ledger.stages)
    assert second["start"] == pytest.approx(first["end"], abs=1e-4)
    assert (run.ledger.adapter(1) / "model.safetensors").is_file()
    saved = json.loads((run.ledger.adapter(1) / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [run.prepared.renderer.end_id, 0]
    assert saved["temperature"] == 0.6


def test_float16_is_refused_on_a_cpu_where_auto_means_it(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """As `model.dtype: float16` is."""
    folder = shutil.copytree(tiny_folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    half = {"name_or_path": str(folder), "quantization": "none", "dtype": "auto"}
    with pytest.raises(ModelError, match="auto is float16 for this model, which can't be trained"):
        done(tiny_recipe(model=half), tmp_path / "runs")


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_what_the_last_step_has_broken_is_not_saved(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The loss of that step was still finite; the validation after it tells."""
    stages = [{"name": "key", "loss_on": "key"}]
    recipe = tiny_recipe(stages=stages, trainer={"max_steps": 1, "learning_rate": 1e38})
    with pytest.raises(RunError, match="expected finite losses at the end"):
        done(recipe, tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    assert not (run / "stages" / "1-key" / "adapter").exists()
    record = json.loads((run / "ledger.json").read_text())["stages"][0]
    assert record["status"] == "open"
    assert not all(loss == loss for loss in record["validation"]["end"].values())


def test_the_best_checkpoint_is_kept_by_a_segments_loss_and_said(
    tiny_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lowest loss is the best, whatever its name ends with: upstream would keep the highest.

    A loss that is NaN is said, kept in the ledger, and never the best.
    """
    loop = ValidatingTrainer.evaluation_loop

    def broken_at_two(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        found = loop(trainer, *args, **kwargs)
        if trainer.state.global_step == 2:
            found.metrics["eval_loss_answer_tag"] = float("nan")
        return found

    monkeypatch.setattr(ValidatingTrainer, "evaluation_loop", broken_at_two)
    trainer = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss_answer_tag",
        "per_device_train_batch_size": 2,
    }
    stages = [{"name": "key", "loss_on": "key"}]
    run = done(tiny_recipe(stages=stages, trainer=trainer), tmp_path / "runs")
    said = capsys.readouterr().err
    assert "key: kept checkpoint-4 (validation loss " in said
    assert "key at 2: the validation loss of answer_tag is not finite; no checkpoint" in said
    validation = run.ledger.stages[0].validation
    assert math.isnan(validation.pop("2")["answer_tag"])
    assert validation["end"]["answer_tag"] == min(
        each["answer_tag"] for each in validation.values()
    )


def test_qlora_hands_over_within_a_thousandth_of_a_nat(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """NF4 with LoRA runs both stages on this device and keeps the adapter float32."""
    recipe = tiny_recipe()
    run = done(recipe, tmp_path / "runs", "model.quantization=nf4")
    first, second = (record.validation for record in run.ledger.stages)
    assert second["start"] == pytest.approx(first["end"], abs=1e-3)
    assert {tensor.dtype for tensor in adapter_of(run, 1).values()} == {torch.float32}


def test_without_validation_rows_the_handoff_is_measured_on_training_rows(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hand-off is checked in every run, whether the recipe names validation rows or not."""
    recipe = tiny_recipe()
    run = done(recipe, tmp_path / "runs", "data.validation=null", "data.test=null")
    said = capsys.readouterr().err
    assert "no validation rows: losses before and after a stage are read on 32 training" in said
    assert "key at end: loss on training rows prompt " in said
    assert "validation loss" not in said
    first, second = (record.validation for record in run.ledger.stages)
    assert second["start"] == pytest.approx(first["end"], abs=1e-4)
    assert not list((run.ledger.folder / "evaluation").iterdir())


def test_an_evaluation_strategy_without_validation_rows_is_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Otherwise transformers would evaluate on whatever rows it was given."""
    overrides = ("data.validation=null", "stages.key.trainer.eval_strategy=steps")
    with pytest.raises(RecipeError) as caught:
        start(load_recipe(tiny_recipe(), overrides), tmp_path / "runs" / "tiny", grade=grade)
    assert str(caught.value) == (
        "tiny: 1 problem\n"
        "  stages.key.trainer.eval_strategy: 'steps' needs validation rows; got none\n"
        "hint: write data.validation: a number of rows of train"
    )


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_an_infinite_loss_ends_the_run_with_its_step(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A diverged stage doesn't go on for the rest of the weekend."""
    recipe = tiny_recipe()
    with pytest.raises(RunError) as caught:
        done(recipe, tmp_path / "runs", "trainer.learning_rate=1e30", "trainer.max_grad_norm=0")
    assert str(caught.value).startswith("completion, step ")
    assert "expected a finite loss; got " in str(caught.value)


def test_a_run_folder_without_permission_is_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root may write everywhere."""

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    recipe = load_recipe(tiny_recipe())
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError) as caught:
        start(recipe, tmp_path / "runs" / "tiny", grade=grade)
    assert str(caught.value) == (
        f"{tmp_path}/runs/tiny: expected a folder that can be written; got 'Permission denied'\n"
        "hint: free the folder, or run where you may write"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_three_settings(error: Exception, tmp_path: Path) -> None:
    """What was reached is kept, and the message says what to change."""
    with pytest.raises(DeviceError) as caught, explained_faults(tmp_path):
        raise error
    assert str(caught.value) == (
        f"{tmp_path}: out of memory; what was reached is kept\n"
        "hint: lower trainer.per_device_train_batch_size (and raise gradient_accumulation_steps), "
        "lower data.max_length, or set trainer.gradient_checkpointing=true; "
        "then go on with a new `name=…`"
    )


def test_other_errors_pass_through(tmp_path: Path) -> None:
    """Only running out of memory is explained as that."""
    with pytest.raises(RuntimeError, match="shapes"), explained_faults(tmp_path):
        raise RuntimeError("shapes do not match")


def test_an_anchored_key_stage_trains_key_and_thinking(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """`{thinking: 0.1, key: 1.0}` logs and improves both; a plain key stage has no thinking."""
    stage = {"name": "key", "loss_on": "key", "trainer": {"learning_rate": 1e-2}}
    recipe = tiny_recipe(stages=[stage])
    without = ("data.test=null",)
    plain = done(recipe, tmp_path / "runs", *without)
    anchor = "stages.key.loss_on={thinking: 0.1, key: 1.0}"
    anchored = done(recipe, tmp_path / "runs", *without, "name=anchored", anchor)
    start, end = (anchored.ledger.stages[0].validation[at] for at in ("start", "end"))
    assert all(end[name] < start[name] - 0.01 for name in ("thinking", "answer_tag", "end"))
    logs = [read_log(run.ledger.stage_folder(0) / "log.jsonl")[-1] for run in (plain, anchored)]
    assert "thinking" in logs[1]["segments"]
    assert "thinking" not in logs[0]["segments"]
    assert end["thinking"] < plain.ledger.stages[0].validation["end"]["thinking"]


def test_a_run_trains_a_detached_key_stage(whole: Run, tmp_path: Path) -> None:
    """It starts with the losses of an exact one, and writes another adapter."""
    recipe = whole.ledger.folder.parent.with_name("tiny.yaml")
    detached = done(recipe, tmp_path / "runs", "name=detached", "stages.key.context=detached")
    logs = [read_log(run.ledger.stage_folder(1) / "log.jsonl") for run in (whole, detached)]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=ROUNDED)
    assert (
        detached.ledger.stages[1].validation["start"] == whole.ledger.stages[1].validation["start"]
    )
    first = [adapter_of(run, 0) for run in (whole, detached)]
    last = [adapter_of(run, 1) for run in (whole, detached)]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_model_that_keeps_states_is_refused_before_the_first_stage(
    tiny_recipe: MakeRecipe, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """What the second stage can't do is said when the weights are there, not after the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba2",
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
    )
    folder = tmp_path / "mamba"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    recipe = tiny_recipe(
        model={"name_or_path": str(folder), "quantization": "none", "attn_implementation": "eager"},
        stages=[
            {"name": "completion", "loss_on": "completion"},
            {"name": "key", "loss_on": "key", "context": "detached"},
        ],
    )
    with pytest.raises(ModelError) as caught:
        done(recipe, tmp_path / "runs")
    assert str(caught.value) == (
        "mamba2: a model of this family keeps of a context more than keys and values: "
        "LinearAttentionLayer\nhint: write context: exact in the stage"
    )
    assert not (tmp_path / "runs" / "tiny" / "evaluation" / "base.jsonl").exists()
