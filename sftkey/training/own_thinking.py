"""Rows in which the model's own thinking stands before the reference's answer: ŷ of Eq. 5.

At inference a model reads its own reasoning, never the reference's. Each training question is
answered by the model as the stage finds it; the answers are saved one by one, and what is written
there isn't written again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.data.prepare import Prepared, tokenized_rows
from sftkey.data.renderer import stop_ids
from sftkey.data.response import Example
from sftkey.errors import DataError
from sftkey.files import write_json
from sftkey.generation.generate import Generation, generate_to_file
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.training.progress import RunProgress

Grade = Callable[[str | None, str, str], bool]  # answer, reference, grader


def write_thinkings(
    recipe: Recipe,
    stage: StageSection,
    prepared: Prepared,
    model: PreTrainedModel | PeftModel,
    folder: Path,
    progress: RunProgress,
) -> dict[int, Generation]:
    """Let the model answer each training question; each process takes its share.

    Args:
        recipe: Its `eval` says how long an answer may be, and how many are written at a time.
        stage: Says how often each question is answered, and at which temperature.
        prepared: The rows.
        model: As the stage finds it.
        folder: The stage's; the answers go there.
        progress: What the person sees.

    Returns:
        Sample `s` of the example at place `p` of N under `s * N + p`, from all processes.
    """
    processes = PartialState()
    rank, world = processes.process_index, processes.num_processes
    frame, examples = prepared.frame, prepared.train_examples
    own = stage.own_thinking
    asked = {
        sample * len(examples) + place: frame.prompt_ids(example.prompt)
        for sample in range(own.samples)
        for place, example in enumerate(examples)
    }
    settings: dict[str, Any] = {
        "stop_ids": stop_ids(frame, model.generation_config.eos_token_id),
        "max_new_tokens": recipe.eval.max_new_tokens,
        "batch_size": recipe.eval.batch_size,
        "temperature": own.temperature,
        "seed": recipe.seed,
        "report": partial(progress.answers, f"{stage.name}: own thinking"),
    }
    files = [folder / f"thinkings.part{each}of{world}.jsonl" for each in range(world)]
    mine = dict(list(asked.items())[rank::world])
    generate_to_file(model, frame.tokenizer, mine, files[rank], **settings)
    processes.wait_for_everyone()
    settings["report"] = None
    written: dict[int, Generation] = {}
    for number, file in enumerate(files):  # all are there: this reads them
        share = dict(list(asked.items())[number::world])
        written |= generate_to_file(model, frame.tokenizer, share, file, **settings)
    return written


def own_examples(
    stage: StageSection,
    prepared: Prepared,
    written: Mapping[int, Generation],
    grader: str,
    grade: Grade,
) -> tuple[list[Example], dict[str, int]]:
    """Put the reference's answer behind each thinking that was closed and is kept.

    Args:
        stage: `own.keep`: all; wrong: those whose answer was wrong; mixed: those of questions that
            were answered right once and wrong once.
        prepared: The rows.
        written: From `write_thinkings`.
        grader: The recipe's.
        grade: Tells whether an answer is right.

    Returns:
        The examples, and how many thinkings were written, not closed, not kept, and used.
    """
    examples, response = prepared.train_examples, prepared.frame.response
    keep = stage.own_thinking.keep
    closed: dict[int, list[tuple[str, bool]]] = {}
    for key in sorted(written):
        example = examples[key % len(examples)]
        text = written[key].text.removeprefix(prepared.frame.bridge)
        parsed = response.parse(text)
        if parsed.thinking is not None:
            right = grade(parsed.answer, example.answer, grader)
            closed.setdefault(key % len(examples), []).append((parsed.thinking, right))
    used = []
    for place, thinkings in closed.items():
        mixed = len({right for _, right in thinkings}) > 1
        for thinking, right in thinkings:
            if {"all": True, "wrong": not right, "mixed": mixed}[keep]:
                used.append(replace(examples[place], thinking=thinking))
    num_closed = sum(map(len, closed.values()))
    counts = {
        "written": len(written),
        "not closed": len(written) - num_closed,
        "not kept": num_closed - len(used),
        "used": len(used),
    }
    return used, counts


def own_rows(
    recipe: Recipe, stage: StageSection, prepared: Prepared, examples: list[Example]
) -> tuple[Dataset, dict[str, int]]:
    """Tokenize the examples as the run's rows are.

    Returns:
        The rows, and how many examples gave none, by reason.

    Raises:
        DataError: No row is left to train on.
    """
    if not examples:
        raise _none_left(stage, "no thinking was closed and kept")
    trim = recipe.data.too_long == "trim_thinking"
    rows, outcome = tokenized_rows(examples, prepared.frame, recipe.data.max_length, trim=trim)
    if len(rows) == 0:
        reason, _ = Counter(reason for _, reason in outcome.refused).most_common(1)[0]
        raise _none_left(stage, reason)
    return rows, dict(Counter(reason for _, reason in outcome.refused))


def _none_left(stage: StageSection, reason: str) -> DataError:
    return DataError(
        f"stages.{stage.name}",
        f"thinking: own leaves no row to train on: {reason}",
        "write own.keep: all, or train an earlier stage for longer",
    )


def make_own_rows(
    recipe: Recipe,
    stage: StageSection,
    prepared: Prepared,
    model: PreTrainedModel | PeftModel,
    folder: Path,
    progress: RunProgress,
    grade: Grade,
) -> Dataset:
    """Give the rows of a stage over the model's own thinking, and write down their counts.

    Raises:
        DataError: No row is left to train on.
    """
    processes = PartialState()
    written = write_thinkings(recipe, stage, prepared, model, folder, progress)
    examples, counts = own_examples(stage, prepared, written, recipe.eval.grader, grade)
    with processes.main_process_first():
        rows, refused = own_rows(recipe, stage, prepared, examples)
    if processes.is_main_process:
        write_json(folder / "thinkings.json", {**counts, "refused": refused})
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    progress.note(f"{stage.name}: own thinking: {shown}")
    return rows
