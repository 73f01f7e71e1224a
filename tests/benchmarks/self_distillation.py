"""TRL's self-distillation (SDFT, arXiv 2601.19897) on the rows of the study of answers alone.

    python tests/benchmarks/self_distillation.py [--seed 1] [--learning-rate 1e-4] [--out FOLDER]

The student writes a response to each training question; the teacher, an average of the student's
own past, reads that response behind the question and the reference's answer, in the words of
`own.hint`. As many steps of as many rows as the study's cells, from the same stage 1, graded on the
same questions. A line of JSON says what came out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from sftkey.data.renderer import stop_ids
from sftkey.evaluation.answers import grade_texts
from sftkey.evaluation.results import score
from sftkey.generation.generate import generate_to_file
from sftkey.models.adapters import load_adapter
from sftkey.models.device import choose_device
from sftkey.models.loading import load_model
from sftkey.models.source import base_identity
from sftkey.recipe.schema import Recipe
from sftkey.study.schema import load_study
from sftkey.study.tasks import arm_recipe, tasks_of
from sftkey.training.own_thinking import HINT
from sftkey.training.run import read_rows

STUDY = Path("recipes/smollm2-135m/study-answers-only.yaml")


def arguments(recipe: Recipe, folder: Path, learning_rate: float) -> SDFTConfig:
    """Return TRL's arguments: the recipe's trainer, TRL's own defaults where SDFT has settings."""
    return SDFTConfig(
        str(folder),
        **(recipe.stage_trainer(recipe.stages[0]) | {"learning_rate": learning_rate}),
        seed=recipe.seed,
        num_generations=1,
        max_completion_length=recipe.eval.max_new_tokens,
        teacher_model_kind="ema",  # `base` is the model without stage 1's adapter
        teacher_prompt_template="{prompt}" + HINT.replace("{answer}", "{privileged_context}"),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )


def figures(recipe: Recipe, folder: Path, learning_rate: float) -> dict[str, Any]:
    """Train, ask and grade; the responses are kept in the folder."""
    prepared, device = read_rows(recipe), choose_device(recipe.model, use_cpu=True)
    renderer, base = prepared.renderer, base_identity(recipe.model)
    assert recipe.model.adapter is not None, "it goes on from a model that thinks"
    model = load_adapter(load_model(recipe.model, device), recipe.model.adapter, base)
    asked: list[Any] = [list(example.prompt) for example in prepared.train_examples]
    ids = renderer.tokenizer.apply_chat_template(
        asked[0], add_generation_prompt=True, return_dict=False
    )
    assert ids == renderer.prompt_ids(prepared.train_examples[0].prompt), "the same prompt"
    answers = [example.answer for example in prepared.train_examples]
    trainer = SDFTTrainer(
        model,
        args=arguments(recipe, folder, learning_rate),
        train_dataset=Dataset.from_dict({"prompt": asked, "privileged_context": answers}),
        processing_class=renderer.tokenizer,
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    questions = prepared.questions(recipe)
    written = generate_to_file(
        model,
        renderer.tokenizer,
        {each.key: renderer.prompt_ids(each.prompt) for each in questions},
        folder / "generations.jsonl",
        stop_ids=stop_ids(renderer, model.generation_config.eos_token_id),
        max_new_tokens=recipe.eval.max_new_tokens,
        batch_size=recipe.eval.batch_size,
    )
    result = score(
        recipe, renderer, recipe.stages[0].name, grade_texts(recipe, renderer, written, questions)
    )
    rates = {name: rate.rate for name, rate in (result.rates or {}).items()}
    steps = trainer.state.global_step
    about = {"seed": recipe.seed, "learning_rate": learning_rate, "rows": len(asked)}
    return about | {"steps": steps, "seconds": round(seconds), "acc": result.acc, "rates": rates}


def main() -> None:
    """Print one seed's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    study = load_study(STUDY)
    recipe = arm_recipe(study, tasks_of(study, STUDY.parent)[0], "own_exact", args.seed)
    if args.max_steps:
        recipe.trainer["max_steps"] = args.max_steps
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(figures(recipe, folder, args.learning_rate)), flush=True)


if __name__ == "__main__":
    main()
