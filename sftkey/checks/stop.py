"""Will the model stop: is the trained end of turn one that it knows, and that stops generation?"""

from __future__ import annotations

import json
from collections.abc import Sequence

from sftkey.checks.findings import Finding
from sftkey.data.renderer import Renderer
from sftkey.models.facts import (
    EMBEDDINGS,
    HEADS,
    head_is_tied,
    published_stops,
    settings_left_aside,
)
from sftkey.models.source import ADAPTER_CONFIG, find_source, read_json
from sftkey.recipe.schema import Recipe


def stop_findings(recipe: Recipe, renderer: Renderer) -> list[Finding]:
    """Find an end of turn that doesn't stop generation, or that a base model never learned.

    A chat template may come with a base model that has never seen its end of turn, and LoRA on the
    linear layers trains neither its embedding nor its row of the output head.

    Raises:
        ModelError: The model's config can't be read.
    """
    published, verified = published_stops(recipe.model)
    if not verified:
        return [not_verified(recipe, renderer)]
    if not set(published).isdisjoint(renderer.end_ids):
        return []
    name, end = recipe.model.name_or_path, _shown(renderer, renderer.end_id)
    stops = ", ".join(_shown(renderer, number) for number in published) or "no token"
    what = f"{name}: generation stops at {stops}, and what ends a turn here is {end}"
    known = renderer.kind == "plain" and renderer.end_token == renderer.tokenizer.eos_token
    tied = not known and head_is_tied(recipe.model)
    if known or _row_is_trained(recipe, renderer.end_id, tied):
        hint = f"other engines need eos_token_id: {[renderer.end_id, *published]}"
        return [Finding("stop-not-published", (), what, hint, refuses=False)]
    what += ": the model may never have learned it, and the recipe doesn't train its row"
    return [Finding("end-not-learned", (), what, _way_out(renderer, published, tied))]


def generation_findings(recipe: Recipe) -> list[Finding]:
    """Name the published settings of generation that the answers of a run don't follow.

    Raises:
        ModelError: The model's generation config can't be read.
    """
    aside = settings_left_aside(recipe.model)
    if not aside:
        return []
    what = f"generation_config.json sets {', '.join(aside)}; answers here are written without them"
    hint = "nothing to do: they are measured alike for every model, and the file is saved on as is"
    message = f"{recipe.model.name_or_path}: {what}"
    return [Finding("generation-settings", (), message, hint, refuses=False)]


def not_verified(recipe: Recipe, renderer: Renderer) -> Finding:
    """Say that nobody has published what stops this model."""
    end = _shown(renderer, renderer.end_id)
    what = f"stop not verified: no generation config says whether {end} stops generation"
    hint = f"other engines need eos_token_id: {renderer.end_id}"
    message = f"{recipe.model.name_or_path}: {what}"
    return Finding("stop-not-verified", (), message, hint, refuses=False)


def _shown(renderer: Renderer, number: int) -> str:
    return f"{renderer.tokenizer.convert_ids_to_tokens(number)!r} ({number})"


def _row_is_trained(recipe: Recipe, end_id: int, tied: bool) -> bool:
    """Tell whether the row of the output head that writes the end of turn is trained."""
    if recipe.lora is None:
        return True
    settings = recipe.lora
    if recipe.model.adapter:
        source = find_source(recipe.model.adapter, config_file=ADAPTER_CONFIG)
        settings = {**(read_json(source, ADAPTER_CONFIG) or {}), **settings}
    indices = settings.get("trainable_token_indices") or {}
    by_module = indices if isinstance(indices, dict) else {EMBEDDINGS[0]: indices}
    names = [name for name, ids in by_module.items() if end_id in ids]
    names += settings.get("modules_to_save") or []
    carriers = (*EMBEDDINGS, *HEADS) if tied else HEADS
    return any(name.rpartition(".")[2] in carriers for name in names)


def _way_out(renderer: Renderer, published: Sequence[int], tied: bool) -> str:
    """Say how to end with what the model knows, or how to teach it this end."""
    row = [renderer.end_id]
    rows = str(row) if tied else f"{{embed_tokens: {row}, lm_head: {row}}}"
    train = f"train its row: lora.trainable_token_indices: {rows}"
    known = [renderer.tokenizer.convert_ids_to_tokens(number) for number in published]
    if renderer.kind == "chat" and renderer.tokenizer.eos_token in known:
        return f"response.frame: plain; or {train}"
    if not known:
        return train
    plain = "response.frame: plain, " if renderer.kind == "chat" else ""
    return f"{plain}response.end: {json.dumps(known[0])}; or {train}"
