"""What others get of a stage: GGUF, Modelfile, vLLM's command, lm-eval task, hub commit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from sftkey.data.renderer import Renderer
from sftkey.data.sources import question_prompt
from sftkey.errors import RunError, first_line
from sftkey.files import appearing, read_json, refuse_existing, write_text
from sftkey.models.adapters import WEIGHTS_FILE
from sftkey.models.loading import load_renderer
from sftkey.models.source import ADAPTER_CONFIG, model_source
from sftkey.recipe.schema import EvalSection, Recipe
from sftkey.sharing.card import hub_id, model_card
from sftkey.sharing.merging import (
    baked_generation_config,
    baked_template,
    with_template,
    write_model,
)
from sftkey.sharing.stage import SharedStage, asked_questions
from sftkey.training.run_folder import Ledger

CONVERTER = "convert_hf_to_gguf.py"
CLONE = "git clone https://github.com/ggml-org/llama.cpp, and name that folder"
QUESTION = "question7d30"
STDERR = 2  # the descriptor: stdout is for data
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes
NOT_SERVED = ("use_dora", "modules_to_save", "trainable_token_indices")  # vLLM's LoRA refuses them


def converter_command(checkout: Path, folder: Path, file: Path, outtype: str) -> list[str]:
    """Return the command by which llama.cpp converts a model's folder to a GGUF file."""
    script = checkout / CONVERTER
    if not script.is_file():
        what = f"expected a checkout of llama.cpp; it holds no {CONVERTER}"
        raise RunError(str(checkout), what, CLONE)
    options = ["--outfile", str(file.absolute()), "--outtype", outtype]
    return [sys.executable, str(script), str(folder.absolute()), *options]


def write_gguf(stage: SharedStage, checkout: Path, file: Path, outtype: str = "auto") -> None:
    """Write a stage's merged model as one GGUF file, its chat template in it.

    Raises:
        RunError: The file exists, the checkout is none, or the converter fails.
        ModelError: The weights can't be loaded.
    """
    refuse_existing(file)
    converter_command(checkout, file, file, outtype)  # a wrong checkout is told before the merge
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".merged-") as place:
        folder = Path(place) / stage.recipe.name  # the converter names the model after it
        write_model(stage.recipe, stage.weights, folder)
        with appearing(file) as written:
            _convert(converter_command(checkout, folder, written, outtype))


def _convert(command: list[str]) -> None:
    """Run the converter; its progress goes to stderr."""
    try:
        subprocess.run(command, check=True, stdout=STDERR)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunError(
            command[1],
            f"llama.cpp's converter failed: {first_line(error)}",
            "its own words stand above; it needs what its requirements.txt names, and a checkout "
            "that knows the model's architecture",
        ) from error


def write_ollama(stage: SharedStage, checkout: Path, folder: Path, outtype: str) -> None:
    """Write a new folder with `model.gguf` and the Modelfile that makes an Ollama model of it."""
    refuse_existing(folder)
    text = modelfile(load_renderer(stage.recipe), stage.recipe)
    write_gguf(stage, checkout, folder / "model.gguf", outtype)
    write_text(folder / "Modelfile", text)


