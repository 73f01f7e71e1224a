"""From a recipe to the rows that its stages train on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from sftkey.data.fitting import refuse_long
from sftkey.data.frame import Frame, probe_frame
from sftkey.data.labels import weights_by_segment
from sftkey.data.response import Example, Segment
from sftkey.data.row_cache import Outcome, tokenized_rows
from sftkey.data.splits import NUM_SHOWN, Splits, load_splits
from sftkey.data.tokenization import Refusal
from sftkey.errors import DataError, Problem, RecipeError
from sftkey.recipe.schema import DataSection, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """The rows of a run.

    Args:
        train: Columns `input_ids`, `segment_ids` (lists of one length a row) and `index`.
        validation: The same columns; None where the recipe names no validation rows.
        test: Examples to answer; their prompts become ids with `frame.prompt_ids`.
        frame: What stands around each completion.
        counts: JSON: rows by split; `dropped` and `trimmed` by "split: reason" with `count` and
            the first 20 `rows`; `tokens` by split and segment.
        refusals: The rows of train and validation that were dropped here.
        validation_examples: Those that the rows of `validation` were made from, in their order.
        train_examples: The same of `train`.
    """

    train: Dataset
    validation: Dataset | None
    test: list[Example]
    frame: Frame
    counts: dict[str, Any]
    refusals: list[Refusal]
    validation_examples: list[Example] = field(default_factory=list)
    train_examples: list[Example] = field(default_factory=list)

    def questions(self, recipe: Recipe) -> list[Example]:
        """Give the test rows that are asked: always the same ones, drawn by the recipe's seed."""
        count = min(recipe.eval.num_questions, len(self.test))
        drawn = random.Random(recipe.seed).sample(range(len(self.test)), count)
        return [self.test[number] for number in sorted(drawn)]


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, need_test: bool = True) -> Prepared:
    """Load the recipe's data and tokenize what is trained and validated on.

    Raises:
        DataError: The data can't be read or split as the recipe says, or no rows are left.
        FrameError: The tokenizer or its template can't carry the response.
    """
    frame = probe_frame(tokenizer, recipe.response, recipe.model.chat_template_kwargs)
    splits = load_splits(recipe.data, recipe.seed, need_test, recipe.response.turns)
    return prepare_splits(recipe, splits, frame)


def prepare_splits(recipe: Recipe, splits: Splits, frame: Frame) -> Prepared:
    """Tokenize what is trained and validated on, of rows that are loaded already.

    Raises:
        DataError: No rows are left, or a stage finds nothing to train in them.
        FrameError: The template drops or raises on a system message.
    """
    counts: dict[str, Any] = {"dropped": splits.dropped(), "trimmed": {}, "tokens": {}}
    datasets: dict[str, Dataset | None] = {}
    refusals: list[Refusal] = []
    kept: dict[str, list[Example]] = {}
    for name, examples in (("train", splits.train), ("validation", splits.validation)):
        counts[name], counts["tokens"][name] = 0, {segment.name: 0 for segment in Segment}
        datasets[name], kept[name] = None, []
        if examples:
            rows, outcome = _fitted_rows(examples, frame, recipe.data)
            refused = _count_outcome(outcome, examples, recipe.data, name, counts)
            datasets[name], counts[name] = rows, len(rows)
            places = {place for place, _ in outcome.refused}
            kept[name] = [each for place, each in enumerate(examples) if place not in places]
            refusals += refused
    counts["test"] = len(splits.test)
    _check_stages(recipe, counts["tokens"]["train"])
    train, validation = datasets["train"], datasets["validation"]
    assert train is not None  # else _fitted_rows has raised
    made_from = (kept["validation"], kept["train"])
    return Prepared(train, validation, splits.test, frame, counts, refusals, *made_from)


def _fitted_rows(
    examples: Sequence[Example], frame: Frame, data: DataSection
) -> tuple[Dataset, Outcome]:
    """Tokenize a split, and deal with rows that are too long."""
    rows, outcome = tokenized_rows(
        examples, frame, data.max_length, trim=data.too_long == "trim_thinking"
    )
    if data.too_long == "error":
        refuse_long([(examples[place].index, n) for place, n in outcome.long], data.max_length)
    return rows, outcome


def _count_outcome(
    outcome: Outcome,
    examples: Sequence[Example],
    data: DataSection,
    split: str,
    counts: dict[str, Any],
) -> list[Refusal]:
    """Count what was dropped or trimmed, and give the refused rows."""
    refusals = [Refusal(examples[n].index, reason, split) for n, reason in outcome.refused]
    for refusal in refusals:
        _count(counts["dropped"], f"{split}: {refusal.reason}", refusal.index)
    for place in outcome.trimmed:
        reason = f"{split}: longer than {data.max_length} tokens"
        _count(counts["trimmed"], reason, examples[place].index)
    counts["tokens"][split] = outcome.tokens
    if len(refusals) == len(examples):
        reasons = Counter(refusal.reason for refusal in refusals).most_common()
        listed = "; ".join(f"{reason} ({count} of {len(examples)})" for reason, count in reasons)
        hint = "raise data.max_length" if "longer than" in listed else None
        raise DataError(data.source, f"no rows are left in {split}: {listed}", hint)
    return refusals


def _check_stages(recipe: Recipe, tokens: dict[str, int]) -> None:
    """Refuse a stage whose loss is on segments that no row has: empty tags, say."""
    problems = [
        Problem(f"stages.{stage.name}.loss_on", "no row of train has a token of these segments")
        for stage in recipe.stages
        if not any(
            weight and tokens[segment.name]
            for segment, weight in zip(Segment, weights_by_segment(stage.loss_on), strict=True)
        )
    ]
    if problems:
        raise DataError(recipe.data.source, problems, hint="see `sftkey show` for the segments")


def refuse_evaluation_without_rows(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse a stage that wants to look at validation rows when there are none.

    Raises:
        RecipeError: Names each such stage.
    """
    problems = [
        Problem(f"stages.{stage.name}.trainer.{key}", f"{value!r} needs validation rows; got none")
        for stage in recipe.stages
        for key, value in recipe.stage_trainer(stage).items()
        if key in ("eval_strategy", "load_best_model_at_end") and value not in (False, "no")
    ]
    if problems and prepared.validation is None:
        raise RecipeError(recipe.name, problems, "write data.validation: a number of rows of train")


def _count(counted: dict[str, Any], reason: str, index: int) -> None:
    entry = counted.setdefault(reason, {"count": 0, "rows": []})
    entry["count"] += 1
    if len(entry["rows"]) < NUM_SHOWN:
        entry["rows"].append(index)
