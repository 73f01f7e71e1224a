"""The plan counts what is held, finds what fits, and says what to write where nothing does."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from sftkey.adapt.adapt import adapt
from sftkey.commands.check import check
from sftkey.errors import CheckError, ModelError, RecipeError
from sftkey.files import GIB
from sftkey.memory_plan.held import (
    adapter_bytes,
    constant_bytes,
    optimizer_bytes,
    read_skeleton,
    setting_of,
    weight_bytes,
)
from sftkey.memory_plan.plan import changes_that_fit, fit, gpu_size, make_plan
from sftkey.models.device import Device
from sftkey.models.facts import Skeleton
from sftkey.models.loading import load_model
from sftkey.recipe.load import RECIPES, load_recipe, recipe_files
from sftkey.recipe.schema import ModelSection, Recipe
from tests.support.model_folders import model_folder, sums, write_rows

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
RECIPE = RECIPES / "qwen3-8b" / "gsm8k.yaml"
LEAVE_OUT = "hint: leave --gpu out"
# The architectures of the models that the recipes name.
OF_FOLDER = {
    "deepseek-r1-distill-qwen-1.5b": "qwen2",
    "gemma-3-1b-it": "gemma3_text",
    "gpt-oss-20b": "gpt_oss",
    "granite-3.3-2b-instruct": "granite",
    "lfm2-1.2b": "lfm2",
    "mistral-7b-instruct-v0.3": "mistral",
    "olmo-2-1b-instruct": "olmo2",
    "phi-4-mini-instruct": "phi3",
    "qwen2.5-1.5b": "qwen2",
    "qwen2.5-3b": "qwen2",
    "qwen2.5-7b": "qwen2",
    "qwen3-4b": "qwen3",
    "qwen3-8b": "qwen3",
    "qwen3-8b-base": "qwen3",
    "smollm3-3b-base": "smollm3",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder that holds a config.json of Qwen3-8B's shape, and nothing else."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(QWEN3_8B))
    return made


@functools.cache
def skeleton_8b() -> Skeleton:
    """Return Qwen3-8B's shape, one for all tests: what was traced of it is kept."""
    return Skeleton(CONFIG_MAPPING["qwen3"].from_dict(QWEN3_8B))


def loader(folder: Path, *overrides: str) -> Callable[..., Recipe]:
    """Return what loads the recipe of Qwen3-8B with the folder's model, and further overrides."""
    model = f"model.name_or_path={folder}"
    return lambda more=(): load_recipe(RECIPE, [model, *overrides, *more])


@pytest.mark.parametrize("unpack", ["never", "auto"])
def test_nf4_is_counted_as_it_is_held(tiny_folder: Path, unpack: Any) -> None:
    """Packed weights, both levels of constants, and what stays unquantized, to the byte.

    Unpacked, as on a CPU by default, they are held in the compute type.
    """
    section = ModelSection(name_or_path=str(tiny_folder), unpack=unpack)
    model = load_model(section, Device("cpu", 0, torch.float32))
    weights = constants = 0
    for parameter in model.parameters():
        weights += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = (state.state2.absmax, state.state2.code, state.offset)
            tensors = (state.absmax, state.code, *nested)
            constants += sum(each.numel() * each.element_size() for each in tensors)
    overrides = [f"model.name_or_path={tiny_folder}", f"model.unpack={unpack}"]
    recipe = load_recipe(RECIPE, overrides)
    skeleton = read_skeleton(section)
    setting = setting_of(recipe, recipe.stages[0], skeleton, "cpu")
    assert setting.quantized == (unpack == "never")
    assert weight_bytes(skeleton, setting) == weights
    assert constant_bytes(skeleton, setting) == constants


