"""The rows of a recipe: split, tokenized, fitted to the length, cached, counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from sftkey.data.collator import pack_rows, reads_packs
from sftkey.data.examples import RowOptions
from sftkey.data.labels import weights_by_segment
from sftkey.data.refused import count_row, numbered, refuse_left_out, refuse_none_left
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.row_cache import SCHEMA, CachedRows, tokenized_rows
from sftkey.data.splits import Splits, load_splits
from sftkey.data.tokenization import Refusal, tokenize
from sftkey.errors import DataError, Problem, RecipeError
from sftkey.recipe.rules import refuse_undecided
from sftkey.recipe.schema import DataSection, Recipe, StageSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dataset_of(examples: Sequence[Example], renderer: Renderer) -> Dataset:
    """Tokenize examples to the rows of a data set, which `KeyCollator` makes batches of.

    Args:
        examples: Prompt, thinking and answer of each; rows have their order.
        renderer: Of the model's tokenizer: `Renderer.read(tokenizer)`.

    Returns:
        `input_ids` and `segment_ids`, (T,) token ids and values of `Segment`, and `index`.

    Raises:
        DataError: Examples can't be a row; it names each by its place, from 0, and says why.
        FrameError: A plain frame got chat messages.

    >>> examples = [sftkey.Example("2 + 2?", "2 and 2 make 4.", "4")]
    >>> rows = sftkey.tokenize(examples, sftkey.Renderer.read(tokenizer))
    >>> rows.column_names, len(rows)
    (['input_ids', 'segment_ids', 'index'], 1)
    """
    made = tokenize(examples, renderer)
    problems = [
        Problem(f"examples[{place}]", row.reason)
        for place, row in enumerate(made)
        if isinstance(row, Refusal)
    ]
    if problems:
        raise DataError("examples", problems)
    return Dataset(pa.Table.from_pylist([vars(row) for row in made], schema=SCHEMA))


NUM_WITHOUT_VALIDATION = 32  # training rows on which stages are then measured
NO_VALIDATION = (
    f"no validation rows: losses before and after a stage are read on {NUM_WITHOUT_VALIDATION} "
    "training rows, which the stage learns"
)


@dataclass(frozen=True)
class Prepared:
    """The rows of a run.

    `counts` is JSON: rows by split; `dropped` and `trimmed` by "split: reason" with `count`, the
    first 20 `rows` and, of what was dropped, `code`; `noted` likewise, what rows lose that are
    trained all the same, with the first two `examples`; `tokens` by split and segment.
    """

    train: Dataset  # columns `input_ids`, `segment_ids` (lists of one length a row) and `index`
    validation: Dataset | None  # the same columns; None where the recipe names no such rows
    test: list[Example]  # to answer; their prompts become ids with `Renderer.prompt_ids`
    renderer: Renderer
    counts: dict[str, Any]
    refusals: list[Refusal]  # the rows that were dropped here
    # What the rows were made from, in their order.
    validation_examples: list[Example] = field(default_factory=list)
    train_examples: list[Example] = field(default_factory=list)
    test_rows: Dataset | None = None  # the columns of train; None where there are no such rows
    _packs: list[Dataset] = field(default_factory=list, init=False)  # those of `packs`, once made

    @property
    def loss_name(self) -> str:
        """What the losses before and after a stage are called, by the rows they are read on."""
        return "loss on training rows" if self.validation is None else "validation loss"

    @property
    def answers_only(self) -> bool:
        """Whether no row of train has a reasoning: the model writes what the stages read."""
        return not any(example.has_thinking for example in self.train_examples)

    @property
    def remarks(self) -> list[str]:
        """What whoever looks at the rows should know of them, where it isn't as usual."""
        written = "these rows have no reasoning: the model writes it when a stage begins"
        return [written] * self.answers_only + [NO_VALIDATION] * (self.validation is None)

    def packs(self, recipe: Recipe) -> Dataset | None:
        """Return the training rows in packs; None where no stage of their recipe reads such."""
        if not any(reads_packs(recipe, stage) for stage in recipe.stages):
            return None
        if not self._packs:
            self._packs.append(pack_rows(self.train, recipe.data.max_length))
        return self._packs[0]

    def stage_rows(self, recipe: Recipe, stage: StageSection) -> Dataset:
        """Return what a stage's batches are made of: rows, or packs of them."""
        packs = self.packs(recipe) if reads_packs(recipe, stage) else None
        return self.train if packs is None else packs

    def num_rows(self, recipe: Recipe, stage: StageSection) -> int:
        """Count the rows, or packs, of a stage's epoch, where it keeps all own thinkings."""
        return len(self.stage_rows(recipe, stage)) * stage.rows_each

    def questions(self, recipe: Recipe) -> list[Example]:
        """Return the test rows that are asked: always the same ones, drawn by the recipe's seed."""
        places = drawn(len(self.test), recipe.eval.num_questions, recipe.seed)
        return [self.test[place] for place in places]


