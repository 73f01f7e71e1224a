import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sftkey.errors import ModelError
from sftkey.models import loading as model_module
from sftkey.models.adapters import add_lora
from sftkey.models.device import Device
from sftkey.models.facts import refuse_other_shapes, skeleton_of
from sftkey.models.loading import load_model, load_tokenizer
from sftkey.models.source import Source
from sftkey.recipe.schema import ModelSection

CPU = Device("cpu", 0, torch.float32)


def section(folder: Path | str, quantization: str = "none", **settings: Any) -> ModelSection:
    """Return the model section of a folder, unquantized unless asked for."""
    return ModelSection.model_validate(
        {"name_or_path": str(folder), "quantization": quantization, **settings}
    )


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the model's folder, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "tiny-llama")


def test_tokenizer_needs_no_weights(folder: Path) -> None:
    """Tokenizer and config are enough to look at tokens."""
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(section(folder))
    assert tokenizer.decode(tokenizer("3 cats")["input_ids"]) == "3 cats"


def test_pad_token_is_added_and_end_of_text_kept(tiny_tokenizer: Any, folder: Path) -> None:
    """A tokenizer without a pad token pads with its end of text, or with any token at all."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    bare.save_pretrained(folder)
    assert load_tokenizer(section(folder)).pad_token == "<|endoftext|>"
    bare.eos_token = "<|im_end|>"
    bare.save_pretrained(folder)
    tokenizer = load_tokenizer(section(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")


def test_recipe_gives_chat_template(tiny_folder: Path, tmp_path: Path) -> None:
    """A template file takes the place of the published one."""
    file = tmp_path / "plain.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(section(tiny_folder, chat_template=str(file)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "hi!"


def test_missing_chat_template(tiny_folder: Path) -> None:
    """The file that isn't there is named."""
    with pytest.raises(ModelError) as error:
        load_tokenizer(section(tiny_folder, chat_template="gone.jinja"))
    assert str(error.value) == (
        "gone.jinja: model.chat_template: can't be read: No such file or directory"
    )


def test_tokenizer_without_offsets(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that knows no character offsets is refused before any mask is wrong."""
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError) as error:
        load_tokenizer(section(tiny_folder))
    assert str(error.value) == (
        f"{tiny_folder}: TokenizersBackend gives no character offsets, which the masks are made "
        "from\nhint: take a model that has a tokenizer.json"
    )


def test_folder_without_tokenizer(folder: Path) -> None:
    """A folder with weights alone says what was expected beside them."""
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError) as error:
        load_tokenizer(section(folder))
    assert str(error.value) == f"{folder}: no tokenizer there; expected tokenizer.json"


def test_unreadable_tokenizer(folder: Path) -> None:
    """A spoilt file is one error with the reader's reason."""
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError) as error:
        load_tokenizer(section(folder))
    assert str(error.value) == (
        f"{folder}/tokenizer_config.json: expected JSON; got Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1)"
    )