def test_8b_in_nf4_is_counted_by_hand(folder: Path) -> None:
    """The sums of the shape on paper: two numbers a byte, embeddings and head in bfloat16."""
    recipe = loader(folder)()
    skeleton = read_skeleton(recipe.model)
    setting = setting_of(recipe, recipe.stages[0], skeleton, "cuda")
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 12288
    others = 2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096
    assert weight_bytes(skeleton, setting) == 36 * layer // 2 + 2 * others
    blocks = 36 * layer // 64
    assert constant_bytes(skeleton, setting) == blocks + blocks // 256 * 4 + 36 * 7 * 1092
    pairs = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3
    assert adapter_bytes(skeleton, setting) == 36 * 16 * pairs * 4
    assert optimizer_bytes(skeleton, setting) == 2 * adapter_bytes(skeleton, setting)
    eight = setting_of(
        loader(folder)(["trainer.optim=adamw_8bit"]), recipe.stages[0], skeleton, "cuda"
    )
    state = optimizer_bytes(skeleton, eight)
    assert state == pytest.approx(adapter_bytes(skeleton, setting) / 2, rel=0.02)


@pytest.mark.parametrize("text", ["24GB", "24GiB", "24 gb", "24.0GB"])
def test_a_gb_is_that_of_a_label(text: str) -> None:
    """A card that is sold with 24 GB has 24 GiB."""
    assert gpu_size(text) == 24 * GIB


@pytest.mark.parametrize("text", ["24", "24MB", "-3GB", "0GB", "big", "1GB"])
def test_a_wrong_size_is_refused(text: str, folder: Path) -> None:
    """Before anything is read."""
    with pytest.raises(RecipeError) as caught:
        check(RECIPE, [f"model.name_or_path={folder / 'none'}"], gpu=text)
    assert str(caught.value) == (
        f"--gpu: expected a size of memory above 1 GiB; got '{text}'\n"
        "hint: write --gpu 24GB, for one; a GB is 2^30 bytes here, as on a card's label"
    )


def test_a_plan_needs_a_size() -> None:
    """`--plan-only` alone has no GPU to plan for."""
    with pytest.raises(RecipeError) as caught:
        check(RECIPE, plan_only=True)
    assert str(caught.value) == (
        "--plan-only: expected --gpu SIZE beside it\nhint: write --gpu 24GB"
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"model_type": "nobodys"},
            "its config.json can't be read: The checkpoint you are trying to load has model type "
            "`nobodys` but Transformers does not recognize this architecture. This could be "
            "because of an issue with the checkpoint, or because your version of Transformers is "
            "out of date.",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "its memory can't be planned: the weights come quantized\n"
            "hint: leave --gpu out, or take the unquantized model",
        ),
    ],
)
def test_an_unknown_model_is_refused(folder: Path, fields: dict[str, Any], what: str) -> None:
    """It says what is wrong with it."""
    (folder / "config.json").write_text(json.dumps(QWEN3_8B | fields))
    with pytest.raises(ModelError) as caught:
        fit(RECIPE, [f"model.name_or_path={folder}"], "24GB")
    assert str(caught.value) == f"{folder}: {what}"


def test_a_broken_config_is_refused(folder: Path) -> None:
    """With the place where it breaks."""
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        fit(RECIPE, [f"model.name_or_path={folder}"], "24GB")
    assert str(caught.value) == (
        f"{folder}/config.json: expected JSON; got Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)"
    )


def test_what_is_not_counted_is_refused(folder: Path) -> None:
    """All of it at once."""
    given = [f"model.name_or_path={folder}", "lora.use_dora=true", "trainer.optim=galore_adamw"]
    with pytest.raises(CheckError) as caught:
        fit(RECIPE, [*given, "model.attn_implementation=flex_attention"], "24GB")
    assert str(caught.value) == (
        "qwen3-8b-gsm8k, stage completion: 3 problems\n"
        "  lora.use_dora: what it adds to memory isn't planned\n"
        "  trainer.optim: galore_adamw: its state isn't planned; known are adamw_torch, "
        "adamw_torch_fused, paged_adamw_32bit, adamw_8bit, adamw_bnb_8bit, paged_adamw_8bit, "
        "lion_32bit, lion_8bit, paged_lion_32bit, paged_lion_8bit, sgd\n"
        "  model.attn_implementation: flex_attention: what it keeps isn't planned\n" + LEAVE_OUT
    )


