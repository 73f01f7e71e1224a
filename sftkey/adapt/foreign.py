"""A model and rows that no recipe of ours describes: what `adapt` would choose, without a file."""

from __future__ import annotations

from dataclasses import dataclass

from sftkey.adapt.data import DataChoice, choose_data, choose_grader, measure
from sftkey.adapt.frame import TAGS, THINK, FrameChoice, choose_frame
from sftkey.checks.recipe import UNDECIDED
from sftkey.data.renderer import Renderer, probe_renderer
from sftkey.data.response import Example
from sftkey.data.sources import load_examples
from sftkey.data.tokenization import Row, fit, tokenize
from sftkey.errors import Problem, RecipeError
from sftkey.models.facts import ModelFacts, read_facts
from sftkey.recipe.schema import DataSection, ModelSection


@dataclass(frozen=True)
class Foreign:
    """Somebody's model, and the rows that it is asked.

    Args:
        section: The model, as it is: not quantized by us.
        renderer: What stands around its responses.
        examples: Those of the rows.
        rows: Their tokens.
        grader: That fits the answers.
        max_new_tokens: That a response may have.
        chosen: Lines that say what was chosen.
    """

    section: ModelSection
    renderer: Renderer
    examples: list[Example]
    rows: list[Row]
    grader: str
    max_new_tokens: int
    chosen: tuple[str, ...]


def read_foreign(name_or_path: str, source: str, seed: int) -> Foreign:
    """Choose frame, tags, columns and grader for a model and rows, as `adapt` does.

    All rows are taken, of a validation split if there is one.

    Raises:
        SFTKeyError: The model or the rows can't be read, or something must be decided first.
    """
    facts = read_facts(name_or_path)
    choice = choose_frame(facts.tokenizer, facts.published_stops)
    data = choose_data(source, seed, choice.section.frame == "plain")
    open_choices = choice.undecided | {
        f"data.{key}": str(data.fields[key]) for key in data.undecided
    }
    if open_choices or choice.renderer is None:
        what = [
            Problem(key, f"to be decided: {value.removeprefix(UNDECIDED).strip()}")
            for key, value in open_choices.items()
        ]
        ask = f"`sftkey adapt {name_or_path} --data {source} -o my.yaml` writes a recipe"
        raise RecipeError(name_or_path, what, f"{ask}: decide there, then diagnose my.yaml")
    renderer = _with_tags_of(data, choice, choice.renderer, facts)
    examples = data.examples
    if data.fields.get("validation") == "validation":
        examples = load_examples(DataSection(**data.fields), seed, "validation").examples
    lengths = measure(examples, renderer, facts.most_tokens)
    fitted = fit(tokenize(examples, renderer), examples, renderer, lengths.max_length, "drop")
    pairs = [(e, row) for e, row in zip(examples, fitted, strict=True) if isinstance(row, Row)]
    grader, why = choose_grader(examples)
    columns = {
        key: data.fields[key]
        for key in ("prompt", "thinking", "answer", "split_rule")
        if key in data.fields
    }
    tags = renderer.response
    return Foreign(
        facts.section.model_copy(
            update={"quantization": "none", "attn_implementation": facts.attention}
        ),
        renderer,
        [example for example, _ in pairs],
        [row for _, row in pairs],
        grader,
        lengths.max_new_tokens,
        (
            f"frame {renderer.kind}; tags {tags.thinking_open!r} {tags.thinking_close!r} "
            f"{tags.answer_open!r} {tags.answer_close!r}",
            ", ".join(f"{key} {value!r}" for key, value in columns.items()) or "built-in columns",
            f"grader {grader}: {why}",
        ),
    )


def _with_tags_of(
    data: DataChoice, choice: FrameChoice, renderer: Renderer, facts: ModelFacts
) -> Renderer:
    """Take the rows' own tags where the template has none: the model was trained on such rows."""
    if data.fields.get("split_rule") != "think_tags" or choice.section.thinking != TAGS.thinking:
        return renderer
    kept = {"frame": choice.section.frame, "end": choice.section.end}
    return probe_renderer(facts.tokenizer, THINK.model_copy(update=kept), choice.kwargs)
