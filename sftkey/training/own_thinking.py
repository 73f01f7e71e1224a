"""The thinkings that a stage's model writes for itself, and the rows that they become."""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.data.prepare import NUM_WITHOUT_VALIDATION, Prepared, drawn
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, QuestionKey
from sftkey.data.row_cache import tokenized_rows
from sftkey.errors import DataError, Problem, shortened
from sftkey.files import write_json
from sftkey.generation.generate import Generation, by_row, generated_in, key_of, lines_of, read_row
from sftkey.generation.key_switch import Switch
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.training.answers import write_parts
from sftkey.training.log import RunProgress

# Of an answer, a reference and the grader's name; what it returns is true for a right answer.
Grader = Callable[[str | None, str, str], object]

NUM_PROBED = 16  # questions that are asked before all others
LEAST_VALID = 0.5  # share of thinkings that are closed and not empty
HINT = (
    "\n\n(The right answer is: {answer}\nWrite the reasoning that leads to it from the question, "
    "as if you had not been told.)"
)
# What a thinking says that speaks of the hint: its own words, and those that stand for it.
OF_HINT = re.compile(
    r"(?:right|correct|given|provided|stated|known|expected) answer (?:is|was)\b"
    r"|\b(?:the|a|this|your) (?:hint|given answer|provided answer|stated answer)\b"
    r"|\b(?:i|we) (?:was|were|am|are|have been|had been|'ve been) (?:told|given)\b"
    r"|\bas if\b.{0,20}\bnot been told\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Writer:
    """Lets a model answer questions, as a stage finds it."""

    recipe: Recipe
    renderer: Renderer
    model: PreTrainedModel | PeftModel
    folder: Path  # the stage's; the answers go there
    progress: RunProgress
    stage: str  # what the progress calls it
    what: str = "own thinking"  # likewise, what is written
    switch: Switch | None = None  # where the model goes over to its key adapter, if it does

    def write(
        self, name: str, examples: Sequence[Example], samples: int, temperature: float
    ) -> dict[int, Generation]:
        """Write each example's answer some times.

        Returns:
            Sample `s` of the example at place `p` of N under `s * N + p`, from all processes.
        """
        asked = {
            sample * len(examples) + place: self.renderer.prompt_ids(example.prompt)
            for sample in range(samples)
            for place, example in enumerate(examples)
        }
        parts = write_parts(
            self.recipe,
            self.renderer,
            self.model,
            asked,
            self.folder / f"{name}.jsonl",
            temperature=temperature,
            switch=self.switch,
            report=partial(self.progress.answers, f"{self.stage}: {self.what}"),
        )
        written: dict[int, Generation] = {}
        for file, share in parts.items():
            written |= generated_in(file, share)
        return written


def with_hint(example: Example) -> Example:
    """Return an example whose prompt tells the answer."""
    hint = HINT.format(answer=example.answer.strip())
    if isinstance(example.prompt, str):
        return replace(example, prompt=example.prompt + hint)
    *before, last = example.prompt
    return replace(example, prompt=(*before, {**last, "content": last["content"] + hint}))


def read_thinkings(file: Path, stage: StageSection, prepared: Prepared) -> dict[int, Generation]:
    """Read thinkings that another engine wrote, as `Writer.write` returns them.

    The file is JSONL of objects with `index`, the row's number, and `text`, what was written after
    the prompt; a row may come as often as `own.samples` says, and be missing. `prompt`, as
    `sftkey prompts` writes it, is compared if it is there.
    """
    examples = prepared.train_examples
    places = {example.key: place for place, example in enumerate(examples)}
    asked = by_row(places)
    written: dict[int, Generation] = {}
    seen: Counter[int] = Counter()
    problems = []
    for number, line in lines_of(file, "see stages.own.file"):
        try:
            row = read_row(line)
            place = places[_asked_key(row, asked)]
            prompt = row.get("prompt")
            if prompt not in (None, prepared.renderer.prompt_text(examples[place].prompt)):
                raise ValueError(f"row {row['index']}: its `prompt` is another than the recipe's")
            if seen[place] >= stage.own_thinking.samples:
                raise ValueError(f"row {row['index']} comes more often than own.samples says")
            written[seen[place] * len(examples) + place] = Generation.of(row)
            seen[place] += 1
        except ValueError as error:
            problems.append(Problem("", str(error), number))
    if problems:
        what = f"expected `index` and `text` in each line; {len(problems)} lines can't be used"
        told = [Problem("", what), *shortened(problems)]
        raise DataError(str(file), told, "write it anew: sftkey prompts")
    return written


def _asked_key(row: Mapping[str, Any], asked: Mapping[int, Sequence[QuestionKey]]) -> QuestionKey:
    """Find the training question that a line answers; without a turn it is the row's first."""
    index, turn = row["index"], row.get("turn") or 0
    if index not in asked:
        raise ValueError(f"row {index} is no row of train")
    key = key_of(asked[index], turn)
    if key is None:
        raise ValueError(f"row {index} has no turn {turn}")
    return key


def require_valid(
    stage: StageSection, prepared: Prepared, written: Mapping[int, Generation]
) -> dict[int, str]:
    """Return the thinkings that are closed and not empty, by their number."""
    thinkings = {key: prepared.renderer.parse(each.text).thinking for key, each in written.items()}
    valid = {key: each for key, each in thinkings.items() if each and each.strip()}
    if len(valid) >= LEAST_VALID * len(written):
        return valid
    response = prepared.renderer.response
    endless = sum(each.stopped is False for each in written.values())
    raise DataError(
        f"stages.{stage.name}",
        f"thinking: own: expected a model that thinks; {len(valid)} of {len(written)} thinkings "
        f"are valid (closed with {response.thinking_close!r} and not empty), {endless} answers "
        "never stopped",
        "train a stage on whole completions with a reasoning first; or write the model's own tags "
        f"as response.thinking (now {[response.thinking_open, response.thinking_close]}), or raise "
        "eval.max_new_tokens",
    )


def count_right(
    renderer: Renderer,
    examples: Sequence[Example],
    written: Mapping[int, Generation],
    grader: str,
    grade: Grader,
) -> int:
    """Count the examples, by their place, whose written answer is right."""
    right = [
        grade(renderer.parse(each.text).answer, examples[place].answer, grader)
        for place, each in written.items()
    ]
    return sum(map(bool, right))


def own_examples(
    stage: StageSection,
    prepared: Prepared,
    written: Mapping[int, Generation],
    grader: str,
    grade: Grader,
) -> tuple[list[Example], dict[str, int]]:
    """Put the reference's answer behind each thinking that is valid and kept.

    `own.keep` says which are: all; right or wrong: those whose own answer was; mixed: those of
    questions that were answered right once and wrong once.

    Returns:
        The examples, and how many thinkings were written, not closed, empty, with a hint also how
        many spoke of it, not kept, and used.
    """
    examples, own = prepared.train_examples, stage.own_thinking
    counts = dict.fromkeys(("written", "not closed", "empty", "of the hint", "not kept", "used"), 0)
    counts["written"] = len(written)
    valid: dict[int, list[tuple[str, bool]]] = {}
    for key in sorted(written):
        place = key % len(examples)
        parsed = prepared.renderer.parse(written[key].text)
        if parsed.thinking is None:
            counts["not closed"] += 1
        elif not parsed.thinking.strip():
            counts["empty"] += 1
        elif own.hint and OF_HINT.search(parsed.thinking):
            counts["of the hint"] += 1
        else:
            right = bool(grade(parsed.answer, examples[place].answer, grader))
            valid.setdefault(place, []).append((parsed.thinking, right))
    used = []
    for place, thinkings in valid.items():
        mixed = len({right for _, right in thinkings}) > 1
        for thinking, right in thinkings:
            if {"all": True, "right": right, "wrong": not right, "mixed": mixed}[own.keep]:
                used.append(replace(examples[place], thinking=thinking))
    counts["used"] = len(used)
    counts["not kept"] = sum(map(len, valid.values())) - len(used)
    if not own.hint:
        del counts["of the hint"]
    return used, counts


def with_references(
    stage: StageSection, prepared: Prepared, used: list[Example], seed: int
) -> list[Example]:
    """Add rows with the data's reasoning, until they are the share that `own.mix` says."""
    mix = stage.own_thinking.mix
    if not mix:
        return used
    pool = [example for example in prepared.train_examples if example.thinking.strip()]
    if not pool:
        what = "own.mix: expected rows with a reasoning; got none"
        raise DataError(f"stages.{stage.name}", what, "leave own.mix out")
    places = drawn(len(pool), round(mix / (1 - mix) * len(used)), f"{seed} {stage.name}")
    return [*used, *(pool[place] for place in places)]


def own_rows(
    recipe: Recipe, stage: StageSection, prepared: Prepared, examples: list[Example]
) -> tuple[Dataset, dict[str, int]]:
    """Tokenize the examples as the run's rows are.

    Returns:
        The rows, and how many examples gave none, by reason.
    """
    reason = "no thinking was closed and kept"
    if examples:
        trim, length = recipe.data.too_long == "trim_thinking", recipe.data.max_length
        rows, outcome = tokenized_rows(examples, prepared.renderer, length, trim=trim)
        refused = Counter(reason for _, reason, _ in outcome.refused)
        if len(rows):
            return rows, dict(refused)
        ((reason, _),) = refused.most_common(1)
    raise DataError(
        f"stages.{stage.name}",
        f"thinking: own leaves no row to train on: {reason}",
        "write own.keep: all, or train an earlier stage for longer",
    )


def make_own_rows(
    stage: StageSection, prepared: Prepared, writer: Writer, grade: Grader
) -> Dataset:
    """Return the rows of a stage over the model's own thinking, and write down their counts.

    `thinkings.json` in the stage's folder says what was written, dropped and used, how many tokens
    that took, and the seconds of this process.

    Raises:
        DataError: Too few thinkings are valid, the file of thinkings can't be used, or no row is
            left to train on.
    """
    processes, recipe, start = PartialState(), writer.recipe, time.monotonic()
    own, asked = stage.own_thinking, prepared.train_examples
    if own.file:
        written = read_thinkings(Path(own.file), stage, prepared)
    else:  # a few questions before all
        probed = (prepared.validation_examples or asked)[:NUM_PROBED]
        require_valid(stage, prepared, writer.write("probe", probed, 1, 0.0))
        asked = [with_hint(each) for each in asked] if own.hint else asked
        written = writer.write("thinkings", asked, own.samples, own.temperature)
    require_valid(stage, prepared, written)
    examples, counts = own_examples(stage, prepared, written, recipe.eval.grader, grade)
    examples = with_references(stage, prepared, examples, recipe.seed) if examples else examples
    with processes.main_process_first():
        rows, refused = own_rows(recipe, stage, prepared, examples)
    cost = {
        "tokens": sum(each.num_tokens or 0 for each in written.values()),
        "seconds": round(time.monotonic() - start, 3),
    }
    if processes.is_main_process:
        write_json(writer.folder / "thinkings.json", {**counts, "refused": refused, **cost})
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    writer.progress.note(
        f"{stage.name}: own thinking: {shown}; {cost['tokens']} tokens, {cost['seconds']:.0f} s"
    )
    return rows


def own_validation(stage: StageSection, prepared: Prepared, writer: Writer) -> Dataset:
    """Return validation rows behind the model's own thinking, for data without any reasoning.

    All stages of a run are measured on those that its first stage's model wrote.
    """
    examples = prepared.validation_examples or prepared.train_examples[:NUM_WITHOUT_VALIDATION]
    valid = require_valid(stage, prepared, writer.write("validation", examples, 1, 0.0))
    behind = [replace(examples[place], thinking=valid[place]) for place in sorted(valid)]
    rows, _ = own_rows(writer.recipe, stage, prepared, behind)
    return rows