def test_adapters_in_some_layers_are_counted_there(folder: Path) -> None:
    """Layers with an adapter and without are of two kinds."""
    few = r"lora.target_modules=model\.layers\.[0-3]\.self_attn\.q_proj"
    every = r"lora.target_modules=model\.layers\.[0-9]+\.self_attn\.q_proj"
    some, whole = (
        make_plan(loader(folder)([given]), skeleton_8b(), 24 * GIB) for given in (few, every)
    )
    assert whole.stages[0].parts["adapters"] == 9 * some.stages[0].parts["adapters"]
    assert some.stages[0].parts["activations"] <= whole.stages[0].parts["activations"]


def test_what_fits_is_the_most(folder: Path) -> None:
    """The longest rows and the largest batch fit as planned, and a little more doesn't."""
    load, size = loader(folder), gpu_size("12GB")
    recipe, skeleton = load(), skeleton_8b()
    for stage in make_plan(recipe, skeleton, size).stages:
        rows, longest = stage.most_rows, stage.longest
        trainer = "trainer.per_device_train_batch_size"

        def fits(*overrides: str, name: str = stage.name) -> bool:
            stages = make_plan(load(overrides), skeleton, size).stages
            needed = next(each.peak_bytes for each in stages if each.name == name)
            return needed + GIB <= size

        assert fits(f"{trainer}={rows}")
        assert not fits(f"{trainer}={rows + 1}")
        assert fits(f"data.max_length={longest}")
        assert not fits(f"data.max_length={longest + 64}")


