"""Will the model stop: is the trained end of turn one that it knows, and that stops generation?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.hub import cached_file

from sftkey.data.renderer import Frame
from sftkey.errors import ModelError, first_line
from sftkey.planning.findings import Finding
from sftkey.recipe.schema import ModelSection, Recipe
from sftkey.source import ADAPTER_CONFIG, Source, find_source, model_source

# What families call the module that reads tokens, and the one that writes them.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output")


def stop_ids_of(section: ModelSection) -> tuple[int, ...] | None:
    """Read which ids stop generation, as the model's makers say; None where they don't.

    Raises:
        ModelError: The model can't be found, or the file read.
    """
    generation = _json(model_source(section), "generation_config.json")
    if generation is None:
        return None
    eos = generation.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def head_is_tied(section: ModelSection) -> bool:
    """Read whether the output head shares its weights with the input embedding.

    Raises:
        ModelError: The model's config can't be read.
    """
    source = model_source(section)
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.commit or "main")
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ModelError(section.name_or_path, f"its config can't be read: {reason}") from error
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _json(source: Source, name: str) -> dict[str, Any] | None:
    """Read a file beside the weights; None where there is none, or none to be had."""
    file = cached_file(
        source.path,
        name,
        revision=source.commit,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if file is None:
        return None
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(file, f"expected JSON; got {error}") from error


def stop_findings(recipe: Recipe, frame: Frame) -> list[Finding]:
    """Find an end of turn that doesn't stop generation, or that a base model never learned.

    A chat template may come with a base model that has never seen its end of turn, and LoRA on the
    linear layers trains neither its embedding nor its row of the output head.

    Raises:
        ModelError: The model's config can't be read.
    """
    published = stop_ids_of(recipe.model)
    if published is None:
        return [not_verified(recipe, frame)]
    if frame.end_id in published:
        return []
    name, end = recipe.model.name_or_path, _shown(frame, frame.end_id)
    stops = ", ".join(_shown(frame, number) for number in published) or "no token"
    what = f"{name}: generation stops at {stops}, and what ends a turn here is {end}"
    known = frame.kind == "plain" and frame.end_token == frame.tokenizer.eos_token
    tied = not known and head_is_tied(recipe.model)
    if known or _row_is_trained(recipe, frame.end_id, tied):
        hint = f"other engines need eos_token_id: {[frame.end_id, *published]}"
        return [Finding("stop-not-published", (), what, hint, refuses=False)]
    what += ": the model may never have learned it, and the recipe doesn't train its row"
    return [Finding("end-not-learned", (), what, _way_out(frame, published, tied))]


def not_verified(recipe: Recipe, frame: Frame) -> Finding:
    """Say that nobody has published what stops this model."""
    end = _shown(frame, frame.end_id)
    what = f"stop not verified: no generation config says whether {end} stops generation"
    hint = f"other engines need eos_token_id: {frame.end_id}"
    message = f"{recipe.model.name_or_path}: {what}"
    return Finding("stop-not-verified", (), message, hint, refuses=False)


def _shown(frame: Frame, number: int) -> str:
    return f"{frame.tokenizer.convert_ids_to_tokens(number)!r} ({number})"


def _row_is_trained(recipe: Recipe, end_id: int, tied: bool) -> bool:
    """Tell whether the row of the output head that writes the end of turn is trained."""
    if recipe.lora is None:
        return True
    settings = recipe.lora
    if recipe.model.adapter:
        source = find_source(recipe.model.adapter, config_file=ADAPTER_CONFIG)
        settings = {**(_json(source, ADAPTER_CONFIG) or {}), **settings}
    indices = settings.get("trainable_token_indices") or {}
    by_module = indices if isinstance(indices, dict) else {EMBEDDINGS[0]: indices}
    names = [name for name, ids in by_module.items() if end_id in ids]
    names += settings.get("modules_to_save") or []
    carriers = (*EMBEDDINGS, *HEADS) if tied else HEADS
    return any(name.rpartition(".")[2] in carriers for name in names)


def _way_out(frame: Frame, published: Sequence[int], tied: bool) -> str:
    """Say how to end with what the model knows, or how to teach it this end."""
    row = [frame.end_id]
    rows = str(row) if tied else f"{{embed_tokens: {row}, lm_head: {row}}}"
    train = f"train its row: lora.trainable_token_indices: {rows}"
    known = [frame.tokenizer.convert_ids_to_tokens(number) for number in published]
    if frame.kind == "chat" and frame.tokenizer.eos_token in known:
        return f"response.frame: plain; or {train}"
    if not known:
        return train
    plain = "response.frame: plain, " if frame.kind == "chat" else ""
    return f"{plain}response.end: {json.dumps(known[0])}; or {train}"
