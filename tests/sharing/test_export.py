"""`sftkey export` writes what llama.cpp, Ollama and vLLM need, up to their own programs."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import sftkey.sharing.export
from sftkey.cli import main
from sftkey.commands.sharing import export
from sftkey.data.sources import question_prompt
from sftkey.errors import RunError
from sftkey.models.device import Device
from sftkey.models.loading import load_renderer
from sftkey.sharing.export import converter_command, modelfile
from sftkey.sharing.merging import asked_ids, with_template
from sftkey.sharing.stage import shared_stage
from sftkey.training.stage_model import load_stage
from tests.support.real_tokenizers import llama_cpp, real_tokenizer
from tests.support.runs import STAGES, ledger_of, made_run
from tests.support.tiny import made_model

# Stands for llama.cpp's converter: writes what it was called with, and the template it was given.
CONVERTER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
found = {"arguments": sys.argv[1:], "template": (folder / "chat_template.jinja").read_text()}
pathlib.Path(sys.argv[3]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Any]:
    """Return a run with a plain stage, which can be merged."""
    folder = tmp_path_factory.mktemp("run")
    return made_run(folder, tiny_folder, num_trained=1, stages=STAGES[:1])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder that has a converter."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


def test_an_ollama_folder_holds_gguf_and_modelfile(
    run: tuple[Path, Any], checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The converter gets the merged folder and the type; nothing else is left."""
    folder, recipe = run
    output = tmp_path / "out"
    words = ["--to", "ollama", "-o", str(output), "--llama-cpp", str(checkout)]
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), *words, "--outtype", "q8_0"])
    assert not end.value.code
    assert capsys.readouterr().out == "ollama create tiny -f Modelfile\n"
    assert sorted(file.name for file in output.iterdir()) == ["Modelfile", "model.gguf"]
    called = json.loads((output / "model.gguf").read_text())
    merged, _, _, *outtype = called["arguments"]
    assert (Path(merged).name, outtype) == ("tiny", ["--outtype", "q8_0"])
    assert "You calculate." in called["template"]
    assert (output / "Modelfile").read_text() == modelfile(load_renderer(recipe), recipe)


