import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import add_fused_lm_head

from sftkey import bounds
from sftkey.errors import DiskError, ModelError
from sftkey.models import adapters as saving_module
from sftkey.models.adapters import add_lora, load_adapter, save_adapter, save_model
from sftkey.models.device import Device
from sftkey.models.loading import load_model
from sftkey.models.source import base_identity
from sftkey.recipe.schema import ModelSection
from tests.support.leftovers import left_by_a_kill
from tests.support.tiny import made_model

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
ROWS = torch.arange(12)[None]


def section(folder: Path, quantization: str = "none") -> ModelSection:
    """Return the model section of a folder."""
    return ModelSection.model_validate({"name_or_path": str(folder), "quantization": quantization})


def loaded(folder: Path, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    """Load a folder's model onto the CPU."""
    return load_model(section(folder, quantization), Device("cpu", 0, dtype))


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters that are trained."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def moved(model: Any) -> Any:
    """Return the adapter weights that do something, as training would."""
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.normal_(std=0.1)
    return model


@pytest.fixture
def base(tiny_folder: Path) -> dict[str, str | None]:
    """Return the identity of the tiny model."""
    return base_identity(section(tiny_folder))


@pytest.fixture
def ours(tiny_model: Any, base: dict[str, str | None], tmp_path: Path) -> Path:
    """Return an adapter that we saved."""
    save_adapter(moved(add_lora(tiny_model, LORA, seed=7)), tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.fixture
def theirs(ours: Path) -> Path:
    """Return an adapter as peft saves it: the base's name alone says what it was trained on."""
    (ours / "base.json").unlink()
    return ours


def rewrite(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_same_seed_same_adapter(tiny_folder: Path) -> None:
    """The seed decides the first weights, whatever was drawn before, and nothing else moves."""
    torch.manual_seed(0)
    first = trained(add_lora(loaded(tiny_folder), LORA, seed=7))
    drawn = torch.rand(3)
    same = trained(add_lora(loaded(tiny_folder), LORA, seed=7))
    other = trained(add_lora(loaded(tiny_folder), LORA, seed=8))
    assert len(first) == 28
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


ROWS_OF_BOTH = {"trainable_token_indices": {"embed_tokens": [2], "lm_head": [2]}}


@pytest.mark.parametrize("extra", [{}, {"trainable_token_indices": [2]}, ROWS_OF_BOTH])
def test_adapter_is_float32_on_a_bfloat16_base(
    tiny_folder: Path, base: dict[str, str | None], tmp_path: Path, extra: dict[str, Any]
) -> None:
    """New or loaded, trained weights are float32 and the base's stay what they were."""
    new = moved(add_lora(loaded(tiny_folder, dtype=torch.bfloat16), LORA | extra, seed=7))
    save_adapter(new, tmp_path / "adapter", base)
    again = load_adapter(
        loaded(tiny_folder, dtype=torch.bfloat16), tmp_path / "adapter", base, lora=LORA | extra
    )
    for model in (new, again):
        assert {each.dtype for each in trained(model).values()} == {torch.float32}
        assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(trained(again)[name], each) for name, each in trained(new).items())
    assert torch.equal(again.eval()(ROWS).logits, new.eval()(ROWS).logits)


@pytest.mark.parametrize(
    ("tied", "extra"), [(False, ROWS_OF_BOTH), (True, {"trainable_token_indices": [2]})]
)
def test_trls_head_trains_the_row_of_an_end(
    tiny_tokenizer: Any, tied: bool, extra: dict[str, Any]
) -> None:
    """The row of an end of turn that a base never learned gets its gradient through TRL's head."""
    model = made_model(tiny_tokenizer, tie_word_embeddings=tied)
    adapted = add_lora(model, LORA | extra, seed=7)
    add_fused_lm_head(model)
    labels = torch.full_like(ROWS, -100)
    labels[0, -1] = 2
    adapted(input_ids=ROWS, labels=labels, fused_lm_head=True).log_probs.sum().backward()
    head = adapted.get_base_model().lm_head
    assert head.token_adapter.trainable_tokens_delta["default"].grad.abs().sum() > 0
    assert head.bias is None


def test_sixteen_bit_adapter_is_upcast(
    ours: Path, tiny_folder: Path, base: dict[str, str | None]
) -> None:
    """Somebody's bfloat16 adapter goes on in float32, with the values that it had."""
    weights = {name: each.bfloat16() for name, each in load_file(adapter_weights(ours)).items()}
    save_file(weights, adapter_weights(ours))
    again = trained(load_adapter(loaded(tiny_folder), ours, base))
    assert {each.dtype for each in again.values()} == {torch.float32}
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A{}.weight"
    assert torch.equal(again[name.format(".default")], weights[name.format("")].float())


def adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights."""
    return folder / "adapter_model.safetensors"


def added(tiny_model: Any, **lora: Any) -> str:
    """Return the error of a new adapter."""
    with pytest.raises(ModelError) as error:
        add_lora(tiny_model, LORA | lora, seed=7)
    return str(error.value)


@pytest.mark.parametrize(
    ("targets", "absent"),
    [
        (["q_proj", "kproj"], "kproj"),
        (["c_attn", "layers"], "c_attn, layers"),
        (r".*\.attention\.wq", r".*\.attention\.wq"),
    ],
)
def test_targets_that_do_not_exist(tiny_model: Any, targets: Any, absent: str) -> None:
    """A target that matches nothing is refused even beside others that do match."""
    assert added(tiny_model, target_modules=targets) == (
        f"lora.target_modules: the model has no linear module {absent}\n"
        f"hint: take from {LINEAR}, or all-linear"
    )


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", "q_proj v_proj"])
def test_a_text_of_names_is_told_to_be_a_list(tiny_model: Any, targets: str) -> None:
    """A text is to peft a pattern of whole names, which a name alone never matches."""
    names = targets.replace(",", " ").replace(" ", ", ")
    assert added(tiny_model, target_modules=targets) == (
        "lora.target_modules: expected a list, since a text is a pattern of whole names; "
        f"got '{targets}'; write [{names}]\nhint: take from {LINEAR}, or all-linear"
    )


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_output_head_carries_no_adapter(tiny_model: Any, targets: Any) -> None:
    """TRL's loss multiplies by the head's weights, so an adapter there would never be trained."""
    assert added(tiny_model, target_modules=targets) == (
        "lora.target_modules: lm_head can't carry an adapter: the loss multiplies by its weights "
        f"themselves\nhint: take from {LINEAR}, or all-linear"
    )


def test_a_tied_embedding_that_peft_ties_no_copy_of() -> None:
    """Of GPT-2's `wte` it doesn't, whatever ensure_weight_tying says; rows of it stay tied."""
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1)
    settings = LORA | {"target_modules": ["c_attn"], "ensure_weight_tying": True}
    with pytest.raises(ModelError) as error:
        add_lora(GPT2LMHeadModel(config), settings | {"modules_to_save": ["wte"]}, seed=7)
    assert str(error.value) == (
        "lora: 1 problem\n  modules_to_save: wte is tied to the model's other end, and peft would "
        "untie its copy; trainable_token_indices trains single rows"
    )
    rows = add_lora(GPT2LMHeadModel(config), settings | {"trainable_token_indices": [4]}, seed=7)
    (row,) = (weight for name, weight in trained(rows).items() if "trainable_tokens" in name)
    row.data += 1.0
    head: Any = rows.get_output_embeddings()
    last = head(torch.eye(16))[:, 4]
    assert torch.equal(last, rows.get_input_embeddings()(torch.tensor(4)))


def test_what_peft_says_of_every_module_is_logged_once(
    tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It would fill the terminal."""
    with caplog.at_level("INFO", "sftkey"):
        add_lora(tiny_model, LORA | {"lora_bias": True}, seed=7)
    (message,) = [each for each in caplog.messages if "has no bias" in each]
    assert message.startswith("peft: ")


def test_initialization_that_changes_the_base(tiny_model: Any) -> None:
    """PiSSA and its like would need the changed base saved, too."""
    assert added(tiny_model, init_lora_weights="pissa") == (
        "lora: init_lora_weights: expected true, false, gaussian or orthogonal; got 'pissa'\n"
        "hint: the others change the base's own weights, which are not saved with an adapter"
    )


def test_their_adapter_on_a_changed_base(ours: Path, tiny_folder: Path) -> None:
    """An adapter that was initialized so doesn't fit the base as it was published."""
    rewrite(ours, init_lora_weights="olora")
    assert refusal(tiny_folder, ours) == (
        f"{ours}: init_lora_weights: expected true, false, gaussian or orthogonal; got 'olora'\n"
        "hint: the others change the base's own weights, which are not saved with an adapter"
    )


def test_whole_modules_on_a_sixteen_bit_base(tiny_folder: Path) -> None:
    """Copies of modules would be float32 and fail at the first product with the base's weights."""
    model = loaded(tiny_folder, dtype=torch.bfloat16)
    assert added(model, modules_to_save=["embed_tokens"]) == (
        "lora.modules_to_save: float32 copies can't compute beside bfloat16 weights\n"
        "hint: train single tokens with trainable_token_indices, or write model.dtype=float32"
    )


def test_settings_that_peft_refuses(tiny_model: Any) -> None:
    """What peft refuses is one error of ours."""
    assert added(tiny_model, target_modules=None, r=0) == (
        "lora: `r` should be a positive integer value but the value passed is 0"
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loaded_adapter_computes_the_same(
    tiny_folder: Path, base: dict[str, str | None], tmp_path: Path, quantization: str
) -> None:
    """What was saved is what is loaded, and it goes on with training or not, as asked."""
    model = moved(add_lora(loaded(tiny_folder, quantization), LORA, seed=7)).eval()
    save_adapter(model, tmp_path / "adapter", base)
    for trainable in (True, False):
        again = load_adapter(
            loaded(tiny_folder, quantization),
            tmp_path / "adapter",
            base,
            lora=LORA,
            trainable=trainable,
        )
        assert torch.equal(again.eval()(ROWS).logits, model(ROWS).logits)
        assert len(trained(again)) == (28 if trainable else 0)


def test_saving_asks_nobody_and_names_the_base(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither our save nor a checkpoint's asks the hub; the record names the base, not a path."""
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked.append)
    tiny_model.name_or_path = tiny_model.config._name_or_path = "some/model"
    model = add_lora(tiny_model, LORA, seed=7)
    identity = {"name_or_path": "some/model", "revision": "0123abc", "fingerprint": "f"}
    save_adapter(model, tmp_path / "adapter", identity)
    model.save_pretrained(tmp_path / "checkpoint")
    assert asked == []
    names = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "base.json"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "0123abc")
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == identity


@pytest.mark.fault("a write cut short")
def test_save_that_is_cut_short_leaves_the_old_adapter(
    ours: Path,
    tiny_folder: Path,
    base: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder appears, or is replaced, when the new one is whole."""
    before = adapter_weights(ours).read_bytes()
    model = add_lora(loaded(tiny_folder), LORA, seed=7)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(saving_module, "save_file", full)
        with pytest.raises(DiskError, match="the disk is full"):
            save_adapter(model, ours, base)
    assert adapter_weights(ours).read_bytes() == before
    left_by_a_kill(ours).mkdir()
    save_adapter(model, ours, base)
    assert adapter_weights(ours).read_bytes() != before
    assert [file.name for file in ours.parent.iterdir()] == [ours.name]


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_pickled_and_torn_weights_are_refused(
    name: str, ours: Path, tiny_folder: Path, base: dict[str, str | None]
) -> None:
    """Pickle is named and not read; a file that was cut short is one error."""
    weights = adapter_weights(ours)
    content = weights.read_bytes()
    weights.unlink()
    (weights.parent / name).write_bytes(content[: len(content) // 2])
    pickled = name.endswith(".bin")
    what = f"expected adapter_model.safetensors; got {name}" if pickled else "can't be read: "
    with pytest.raises(ModelError, match=what):
        load_adapter(loaded(tiny_folder), ours, base)


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_an_adapter_that_is_not_finite_is_refused(
    ours: Path, tiny_folder: Path, base: dict[str, str | None]
) -> None:
    """By whatever loads it: generate, evaluate, merge, export, a stage that goes on from it."""
    tensors = load_file(adapter_weights(ours))
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter_weights(ours))
    with pytest.raises(ModelError) as error:
        load_adapter(loaded(tiny_folder), ours, base)
    assert str(error.value).startswith(
        f"{ours}: expected finite weights; 1 of 28 hold NaN or infinity, such as {name}\nhint: "
    )


def test_whole_model(tiny_folder: Path, base: dict[str, str | None], tmp_path: Path) -> None:
    """A model that was trained itself is saved whole, with the base that it came from."""
    model = loaded(tiny_folder)
    model.lm_head.weight.data.fill_(2.0)
    save_model(model, tmp_path / "stage" / "model", base)
    assert (loaded(tmp_path / "stage" / "model").lm_head.weight == 2.0).all()
    assert json.loads((tmp_path / "stage" / "model" / "base.json").read_text()) == base
    assert [file.name for file in (tmp_path / "stage").iterdir()] == ["model"]


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_weights_that_are_not_finite_are_not_saved(
    tiny_folder: Path, base: dict[str, str | None], tmp_path: Path
) -> None:
    """Of an adapter or of a whole model; the error names one of them, and nothing is written."""
    model = add_lora(loaded(tiny_folder), LORA, seed=7)
    next(iter(trained(model).values())).data[0, 0] = float("inf")
    whole = loaded(tiny_folder)
    whole.lm_head.weight.data[0, 0] = float("nan")
    for save, broken in ((save_adapter, model), (save_model, whole)):
        with pytest.raises(ModelError, match=r"1 of \d+ hold NaN or infinity, such as .*\nhint: l"):
            save(broken, tmp_path / "stage", base)
    assert not list(tmp_path.iterdir())


def refusal(tiny_folder: Path, folder: Path, lora: dict[str, Any] | None = None) -> str:
    """Return the error of loading an adapter onto a folder's model."""
    with pytest.raises(ModelError) as error:
        load_adapter(loaded(tiny_folder), folder, base_identity(section(tiny_folder)), lora=lora)
    return str(error.value)


def test_a_file_in_the_place_of_a_folder_is_named(
    ours: Path, tiny_folder: Path, base: dict[str, str | None]
) -> None:
    """The folder that it lies in is what was meant."""
    file = adapter_weights(ours)
    with pytest.raises(ModelError) as error:
        load_adapter(loaded(tiny_folder), file, base)
    assert str(error.value) == (
        f"{file}: a file; expected the folder that it lies in\nhint: write {ours}"
    )


def test_base_may_have_moved(ours: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The weights count, not the folder's name."""
    copy = shutil.copytree(tiny_folder, tmp_path / "renamed")
    assert len(trained(load_adapter(loaded(copy), ours, base_identity(section(copy))))) == 28


def test_adapter_for_another_base(ours: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Another model's adapter is refused, even where its shapes fit."""
    other = loaded(tiny_folder)
    other.lm_head.weight.data.fill_(2.0)
    other.save_pretrained(tmp_path / "other")
    assert refusal(tmp_path / "other", ours) == (
        f"{ours}: trained for {tiny_folder}; model.name_or_path is {tmp_path}/other\n"
        f"hint: write model.name_or_path={tiny_folder}"
    )


@pytest.mark.fault("rows, template or weights changed between two commands")
def test_adapter_for_other_weights_of_the_name(ours: Path, tiny_folder: Path) -> None:
    """A repository that moved on is told from the commit that the adapter was trained on."""
    record = json.loads((ours / "base.json").read_text())
    expected = (
        f"{ours}: trained for other weights of {tiny_folder}: expected fingerprint 00ff; got "
        f"{record['fingerprint']}"
    )
    (ours / "base.json").write_text(json.dumps(record | {"fingerprint": "00ff"}))
    assert refusal(tiny_folder, ours) == expected
    (ours / "base.json").write_text(
        json.dumps(record | {"fingerprint": "00ff", "revision": "0123abc"})
    )
    assert refusal(tiny_folder, ours) == f"{expected}\nhint: write model.revision=0123abc"


@pytest.mark.parametrize("name", ["someone/tiny-llama", "/elsewhere/tiny-llama/"])
def test_their_adapter_by_its_bases_name(theirs: Path, tiny_folder: Path, name: str) -> None:
    """Where no identity was saved, the last part of the name decides."""
    rewrite(theirs, base_model_name_or_path=name)
    base = base_identity(section(tiny_folder))
    assert len(trained(load_adapter(loaded(tiny_folder), theirs, base))) == 28


def test_their_adapter_for_another_base(theirs: Path, tiny_folder: Path) -> None:
    """Peft would put it on any model whose shapes fit."""
    rewrite(theirs, base_model_name_or_path="someone/huge-llama")
    assert refusal(tiny_folder, theirs) == (
        f"{theirs}: trained for someone/huge-llama; model.name_or_path is {tiny_folder}\n"
        "hint: write model.name_or_path=someone/huge-llama"
    )


def test_their_adapter_for_nobody_knows_what(theirs: Path, tiny_folder: Path) -> None:
    """An adapter that doesn't name its base can't be compared."""
    rewrite(theirs, base_model_name_or_path=None)
    assert refusal(tiny_folder, theirs) == (
        f"{theirs}: doesn't say which base it was trained for\n"
        "hint: write it as base_model_name_or_path into its adapter_config.json"
    )


def test_lists_of_a_recipe_have_no_order(tiny_folder: Path, base: Any, tmp_path: Path) -> None:
    """An adapter's own order is the process's: a second stage with the same list goes on."""
    names = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    model = add_lora(loaded(tiny_folder), {"target_modules": [], "target_parameters": names}, 1)
    save_adapter(model, tmp_path / "adapter", base)
    for targets in ([], None):
        lora = {"target_modules": targets, "target_parameters": names[::-1]}
        load_adapter(loaded(tiny_folder), tmp_path / "adapter", base, lora=lora)
    lora = {"target_parameters": names[:2]}
    assert "lora.target_parameters is" in refusal(tiny_folder, tmp_path / "adapter", lora)


def test_recipe_contradicts_adapter(ours: Path, tiny_folder: Path) -> None:
    """What the recipe says and the adapter doesn't have would do nothing, so it is refused."""
    wanted = {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    targets = "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"
    assert refusal(tiny_folder, ours, wanted) == (
        f"{ours}: lora.r is 16 in the recipe and 4 in the adapter; lora.target_modules is "
        f"['q_proj', 'v_proj'] (4 modules) in the recipe and {targets} (14) in the adapter; "
        "lora.use_rslora is True in the recipe and False in the adapter\n"
        "hint: write what the adapter has, or leave the key out"
    )


def test_adapter_of_another_kind(tiny_model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Only LoRA adapters go on."""
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model, config).save_pretrained(tmp_path / "ia3")
    assert refusal(tiny_folder, tmp_path / "ia3") == (
        f"{tmp_path}/ia3: expected a LoRA adapter; got IA3Config"
    )
    file = tmp_path / "ia3" / "adapter_config.json"
    file.write_text(file.read_text().replace("IA3", "NEWER"))
    assert refusal(tiny_folder, tmp_path / "ia3").startswith(f"{tmp_path}/ia3: can't be read")


@pytest.mark.fault("texts that take long to read")
def test_targets_that_take_without_end_are_refused(
    ours: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's own pattern is compared with the modules' names, and may be a stranger's."""
    monkeypatch.setattr(bounds.bounded.__wrapped__, "__defaults__", (0.1, None))
    adapter = shutil.copytree(ours, tmp_path / "other")
    file = adapter / "adapter_config.json"
    for pattern, what in (("(([a-z_.0-9]*)*)*!", "takes more than 5 s"), ("(", "expected a reg")):
        config = json.loads(file.read_text()) | {"target_modules": pattern}
        file.write_text(json.dumps(config))
        said = refusal(tiny_folder, adapter, {"target_modules": "all-linear"})
        assert said.startswith("lora.target_modules: ")
        assert what in said


def test_no_adapter_there(tiny_folder: Path, tmp_path: Path) -> None:
    """A model's folder is no adapter; a missing one is no hub id."""
    assert refusal(tiny_folder, tiny_folder) == f"{tiny_folder}: no adapter_config.json there"
    assert refusal(tiny_folder, tmp_path / "gone") == f"{tmp_path}/gone: no such folder"


def test_adapter_with_unreadable_config(ours: Path, tiny_folder: Path) -> None:
    """A torn config is one error."""
    (ours / "adapter_config.json").write_text("{")
    assert refusal(tiny_folder, ours) == (
        f"{ours}: can't be read: Expecting property name enclosed in double quotes: line 1 column "
        "2 (char 1)"
    )


def test_weights_of_another_rank(ours: Path, tiny_folder: Path) -> None:
    """Weights that contradict the adapter's own config don't load in part."""
    rewrite(ours, r=8)
    assert refusal(tiny_folder, ours) == (
        f"{ours}: its weights don't fit the model: size mismatch for "
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight: copying a param with "
        "shape torch.Size([32, 4]) from checkpoint, the shape in current model is "
        "torch.Size([32, 8])."
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"),
        ("lora_dropout", 2.0),
        ("rank_pattern", [1]),
        ("lora_alpha", "9"),
        ("trainable_token_indices", [10**6]),
        ("bias", "foo"),
        ("modules_to_save", ["lm_head"]),
        ("megatron_config", {"a": 1}),
    ],
)
def test_a_config_that_was_changed_is_one_error(
    ours: Path, tiny_folder: Path, key: str, value: Any
) -> None:
    """Whatever peft makes of it."""
    rewrite(ours, **{key: value})
    assert refusal(tiny_folder, ours).startswith(f"{ours}: its ")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_match_nothing(ours: Path, tiny_folder: Path, change: str) -> None:
    """Peft would leave out what doesn't match, and warn at most."""
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights = load_file(adapter_weights(ours))
    tensor = weights.pop(name)
    if change == "unexpected":
        weights |= {name: tensor, name.replace("layers.1", "layers.9"): tensor.clone()}
    save_file(weights, adapter_weights(ours))
    unmatched = {
        "missing": name.replace("lora_B", "lora_B.default"),
        "unexpected": name.replace("layers.1", "layers.9"),
    }
    assert refusal(tiny_folder, ours) == (
        f"{ours}: 1 of its weights don't match the model's, such as {unmatched[change]}"
    )


def test_config_of_peft_is_ours(ours: Path) -> None:
    """What we save, peft reads without us."""
    config = LoraConfig.from_pretrained(str(ours))
    assert (config.r, config.inference_mode, config.task_type) == (4, True, "CAUSAL_LM")
