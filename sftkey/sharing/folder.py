"""A model folder graded on a run's questions, beside the stage that it was made from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftkey.data.response import Example
from sftkey.errors import RunError
from sftkey.evaluation.answers import grade_texts, read_generations
from sftkey.evaluation.comparison import Comparison, compare
from sftkey.evaluation.results import read_result, result_file, score, write_result
from sftkey.generation.generate import generate_to_file
from sftkey.models.device import choose_device
from sftkey.models.loading import load_model, load_tokenizer
from sftkey.models.source import fingerprint
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import stage_names
from sftkey.sharing.merging import asked_ids
from sftkey.sharing.stage import asked_questions
from sftkey.training.run_folder import Ledger

DESCRIBED = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")


@dataclass(frozen=True)
class FolderResult:
    """How a model folder answered, against the run's own model."""

    # The run's stage, then the folder; the difference stands in `between_runs`.
    comparison: Comparison
    num_equal: int  # questions to which both wrote the same text
    num_questions: int  # all of them


def grade_folder(
    run: Path, recipe: Recipe, number: int, folder: Path, report: Callable[[int, int], None]
) -> FolderResult:
    """Let a model folder answer a run's test questions, as a server of the folder would.

    Prompts come from the folder's own chat template, stops from its own generation config. What it
    answers lies in `evaluation/models/` of the run, and isn't asked again while the folder stays as
    it is. The stage at `number` is compared with it, the first being 1 and 0 the base; `report`
    gets the number of finished answers and that of all.

    Raises:
        RunError: The stage's own answers aren't graded, or there are no questions.
        ModelError: The folder holds no model.
    """
    ledger = Ledger(run, recipe, main=False)
    stage = stage_names(recipe)[number]
    graded = result_file(run, stage)
    if not graded.exists():
        what = f"{stage} has no graded answers, which the folder's are compared with"
        raise RunError(str(run), what, f"sftkey evaluate {run}")
    prepared, questions = asked_questions(run, recipe)
    answers = _answers(recipe, run, folder, questions, report)
    keys = [example.key for example in questions]
    written = read_generations(answers, keys)
    before = read_generations(ledger.generations(stage), keys)
    renderer = prepared.renderer
    result = score(
        recipe,
        renderer,
        stage,
        grade_texts(recipe, renderer, written, questions),
        settings={"model": str(folder)},
    )
    write_result(answers.parent, result.model_copy(update={"stage": answers.stem}))
    # Names that say where each comes from, and how the run held its weights.
    held = "" if recipe.model.quantization == "none" else f" in {recipe.model.quantization}"
    comparison = compare({f"{run}{held}": [read_result(graded)], str(folder): [result]})
    equal = sum(written[key].text == before[key].text for key in keys)
    return FolderResult(comparison, equal, len(keys))


def _answers(
    recipe: Recipe,
    run: Path,
    folder: Path,
    questions: list[Example],
    report: Callable[[int, int], None],
) -> Path:
    """Write what is missing of the folder's answers; returns their file."""
    section = recipe.model.model_copy(
        update={
            "name_or_path": str(folder),
            **dict.fromkeys(("file", "sha256", "revision", "chat_template", "adapter")),
            "chat_template_kwargs": {},
            "quantization": "none",
            "dtype": "auto",
        }
    )
    tokenizer = load_tokenizer(section)
    file = run / "evaluation" / "models" / f"{folder.name}-{_state(folder)}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    prompts = {example.key: _prompt(tokenizer, example) for example in questions}
    if not file.exists() or len(file.read_bytes().splitlines()) < len(prompts):
        device = choose_device(section, use_cpu=bool(recipe.trainer.get("use_cpu")))
        model = load_model(section, device)
        stops: Any = model.generation_config.eos_token_id
        generate_to_file(
            model,
            tokenizer,
            prompts,
            file,
            report=report,
            stop_ids=[stops] if isinstance(stops, int) else stops,
            max_new_tokens=recipe.eval.max_new_tokens,
            batch_size=recipe.eval.batch_size,
            temperature=recipe.eval.temperature,
            seed=recipe.seed,
        )
    return file


def _prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Return the ids that a server of the folder feeds for a row's prompt."""
    prompt = example.prompt
    if not tokenizer.chat_template and isinstance(prompt, str):
        plain: list[int] = tokenizer(prompt)["input_ids"]
        return plain
    return asked_ids(tokenizer, prompt)


def _state(folder: Path) -> str:
    """Name what the answers depend on: the folder's weights, template and generation config."""
    digest = hashlib.sha256((fingerprint(folder) or "").encode())
    for name in DESCRIBED:
        file = folder / name
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()[:8]
