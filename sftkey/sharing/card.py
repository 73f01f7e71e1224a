"""A model card: what was trained, from what, how it was measured, and what that can't say."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from sftkey.data.sources import with_defaults
from sftkey.evaluation.results import StageResult, read_graded
from sftkey.files import read_json
from sftkey.models.packaged import is_packaged
from sftkey.recipe.schema import Recipe
from sftkey.sharing.stage import SharedStage

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_id(name: str) -> str | None:
    """Return the name if others find it on the hub; None of a folder, a file or a package."""
    there = Path(name).expanduser().exists() or is_packaged(name)
    return name if HUB_ID.fullmatch(name) and not there else None


def model_card(stage: SharedStage) -> str:
    """Return a trained stage's model card, with its metadata for the hub."""
    results = {each.stage: each for each in read_graded(stage.run)}
    data = ModelCardData(
        base_model=hub_id(stage.recipe.model.name_or_path),
        datasets=hub_id(with_defaults(stage.recipe.data).source),
        library_name="transformers" if stage.recipe.lora is None else "peft",
        pipeline_tag="text-generation",
        tags=["sftkey", "trl", "sft"],
        model_name=stage.recipe.name,
        eval_results=_eval_results(stage.recipe, results.get(stage.name)),
    )
    parts = [
        f"# {stage.recipe.name}",
        _head(stage),
        "## Results",
        _table(stage.recipe, results),
        "## Use",
        _use(stage),
        "## Data",
        _counts(stage.run, stage.recipe),
        "## Limits",
        _limits(stage, results.get(stage.name)),
        "## Recipe",
        f"```yaml\n{public_recipe(stage.recipe)}```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _eval_results(recipe: Recipe, result: StageResult | None) -> list[EvalResult] | None:
    """Return what the hub shows as the model's index."""
    if result is None:
        return None
    data = with_defaults(recipe.data)
    about: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": hub_id(data.source) or _shared_name(data.source),
        "dataset_name": " ".join(filter(None, [_shared_name(data.source), data.task])),
        "dataset_config": data.config,
        "dataset_split": "test",
    }
    shares = {
        "accuracy": (f"Acc ({recipe.eval.grader})", result.acc, result.acc_interval),
        "format": ("Fmt", result.fmt, result.fmt_interval),
    }
    return [
        EvalResult(
            **about,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
            metric_args={
                "num_questions": result.num_questions,
                "interval_95": [round(end, 4) for end in interval],
            },
        )
        for kind, (name, value, interval) in shares.items()
    ]


def _head(stage: SharedStage) -> str:
    recipe = stage.recipe
    base = hub_id(recipe.model.name_or_path) or _shared_name(recipe.model.name_or_path)
    what = "All weights" if recipe.lora is None else "A LoRA adapter"
    stages = [f"`{each.name}` (loss on {_loss(each.loss_on)})" for each in recipe.stages]
    return (
        f"{what} of {base}, trained with sftkey on {_shared_name(recipe.data.source)}: "
        f"{', then '.join(stages[: stage.number])}. This is stage `{stage.name}`."
    )


def _loss(loss_on: str | Mapping[str, float]) -> str:
    if isinstance(loss_on, str):
        return {"completion": "the whole response", "key": "what follows the reasoning"}.get(
            loss_on, f"the {loss_on}"
        )
    return ", ".join(f"{name} x {weight:g}" for name, weight in loss_on.items())


def _table(recipe: Recipe, results: Mapping[str, StageResult]) -> str:
    """Write a row for each stage, with its intervals."""
    if not results:
        return "Its answers weren't graded."
    settings = recipe.eval
    way = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    lines = [
        f"Test questions, {way}, at most {settings.max_new_tokens} tokens. *Acc* is the share of "
        f"right answers (grader `{settings.grader}`), *Fmt* that of responses with the right tags; "
        "in brackets stands the 95% interval.",
        "",
        "| model | questions | Acc | Fmt |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        shares = ((result.acc, result.acc_interval), (result.fmt, result.fmt_interval))
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(share, *ends) for share, ends in shares]
        label = "before training" if name == "base" else f"after `{name}`"
        lines.append(f"| {label} | {result.num_questions} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _use(stage: SharedStage) -> str:
    response = stage.recipe.response
    tags = [json.dumps(tag, ensure_ascii=False) for tag in (*response.thinking, *response.answer)]
    text = (
        "The chat template holds the system message and the text around a question that the model "
        "was trained with. It writes its reasoning between {} and {}, and its answer between {} "
        "and {}."
    ).format(*tags)
    if stage.recipe.stages[stage.number - 1].context == "frozen":
        text += (
            " The adapter acts from the reasoning's last token on; what is before it is written "
            "without it, with the adapter in `context/` where there is one."
        )
    return text


def _counts(run: Path, recipe: Recipe) -> str:
    """Say how many rows there were, and what was left out."""
    file = run / "data.json"
    source = _shared_name(recipe.data.source)
    if not file.exists():
        return source
    counts = read_json(file)
    splits = [
        f"{name} {counts[name]}" for name in ("train", "validation", "test") if name in counts
    ]
    lines = [f"{source}: {', '.join(splits)} rows."]
    lines += [f"- left out, {why}: {each['count']}" for why, each in counts["dropped"].items()]
    return "\n".join(lines)


def _limits(stage: SharedStage, result: StageResult | None) -> str:
    recipe = stage.recipe
    lines = [
        f"- One seed ({recipe.seed}); another one gives other figures.",
        "- An interval says what other questions of the same kind could have given, and nothing of "
        "questions of another kind.",
    ]
    if result is not None:
        lines.append("- The answer is judged by a rule, the reasoning isn't.")
        if result.num_unparsed:
            lines.append(f"- In {result.num_unparsed} responses no answer could be read: wrong.")
        if result.num_never_stopped:
            lines.append(f"- {result.num_never_stopped} responses reached the longest length.")
    if recipe.model.quantization != "none":
        held = recipe.model.quantization
        lines.append(
            f"- It was trained and measured on a base in {held}; beside the published weights it "
            "may answer otherwise."
        )
    return "\n".join(lines)


def public_recipe(recipe: Recipe) -> str:
    """Write a recipe without the folders of this machine and without the judge's address."""
    section = recipe.eval.model_copy(update={"judge": None})
    model = _without_folders(recipe.model, ("name_or_path", "adapter", "chat_template"))
    data = _without_folders(recipe.data, ("source", "train", "validation", "test"))
    return recipe.model_copy(update={"eval": section, "model": model, "data": data}).to_yaml()


def _without_folders(section: Any, keys: tuple[str, ...]) -> Any:
    values = {key: getattr(section, key) for key in keys}
    texts = {key: _shared_name(value) for key, value in values.items() if isinstance(value, str)}
    return section.model_copy(update=texts)


def _shared_name(text: str) -> str:
    """Return the last part of a path of this machine; another name as it is."""
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or path.exists() else text
