"""The recipe that ships for the nearest model, and in what another differs from it."""

import difflib
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftkey.adapt.data import DataChoice, choose_data, measure
from sftkey.adapt.frame import choose_frame
from sftkey.adapt.own import own_notes
from sftkey.adapt.write import OWN_TOKENS, Choices, head, last_part, sections
from sftkey.checks.mask_proof import Proof, prove
from sftkey.data.examples import USUAL, RowOptions
from sftkey.data.preview import row_tokens
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Response
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError, RecipeError
from sftkey.memory_plan.held import read_skeleton
from sftkey.memory_plan.plan import gpu_size, make_plan
from sftkey.models.device import has_cuda
from sftkey.models.facts import read_facts
from sftkey.recipe.load import changed_keys, load_recipe, short_name
from sftkey.recipe.rules import undecided
from sftkey.recipe.schema import Recipe
from sftkey.recipe.yaml_io import dotted, inline, write_recipe

COMPARED = ("model.", "lora", "response.")
OWN = ("model.name_or_path", "model.file", "model.sha256", "model.revision")


@dataclass(frozen=True)
class Nearest:
    """A recipe of the collection."""

    file: Path  # where it lies
    same_family: bool  # its model is of the same family by name
    # Key, value there, value here; of the sections model, lora and response.
    differences: list[tuple[str, str, str]]


def find_nearest(recipe: Recipe, model_type: str, files: Iterable[Path]) -> Nearest | None:
    """Find the recipe of the nearest model: of the same family, then with the same frame and tags.

    `model_type` is the architecture's name in the config of the new recipe's model.
    """
    families = {_family(model_type), _family(recipe.model.name_or_path)}

    def likeness(pair: tuple[Path, Recipe]) -> tuple[bool, bool, float]:
        other = pair[1]
        here, there = (last_part(each.model.name_or_path).lower() for each in (recipe, other))
        return (
            _family(other.model.name_or_path) in families,
            other.response == recipe.response,
            difflib.SequenceMatcher(None, here, there).ratio(),
        )

    known = [(file, load_recipe(file)) for file in files]
    if not known:
        return None
    file, other = max(known, key=likeness)
    return Nearest(file, likeness((file, other))[0], _differences(other, recipe))


def _family(name: str) -> str:
    """Return the letters that a name begins with: `qwen` of Qwen2.5-1.5B and of qwen2_moe."""
    match = re.match("[a-z]+", last_part(name).lower().removeprefix("meta-"))
    return match[0] if match else ""


def _differences(other: Recipe, recipe: Recipe) -> list[tuple[str, str, str]]:
    before, after = other.model_dump(mode="json"), recipe.model_dump(mode="json")
    keys = [key for key in changed_keys(other, recipe) if key.startswith(COMPARED)]
    return [(key, _shown(before, key), _shown(after, key)) for key in keys if key not in OWN]


def _shown(values: Any, path: str) -> str:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return inline(values)


NUM_PROOF_ROWS = 2000
MADE = Example("What is 3 times 4?", "3 times 4 is 12.", "12", 0)
SEED = 42
UNREAD_ROWS = (
    "no row was read: data and lengths are those of {like}; `sftkey check {file}` reads the rows"
)
NO_CUDA = "no CUDA here, so the weights stay unquantized; --gpu 24GB writes for a GPU elsewhere"


@dataclass(frozen=True)
class Adapted:
    """A recipe for a model, and what was found out on the way."""

    text: str  # the recipe's YAML
    recipe: Recipe  # the same, read
    model_type: str  # the architecture's name
    # Of the masks in this frame; None where the user must decide something first.
    proof: Proof | None
    # The first row of the data (or a made one) as `preview.preview_rows` gives it.
    example: list[dict[str, Any]]
    notes: list[str]  # what the user should know of how the data is read

    @property
    def undecided(self) -> dict[str, str]:
        """The keys whose values the user must decide, with what is to be chosen from."""
        return {dotted(keys): value for keys, value in undecided(self.recipe)}


