"""The command line: which commands there are, and how they end.

A command imports torch and what needs it inside its function, so `--help` starts at once.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from sftkey import __version__
from sftkey.commands.adapt import adapt
from sftkey.commands.ask import chat, generate
from sftkey.commands.check import check, diagnose
from sftkey.commands.env import env
from sftkey.commands.recipes import cp, ls, prompts, show
from sftkey.commands.results import compare, errors, evaluate, report
from sftkey.commands.sharing import card, export, merge, push
from sftkey.commands.study import study
from sftkey.commands.terminal import (
    log_to_stderr,
    never_silent,
    ready_streams,
    require_numbers,
    say,
)
from sftkey.commands.train import train
from sftkey.errors import Told, as_told
from sftkey.files import explained_disk

app = typer.Typer(
    help="Fine-tune a language model so that its final answer is right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its panels cost start-up time and cut long lines in a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130  # what Ctrl-C ends a process with, where no run has said what it kept
GOING_ON = ("train", "evaluate", "study")  # what these have done lies in their folders
ANEW = "nothing was kept, and the same command starts anew"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sftkey {__version__}")
        raise typer.Exit


@app.callback()
def sftkey(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print sftkey's version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Declare the options that stand before a command; `main` reads `--debug`."""


# Every command in the order of the help, with the examples at the end of its own.
COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    train: (
        "sftkey train smollm2-135m/demo",
        "sftkey train my.yaml name=slower trainer.learning_rate=5e-5",
    ),
    check: ("sftkey check my.yaml", "sftkey check qwen3-8b/gsm8k --gpu 24GB --plan-only"),
    ls: ("sftkey ls", "sftkey ls --plan", "sftkey ls --json"),
    cp: ("sftkey cp qwen3-8b/gsm8k my.yaml",),
    show: (
        "sftkey show my.yaml --rows 5",
        "sftkey show smollm2-135m/demo stages.key.loss_on=answer",
    ),
    adapt: (
        "sftkey adapt Qwen/Qwen3-4B --data my.jsonl -o my.yaml --gpu 24GB",
        "sftkey adapt Qwen/Qwen3-4B --like qwen3-8b/gsm8k -o my.yaml",
    ),
    evaluate: (
        "sftkey evaluate runs/mine",
        "sftkey evaluate runs/mine --model mine-merged",
        "sftkey evaluate runs/mine --generations answers.jsonl --stage key",
    ),
    errors: ("sftkey errors runs/mine", "sftkey errors runs/mine --kind unparsed --json"),
    report: ("sftkey report runs/mine",),
    compare: ("sftkey compare runs/mine runs/other",),
    diagnose: (
        "sftkey diagnose my.yaml",
        "sftkey diagnose my-sft-model --data my.jsonl --rows 100",
    ),
    study: ("sftkey study study.yaml --plan", "sftkey study study.yaml"),
    generate: (
        'sftkey generate runs/mine "What is 2 + 3?"',
        'sftkey generate runs/mine "What is 2 + 3?" --stage base --json',
    ),
    chat: ("sftkey chat runs/mine", "sftkey chat runs/mine --stages --thinking"),
    merge: ("sftkey merge runs/mine -o mine-merged",),
    export: (
        "sftkey export runs/mine --to vllm -o mine-vllm",
        "sftkey export runs/mine --to gguf -o mine.gguf --llama-cpp llama.cpp",
    ),
    card: ("sftkey card runs/mine",),
    push: ("sftkey push runs/mine me/mine --private",),
    prompts: ("sftkey prompts my.yaml --split validation", "sftkey prompts runs/mine"),
    env: ("sftkey env",),
}


def _epilog(examples: Sequence[str]) -> str:
    r"""Return what stands below a command's options; click leaves what follows a `\b` as it is."""
    head = "Example:" if len(examples) == 1 else "Examples:"
    return "\n".join(["\b", head, *(f"  {example}" for example in examples)])


for command, examples in COMMANDS.items():
    app.command(epilog=_epilog(examples))(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can mend ends it with exit code 2 and no traceback.

    A run that a signal has stopped ends with 128 and the signal's number.

    `--debug` counts wherever it stands: `python -m sftkey.train` can't put it before the command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers report who uses them otherwise
    ready_streams()
    log_to_stderr()
    try:
        with never_silent(), explained_disk():
            require_numbers()
            app(words, prog_name="sftkey")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            goes_on = bool(words) and words[0] in GOING_ON
            say(f"stopped; {'the same command goes on' if goes_on else ANEW}")
        raise
    except (Told, OSError) as caught:
        if debug:
            traceback.print_exc()
        error = as_told(caught)
        say(f"error: {error}")
        sys.exit(error.exit_code)
