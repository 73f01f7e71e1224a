"""Print the answers of a run's stage that aren't right, with their questions and references."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path

from sftkey.commands.terminal import say, stdout_console
from sftkey.errors import RunError
from sftkey.evaluation.answers import GradedAnswer, chosen, read_answers
from sftkey.training.run_folder import BASE, run_recipe

NUM_SHOWN = 10  # answers, where nobody says how many


def errors(
    folder: Path,
    stage: str | None = None,
    kind: str | None = None,
    pattern: str | None = None,
    num_rows: int | None = None,
    as_json: bool = False,
) -> None:
    """Print a stage's wrong answers, and how many there are of each kind.

    Args:
        folder: A run folder.
        stage: A stage, or `base`; default the last one whose answers are graded.
        kind: As in `chosen`.
        pattern: As in `chosen`.
        num_rows: How many are printed; default 10, with `as_json` all.
        as_json: Print one object a line.

    Raises:
        RunError: The folder is no run, or the stage's answers aren't graded.
    """
    names = [BASE, *(each.name for each in run_recipe(folder).stages)]
    if stage is not None and stage not in names:
        raise RunError(str(folder), f"--stage: expected one of {', '.join(names)}; got {stage!r}")
    graded = [name for name in names if (folder / "evaluation" / f"{name}.json").exists()]
    name = stage or (graded or names)[-1]
    answers = read_answers(folder, name)
    found = chosen(answers, kind, pattern)
    if as_json:
        for answer in found[:num_rows]:
            print(answer.model_dump_json())
        return
    console = stdout_console()
    shown = found[: num_rows or NUM_SHOWN]
    for answer in shown:
        console.print(rendered(answer))
    num_wrong = sum(not answer.right for answer in answers)
    counts = Counter(each for answer in answers for each in answer.kinds)
    kinds = ", ".join(f"{each} {count}" for each, count in counts.items())
    say(f"{name}: {num_wrong} of {len(answers)} answers aren't right ({kinds or 'none'})")
    if len(shown) < len(found):
        say(f"{len(shown)} of {len(found)} are shown; --rows {len(found)} shows all")


def rendered(answer: GradedAnswer) -> str:
    """Return an answer for a terminal."""
    turn = f", turn {answer.turn}" if answer.turn else ""
    read = f" (read as {answer.read})" if answer.read not in (None, answer.got) else ""
    parts = {
        "question": answer.question,
        "expected": answer.expected,
        "got": "nothing" if answer.got is None else answer.got + read,
        "thinking": answer.thinking,
        "text": answer.text,
    }
    lines = [f"row {answer.index}{turn}: {', '.join(answer.kinds)}"]
    for name, text in parts.items():
        if text is None:
            continue
        lines.append(f"  {name}:")
        lines.append(textwrap.indent(text.strip("\n") or "(empty)", "    "))
    return "\n".join([*lines, ""])