def test_folder_without_weights(folder: Path) -> None:
    """A model folder without weights says what was expected there."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: no weights there; expected *.safetensors beside config.json"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_pickled_weights_are_refused_by_name(folder: Path) -> None:
    """Reading them may run code: nothing is read, and the conversion is named."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even read")
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: expected weights as *.safetensors; got pytorch_model.bin, whose reading may "
        "run code\nhint: if you trust who wrote them, convert them: "
        "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_folder_with_torn_weights(folder: Path) -> None:
    """A file that was cut short is one error."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: its model can't be loaded: Error while deserializing header: incomplete "
        "metadata, file not fully covered"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_attention_heads": -4}, "negative dimension"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads: .* by zero"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads: .* by zero"),
        ({"head_dim": 0}, "config.json: head_dim: .* got 0"),
        ({"pad_token_id": 10**9}, "config.json: pad_token_id: Padding_idx"),
        ({"hidden_size": 0}, "makes 21 weights without a number in them, such as model.embed_tok"),
        ({"intermediate_size": 0}, "makes 6 weights without a number in them, such as model.laye"),
        ({"num_hidden_layers": 10**9}, "expected at most 1,000 layers; got 1,000,000,000"),
        ("[" * 9999, "recursion"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_config_that_no_model_has_is_refused(config: Any, what: str, folder: Path) -> None:
    """Before anything is built of it that takes all memory, and without a traceback."""
    file = folder / "config.json"
    changed = config if isinstance(config, str) else json.loads(file.read_text()) | config
    file.write_text(changed if isinstance(config, str) else json.dumps(changed))
    with pytest.raises(ModelError, match=what):
        skeleton_of(section(folder))


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_weights_of_other_shapes_than_the_configs_are_said(folder: Path) -> None:
    """Upstream sends its reader to a report in the log."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 10**12}))
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    what = "its model can't be loaded: its weights have other shapes than its config.json says"
    assert str(error.value) == f"{folder}: {what}"
    with pytest.raises(ModelError) as error:
        refuse_other_shapes(section(folder), skeleton_of(section(folder)))
    assert str(error.value) == (
        f"{folder}: lm_head.weight has the shape [329, 32]; its config.json says "
        "[1000000000000, 32]\n"
        "hint: put the config.json there that the weights were published with"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_check_reads_the_heads_of_weights(folder: Path) -> None:
    """What was cut short is told without loading them; whole weights pass."""
    sound, weights = section(folder), folder / "model.safetensors"
    refuse_other_shapes(sound, skeleton_of(sound))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: can't be read: "):
        refuse_other_shapes(sound, skeleton_of(sound))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_weights_that_are_not_finite_are_refused(
    number: float, dtype: torch.dtype, folder: Path
) -> None:
    """A model or an adapter that holds one number that is none would answer with noise."""
    loaded = load_model(section(folder), CPU)
    loaded.lm_head.weight.data[3, 7] = number
    loaded.to(dtype).save_pretrained(folder)
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: expected finite weights; 1 of 21 hold NaN or infinity, such as lm_head.weight\n"
        "hint: get them anew from where they came; what was trained, train with a lower "
        "learning_rate"
    )


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "pytorch_model.bin"])
def test_an_index_names_safetensors_beside_it(shard: str, folder: Path) -> None:
    """Upstream reads whatever it names, and what isn't safetensors as pickle."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: model.safetensors.index.json: expected names of *.safetensors beside it; got "
        f"{shard!r}\nhint: take the model from who made it"
    )


def test_missing_weights_are_never_made_up(folder: Path) -> None:
    """Upstream would fill a missing tensor with random numbers, and warn."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_model(section(folder), CPU)
    assert str(error.value) == (
        f"{folder}: 1 of the model's weights are not there, such as "
        "model.layers.1.mlp.up_proj.weight"
    )


def test_gate_before_the_weights(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that gives the config and not the weights is the hub's error, not transformers'."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        cause = hub.GatedRepoError("403", response=response)
        raise OSError("You are trying to access a gated repo.") from cause

    found = Source("meta/llama", "0123abc", tiny_folder)
    monkeypatch.setattr(model_module, "model_source", lambda section: found)
    for auto, load in (
        (AutoTokenizer, load_tokenizer),
        (AutoModelForCausalLM, lambda section: load_model(section, CPU)),
    ):
        monkeypatch.setattr(auto, "from_pretrained", refuse)
        with pytest.raises(ModelError) as error:
            load(section("meta/llama"))
        assert str(error.value) == (
            "meta/llama: gated: the hub gives it only to accounts that accepted its licence\n"
            "hint: accept it at https://huggingface.co/meta/llama, then run `hf auth login`"
        )


def test_dtype_of_weights(tiny_folder: Path) -> None:
    """The compute type by default, or what was asked."""
    modern = Device("cpu", 0, torch.bfloat16)
    assert load_model(section(tiny_folder), modern).dtype == torch.bfloat16
    assert load_model(section(tiny_folder, dtype="auto"), modern).dtype == torch.float32
    assert load_model(section(tiny_folder, dtype="bfloat16"), CPU).dtype == torch.bfloat16


def test_weights_of_an_earlier_stage(tiny_folder: Path, tiny_model: Any, tmp_path: Path) -> None:
    """Full fine-tuning goes on from the folder that a stage wrote."""
    tiny_model.lm_head.weight.data.fill_(2.0)
    tiny_model.save_pretrained(tmp_path)
    model = load_model(section(tiny_folder), CPU, full=True, folder=tmp_path)
    assert (model.lm_head.weight == 2.0).all()


def quantized(folder: Path, **settings: Any) -> Any:
    """Load a folder's model in NF4, which stays packed unless asked otherwise."""
    return load_model(section(folder, "nf4", **{"unpack": "never", **settings}), CPU)


def input_gradient(model: Any) -> torch.Tensor:
    """Return the gradient at the model's input, in training mode."""
    embedded = model.get_input_embeddings()(torch.arange(12)[None]).detach().requires_grad_()
    model.train()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    return embedded.grad.clone()


def evaluate(model: Any) -> None:
    """Run a forward pass as an evaluation does."""
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(12)[None])