def test_a_modelfile_says_all_that_was_measured(run: tuple[Path, Any]) -> None:
    """The run's prompt, its stop, greedy, no penalty, and room for prompt and response."""
    _, recipe = run
    assert modelfile(load_renderer(recipe), recipe) == (
        'FROM ./model.gguf\nTEMPLATE """<|im_start|>system\nYou calculate.<|im_end|>\n'
        "<|im_start|>user\nQ: {{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
        '{{ .Response }}"""\n'
        "PARAMETER temperature 0.0\nPARAMETER repeat_penalty 1.0\nPARAMETER num_predict 24\n"
        'PARAMETER num_ctx 1048\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_modelfile_escapes_braces_and_refuses_quotes(run: tuple[Path, Any]) -> None:
    """Braces mean something to Go, and three quotes end the template."""
    _, recipe = run
    renderer = load_renderer(recipe)

    def with_system(text: str) -> str:
        data = recipe.data.model_copy(update={"system": text})
        return modelfile(renderer, recipe.model_copy(update={"data": data}))

    assert '\nJSON: {{ "{{" }}"a": 1}}<|im_end|>' in with_system('JSON: {{"a": 1}}')
    with pytest.raises(RunError, match='can\'t hold a prompt with """'):
        with_system('say """')


def test_the_converter_is_llama_cpps_own(checkout: Path, tmp_path: Path) -> None:
    """Its command is built; a folder without it is refused with what to do."""
    assert converter_command(checkout, tmp_path / "m", tmp_path / "m.gguf", "bf16") == [
        sys.executable,
        str(checkout / "convert_hf_to_gguf.py"),
        str(tmp_path / "m"),
        "--outfile",
        str(tmp_path / "m.gguf"),
        "--outtype",
        "bf16",
    ]
    with pytest.raises(RunError) as raised:
        converter_command(tmp_path, tmp_path, tmp_path, "bf16")
    assert str(raised.value) == (
        f"{tmp_path}: expected a checkout of llama.cpp; it holds no convert_hf_to_gguf.py\n"
        "hint: git clone https://github.com/ggml-org/llama.cpp, and name that folder"
    )


@pytest.mark.network
def test_a_gguf_gives_the_answers_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty greedy answers of two random layers, from the file alone, token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkout = llama_cpp()
    monkeypatch.setenv("PYTHONPATH", str(checkout / "site"))
    tokenizer = real_tokenizer("smollm2")
    model = made_model(tokenizer, initializer_range=0.3, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder, recipe = made_run(tmp_path, tmp_path / "model", num_trained=1, stages=STAGES[:1])
    file = tmp_path / "out" / "m.gguf"
    export(folder, "gguf", file, llama_cpp=checkout, outtype="f32")

    served = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    renderer = load_renderer(recipe)
    cpu = Device("cpu", 0, torch.float32)
    trained = load_stage(recipe, ledger_of(folder, recipe), cpu, renderer, 1).eval()
    for number in range(20):
        question = f"What is {number} + {number}?"
        ids = asked_ids(read, [{"role": "user", "content": question}])
        assert ids == renderer.prompt_ids(question_prompt(recipe.data, question))
        given = torch.tensor([ids])
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": renderer.end_id}
        found, expected = (each.generate(given, **greedy) for each in (served, trained))
        assert found.tolist() == expected.tolist()
        assert found.shape[1] > given.shape[1]


def test_a_converter_that_fails_leaves_nothing(
    run: tuple[Path, Any], checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file under the name nor the merged folder; the error says whose fault it is."""
    folder, _ = run
    monkeypatch.setattr(sftkey.sharing.export, "write_model", lambda *_: None)
    (checkout / "convert_hf_to_gguf.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(RunError, match=r"llama.cpp's converter failed: .* exit status 3"):
        export(folder, "gguf", tmp_path / "out" / "m.gguf", llama_cpp=checkout)
    assert list((tmp_path / "out").iterdir()) == []


def test_vllm_serves_an_adapter_beside_its_base(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The written template makes the run's prompt; the command names all that is needed."""
    folder, recipe = run
    output = tmp_path / "serve"
    export(folder, "vllm-lora", output)
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == [
        "vllm",
        "serve",
        recipe.model.name_or_path,
        "--enable-lora",
        "--max-lora-rank",
    ]
    assert words[5:8] == ["8", "--lora-modules", f"tiny={folder}/stages/1-completion/adapter"]
    assert json.loads(words[-1]) == {"temperature": 0.0, "repetition_penalty": 1.0}
    renderer = load_renderer(recipe)
    template = (output / "chat_template.jinja").read_text()
    asked = asked_ids(
        with_template(renderer.tokenizer, template), [{"role": "user", "content": "2?"}]
    )
    assert "You calculate.<|im_end|>\n<|im_start|>user\nQ: 2?" in renderer.tokenizer.decode(asked)
    config = json.loads((output / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["max_new_tokens"]) == ([renderer.end_id], 24)


def test_what_vllm_cannot_serve_is_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    """Adapters with more than LoRA's two matrices, and ranks that it has no room for."""
    folder, _ = run
    config = shared_stage(folder, None).weights / "adapter_config.json"
    whole = config.read_text()
    try:
        for changed, error in (
            ({"use_dora": True}, "vLLM serves no adapter with use_dora"),
            ({"r": 1024}, "vLLM serves no adapter of rank 1024"),
        ):
            config.write_text(json.dumps(json.loads(whole) | changed))
            with pytest.raises(RunError) as raised:
                export(folder, "vllm-lora", tmp_path / "serve")
            assert str(raised.value).endswith(f"{error}\nhint: `--to vllm` merges it")
    finally:
        config.write_text(whole)


def test_wrong_calls_are_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    """An engine that isn't there, and a converter that isn't named."""
    folder, _ = run
    with pytest.raises(RunError) as raised:
        export(folder, "vlm", tmp_path / "out")
    assert str(raised.value) == (
        "--to: expected one of gguf, ollama, vllm, vllm-lora, lm-eval; got 'vlm'; "
        "did you mean `vllm`?"
    )
    with pytest.raises(RunError) as raised:
        export(folder, "gguf", tmp_path / "out.gguf")
    assert str(raised.value) == (
        "--llama-cpp: expected a checkout of llama.cpp for --to gguf; got none\n"
        "hint: git clone https://github.com/ggml-org/llama.cpp, and name that folder"
    )
