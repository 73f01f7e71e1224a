"""A run's test questions and grader as a task of lm-evaluation-harness."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from sftkey.data.prepare import prepare
from sftkey.errors import RunError
from sftkey.files import appearing
from sftkey.models.loading import load_tokenizer
from sftkey.models.source import model_source
from sftkey.recipe.schema import EvalSection, Recipe
from sftkey.sharing.stage import SharedStage


def write_task(stage: SharedStage, folder: Path) -> str:
    """Write a task folder: the same prompts to the token, the same verdicts.

    Args:
        stage: Its run's test questions are written.
        folder: A new folder.

    Returns:
        The command that evaluates the stage with it.

    Raises:
        RunError: The folder exists, or the run asks no questions.
    """
    recipe = stage.recipe
    if folder.exists():
        raise RunError(str(folder), "expected a new folder; it exists already")
    prepared = prepare(recipe, load_tokenizer(recipe.model), need_test=False)
    questions, renderer = prepared.questions(recipe), prepared.renderer
    if not questions:
        raise RunError(str(stage.run), "expected test rows; its recipe has none", "write data.test")
    rows = [
        {
            "index": example.index,
            "turn": example.turn,
            "prompt": renderer.prompt_text(example.prompt),
            "answer": example.answer,
        }
        for example in questions
    ]
    settings = {
        "tags": list(vars(renderer.response).values()),
        "grader": recipe.eval.grader,
        "assistant_prefix": renderer.assistant_prefix,
        "end": renderer.end,
    }
    name = "sftkey_" + re.sub(r"\W+", "_", recipe.name)
    with appearing(folder) as made:
        made.mkdir()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (made / "rows.jsonl").write_text(lines, encoding="utf-8")
        (made / "task.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (made / f"{name}.yaml").write_text(_yaml(name, renderer.end_token, recipe.eval))
        shutil.copyfile(Path(__file__).with_name("lm_eval_task.py"), made / "utils.py")
    return _command(stage, name, folder)


def _yaml(name: str, end: str, settings: EvalSection) -> str:
    """Write the task; its prompts are whole, so that nothing is put around them."""
    sampled = settings.temperature > 0
    generation = {
        "until": [end],
        "max_gen_toks": settings.max_new_tokens,
        "do_sample": sampled,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        "repetition_penalty": 1.0,
    }
    return f"""\
# Prompts are whole: run it without --apply_chat_template.
task: {name}
custom_dataset: !function utils.load
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: prompt
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs: {json.dumps(generation, ensure_ascii=False)}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: fmt, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def _command(stage: SharedStage, name: str, folder: Path) -> str:
    return shlex.join(
        [
            *("lm_eval", "--model", "hf", "--model_args", _model(stage.recipe, stage.weights)),
            *("--tasks", name, "--include_path", str(folder)),
            *("--batch_size", str(stage.recipe.eval.batch_size), "--log_samples"),
            *("--output_path", f"{folder}-results"),
        ]
    )


def _model(recipe: Recipe, weights: Path) -> str:
    """Name the model as the harness reads it."""
    if recipe.lora is None:
        return f"pretrained={weights},tokenizer={model_source(recipe.model).path}"
    return f"pretrained={model_source(recipe.model).path},peft={weights}"