def test_nf4_quantizes_twice(tiny_folder: Path) -> None:
    """Every linear module but the head is NF4, and its scales are quantized too."""
    from bitsandbytes.nn import Linear4bit

    states = [
        module.weight.quant_state
        for module in quantized(tiny_folder).modules()
        if isinstance(module, Linear4bit)
    ]
    assert len(states) == 14
    assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def is_packed(model: Any) -> bool:
    """Tell whether a model has modules of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit

    found = {isinstance(each, Linear4bit) for each in model.modules()}
    assert model.is_quantized == model.is_loaded_in_4bit == (True in found)
    return True in found


def test_unpacked_model_is_the_packed_one(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default NF4 is unpacked on a CPU: same logits and gradient, nothing new to train."""
    with caplog.at_level("INFO", logger="sftkey"):
        packed, unpacked = quantized(tiny_folder), quantized(tiny_folder, unpack="auto")
    assert caplog.messages == ["NF4 weights are unpacked once, to 0.0 GiB"]
    assert (is_packed(packed), is_packed(unpacked)) == (True, False)
    ids = torch.arange(12)[None]
    expected = packed(input_ids=ids).logits
    torch.testing.assert_close(unpacked(input_ids=ids).logits, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(input_gradient(unpacked), input_gradient(packed))
    trained = [
        {name for name, each in model.named_parameters() if each.requires_grad}
        for model in (packed, unpacked)
    ]
    assert trained[0] == trained[1]


def test_adapter_trained_on_unpacked_weights_is_the_same(tiny_folder: Path) -> None:
    """A step of the optimizer gives the same adapter, packed or unpacked."""
    adapters = []
    for unpack in ("never", "auto"):
        model: Any = add_lora(quantized(tiny_folder, unpack=unpack), {"r": 4}, 1)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        ids = torch.arange(24).view(2, 12)
        optimizer = torch.optim.SGD(trained.values(), 0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        adapters.append({name: each.detach() for name, each in trained.items()})
    assert adapters[0].keys() == adapters[1].keys()
    for name, expected in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], expected)


def test_unpacked_only_where_it_fits(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the free memory must suffice; 73,728 bytes is what the tiny model's weights take."""
    for free, packed in ((2 * 73728, False), (2 * 73728 - 2, True)):
        monkeypatch.setattr(model_module, "free_bytes", lambda free=free: free)
        with caplog.at_level("INFO", logger="sftkey"):
            assert is_packed(quantized(tiny_folder, unpack="auto")) == packed
    expected = "NF4 weights stay packed: unpacked they would need 0.0 GiB"
    assert caplog.messages[-1] == expected


def test_stays_packed_where_types_differ_or_weights_are_sharded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in bfloat16 that multiplies in float32 needs bitsandbytes' conversions."""
    half = load_model(section(tiny_folder, dtype="bfloat16"), CPU)
    half.save_pretrained(folder := tiny_folder.parent / "half")
    assert is_packed(quantized(folder, unpack="auto", dtype="auto"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert is_packed(quantized(tiny_folder, unpack="auto"))


@pytest.mark.parametrize(("fsdp", "storage"), [("true", torch.float32), ("false", torch.uint8)])
def test_fsdp_gets_nf4_weights_that_it_can_shard(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fsdp: str, storage: torch.dtype
) -> None:
    """Where the launcher says FSDP, the packed weights are numbers of the compute type."""
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    model = quantized(tiny_folder)
    evaluate(model)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert {layer.weight.dtype for layer in layers} == {storage}


def test_gradient_survives_an_evaluation(tiny_folder: Path) -> None:
    """The gradient through quantized layers is exactly the same before and after a forward pass."""
    model = quantized(tiny_folder)
    before = input_gradient(model)
    evaluate(model)
    assert before.abs().sum() > 0
    assert torch.equal(input_gradient(model), before)


def test_gradient_would_be_lost() -> None:
    """Without our switch bitsandbytes loses the gradient on such a CPU."""
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(1, 64))
    layer.train()
    inputs = torch.ones(1, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="autograd"):
        layer(inputs).sum().backward()
    assert inputs.grad is None


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_weights_that_train_are_float32(folder: Path, dtype: str | None) -> None:
    """In 16 bits most small steps round to nothing, whatever type was published or asked for."""
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    model = load_model(section(folder, dtype=dtype), CPU, full=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_published_generation_config_is_saved_as_it_was_published(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Settings that transformers won't save once an end is added end no checkpoint, no merge."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_folder, folder)
    published = {"temperature": 0.6, "top_p": 0.9, "min_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps({**published, "eos_token_id": 0}))
    model = load_model(ModelSection(name_or_path=str(folder), quantization="none"), CPU)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {**saved, **published, "eos_token_id": [2, 0]} == saved
