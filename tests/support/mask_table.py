"""The table of docs/masks.md: what the gate makes of hard rows in each family of recipes/.

    python -m tests.support.mask_table

Real tokenizers come from packages (`real_tokenizers`); a family without one gets a tokenizer that
is trained on the spot, with the family's control tokens and template.
"""

import json
from collections.abc import Iterator
from typing import Any

from sftkey.checks.mask_proof import SYSTEM, Proof, hard_examples, judge
from sftkey.data.renderer import Renderer
from sftkey.data.response import TOOLS, Example
from sftkey.data.template import reads_of
from sftkey.data.tokenization import OWN_TAGS, Row, tokenize
from sftkey.errors import FrameError
from sftkey.recipe.load import RECIPES, load_recipe, recipe_files
from sftkey.recipe.schema import Recipe, ResponseSection
from tests.support.families import FAMILIES, Family

NUM_ROWS, SEED = 50, 20
SPECIAL_TEXT = "holds the text of a special token"
VOCABULARIES = {
    "qwen3": "Qwen3's",
    "llama2": "Mistral 7B v0.1's",
    "llama3_1": "Llama 3.1's",
    "gemma3": "Gemma 3's",
    "gptoss": "gpt-oss'",
    "smollm2": "SmolLM2's",
}
HEAD = (
    *("family", "recipes", "proven on", "header", "rows", "right", "refused", "wrong"),
    *("system message", "tools", "unknown key", "unknown kwarg"),
)
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"name": "add", "description": "Add one.", "parameters": NUMBERS}
TOOL = {"type": "function", "function": ADD}
ASKED = {
    "system message": (SYSTEM, QUESTION),
    "tools": ({"role": TOOLS, "content": json.dumps([TOOL])}, QUESTION),
    "unknown key": ({**QUESTION, "weather": "fair"},),
}


def num_refused_otherwise(proof: Proof) -> int:
    """Count the rows refused for something else than what a text holds of the frame's own."""
    own = (SPECIAL_TEXT, OWN_TAGS)
    return sum(n for reason, n in proof.refused.items() if not any(o in reason for o in own))


def table() -> list[str]:
    """Return the table's lines."""
    aligned = ["---:" if name in ("recipes", *HEAD[4:8]) else "---" for name in HEAD]
    rows = (HEAD, aligned, *_rows())
    return [f"| {' | '.join(row)} |" for row in rows]


def _rows() -> Iterator[list[str]]:
    """Yield a row for each family, over the frames of all its recipes."""
    by_family: dict[Family, list[Recipe]] = {}
    for file in recipe_files(RECIPES):
        by_family.setdefault(FAMILIES[file.parent.name], []).append(load_recipe(file))
    for family, recipes in sorted(by_family.items(), key=lambda it: _name(it[0])):
        frames = {repr((it.response, it.model.chat_template_kwargs)): it for it in recipes}
        renderers = [_renderer(family, recipe) for recipe in frames.values()]
        counts = [sum(each) for each in zip(*map(_counted, renderers), strict=True)]
        on = VOCABULARIES[family.real] if family.real else f"a stand-in ({family.kind})"
        said = [*map(_header, renderers)], *zip(*map(_answers, renderers), strict=True)
        header, *answers = (" or ".join(dict.fromkeys(each)) for each in said)
        yield [_name(family), str(len(recipes)), on, header, *map(str, counts), *answers]


def _name(family: Family) -> str:
    return family.name if family.template else f"{family.name}, base"


def _renderer(family: Family, recipe: Recipe) -> Renderer:
    tokenizer: Any = family.real_one() if family.real else family.standing_in()
    return Renderer.read(tokenizer, recipe.response, recipe.model.chat_template_kwargs)


def _counted(renderer: Renderer) -> tuple[int, int, int, int]:
    """Count hard rows: all, those that are right, those rightly refused, and the others."""
    examples = hard_examples(renderer, NUM_ROWS, SEED)
    proof = judge(renderer, examples, tokenize(examples, renderer))
    return proof.rows, proof.right, sum(proof.refused.values()), len(proof.wrong)


def _header(renderer: Renderer) -> str:
    """Say how it is known that a row's generation prompt is the one that was probed."""
    if renderer.kind == "plain":
        return "none"
    return "by the syntax tree" if reads_of(renderer.tokenizer).fixed_header else "row by row"


def _answers(renderer: Renderer) -> list[str]:
    """Say what becomes of what a row or a recipe says beside its question."""
    answers = []
    for prompt in ASKED.values():
        try:
            (row,) = tokenize([Example(prompt, "2 and 2.", "4")], renderer)
            answers.append("written" if isinstance(row, Row) else "refused")
        except FrameError:
            answers.append("refused")
    return [*answers, "refused" if _refuses_kwarg(renderer) else "ignored"]


def _refuses_kwarg(renderer: Renderer) -> bool:
    """Tell whether the frame is refused for a kwarg with a slip in its name, and for that alone."""
    section = ResponseSection(
        frame=renderer.kind,
        thinking=(renderer.response.thinking_open, renderer.response.thinking_close),
        answer=(renderer.response.answer_open, renderer.response.answer_close),
        end=renderer.end if renderer.kind == "plain" else None,
    )
    kwargs = dict(renderer.chat_template_kwargs)
    Renderer.read(renderer.tokenizer, section, kwargs)
    try:
        Renderer.read(renderer.tokenizer, section, {**kwargs, "enable_thinkng": True})
    except FrameError as error:
        return "chat_template_kwargs" in str(error)
    return False


if __name__ == "__main__":
    print(*table(), sep="\n")
