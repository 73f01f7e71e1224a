"""What upstream would refuse after hours is refused before any weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from sftkey.checks import recipe as checks
from sftkey.checks import rehearsal
from sftkey.checks.gate import check_recipe
from sftkey.errors import RecipeError
from sftkey.recipe.load import load_recipe
from tests.support.model_folders import model_folder
from tests.support.tiny import made_model

MakeRecipe = Callable[..., Path]


def refused(recipe: Path, *overrides: str) -> list[str]:
    """Return what `check` refuses a recipe for."""
    try:
        report = check_recipe(load_recipe(recipe, overrides))
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return [finding.message for finding in report.refusals]


NAMES = {
    "lora.modules_to_save=[lmhead]": "the model has no lmhead; did you mean `lm_head`?",
    "lora.rank_pattern={qproj: 16}": "'qproj' matches no target module; did you mean `q_proj`?",
    "lora.alpha_pattern={up: 16}": "'up' matches no target module",
    "lora.exclude_modules=[qprj]": "the target modules hold no qprj; did you mean `q_proj`?",
    "lora.exclude_modules='.*mixer.*'": "'.*mixer.*' excludes none of the target modules",
    "lora.target_parameters=[mlp.expert.gate_up_proj]": "the model has no mlp.expert.gate_up_proj",
    "lora={target_modules: [q_proj], layers_to_transform: [7]}": (
        "expected layers from 0 to 1; got 7"
    ),
    "lora.trainable_token_indices=[100000]": "expected ids from 0 to 328; got 100000",
    "lora.trainable_token_indices={embed_token: [5]}": "did you mean `embed_tokens`?",
    "lora.ensure_weight_tying=true": "this model's head and embedding are not tied",
    "lora.target_modules=[]": "No `target_modules` passed",
    "lora.layer_replication=[[0, 2], [1, 2]]": "an adapter on replicated layers can't be merged",
    "lora.alora_invocation_tokens=[1]": "such an adapter acts from a token on",
    "lora.megatron_core=megatron.core": "sftkey trains without Megatron",
    "lora.init_lora_weights=pissa": "expected true, false, gaussian or orthogonal",
    "trainer.metric_for_best_model=accuracy": "expected a validation loss, one of loss, ",
    "trainer.metric_for_best_model=eval_loss_answr": "did you mean `loss_answer`?",
    "trainer.greater_is_better=true": "all that a stage can be chosen by are losses",
    "trainer.data_seed=1": "rows that are grouped by length are shuffled by `seed`",
    "trainer.save_only_model=true": "could not go on from a checkpoint without its optimizer",
    "trainer.push_to_hub=true": "it would push each stage over the other",
    "trainer.hub_model_id=me/mine": "it would push each stage over the other",
    "trainer.activation_offloading=true": "takes activations off a GPU, and this machine has none",
    "trainer.report_to=wandb": "wandb",
    "trainer={load_best_model_at_end: true, eval_strategy: steps, eval_steps: 3, save_steps: 2}": (
        "trl.SFTConfig refuses it: ValueError: --load_best_model_at_end requires"
    ),
    "trainer={load_best_model_at_end: true, eval_strategy: steps, save_strategy: 'no'}": (
        "write save_strategy: steps or epoch"
    ),
    "trainer={load_best_model_at_end: true}": "write eval_strategy: steps or epoch",
    "trainer={save_strategy: best}": "without evaluations none is the best",
    "trainer.eval_steps=3": "does nothing where eval_strategy is 'no'",
    "trainer={gradient_checkpointing: false, gradient_checkpointing_kwargs: {a: 1}}": (
        "does nothing where gradient_checkpointing is false"
    ),
    "trainer.dataloader_persistent_workers=true": "does nothing where dataloader_num_workers is 0",
    "trainer={dataloader_num_workers: 1, dataloader_prefetch_factor: -2}": (
        "expected a whole number above 0; got -2"
    ),
    "trainer.dataloader_multiprocessing_context=fork": (
        "does nothing where dataloader_num_workers is 0"
    ),
    "trainer={activation_checkpointing: false, gradient_checkpointing: true}": (
        "gradient_checkpointing: does nothing where activation_checkpointing is false"
    ),
    "trainer={activation_checkpointing: false, activation_checkpointing_kwargs: {a: 1}}": (
        "does nothing where gradient_checkpointing is false"
    ),
    "trainer={lr_scheduler_type: constant, warmup_steps: 5}": (
        "does nothing where lr_scheduler_type is 'constant'"
    ),
    "trainer={lr_scheduler_type: constant_with_warmup, lr_scheduler_kwargs: {a: 1}}": (
        "does nothing where lr_scheduler_type is 'constant_with_warmup'"
    ),
    "trainer.run_name=mine": "does nothing where report_to is 'none'",
    "trainer.optim_target_modules=[q_proj]": "adamw_torch_fused never reads it",
    "trainer.accelerator_config=absent.json": "trl.SFTConfig refuses it: FileNotFoundError",
    "trainer.accelerator_config={gradient_accumulation_kwargs: {num_steps: 3}}": (
        "gradient_accumulation_kwargs: refused: write gradient_accumulation_steps"
    ),
    "trainer={torch_compile: true, torch_compile_backend: foo}": "'FOO' is not a valid Dynamo",
    "stages.key.trainer.use_cpu=true": "a run has one device",
    "lora={target_modules: [q_proj], exclude_modules: [q_proj]}": (
        "exclude_modules leave none of the 2 modules that it names"
    ),
    "lora={target_modules: [q_proj], layers_to_transform: [0], layers_pattern: h}": (
        "layers_to_transform and layers_pattern leave none of the 2 modules"
    ),
    "lora={target_modules: '.*q_proj', layers_to_transform: [0]}": (
        "peft reads it beside a list of target_modules without their layers alone"
    ),
    "lora={target_modules: [model.layers.1.self_attn.q_proj, v_proj], layers_to_transform: 0}": (
        "without their layers alone; got 'model.layers.1.self_attn.q_proj'; take from down_proj"
    ),
    "trainer={save_strategy: epoch, save_steps: 5}": "does nothing where save_strategy is 'epoch'",
    "trainer.metric_for_best_model=loss_answer": (
        "does nothing without one of load_best_model_at_end: true, save_strategy: 'best'"
    ),
    "lora.loftq_config={loftq_bits: 4}": "it goes with an init_lora_weights that changes the base",
    "lora.fan_in_fan_out=true": "peft reads from each layer how its weights lie",
    "trainer.ignore_data_skip=true": "would read other rows than one that ran through",
    "trainer.batch_eval_metrics=true": "sftkey validates by segment itself",
    "trainer={optim: sgd, adam_beta1: 0.5}": "adam_beta1=0.5: sgd never reads it",
    "trainer={optim: adamw_torch, optim_args: rank=4}": "'rank=4': adamw_torch never reads it",
    "lora.layers_pattern=h": "does nothing where layers_to_transform is nothing",
    "lora.use_qalora=true": "it acts on GPTQ's layers",
    "model.attn_implementation=flash_attn": "expected one that this model has, on this machine",
    "trainer.optim=galore_adamw": "galore_torch",
    "trainer.optim=schedule_free_adamw": "schedulefree",
    "stages.key.trainer.lr_scheduler_type=cosine_with_min_lr": (
        "stages.key: its first step, evaluation or save fails: ValueError: One of min_lr"
    ),
}


@pytest.mark.parametrize("override", NAMES)
def test_what_would_fail_or_do_nothing_is_one_refusal(
    override: str, tiny_recipe: MakeRecipe
) -> None:
    """By `check`, in one message that names the setting."""
    [message] = refused(tiny_recipe(), override)
    assert NAMES[override] in message


SOUND = [
    "trainer={dataloader_num_workers: 2, dataloader_multiprocessing_context: fork, max_steps: 2}",
    "trainer={activation_checkpointing: false, eval_strategy: epoch, lr_scheduler_type: "
    "reduce_lr_on_plateau}",
    "lora={target_modules: [q_proj], layers_to_transform: [1], layers_pattern: layers}",
    "lora={r: 2, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}, use_rslora: true}",
    "lora={r: 2, target_modules: all-linear, exclude_modules: [down_proj], lora_bias: true}",
    "lora={r: 2, target_modules: '.*layers.1.*q_proj'}",
    "lora={target_modules: [q_proj], modules_to_save: [lm_head], use_dora: true}",
    "lora={target_modules: [], target_parameters: [q_proj.weight]}",
    "lora={target_modules: [q_proj], trainable_token_indices: {lm_head: [2]}, bias: lora_only}",
    "stages.key.context=frozen",
    "stages.key.context=detached",
    "lora=null",
]


def test_what_can_be_trained_passes(tiny_recipe: MakeRecipe) -> None:
    """Among it a stage that takes the same target parameters on from the one before."""
    for override in SOUND:
        assert refused(tiny_recipe(), override) == [], override


def test_an_adapter_that_can_not_be_merged_is_a_note(tiny_recipe: MakeRecipe) -> None:
    """It can be trained and served beside its base."""
    report = check_recipe(load_recipe(tiny_recipe(), ("lora.lora_bias=true",)))
    assert {(each.code, each.refuses) for each in report.findings} == {("not-merged", False)}
    assert "its adapter can't be merged: " in report.findings[0].message


def test_an_attention_that_the_model_has_is_named(
    tiny_recipe: MakeRecipe, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """BLOOM has no sdpa, which is a recipe's default."""
    config = {"model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 32}
    model = model_folder(tmp_path / "bloom", tiny_tokenizer, vocab_size=1000, **config)
    recipe = tiny_recipe(model={"name_or_path": model, "quantization": "none"})
    (finding,) = check_recipe(load_recipe(recipe, ("lora.target_modules=all-linear",))).refusals
    assert "got 'sdpa': BloomForCausalLM does not support" in finding.message
    assert finding.hint == "write model.attn_implementation=eager"


def test_half_of_a_tied_pair_is_refused(
    tiny_recipe: MakeRecipe, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Peft would untie its copy, or leave what no merge can write; both are named, with a way."""
    made_model(tiny_tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    recipe = tiny_recipe(model={"name_or_path": str(tmp_path / "tied"), "quantization": "none"})
    saved = "lora={target_modules: [q_proj], modules_to_save: [embed_tokens]%s}"
    [message] = refused(recipe, saved % "")
    assert "embed_tokens is tied to the model's other end" in message
    assert "ensure_weight_tying=true" in message
    for named in ("[embed_tokens]", "[lm_head]", "[lm_head, embed_tokens]"):
        both = saved.replace("[embed_tokens]", named)
        assert refused(recipe, both % ", ensure_weight_tying: true") == []
    [message] = refused(recipe, "lora={target_modules: [embed_tokens, q_proj]}")
    assert "the adapter could not be merged" in message
    rows = "lora={target_modules: [q_proj], trainable_token_indices: %s}"
    [message] = refused(recipe, rows % "{lm_head: [5]}")
    assert "peft would untie its rows; write the ids alone, as a list" in message
    assert refused(recipe, rows % "[5]") == []


def test_tokens_without_a_row_of_the_embedding_are_refused(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """A tag that was added to the tokenizer alone is named before it is an IndexError."""
    import copy

    folder = shutil.copytree(tiny_folder, tmp_path / "grown")
    grown = copy.deepcopy(tiny_tokenizer)
    grown.add_special_tokens({"extra_special_tokens": ["<Thinking>"]})
    grown.save_pretrained(folder)
    model = {"name_or_path": str(folder), "quantization": "none"}
    tag, train, validation, test = refused(tiny_recipe(model=model))
    size = len(tiny_tokenizer)
    assert tag.endswith(
        f"the tag token '<Thinking>' has the id {size}, and the embedding {size} rows"
    )
    for split, message in (("train", train), ("validation", validation), ("test", test)):
        told = f"{split}: an id of {size}, and the embedding has {size} rows: "
        assert message.startswith(told)


def test_rows_that_would_scale_their_neighbours_positions_are_refused(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """Dynamic NTK and longrope scale a batch by its longest row."""
    folder = shutil.copytree(tiny_folder, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    told = {**config, "max_position_embeddings": 64, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(told))
    recipe = tiny_recipe(model={"name_or_path": str(folder), "quantization": "none"})
    [message] = refused(recipe)
    assert "its positions are scaled by a batch's longest row above 64 tokens" in message


def test_an_adapter_on_the_head_is_refused_before_weights_are_loaded(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The loss reads the head's weights themselves."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(made_model(tiny_tokenizer), config).save_pretrained(tmp_path / "adapter")
    [message] = refused(tiny_recipe(), f"model.adapter={tmp_path / 'adapter'}", "lora={}")
    assert "lm_head can't carry an adapter" in message


def test_a_family_that_can_not_be_cut_is_not_refused(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails with plain settings, too, says nothing of the recipe: a note."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("of the small model's own")

    monkeypatch.setattr(rehearsal.Rehearsal, "_with_adapters", fail)
    report = check_recipe(load_recipe(tiny_recipe(), ("trainer.learning_rate=0.00123",)))
    assert [(each.code, each.refuses) for each in report.findings] == [("not-rehearsed", False)]


def test_what_was_rehearsed_once_is_not_rehearsed_again(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study checks each of its cells: those with the same settings take no second rehearsal."""
    rate = "trainer.learning_rate=0.00124"
    assert refused(tiny_recipe(), rate) == []
    monkeypatch.setattr(rehearsal, "small_model", lambda skeleton: pytest.fail("once more"))
    assert refused(tiny_recipe(), rate, "seed=3", "name=another") == []


PUBLISHED: dict[str, tuple[str, Any, str]] = {
    "eos": (
        "generation_config.json",
        {"eos_token_id": "2"},
        "an id, a list of ids or null; got '2'",
    ),
    "no id": (
        "generation_config.json",
        {"eos_token_id": [2, -1]},
        "an id, a list of ids or null; got [2, -1]",
    ),
    "several": ("generation_config.json", {"num_return_sequences": 3}, "can't be read: Greedy"),
    "dropout": ("config.json", {"attention_dropout": 2.0}, "a number from 0 to 1; got 2.0"),
    "method": ("config.json", {"quantization_config": {"quant_method": "foo"}}, "foo"),
    "text": ("config.json", {"quantization_config": "gptq"}, "config.json: quantization_config: "),
    "yarn": ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: "),
    "dtype": ("config.json", {"dtype": "foo"}, "config.json: dtype: "),
    "heads": ("config.json", {"num_attention_heads": 3}, "(32) is not a multiple of the number"),
    "act": ("config.json", {"hidden_act": "foo"}, "config.json: hidden_act: 'foo'; got 'foo'"),
    "rope": (
        "config.json",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
        "factor field must be a float or int >= 1, got 0.5",
    ),
    "layers": (
        "config.json",
        {"num_hidden_layers": 1},
        "no place for 9 of the weights, such as model.layers.1.input_layernorm.weight",
    ),
}


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTIZED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "model.quantization=none", "pip install optimum"),
    "awq": ({"quant_method": "awq", "bits": 4}, "model.quantization=none", "pip install gptqmodel"),
    "spqr": ({"quant_method": "bitnet"}, "model.quantization=none", "can't train weights of bitne"),
    "whole": (BNB, "lora=null", "trains the model's own weights; got some that bitsandbytes"),
    "again": (BNB | {"bnb_4bit_quant_type": "fp4"}, "model.quantization=nf4", "quantized already"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_weights_that_come_quantized_are_refused_where_they_can_not_be_trained(
    case: str, tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """The package that they need is named, and nothing is quantized twice."""
    told, setting, what = QUANTIZED[case]
    [message] = refused(of_quantized(told, tiny_folder, tmp_path, tiny_recipe), setting)
    assert what in message


def of_quantized(
    told: dict[str, Any], tiny_folder: Path, tmp_path: Path, tiny_recipe: MakeRecipe
) -> Path:
    """Write a recipe whose model says that its weights are quantized."""
    folder = tmp_path / "tiny-llama"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": told}))
    recipe = tiny_recipe()
    recipe.write_text(recipe.read_text().replace(str(tiny_folder), str(folder)))
    return recipe


def test_weights_that_need_a_gpu_are_noted_where_there_is_none(
    tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may find one; where there is one, the reason refuses."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("GPU is required")

    monkeypatch.setattr(checks.AutoHfQuantizer, "from_config", missing)
    told = {"quant_method": "gptq", "bits": 4}
    recipe = of_quantized(told, tiny_folder, tmp_path, tiny_recipe)
    for there, refuses in ((False, False), (True, True)):
        monkeypatch.setattr(checks.torch.cuda, "is_available", lambda there=there: there)
        report = check_recipe(load_recipe(recipe))
        [found] = [each for each in report.findings if "GPU is required" in each.message]
        assert found.refuses == refuses


@pytest.mark.parametrize("case", PUBLISHED)
def test_what_a_model_folder_says_is_refused_where_it_can_not_be_used(
    case: str, tiny_recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """Loading the model, or its first step, would fail on it."""
    file, told, what = PUBLISHED[case]
    folder = tmp_path / "tiny-llama"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **told}))
    messages = refused(tiny_recipe(), f"model.name_or_path={folder}")
    assert what in messages[0]
