"""Write what another program needs of a stage."""

from __future__ import annotations

import sys
from pathlib import Path

from sftkey.errors import RunError, did_you_mean
from sftkey.sharing.stage import SharedStage, refuse_frozen, shared_stage

ENGINES = ("gguf", "ollama", "vllm", "vllm-lora", "lm-eval")


def export(
    folder: Path,
    engine: str,
    output: Path,
    *,
    stage: str | None = None,
    llama_cpp: Path | None = None,
    outtype: str = "auto",
) -> None:
    """Write a stage's model for another program, whose command goes to stdout.

    Args:
        folder: A run folder.
        engine: One of `ENGINES`.
        output: A new file (`gguf`) or folder.
        stage: A trained stage; default the last one that is trained.
        llama_cpp: A checkout of llama.cpp, whose converter writes GGUF.
        outtype: The converter's type of weights.

    Raises:
        SFTKeyError: There is no such engine, the checkout is missing, or the stage can't be merged.
    """
    if engine not in ENGINES:
        expected = f"expected one of {', '.join(ENGINES)}; got {engine!r}"
        raise RunError("--to", expected + did_you_mean(engine, ENGINES))
    shared = shared_stage(folder, stage, "export")
    refuse_frozen(shared)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.sharing import export as exports
    from sftkey.sharing.merging import write_model

    if engine == "lm-eval":
        from sftkey.sharing.harness import write_task

        print(write_task(shared, output))
        return
    if engine == "vllm-lora":
        print(exports.write_vllm_lora(shared, output))
        return
    if engine == "vllm":
        write_model(shared.recipe, shared.weights, output)
        print(exports.vllm_command(output, shared.recipe))
        return
    _by_converter(shared, engine, output, llama_cpp, outtype)


def _by_converter(
    shared: SharedStage, engine: str, output: Path, llama_cpp: Path | None, outtype: str
) -> None:
    """Write GGUF, or an Ollama model of it."""
    from sftkey.sharing import export as exports

    if llama_cpp is None:
        raise RunError(
            "--llama-cpp",
            f"expected a checkout of llama.cpp for --to {engine}; got none",
            "git clone https://github.com/ggml-org/llama.cpp, and name that folder",
        )
    if engine == "gguf":
        exports.write_gguf(shared, llama_cpp, output, outtype)
        print(output)
        return
    exports.write_ollama(shared, llama_cpp, output, outtype)
    print(f"{output}: in this folder, the command below makes the model", file=sys.stderr)
    print(f"ollama create {shared.recipe.name} -f Modelfile")
