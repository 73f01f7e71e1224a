"""Ask what a run has trained one question."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.errors import RunError
from sftkey.training.run_folder import run_recipe, trained_stage

if TYPE_CHECKING:
    from sftkey.data.renderer import Renderer
    from sftkey.generation.generate import Generation
    from sftkey.recipe.schema import Recipe


def generate(
    folder: Path,
    question: str | None = None,
    *,
    stage: str | None = None,
    max_new_tokens: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the thinking and the answer to a question.

    Args:
        folder: A run folder.
        question: None: it stands on stdin.
        stage: A trained stage, or `base`; default the last one that is trained.
        max_new_tokens: Default the recipe's.
        as_json: Print one JSON object.

    Raises:
        SFTKeyError: There is no question, or the folder is no run, or the stage isn't trained.
    """
    recipe = run_recipe(folder)
    number = trained_stage(folder, recipe, stage)
    asked = (sys.stdin.read() if question is None else question).strip()
    if not asked:
        raise RunError(
            "question",
            "expected a text; got none",
            f'sftkey generate {folder} "How many …?", or the question on stdin',
        )
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    limit = max_new_tokens or recipe.eval.max_new_tokens
    generation, renderer = _write(folder, recipe, number, asked, limit)
    parsed = renderer.response.parse(generation.text.removeprefix(renderer.assistant_prefix))
    if as_json:
        found = {
            "thinking": parsed.thinking,
            "answer": parsed.answer,
            "text": generation.text,
            "stopped": generation.stopped,
        }
        print(json.dumps(found, ensure_ascii=False))
        return
    if parsed.answer is None:
        print(generation.text)
        print("note: no answer was found in this text", file=sys.stderr)
    else:
        print(f"thinking:\n{parsed.thinking or ''}\n\nanswer:\n{parsed.answer}")
    if not generation.stopped:
        print(f"note: it didn't stop within {limit} tokens", file=sys.stderr)


def _write(
    folder: Path, recipe: Recipe, number: int, question: str, max_new_tokens: int
) -> tuple[Generation, Renderer]:
    """Load the stage's model and let it answer."""
    from sftkey.data.renderer import probe_renderer, stop_ids
    from sftkey.data.sources import num_columns, question_prompt
    from sftkey.generation.generate import generate
    from sftkey.generation.key_switch import find_switch
    from sftkey.models.device import choose_device
    from sftkey.models.loading import load_tokenizer
    from sftkey.training.run_folder import Ledger
    from sftkey.training.stage_model import load_stage

    tokenizer = load_tokenizer(recipe.model)
    renderer = probe_renderer(tokenizer, recipe.response, recipe.model.chat_template_kwargs)
    if (count := num_columns(recipe.data)) != 1:
        what = f"data.prompt puts {count} columns together; the question is taken as all of it"
        print(f"note: {what}", file=sys.stderr)
    prompt = renderer.prompt_ids(question_prompt(recipe.data, question))
    device = choose_device(recipe.model, use_cpu=bool(recipe.trainer.get("use_cpu")))
    model = load_stage(recipe, Ledger(folder, recipe, main=False), device, renderer, number)
    # Before a frozen stage stand key adapters that aren't trained yet.
    frozen = number > 0 and recipe.stages[number - 1].context == "frozen"
    written = generate(
        model,
        tokenizer,
        [prompt],
        stop_ids=stop_ids(renderer, model.generation_config.eos_token_id),
        max_new_tokens=max_new_tokens,
        batch_size=1,
        temperature=recipe.eval.temperature,
        seed=recipe.seed,
        switch=find_switch(model, renderer) if frozen else None,
    )
    return next(generation for _, generation in written), renderer