ROWS = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=32"]
CHANGES: dict[str, tuple[str, list[str], list[str]]] = {
    "fits": ("24GB", [], []),
    "checkpointing": (
        "12GB",
        ["trainer.gradient_checkpointing=false"],
        ["trainer.gradient_checkpointing=true"],
    ),
    "keys": (
        "10GB",
        ["stages.key.context=detached", "data.max_length=2048", *ROWS],
        ["stages.key.key_batch_tokens=512"],
    ),
    "nf4": ("16GB", ["model.quantization=none"], ["model.quantization=nf4"]),
    "length": ("10GB", ["data.max_length=30000"], ["data.max_length=2240"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_change_is_the_simplest_that_suffices(name: str, folder: Path) -> None:
    """It is written as overrides, and with them the recipe fits by its own plan."""
    gpu, overrides, expected = CHANGES[name]
    load, size = loader(folder, *overrides), gpu_size(gpu)
    skeleton = skeleton_8b()
    found = changes_that_fit(load, skeleton, size)
    assert found == expected
    assert make_plan(load(), skeleton, size).fits == (found == [])
    assert make_plan(load(found), skeleton, size).fits


def test_where_nothing_suffices_there_is_no_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is another answer than that none is needed."""
    never = SimpleNamespace(fits=False, stages=(SimpleNamespace(longest=0),))
    monkeypatch.setattr("sftkey.memory_plan.plan.make_plan", lambda *_: never)
    assert changes_that_fit(loader(folder), skeleton_8b(), 24 * GIB) is None


def test_several_changes_where_one_does_not_suffice(folder: Path) -> None:
    """None of them can be left out."""
    given = ["model.quantization=none", "trainer.per_device_train_batch_size=32"]
    load, size = loader(folder, *given, "data.max_length=4096"), gpu_size("12GB")
    skeleton = skeleton_8b()
    found = changes_that_fit(load, skeleton, size)
    assert found is not None
    assert "model.quantization=nf4" in found
    assert len(found) > 1
    assert make_plan(load(found), skeleton, size).fits
    keys = {each.partition("=")[0] for each in found}
    for key in keys - {"trainer.gradient_accumulation_steps"}:
        fewer = [each for each in found if each.partition("=")[0] != key]
        assert not make_plan(load(fewer), skeleton, size).fits


def test_a_detached_key_needs_less(folder: Path) -> None:
    """Its context leaves a cache, and no activations."""
    one = "trainer.gradient_accumulation_steps=1"  # a step of one batch, whose keys are alone
    recipe = loader(folder, "trainer.gradient_checkpointing=false", "data.max_length=8192", one)
    skeleton = skeleton_8b()
    exact = make_plan(recipe(), skeleton, 24 * GIB).stages[1]
    detached = make_plan(recipe(["stages.key.context=detached"]), skeleton, 24 * GIB).stages[1]
    assert exact.parts["cache"] == 0
    per_token = 2 * 36 * 1024 * 2  # keys and values of all layers, in bfloat16
    assert detached.parts["cache"] == pytest.approx(2 * 8192 * per_token, rel=0.001)
    assert detached.peak_bytes < exact.peak_bytes / 3


def test_a_frozen_stage_holds_two_adapters(folder: Path) -> None:
    """One acts on the context, one is trained; a grid trains all of its own."""
    kept = "trainer.gradient_checkpointing=false"  # else a layer repeats its cache for itself
    alone = "stages.key.key_batch_tokens=1"
    load = loader(folder, "stages.key.context=frozen", kept, alone)
    skeleton = skeleton_8b()
    one, two = make_plan(load(), skeleton, 24 * GIB).stages
    assert two.parts["adapters"] == 2 * one.parts["adapters"]
    assert two.parts["gradients"] == one.parts["gradients"]
    grid = make_plan(load(["stages.key.grid={r: [16, 32]}"]), skeleton, 24 * GIB).stages[1]
    assert grid.parts["gradients"] == 3 * one.parts["gradients"]
    assert grid.parts["cache"] == 2 * two.parts["cache"]


def test_a_stage_that_is_held_by_its_start_keeps_it(folder: Path) -> None:
    """A copy of the adapter, and the logits of both in tiles of the whole vocabulary."""
    load = loader(folder)
    skeleton = skeleton_8b()
    plain, held = (
        make_plan(load([f"stages.key.kl={kl}"]), skeleton, 24 * GIB).stages[1] for kl in (0, 1)
    )
    assert held.parts["adapters"] == 2 * plain.parts["adapters"]
    assert held.parts["logits"] > 6 * (2**24 - 151936) * 4
    assert held.parts["optimizer"] == plain.parts["optimizer"]


@functools.cache
def skeleton_of(family: str, attention: str) -> Skeleton:
    """Return a small model of an architecture, one for all recipes that name it."""
    sizes = {"num_hidden_layers": 6, "hidden_size": 2048, "intermediate_size": 8192}
    return Skeleton(CONFIG_MAPPING[family].from_dict(sizes), attention)


@pytest.mark.parametrize("file", list(recipe_files(RECIPES)), ids=lambda file: file.parent.name)
def test_every_recipe_has_a_figure(file: Path) -> None:
    """With a config of its model's architecture."""
    recipe = load_recipe(file)
    family = OF_FOLDER.get(file.parent.name, "llama")
    skeleton = skeleton_of(family, recipe.model.attn_implementation)
    for stage in make_plan(recipe, skeleton, 24 * GIB).stages:
        assert stage.parts["activations"] > 0
        assert stage.peak_bytes > stage.parts["weights"] > 2**28


@pytest.mark.slow
def test_the_command_loads_nothing_heavy(folder: Path) -> None:
    """It plans from a folder with a config alone, and imports neither peft nor rows' libraries."""
    code = (
        "import sys; from sftkey.cli import main\n"
        "main(sys.argv[1:])\n"
        "assert not {'peft', 'trl', 'datasets', 'bitsandbytes'} & set(sys.modules)"
    )
    model = f"model={{name_or_path: {folder}}}"
    config = json.dumps(QWEN3_8B | {"num_hidden_layers": 4})
    (folder / "config.json").write_text(config)
    command = [sys.executable, "-c", code, "check", str(RECIPE), "--gpu", "24GB", "--plan-only"]
    done = subprocess.run([*command, model], capture_output=True, text=True, check=True)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "peak memory on CUDA, GiB (planned)"
    assert "quantization constants 0.01 0.01" in lines
    assert lines[-1] == "qwen3-8b-gsm8k: fits"


def test_json_has_plan_and_finding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What doesn't fit refuses, with the change as the hint."""
    with pytest.raises(SystemExit) as ended:
        check(RECIPE, [f"model.name_or_path={folder}"], as_json=True, gpu="8GB", plan_only=True)
    assert ended.value.code == 2
    report = json.loads(capsys.readouterr().out)
    (finding,) = report["findings"]
    peak = report["plan"]["stages"]["completion"]["peak_bytes"]
    assert finding == {
        "code": "memory",
        "rows": [],
        "message": f"stage completion needs {peak / GIB:.2f} GiB at its peak, and 1.00 GiB are set "
        "aside; the GPU has 8.00 GiB",
        "hint": f"write {' '.join(ROWS)}",
        "refuses": True,
    }
    assert report["plan"]["changes"] == ROWS
    assert sum(report["plan"]["stages"]["key"]["parts"].values()) <= peak


def test_nothing_that_fits_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no change suffices."""
    monkeypatch.setattr("sftkey.memory_plan.plan.changes_that_fit", lambda *_: None)
    with pytest.raises(SystemExit):
        check(RECIPE, [f"model.name_or_path={folder}"], gpu="6GB", plan_only=True)
    *_, hint, last = capsys.readouterr().out.splitlines()
    what = "no change that is known here makes it fit: take a smaller model or a larger GPU"
    assert hint == f"    hint: {what}"
    assert last == "qwen3-8b-gsm8k: refused for 1 finding"


def test_check_plans_beside_the_rows(
    tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `--plan-only` the gate's findings and the plan come together."""
    check(tiny_recipe(), ["trainer.optim=sgd"], as_json=True, gpu="24GB")
    report = json.loads(capsys.readouterr().out)
    assert report["statistics"]["key_share"]
    assert report["plan"]["fits"]
    dora = ["lora.use_dora=true"]
    for plan_only in (False, True):
        with pytest.raises(SystemExit):
            check(tiny_recipe(), dora, as_json=True, gpu="24GB", plan_only=plan_only)
        (finding,) = json.loads(capsys.readouterr().out)["findings"]
        assert finding["message"] == (
            "tiny, stage completion: lora.use_dora: what it adds to memory isn't planned"
        )


def test_adapt_takes_the_rows_that_fit(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as the GPU holds, and the rest accumulated; in NF4, without CUDA here too."""
    monkeypatch.setattr("sftkey.adapt.adapt.has_cuda", lambda: False)
    monkeypatch.setattr("sftkey.adapt.adapt.NUM_PROOF_ROWS", 20)
    big = {k: v for k, v in QWEN3_8B.items() if k not in ("vocab_size", "model_type")}
    model = model_folder(tmp_path / "m", tiny_tokenizer, ["<|im_end|>"], **big)
    rows = write_rows(tmp_path / "rows.jsonl", sums(30))
    for gpu, at_once, why in (("5.5GB", 4, "5 fit 5.5GB"), ("4GB", 1, "not even one fits 4GB")):
        adapted = adapt(model, tmp_path / "recipe.yaml", None, rows, gpu)
        assert f"nf4               # for {gpu}; none where there is room" in adapted.text
        trainer = adapted.recipe.trainer
        assert trainer["per_device_train_batch_size"] == at_once
        assert trainer["gradient_accumulation_steps"] == 16 // at_once
        assert f"rows at once; {why} by `sftkey check --gpu`" in adapted.text