def drawn(num_all: int, count: int, seed: int | str) -> list[int]:
    """Draw so many of the places from 0, or take all of fewer; in their order."""
    return sorted(random.Random(seed).sample(range(num_all), min(count, num_all)))


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Load the recipe's data and tokenize what is trained and validated on.

    Raises:
        DataError: The data can't be read or split as the recipe says, a row can't be tokenized and
            the recipe doesn't let such rows drop, or no rows are left.
        FrameError: The tokenizer or its template can't carry the response.
        RecipeError: Something is still to be decided.
    """
    refuse_undecided(recipe)
    renderer = Renderer.read(tokenizer, recipe.response, recipe.model.chat_template_kwargs)
    splits = load_splits(recipe.data, recipe.seed, RowOptions.of(recipe))
    return prepare_splits(recipe, splits, renderer)


def prepare_splits(recipe: Recipe, splits: Splits, renderer: Renderer) -> Prepared:
    """Tokenize what is trained and validated on, of rows that are loaded already."""
    counts: dict[str, Any] = {"dropped": deepcopy(splits.dropped)}
    counts |= {name: {} for name in ("trimmed", "noted", "tokens")}
    rows: dict[str, Dataset | None] = {"train": None, "validation": None, "test": None}
    kept: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    refusals: list[Refusal] = []
    for name, examples in (("train", splits.train), ("validation", splits.validation)):
        counts[name], counts["tokens"][name] = 0, {segment.name: 0 for segment in Segment}
        if examples:
            trim = recipe.data.too_long == "trim_thinking"
            made, outcome = tokenized_rows(examples, renderer, recipe.data.max_length, trim)
            _check_lengths(outcome, examples, recipe.data)
            kept[name] = _count_outcome(outcome, examples, recipe.data, name, counts, refusals)
            rows[name], counts[name] = made, len(made)
            counts["tokens"][name] = outcome.tokens
    if splits.test:  # no row of test is too long: its answer is only compared
        rows["test"], outcome = tokenized_rows(splits.test, renderer, 2**31, trim=False)
        kept["test"] = _count_outcome(outcome, splits.test, recipe.data, "test", counts, refusals)
    refuse_left_out(recipe.data, counts["dropped"])
    counts["test"] = len(kept["test"])
    _check_stages(recipe, counts["tokens"]["train"])
    assert rows["train"] is not None  # else load_splits has raised
    prepared = (rows["train"], rows["validation"], kept["test"], renderer, counts, refusals)
    return Prepared(*prepared, kept["validation"], kept["train"], rows["test"])


def _check_lengths(outcome: CachedRows, examples: Sequence[Example], data: DataSection) -> None:
    """Refuse rows that are too long, where the recipe says so."""
    if data.too_long == "error" and outcome.long:
        most, longest = data.max_length, max(length for _, length in outcome.long)
        what = numbered([examples[place].index for place, _ in outcome.long])
        raise DataError(
            "data.max_length",
            f"expected rows of at most {most} tokens; got some of up to {longest}: {what}",
            "rows count from 0; raise data.max_length, or choose data.too_long: drop or "
            "trim_thinking",
        )


def _count_outcome(
    outcome: CachedRows,
    examples: Sequence[Example],
    data: DataSection,
    split: str,
    counts: dict[str, Any],
    refusals: list[Refusal],
) -> list[Example]:
    """Count what was dropped or trimmed, and return the examples that are kept."""
    for place, reason, code in outcome.refused:
        refusals.append(Refusal(examples[place].index, reason, code, split))
        count_row(counts["dropped"], f"{split}: {reason}", examples[place].index, code)
    for place in outcome.trimmed:
        reason = f"{split}: longer than {data.max_length} tokens"
        count_row(counts["trimmed"], reason, examples[place].index)
    for place, what, shown in outcome.noted:
        entry = count_row(counts["noted"], f"{split}: {what}", examples[place].index)
        if shown and len(entry.setdefault("examples", [])) < 2:
            entry["examples"].append(f"row {examples[place].index}: {shown}")
    if len(outcome.refused) == len(examples):
        refuse_none_left(data, split, counts["dropped"])
    gone = {place for place, *_ in outcome.refused}
    return [each for place, each in enumerate(examples) if place not in gone]


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
    """Refuse a stage that wants to look at validation rows when there are none."""
    problems = [
        Problem(f"stages.{stage.name}.trainer.{key}", f"{value!r} needs validation rows; got none")
        for stage in recipe.stages
        for key, value in recipe.stage_trainer(stage).items()
        if key in ("eval_strategy", "load_best_model_at_end") and value not in (False, "no")
    ]
    problems += [
        Problem(f"stages.{stage.name}.early_stop", "it asks validation rows; got none")
        for stage in recipe.stages
        if stage.early_stop is not None
    ]
    if problems and prepared.validation is None:
        raise RecipeError(recipe.name, problems, "write data.validation: a number of rows of train")
