"""Run folders of the tiny model as training leaves them, their adapters random."""

from pathlib import Path
from typing import Any

import yaml

from sftkey.data.renderer import Renderer
from sftkey.models.adapters import DEFAULT, add_lora, save_adapter, save_model
from sftkey.models.device import Device
from sftkey.models.key_pass import KEY
from sftkey.models.loading import load_model, load_tokenizer
from sftkey.models.source import base_identity
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import Ledger, open_run
from sftkey.training.stage_model import stands_on
from tests.support.model_folders import write_rows
from tests.support.tiny import made_rows

LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
STAGES: tuple[dict[str, Any], ...] = (
    {"name": "completion", "loss_on": "completion"},
    {"name": "key", "loss_on": "key", "context": "frozen"},
)


def made_run(
    folder: Path,
    model: Path,
    *,
    num_trained: int = 2,
    quantization: str = "none",
    stages: tuple[dict[str, Any], ...] = STAGES,
    **sections: Any,
) -> tuple[Path, Recipe]:
    """Write a run whose first stages are trained: recipe, ledger, and random adapters.

    Args:
        folder: Where `runs/tiny` goes.
        model: A model folder.
        num_trained: Stages that are trained.
        quantization: Of the model.
        stages: The recipe's.
        sections: Others of the recipe.
    """
    import torch

    written: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(model), "quantization": quantization},
        "lora": LORA,
        "data": {"source": "rows.jsonl", "system": "You calculate.", "prompt": "Q: {question}"},
        "trainer": {"use_cpu": True},
        "stages": list(stages),
        "eval": {"max_new_tokens": 24},
        **sections,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(written))
    recipe = load_recipe(file)
    run = folder / "runs" / "tiny"
    ledger = open_run(recipe, run)
    base = base_identity(recipe.model)
    for number in range(num_trained):
        loaded = load_model(recipe.model, Device("cpu", 0, torch.float32))
        if recipe.lora is None:
            save_model(loaded, ledger.adapter(number), base)
        else:
            frozen = recipe.stages[number].context == "frozen"
            name, more = (KEY, stands_on(recipe, ledger, number)) if frozen else (DEFAULT, {})
            adapted = add_lora(loaded, recipe.lora, number + 1, name)
            save_adapter(adapted, ledger.adapter(number), base | more, name=name)
        ledger.stages[number].status = "trained"
    ledger.save()
    return run, recipe


def asking_run(folder: Path, model: Path, **settings: Any) -> Path:
    """Write a run over rows of its own, with one stage and a system message.

    `settings` are others of its evaluation.
    """
    source = write_rows(folder / "rows.jsonl", made_rows(20))
    data = {"source": source, "validation": 4, "test": 8, "system": "You count."}
    asks = {"max_new_tokens": 12, **settings}
    return made_run(folder, model, num_trained=1, stages=STAGES[:1], data=data, eval=asks)[0]


def ledger_of(run: Path, recipe: Recipe) -> Ledger:
    """Read a run's ledger."""
    return Ledger(run, recipe, main=False)


def frame_of(recipe: Recipe) -> Any:
    """Return a run's frame."""
    return Renderer.read(load_tokenizer(recipe.model), recipe.response)
