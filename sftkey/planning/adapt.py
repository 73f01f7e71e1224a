"""From a model to a recipe for it: everything that its config and tokenizer tell, with the reasons.

No weight is read. What can't be chosen is marked, and the gate refuses it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftkey.checks.mask_proof import Proof, prove
from sftkey.checks.recipe import undecided
from sftkey.data.preview import row_tokens
from sftkey.data.renderer import Frame
from sftkey.data.response import Example
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.memory_plan.plan import make_plan, size_bytes
from sftkey.memory_plan.shape import read_shape
from sftkey.models.facts import read_facts
from sftkey.planning.adapt_choices import Choices
from sftkey.planning.adapt_sections import head, sections
from sftkey.planning.data_choice import choose_data, measure
from sftkey.planning.frame_choice import choose_frame
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.recipe.yaml_io import dotted, write_recipe

NUM_PROOF_ROWS = 2000
MADE = Example("What is 3 times 4?", "3 times 4 is 12.", "12", 0)
SEED = 42


@dataclass(frozen=True)
class Adapted:
    """A recipe for a model, and what was found out on the way.

    Args:
        text: The recipe's YAML.
        recipe: The same, read.
        model_type: The architecture's name.
        frame: None where the user must decide something first.
        proof: Of the masks in this frame.
        example: The first row of the data (or a made one) as `preview.preview_rows` gives it.
    """

    text: str
    recipe: Recipe
    model_type: str
    frame: Frame | None
    proof: Proof | None
    example: list[dict[str, Any]]

    @property
    def undecided(self) -> list[str]:
        """The keys whose values the user must decide."""
        return [dotted(keys) for keys, _ in undecided(self.recipe)]


def adapt(
    name_or_path: str, path: Path, like: Path | None, source: str | None, gpu: str | None = None
) -> Adapted:
    """Make a recipe for a model.

    Args:
        name_or_path: A hub id, a folder (config and tokenizer are enough), or a package.
        path: Where the recipe will lie: its head names it.
        like: A recipe whose data, stages and settings are taken over.
        source: The data: a built-in name, a hub id, a file or a folder.
        gpu: The size of the GPU that it is for.

    Raises:
        SFTKeyError: The model, the data or the other recipe can't be read.
    """
    gpu_bytes = size_bytes(gpu) if gpu else 0
    other = load_recipe(like) if like else None
    facts = read_facts(name_or_path, other.model if other else None)
    choice = choose_frame(facts.tokenizer, facts.published_stops)
    frame, seed = choice.frame, other.seed if other else SEED
    data = choose_data(source, seed, choice.section.frame == "plain") if source else None
    lengths = None
    if data is not None and data.examples and frame is not None:
        lengths = measure(data.examples, frame, facts.most_tokens)
    choices = Choices(facts, choice, data, lengths, other, str(like or ""), source, seed, path)
    text = write_recipe(head(choices), sections(choices))
    recipe = _read(text)
    if gpu:
        stages = make_plan(recipe, read_shape(facts.section), gpu_bytes).stages
        most = min(stage.most_rows for stage in stages)
        choices = replace(choices, gpu=gpu, most_rows=most)
        text = write_recipe(head(choices), sections(choices))
        recipe = _read(text)
    if frame is None:
        return Adapted(text, recipe, facts.model_type, None, None, [])
    proof = prove(frame, NUM_PROOF_ROWS, seed)
    if proof.wrong:
        raise FrameError(
            name_or_path,
            f"masks are wrong on {len(proof.wrong)} of {proof.rows} hard rows, at first: "
            f"{proof.wrong[0].what}",
            "nothing was written; it is a bug of sftkey, please report it with the model's name",
        )
    examples = data.examples if data and data.examples else [MADE]
    example = list(_preview(examples, frame, recipe))[:1]
    return Adapted(text, recipe, facts.model_type, frame, proof, example)


def _read(text: str) -> Recipe:
    """Read a recipe back, as training will."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return load_recipe(file)


def _preview(examples: list[Example], frame: Frame, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Show the first example that becomes a row, as the collator makes it for each stage."""
    for example in examples:
        (row,) = tokenize([example], frame)
        if isinstance(row, Row):
            (tokens,) = row_tokens([row], recipe, frame.tokenizer)
            yield {"index": example.index, "split": "train", "tokens": tokens}
            return
