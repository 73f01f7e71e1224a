"""Ask what a run has trained: one question, or one after another."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer

from sftkey.commands.arguments import Answering, AsJSON, MaxNewTokens, RunArgument
from sftkey.commands.terminal import said, say, set_up
from sftkey.data.response import Response
from sftkey.errors import RunError
from sftkey.pipeline import Reply, TrainedRun, open_run
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE
from sftkey.training.run_folder import trained_stage

FORGET = "/new"


def generate(
    folder: RunArgument,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Default: what stands on stdin.")
    ] = None,
    stage: Answering = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: AsJSON = False,
) -> None:
    """Ask what a run has trained one question."""
    run = open_run(folder)
    trained_stage(folder, run.recipe, stage)  # a wrong call is told before torch is imported
    asked = (sys.stdin.read() if question is None else question).strip()
    if not asked:
        raise RunError(
            "question",
            "expected a text; got none",
            f'sftkey generate {folder} "How many …?", or the question on stdin',
        )
    set_up()
    reply = run.ask(asked, stage, max_new_tokens)
    if as_json:
        print(json.dumps(asdict(reply), ensure_ascii=False))
        return
    if reply.answer is None:
        print(reply.text)
    else:
        print(f"thinking:\n{reply.thinking or ''}\n\nanswer:\n{reply.answer}")
    say_what_is_missing(run.recipe, reply, max_new_tokens)


def say_what_is_missing(recipe: Recipe, reply: Reply, max_new_tokens: int | None) -> None:
    """Note on stderr that a reply has no answer, or wasn't ended."""
    if reply.answer is None:
        say("note: no answer was found in this text")
    if not reply.stopped:
        limit = max_new_tokens or recipe.eval.max_new_tokens
        say(f"note: it didn't stop within {limit} tokens")


def chat(
    folder: RunArgument,
    stage: Answering = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Let base and all stages answer; a model each is held.")
    ] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Show the thinkings, not the answers alone.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Ask what a run has trained one question after another."""
    if stages and stage is not None:
        raise RunError("--stages", f"expected it without --stage; got --stage {stage}")
    run = TrainedRun(folder, keeps_models=stages)
    last = trained_stage(folder, run.recipe, stage)  # a wrong call is told before torch is imported
    names = [BASE, *run.stages] if stages else [[BASE, *run.stages][last]]
    set_up()
    # Where it trains all turns of conversations, earlier ones stand in the prompt.
    talks = run.recipe.response.turns == "all"
    forget = f"; {FORGET} forgets what was said" if talks else ""
    say(f"{run.folder}, {', '.join(names)}: a question a line{forget}")
    said_before: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for question in _questions():
        if question == FORGET and talks:
            for turns in said_before.values():
                turns.clear()
            continue
        for name in names:
            if stages:
                print(f"{name}:")
            reply = _answer(run, question, name, said_before[name], thinking, max_new_tokens)
            if talks and reply is not None:
                said_before[name].append((question, reply.answer or reply.text))


def _questions() -> Iterator[str]:
    """Yield the lines that aren't empty; Ctrl-D and Ctrl-C end them."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its arrow keys; not on Windows)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line:
                yield line
    if sys.stdin.isatty():
        print()  # the shell's own prompt gets a line of its own


def _answer(
    run: TrainedRun,
    question: str,
    stage: str,
    turns: list[tuple[str, str]],
    thinking: bool,
    max_new_tokens: int | None,
) -> Reply | None:
    """Print an answer while it is written; Ctrl-C ends it, and nothing is returned."""
    response, printed = Response.from_section(run.recipe.response), ""

    def show(text: str, whole: bool = False) -> None:
        """Print what is new and can be read."""
        nonlocal printed
        ready = readable(text, response, thinking, whole)
        if new := ready[len(printed) :]:
            print(new, end="", flush=True)
            said()
            printed = ready

    try:
        reply = run.ask(question, stage, max_new_tokens, turns=turns, on_text=show)
    except KeyboardInterrupt:
        say("\nstopped; the question is forgotten")
        return None
    show(reply.text, whole=True)
    print(flush=True)
    say_what_is_missing(run.recipe, reply, max_new_tokens)
    return reply


def readable(text: str, response: Response, thinking: bool, whole: bool = False) -> str:
    r"""Return what can be shown of a text: the answer, with `thinking` that too, without tags.

    What is returned for more of the same text begins with what was returned for less of it. A text
    that doesn't begin with a thinking is shown as it is.

    Args:
        text: All that was written so far.
        response: The tags.
        thinking: Show the thinking, too.
        whole: Nothing comes any more: no beginning of a tag is held back.

    >>> response = Response("<T>", "</T>\n", "<A>", "</A>")
    >>> readable("<T>2 + 2</T>\n<A>4</", response, thinking=True)
    '2 + 2\n\n4'
    """
    opening, close, answer_open, answer_close = (tag.strip() for tag in vars(response).values())
    text = text.lstrip()
    if not whole and (not text or (opening != text and opening.startswith(text))):
        return ""
    inside, closed, behind = text.removeprefix(opening).partition(close) if close else ("", "", "")
    if not text.startswith(opening) or not close or (whole and not closed):
        return text.rstrip()
    shown = (inside if closed else _settled(inside, close)).strip() if thinking else ""
    behind = behind.lstrip()
    if not closed or (not whole and answer_open != behind and answer_open.startswith(behind)):
        return shown
    body, ended, _ = behind.removeprefix(answer_open).partition(answer_close or "\0")
    answer = (body if ended or whole else _settled(body, answer_close)).strip()
    return "\n\n".join(filter(None, (shown, answer)))


def _settled(text: str, tag: str) -> str:
    """Leave out an end that may be the beginning of a tag."""
    for length in range(min(len(tag), len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length]
    return text