def adapt(
    name_or_path: str,
    path: Path,
    like: Path | None,
    source: str | None,
    gpu: str | None = None,
    *,
    one_stage: bool = False,
) -> Adapted:
    """Make a recipe for a model.

    Args:
        name_or_path: A hub id, a folder (config and tokenizer are enough), or a package.
        path: Where the recipe will lie: its head names it.
        like: A recipe whose data, stages and settings are taken over.
        source: The data: a built-in name, a hub id, a file or a folder.
        gpu: The size of the GPU that it is for.
        one_stage: In place of the paper's two stages one, with five-fold weight on the key.

    Raises:
        SFTKeyError: The model, the data or the other recipe can't be read, or have other stages
            than one over a reasoning.
    """
    gpu_bytes = gpu_size(gpu) if gpu else 0
    other, named = (load_recipe(like), short_name(like)) if like else (None, "")
    facts = read_facts(name_or_path, other.model if other else None)
    choice = choose_frame(facts.tokenizer, facts.published_stops)
    renderer, seed = choice.renderer, other.seed if other else SEED
    data = DataChoice({})
    if source:
        options = RowOptions.of(other) if other else USUAL
        data = choose_data(source, seed, choice.section.frame == "plain", renderer, options)
    if one_stage:
        _refuse_other_stages(named, data)
    lengths = None
    if data.examples and renderer is not None:
        thinking = OWN_TOKENS if data.own else 0
        lengths = measure(data.examples, renderer, facts.skeleton.most_tokens, thinking)
    how = Choices(facts, choice, data, lengths, other, named, source, seed, path, gpu)
    choices = replace(how, cuda=bool(gpu) or has_cuda(), one_stage=one_stage)
    text, recipe = _written(choices)
    if gpu:
        stages = make_plan(recipe, read_skeleton(facts.section), gpu_bytes).stages
        most = min(stage.most_rows for stage in stages)
        text, recipe = _written(replace(choices, most_rows=most))
    notes = own_notes(Response.from_section(choice.section)) if data.own else []
    if other is not None and not source:
        notes.append(UNREAD_ROWS.format(like=named, file=path))
    notes += [*data.notes, *([NO_CUDA] if choices.stays_whole else [])]
    if renderer is None:
        return Adapted(text, recipe, facts.model_type, None, [], notes)
    proof = _proven(name_or_path, renderer, seed)
    example = _preview(data.examples[0] if data.examples else MADE, renderer, recipe)
    return Adapted(text, recipe, facts.model_type, proof, example, notes)


def _refuse_other_stages(like: str, data: DataChoice) -> None:
    """Refuse what gives the recipe its stages, where one stage is asked for."""
    if like or data.own:
        got = f"the stages of {like}" if like else "stages behind the model's own thinking"
        what = f"expected data with a reasoning and no other recipe; got {got}"
        raise RecipeError("--one-stage", what, "leave it out")


def _written(choices: Choices) -> tuple[str, Recipe]:
    """Write the recipe, and read it back as training will."""
    text = write_recipe(head(choices), sections(choices))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return text, load_recipe(file)


def _proven(name: str, renderer: Renderer, seed: int) -> Proof:
    """Prove the masks, or refuse the model."""
    proof = prove(renderer, NUM_PROOF_ROWS, seed)
    if proof.wrong:
        raise FrameError(
            name,
            f"masks are wrong on {len(proof.wrong)} of {proof.rows} hard rows, at first: "
            f"{proof.wrong[0].what}",
            "nothing was written; it is a bug of sftkey, please report it with the model's name",
        )
    return proof


def _preview(example: Example, renderer: Renderer, recipe: Recipe) -> list[dict[str, Any]]:
    """Show an example, if it becomes a row, as the collator makes it for each stage."""
    (row,) = tokenize([example], renderer)
    if not isinstance(row, Row):
        return []
    (tokens,) = row_tokens([row], recipe, renderer.tokenizer)
    return [{"index": example.index, "split": "train", "tokens": tokens}]
