"""Answers to the test questions, and the thinkings that a stage writes for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftkey.data.prepare import Prepared, tokenized_rows
from sftkey.data.renderer import stop_ids
from sftkey.data.response import Example
from sftkey.errors import DataError
from sftkey.files import write_json, write_text
from sftkey.generation.generate import Generation, generate_to_file
from sftkey.generation.key_switch import find_switch
from sftkey.models.device import launched_with
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.training.log import RunProgress
from sftkey.training.run_folder import Ledger

Grader = Callable[[str | None, str, str], bool]  # answer, reference, grader


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
    renderer, examples = prepared.renderer, prepared.train_examples
    own = stage.own_thinking
    asked = {
        sample * len(examples) + place: renderer.prompt_ids(example.prompt)
        for sample in range(own.samples)
        for place, example in enumerate(examples)
    }
    settings: dict[str, Any] = {
        "stop_ids": stop_ids(renderer, model.generation_config.eos_token_id),
        "max_new_tokens": recipe.eval.max_new_tokens,
        "batch_size": recipe.eval.batch_size,
        "temperature": own.temperature,
        "seed": recipe.seed,
        "report": partial(progress.answers, f"{stage.name}: own thinking"),
    }
    files = [folder / f"thinkings.part{each}of{world}.jsonl" for each in range(world)]
    mine = dict(list(asked.items())[rank::world])
    generate_to_file(model, renderer.tokenizer, mine, files[rank], **settings)
    processes.wait_for_everyone()
    settings["report"] = None
    written: dict[int, Generation] = {}
    for number, file in enumerate(files):  # all are there: this reads them
        share = dict(list(asked.items())[number::world])
        written |= generate_to_file(model, renderer.tokenizer, share, file, **settings)
    return written


def own_examples(
    stage: StageSection,
    prepared: Prepared,
    written: Mapping[int, Generation],
    grader: str,
    grade: Grader,
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
    examples, response = prepared.train_examples, prepared.renderer.response
    keep = stage.own_thinking.keep
    closed: dict[int, list[tuple[str, bool]]] = {}
    for key in sorted(written):
        example = examples[key % len(examples)]
        text = written[key].text.removeprefix(prepared.renderer.assistant_prefix)
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
    rows, outcome = tokenized_rows(examples, prepared.renderer, recipe.data.max_length, trim=trim)
    if len(rows) == 0:
        reason, _ = Counter(reason for _, reason, _ in outcome.refused).most_common(1)[0]
        raise _none_left(stage, reason)
    return rows, dict(Counter(reason for _, reason, _ in outcome.refused))


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
    grade: Grader,
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


def sharded() -> bool:
    """Tell whether no process holds the whole model (FSDP, DeepSpeed)."""
    return launched_with("FSDP") or launched_with("DEEPSPEED")


@dataclass
class Answers:
    """Writes a run's generations, each once, and goes on with them after a kill.

    `asked` names the stages (or `base`) that answer the test questions; None stands for all.
    """

    recipe: Recipe
    ledger: Ledger
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    progress: RunProgress
    asked: Collection[str] | None = None

    @cached_property
    def questions(self) -> list[Example]:
        """Give the test rows that are asked."""
        return self.prepared.questions(self.recipe)

    def missing(self, name: str) -> bool:
        """Tell whether a stage's answers, or the base model's, are still to be written."""
        asked = self.asked is None or name in self.asked
        return asked and bool(self.questions) and not self.ledger.generations(name).exists()

    def write(self, name: str, model: PreTrainedModel | PeftModel) -> None:
        """Let the model answer; each process takes its share of the questions.

        A sharded model doesn't generate here: `sftkey evaluate` does it later, on one process.
        """
        if sharded():
            self.progress.note(f"{name}: not evaluated; run `sftkey evaluate {self.ledger.folder}`")
            return
        processes = PartialState()
        rank, world = processes.process_index, processes.num_processes
        whole = self.ledger.generations(name)
        parts = [whole.with_name(f"{name}.part{r}of{world}.jsonl") for r in range(world)]
        settings = self.recipe.eval
        contexts = {stage.name: stage.context for stage in self.recipe.stages}
        frozen = contexts.get(name) == "frozen"  # else the key's adapters aren't trained yet
        generate_to_file(
            model,
            self.tokenizer,
            {
                example.index: self.prepared.renderer.prompt_ids(example.prompt)
                for example in self.questions[rank::world]
            },
            parts[rank],
            stop_ids=stop_ids(self.prepared.renderer, model.generation_config.eos_token_id),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            seed=self.recipe.seed,
            switch=find_switch(model, self.prepared.renderer) if frozen else None,
            report=partial(self.progress.answers, name),
        )
        processes.wait_for_everyone()
        if self.ledger.main:
            write_text(whole, "".join(part.read_text(encoding="utf-8") for part in parts))
            for part in parts:
                part.unlink()
        processes.wait_for_everyone()
