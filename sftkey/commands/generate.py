"""Ask what a run has trained one question."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from sftkey.errors import RunError
from sftkey.pipeline import Reply, open_run
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import trained_stage


def generate(
    folder: Path,
    question: str | None = None,
    *,
    stage: str | None = None,
    max_new_tokens: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the thinking and the answer to a question.

    Args:
        folder: A run folder.
        question: None: it stands on stdin.
        stage: A trained stage, or `base`; default the last one that is trained.
        max_new_tokens: Default the recipe's.
        as_json: Print one JSON object.

    Raises:
        SFTKeyError: There is no question, or the folder is no run, or the stage isn't trained.
    """
    run = open_run(folder)
    trained_stage(folder, run.recipe, stage)  # a wrong call is told before torch is imported
    asked = (sys.stdin.read() if question is None else question).strip()
    if not asked:
        raise RunError(
            "question",
            "expected a text; got none",
            f'sftkey generate {folder} "How many …?", or the question on stdin',
        )
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
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
        print("note: no answer was found in this text", file=sys.stderr)
    if not reply.stopped:
        limit = max_new_tokens or recipe.eval.max_new_tokens
        print(f"note: it didn't stop within {limit} tokens", file=sys.stderr)
