"""What a run's answers were worth: grade them, list the wrong ones, compare, write the report."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftkey.commands.arguments import Alpha, Answering, AsJSON, RunArgument
from sftkey.commands.terminal import (
    print_markdown,
    quiet_libraries,
    say,
    set_up,
    stdout_console,
)
from sftkey.errors import RunError
from sftkey.pipeline import TrainedRun, evaluate_run, evaluated_recipe, report_run
from sftkey.training.run_folder import known_stages, run_recipe, trained_stage

if TYPE_CHECKING:
    from sftkey.evaluation.answers import GradedAnswer
    from sftkey.study.results import StudyResults

NUM_SHOWN = 10  # answers, where nobody says how many


def evaluate(
    folder: RunArgument,
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
    if model is not None:
        if generations is not None:
            raise RunError("--generations", "expected --model or --generations; got both")
        evaluate_folder(folder, model, stage)
        return
    evaluated_recipe(folder, generations, stage)  # a wrong call is told before torch is imported
    set_up()
    run, failures = evaluate_run(folder, generations, stage)
    print_table(run, alpha)
    if failures:  # to ask the judge; all is graded by the rule, and printed
        raise failures[0]


def evaluate_folder(folder: Path, model: Path, stage: str | None) -> None:
    """Grade a model folder on a run's questions; print what differs from the run's own stage."""
    recipe = run_recipe(folder)
    number = trained_stage(folder, recipe, stage)
    set_up()
    from sftkey.evaluation.comparison import sentences, table
    from sftkey.sharing.folder import grade_folder

    def report(done: int, total: int) -> None:
        say(f"{model}: {done} of {total} questions answered")

    found = grade_folder(folder, recipe, number, model, report)
    console = stdout_console()
    console.print(table(found.comparison))
    for line in sentences(found.comparison):
        console.print(line)
    console.print(f"Both wrote the same text to {found.num_equal} of {found.num_questions}.")


def print_table(run: TrainedRun, alpha: float | None = None) -> None:
    """Print the table of all graded stages on stdout, and what it shows (main process only)."""
    from accelerate import PartialState

    from sftkey.diagnosis.run import diagnosed
    from sftkey.evaluation.comparison import compare_runs, render

    if not PartialState().is_main_process:
        return
    if not run.results:
        say(f"{run.folder}: nothing was evaluated, so there is no table")
        return
    console = stdout_console()
    console.print(render(compare_runs([run.folder], alpha)))
    for line in diagnosed(run.folder, run.recipe):
        console.print(line)


def errors(
    folder: RunArgument,
    stage: Answering = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only wrong, unparsed, truncated or invalid ones."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--grep", metavar="PATTERN", help="Only where this regular expression stands."
        ),
    ] = None,
    num_rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="How many to show; default 10, with --json all."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Show a stage's wrong answers beside question and reference."""
    from sftkey.evaluation.answers import chosen, read_answers
    from sftkey.evaluation.results import result_file

    names = known_stages(folder, run_recipe(folder), stage)
    graded = [name for name in names if result_file(folder, name).exists()]
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
    read = f" (read as {answer.read})" if answer.read not in (None, answer.got) else ""
    parts = {
        "question": answer.question,
        "expected": answer.expected,
        "got": "nothing" if answer.got is None else answer.got + read,
        "thinking": answer.thinking,
        "text": answer.text,
    }
    lines = [f"{answer.key}: {', '.join(answer.kinds)}"]
    for name, text in parts.items():
        if text is None:
            continue
        lines.append(f"  {name}:")
        lines.append(textwrap.indent(text.strip("\n") or "(empty)", "    "))
    return "\n".join([*lines, ""])


def report(folder: RunArgument) -> None:
    """Write a run's report.html: tokens, losses, results and answers."""
    run_recipe(folder)  # a wrong folder is told before torch is imported
    quiet_libraries()
    for file in report_run(folder):
        print(file)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs or studies.")
    ],
    as_json: AsJSON = False,
    alpha: Alpha = None,
) -> None:
    """Compare runs, stage by stage, with intervals; show studies."""
    from sftkey.evaluation.comparison import as_json as comparison_json
    from sftkey.evaluation.comparison import compare_runs, render
    from sftkey.study.report import report
    from sftkey.study.results import find_results, read_results_file

    files = {folder: find_results(folder) for folder in folders}
    studies = {folder: read_results_file(file) for folder, file in files.items() if file}
    runs = [folder for folder, file in files.items() if not file]
    comparison = compare_runs(runs, alpha) if runs else None
    if as_json:
        found = comparison_json(comparison) if comparison else {}
        if studies:
            found["studies"] = [_as_json(*study, alpha) for study in studies.items()]
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if comparison:
        stdout_console().print(render(comparison))
    for folder, results in studies.items():
        print_markdown(report(results, pictures=None, title=str(folder), alpha=alpha))


def _as_json(folder: Path, results: StudyResults, alpha: float | None) -> dict[str, Any]:
    from sftkey.evaluation.statistics import score_of

    data = results.model_dump(mode="json")
    if alpha is not None:
        for arm in data["arms"]:
            arm |= {"alpha": alpha, "score": score_of(arm["acc"], arm["fmt"], alpha)}
    return {"study": str(folder), **data}