def modelfile(renderer: Renderer, recipe: Recipe) -> str:
    """Return a Modelfile: prompt, stops and sampling are those of the run's evaluation."""
    settings = recipe.eval
    prompt = renderer.prompt_text(question_prompt(recipe.data, QUESTION))
    bos = renderer.tokenizer.bos_token
    if bos and renderer.tokenizer("a")["input_ids"][0] == renderer.tokenizer.bos_token_id:
        prompt = prompt.removeprefix(bos)  # the engine sets it by itself
    parts = (part.replace("{{", '{{ "{{" }}') for part in prompt.split(QUESTION))
    template = "{{ .Prompt }}".join(parts) + "{{ .Response }}"  # Go's, where braces mean something
    if '"""' in template:
        raise RunError(recipe.name, 'a Modelfile can\'t hold a prompt with """', "export --to gguf")
    sampling = {"temperature": settings.temperature, "repeat_penalty": 1.0}
    if settings.temperature:
        sampling |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling |= {
        "num_predict": settings.max_new_tokens,
        "num_ctx": recipe.data.max_length + settings.max_new_tokens,
    }
    lines = [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    lines.append(f"PARAMETER stop {json.dumps(renderer.end_token, ensure_ascii=False)}")
    return "\n".join(["FROM ./model.gguf", f'TEMPLATE """{template}"""', *lines, ""])


def vllm_command(folder: Path, recipe: Recipe) -> str:
    """Return the command that serves a merged folder as it was measured.

    vLLM takes stops and lengths from the generation config, but reads no `do_sample` there.
    """
    return shlex.join(["vllm", "serve", str(folder), *_sampling(recipe)])


def _sampling(recipe: Recipe) -> list[str]:
    return [
        "--override-generation-config",
        json.dumps({"temperature": recipe.eval.temperature, "repetition_penalty": 1.0}),
    ]


def write_vllm_lora(stage: SharedStage, folder: Path) -> str:
    """Write the chat template and generation config that vLLM needs beside base and adapter.

    Returns:
        The command that serves the adapter under the run's name.
    """
    from transformers import GenerationConfig

    recipe = stage.recipe
    refuse_existing(folder)
    rank = _lora_rank(stage)
    renderer = load_renderer(recipe)
    base = model_source(recipe.model)
    try:
        published = GenerationConfig.from_pretrained(base.path, revision=base.commit or "main")
    except OSError:  # there is none
        published = GenerationConfig()
    with appearing(folder) as made:
        made.mkdir()
        (made / "chat_template.jinja").write_text(
            baked_template(renderer, recipe.data), encoding="utf-8"
        )
        baked_generation_config(published, renderer, recipe).save_pretrained(made)
    words = ["vllm", "serve", base.path, "--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--lora-modules", f"{recipe.name}={stage.weights}"]
    if recipe.model.quantization == "nf4":  # what the adapter was trained on
        words += ["--quantization", "bitsandbytes"]
    words += ["--chat-template", str(folder / "chat_template.jinja")]
    words += ["--generation-config", str(folder), *_sampling(recipe)]
    return shlex.join(words)


def _lora_rank(stage: SharedStage) -> int:
    """Return the smallest rank that vLLM takes and that holds the adapter's."""
    hint = "`--to vllm` merges it"
    if stage.recipe.lora is None:
        raise RunError(str(stage.run), f"{stage.name} trained the model whole", hint)
    config = read_json(stage.weights / ADAPTER_CONFIG)
    if refused := [name for name in NOT_SERVED if config.get(name)]:
        what = f"vLLM serves no adapter with {', '.join(refused)}"
        raise RunError(str(stage.weights), what, hint)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    fitting = [rank for rank in LORA_RANKS if rank >= max(ranks)]
    if not fitting:
        raise RunError(str(stage.weights), f"vLLM serves no adapter of rank {max(ranks)}", hint)
    return fitting[0]


def write_task(stage: SharedStage, folder: Path) -> str:
    """Write a task folder of a run's test questions: the same prompts to the token, and verdicts.

    Returns:
        The command that evaluates the stage with it.
    """
    recipe = stage.recipe
    refuse_existing(folder)
    prepared, questions = asked_questions(stage.run, recipe)
    renderer = prepared.renderer
    rows = [
        {
            "index": example.index,
            "turn": example.turn,
            "prompt": renderer.prompt_text(example.prompt),
            "answer": example.answer,
        }
        for example in questions
    ]
    settings = {
        "tags": list(vars(renderer.response).values()),
        "grader": recipe.eval.grader,
        "assistant_prefix": renderer.assistant_prefix,
        "end": renderer.end,
    }
    name = "sftkey_" + re.sub(r"\W+", "_", recipe.name)
    with appearing(folder) as made:
        made.mkdir()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (made / "rows.jsonl").write_text(lines, encoding="utf-8")
        (made / "task.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (made / f"{name}.yaml").write_text(_yaml(name, renderer.end_token, recipe.eval))
        shutil.copyfile(Path(__file__).with_name("lm_eval_task.py"), made / "utils.py")
    return _command(stage, name, folder)


def _yaml(name: str, end: str, settings: EvalSection) -> str:
    """Write the task; its prompts are whole, so that nothing is put around them."""
    sampled = settings.temperature > 0
    generation = {
        "until": [end],
        "max_gen_toks": settings.max_new_tokens,
        "do_sample": sampled,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        "repetition_penalty": 1.0,
    }
    return f"""\
# Prompts are whole: run it without --apply_chat_template.
task: {name}
custom_dataset: !function utils.load
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: prompt
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs: {json.dumps(generation, ensure_ascii=False)}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: fmt, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def _command(stage: SharedStage, name: str, folder: Path) -> str:
    """Return the command that evaluates a stage with its task."""
    base, weights = model_source(stage.recipe.model).path, stage.weights
    model = f"pretrained={base},peft={weights}"
    if stage.recipe.lora is None:
        model = f"pretrained={weights},tokenizer={base}"
    return shlex.join(
        [
            *("lm_eval", "--model", "hf", "--model_args", model),
            *("--tasks", name, "--include_path", str(folder)),
            *("--batch_size", str(stage.recipe.eval.batch_size), "--log_samples"),
            *("--output_path", f"{folder}-results"),
        ]
    )


ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS_FILE)


def push(stage: SharedStage, repo: str, *, private: bool = False, merged: bool = False) -> str:
    """Put a stage's adapter, or its merged model, on the hub; the address of the commit is given.

    Raises:
        RunError: The adapter's base is nowhere but here, or the hub doesn't take it.
        ModelError: The weights can't be loaded.
    """
    recipe = stage.recipe
    if recipe.lora is not None and not merged and hub_id(recipe.model.name_or_path) is None:
        raise RunError(
            str(stage.run),
            f"the adapter's base, {recipe.model.name_or_path}, isn't on the hub: nobody else could "
            "load it",
            "`--merged` pushes the merged model",
        )
    with TemporaryDirectory(prefix="sftkey-push-") as place:
        folder = Path(place) / "model"
        _write_files(stage, folder, merged)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"{recipe.name}, {stage.name}"
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise RunError(
                repo,
                f"the hub doesn't take it: {first_line(error)}",
                "`hf auth login` with a token that may write; a repository is `owner/name`",
            ) from error
    return str(done.commit_url)


def _write_files(stage: SharedStage, folder: Path, merged: bool) -> None:
    """Write the files of a repository into a new folder."""
    recipe = stage.recipe
    if merged or recipe.lora is None:
        write_model(recipe, stage.weights, folder)
    else:
        _copy_adapter(stage.weights, folder)
        if recipe.stages[stage.number - 1].context == "frozen" and stage.number > 1:
            before = Ledger(stage.run, recipe, main=False).adapter(stage.number - 2)
            _copy_adapter(before, folder / "context")
        renderer = load_renderer(recipe)
        template = baked_template(renderer, recipe.data)
        with_template(renderer.tokenizer, template).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(stage), encoding="utf-8")


def _copy_adapter(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
