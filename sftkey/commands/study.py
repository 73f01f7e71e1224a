"""Run a study: arms times seeds over one or more recipes, in one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftkey.commands.terminal import print_markdown, say, set_up, stdout_console
from sftkey.errors import RunError
from sftkey.files import write_text
from sftkey.study.schema import Study, load_study

if TYPE_CHECKING:
    from sftkey.study.results import StudyResults
    from sftkey.study.run import StudyRun


SCREENING = "a screening: each arm once, on validation rows; it shows nothing"
NEXT = (
    "screened: name the arms that go on under `confirm` in the study's file, before any test "
    "question is read; the same command then runs them. By these validation rows: confirm: [{}]"
)


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML file.")],
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Print cells, steps, tokens, time and memory; train nothing."),
    ] = False,
    report_folder: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FOLDER",
            help="Write its report anew from its cells; train nothing.",
        ),
    ] = None,
) -> None:
    """Run arms and seeds over recipes, or go on with them."""
    checked = load_study(file)
    if report_folder is not None:
        write_report(checked, file.parent, report_folder)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = f"expected one process; got {os.environ['WORLD_SIZE']}"
        raise RunError(str(file), what, "start it as `sftkey study`, without a launcher")
    set_up()
    runs = phases(checked, file)
    if plan_only:
        from sftkey.study.plan import memory, plan, promised, rendered, to_choose

        for run in runs:
            planned = plan(run)
            notes = memory(planned)
            notes += [SCREENING] if run.test_seeds else promised(run, planned)
            choosing = to_choose(run) if run is runs[0] else []  # phases share their choices
            stdout_console().print(rendered(planned, choosing + notes))
        return
    run_phases(runs, file)
    if checked.confirming() is None:
        from sftkey.study.report import to_confirm

        names = to_confirm(write_figures(runs[0].study, runs[0].folder.root))
        say(NEXT.format(", ".join(names)))


def run_phases(runs: Sequence[StudyRun], file: Path) -> None:
    """Run the cells of a study's phases, on several GPUs beside each other; write their reports."""
    gpus = visible_gpus()
    if len(gpus) > 1:  # a process without a cell would have nothing to report
        num_cells = min(len(list(run.cells(choose=False))) for run in runs)
        run_beside(gpus[:num_cells], [sys.executable, "-m", "sftkey", "study", str(file)])
    for run in runs:
        if len(gpus) < 2:
            if run.study.screen is not None and not run.test_seeds:
                run.keep_confirmed()
            for _ in run.run():
                write_figures(run.study, run.folder.root)
        write_report(run.study, file.parent, run.folder.root)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def run_beside(gpus: Sequence[str], command: Sequence[str]) -> None:
    """Run a command once for each GPU, all at the same time; print what they say, by GPU.

    Each sees its GPU alone, so each takes a cell that no other one has. A signal is handed on; the
    command ends when all of them have, with the first exit code that isn't 0.
    """
    processes = {
        gpu: subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            stdout=subprocess.DEVNULL,  # each one's report; the last one's cells are in none
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches them once, by `hand_on`
        )
        for gpu in gpus
    }

    def relay(gpu: str, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                say(f"GPU {gpu}: {line.rstrip()}")

    def hand_on(number: int, _: object) -> None:
        for process in processes.values():
            process.send_signal(number)

    readers = [threading.Thread(target=relay, args=each) for each in processes.items()]
    before = {each: signal.signal(each, hand_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        codes = [process.wait() for process in processes.values()]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code := next(filter(None, codes), 0):
        sys.exit(code if code > 0 else 128 - code)


def phases(checked: Study, file: Path) -> list[StudyRun]:
    """Return the runs of a study's phases, in their order: a screening, and what is confirmed."""
    runs = []
    if checked.screen is not None:
        whole = study_run(checked.screening(), file)
        runs.append(replace(whole, folder=whole.folder.screening(), test_seeds=checked.seeds))
    if (confirming := checked.confirming()) is not None:
        runs.append(study_run(confirming, file))
    return runs


def write_figures(checked: Study, folder: Path) -> StudyResults:
    """Write `results.json` from the cells that are finished."""
    from sftkey.study.results import read_cells, write_results
    from sftkey.study.summary import summarize

    results = summarize(read_cells(folder), checked.control, checked.arms, checked.primary)
    write_results(folder, results)
    return results


def write_report(checked: Study, recipes: Path, folder: Path) -> None:
    """Write the pictures, `report.md` and `report.html` of the cells in a folder; print the report.

    The study names its recipes from the folder `recipes`.
    """
    from sftkey.study.page import draw_pictures, stage_weights, write_page
    from sftkey.study.report import report
    from sftkey.study.results import read_cells

    results = write_figures(checked, folder)
    weights = {(arm.task, arm.name): stage_weights(checked, recipes, arm) for arm in results.arms}
    pictures = draw_pictures(folder, results, weights)
    text = report(results, pictures, title=checked.name)
    write_text(folder / "report.md", text)
    page = write_page(folder, results, read_cells(folder), pictures, title=checked.name)
    print_markdown(text)
    say(f"report: {page}")


def study_run(checked: Study, file: Path) -> StudyRun:
    """Put a study together: its recipes, the gate, and what grades."""
    from sftkey.checks.gate import require_trainable
    from sftkey.evaluation.stage import grade_stage
    from sftkey.study.run import StudyRun
    from sftkey.study.tasks import StudyFolder, tasks_of

    return StudyRun(
        study=checked,
        tasks=tasks_of(checked, file.parent),
        folder=StudyFolder(Path("runs") / checked.name),
        read=require_trainable,
        grade=grade_stage,
        note=say,
        command=f"sftkey study {file.name}",
    )
