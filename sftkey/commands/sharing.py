"""What other programs and people get of a trained stage: a model folder, an export, the hub."""

from pathlib import Path
from typing import Annotated

import typer

from sftkey.commands.arguments import LastStage, RunArgument
from sftkey.commands.terminal import say, set_up
from sftkey.errors import RunError, did_you_mean
from sftkey.sharing.stage import refuse_frozen, shared_stage

ENGINES = ("gguf", "ollama", "vllm", "vllm-lora", "lm-eval")


def merge(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.")],
    stage: LastStage = None,
) -> None:
    """Write a stage's model as a folder that other programs serve."""
    shared = shared_stage(run, stage)
    refuse_frozen(shared)
    set_up()
    from sftkey.sharing.merging import write_model

    found = write_model(shared.recipe, shared.weights, output)
    if found:
        say(
            f"{output}: {shared.weights} merged into {shared.recipe.model.name_or_path} in "
            f"{found.dtype}; on a probe the adapter changes logits by up to {found.effect:.3g}, "
            f"the merged model is within {found.distance:.3g} of it"
        )
    print(output)


def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option("--to", metavar="ENGINE", help="gguf, ollama, vllm, vllm-lora or lm-eval."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="A new file (gguf) or folder.")
    ],
    stage: LastStage = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A checkout of llama.cpp, which converts to GGUF."),
    ] = None,
    outtype: Annotated[
        str, typer.Option(metavar="TYPE", help="The GGUF's weights: f32, f16, bf16, q8_0, …")
    ] = "auto",
) -> None:
    """Write what llama.cpp, Ollama, vLLM or lm-eval needs of a stage."""
    if to not in ENGINES:
        expected = f"expected one of {', '.join(ENGINES)}; got {to!r}"
        raise RunError("--to", expected + did_you_mean(to, ENGINES))
    shared = shared_stage(run, stage, "export")
    refuse_frozen(shared)
    set_up()
    from sftkey.sharing import export as exports
    from sftkey.sharing.merging import write_model

    if to == "lm-eval":
        print(exports.write_task(shared, output))
    elif to == "vllm-lora":
        print(exports.write_vllm_lora(shared, output))
    elif to == "vllm":
        write_model(shared.recipe, shared.weights, output)
        print(exports.vllm_command(output, shared.recipe))
    elif llama_cpp is None:
        what = f"expected a checkout of llama.cpp for --to {to}; got none"
        raise RunError("--llama-cpp", what, exports.CLONE)
    elif to == "gguf":
        exports.write_gguf(shared, llama_cpp, output, outtype)
        print(output)
    else:
        exports.write_ollama(shared, llama_cpp, output, outtype)
        say(f"{output}: in this folder, the command below makes the model")
        print(f"ollama create {shared.recipe.name} -f Modelfile")


def card(run: RunArgument, stage: LastStage = None) -> None:
    """Print a stage's model card."""
    shared = shared_stage(run, stage, "describe")
    from sftkey.sharing.card import model_card

    print(model_card(shared), end="")


def push(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")],
    stage: LastStage = None,
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Push the merged model, not the adapter.")
    ] = False,
) -> None:
    """Put a stage's adapter, tokenizer and card on the hub."""
    shared = shared_stage(run, stage, "push")
    if merged:
        refuse_frozen(shared)
    set_up()
    from sftkey.sharing.export import push as pushed

    print(pushed(shared, repo, private=private, merged=merged))
