"""A stage on the hub: weights, tokenizer and card in one commit."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from sftkey.errors import RunError, first_line
from sftkey.models.adapters import WEIGHTS_FILE
from sftkey.models.loading import load_renderer
from sftkey.models.source import ADAPTER_CONFIG
from sftkey.sharing.baking import baked_template, with_template
from sftkey.sharing.card import hub_id, model_card
from sftkey.sharing.merging import write_model
from sftkey.sharing.stage import SharedStage
from sftkey.training.run_folder import Ledger

ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS_FILE)


def push(stage: SharedStage, repo: str, *, private: bool = False, merged: bool = False) -> str:
    """Put a stage's adapter, or its merged model, on the hub; the address of the commit is given.

    Args:
        stage: A trained one.
        repo: `owner/name`; made, as a `private` one or not, if there is none.
        private: Whether others can't see it.
        merged: The model with the adapter merged into it, and not the adapter.

    Raises:
        RunError: The adapter's base is nowhere but here, or the hub doesn't take it.
        ModelError: The weights can't be loaded.
    """
    recipe = stage.recipe
    if recipe.lora is not None and not merged and hub_id(recipe.model.name_or_path) is None:
        raise RunError(
            str(stage.run),
            f"the adapter's base, {recipe.model.name_or_path}, isn't on the hub: nobody else could "
            "load it",
            "`--merged` pushes the merged model",
        )
    with TemporaryDirectory(prefix="sftkey-push-") as place:
        folder = Path(place) / "model"
        _write_files(stage, folder, merged)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"{recipe.name}, {stage.name}"
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise RunError(
                repo,
                f"the hub doesn't take it: {first_line(error)}",
                "`hf auth login` with a token that may write; a repository is `owner/name`",
            ) from error
    return str(done.commit_url)


def _write_files(stage: SharedStage, folder: Path, merged: bool) -> None:
    """Write the files of a repository into a new folder."""
    recipe = stage.recipe
    if merged or recipe.lora is None:
        write_model(recipe, stage.weights, folder)
    else:
        _copy_adapter(stage.weights, folder)
        if recipe.stages[stage.number - 1].context == "frozen" and stage.number > 1:
            before = Ledger(stage.run, recipe, main=False).adapter(stage.number - 2)
            _copy_adapter(before, folder / "context")
        renderer = load_renderer(recipe)
        template = baked_template(renderer, recipe.data)
        with_template(renderer.tokenizer, template).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(stage), encoding="utf-8")


def _copy_adapter(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
