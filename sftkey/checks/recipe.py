"""What the gate reads off a recipe and its model's configs: open choices, rates, ends of turn."""

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from sftkey.checks.findings import Finding
from sftkey.checks.rehearsal import quiet
from sftkey.data.labels import weights_by_segment
from sftkey.data.renderer import Renderer
from sftkey.data.response import Segment
from sftkey.errors import ModelError, first_line, shown
from sftkey.models.device import launched_with
from sftkey.models.facts import Skeleton, published_stops, skeleton_of
from sftkey.models.source import (
    ADAPTER_CONFIG,
    UNREADABLE,
    find_source,
    model_source,
    read_json,
)
from sftkey.recipe.rules import DECIDE, undecided
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import trainer_setting
from sftkey.recipe.yaml_io import dotted

# For all weights between the 5e-6 of arXiv 2512.21017 and the 2e-5 of TRL's example, for LoRA the
# 2e-4 of the same example (trl/scripts/sft.py, 1.16).
USUAL_LEARNING_RATES = {"full fine-tuning": 1e-5, "LoRA": 2e-4}
FACTOR = 10.0
# What families call the module that reads tokens, and the one that writes them.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output")
# Settings of generation that say where texts begin and end, and what changes no token.
KEPT = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache")


def recipe_findings(recipe: Recipe, env: Mapping[str, str]) -> Iterator[Finding]:
    """Find what no row and no file is needed for.

    `accelerate launch` says in `env` what its config asks for.
    """
    for keys, value in undecided(recipe):
        what = f"{dotted(keys)} is still to be decided: {value}"
        yield Finding("undecided", (), what, DECIDE)
    yield from _escapes(recipe)
    yield from _told(recipe)
    yield from _launcher(recipe, env)
    yield from _learning_rates(recipe)
    yield from _epochs(recipe)
    if recipe.model.adapter is None:
        yield from _end_untrained(recipe)


# What double quotes make of `\boxed`, `\frac` or `\right`; and no quotes, or single ones, of `\n`.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f].*|\r(?!\n).*")
UNREAD_BREAK = re.compile(r"\\n(?![a-z]).*")


def _escapes(recipe: Recipe) -> Iterator[Finding]:
    """Find texts of which YAML's quotes have made something else than was meant."""
    names = ("system", "prompt", "thinking", "answer", "split_rule")
    texts = {f"data.{name}": getattr(recipe.data, name) or "" for name in names}
    for name in ("thinking", "answer"):
        pair = getattr(recipe.response, name)
        texts |= {f"response.{name}[{number}]": text for number, text in enumerate(pair)}
    for place, text in texts.items():
        if found := CONTROL.search(text):
            what = "a control character, which double quotes make of a backslash and a letter"
            hint = "write the text in single quotes, or its backslashes twice"
            yield Finding("escape", (), f"{place}: holds {what}: {shown(found[0])}", hint)
        elif place != "data.split_rule" and (found := UNREAD_BREAK.search(text)):
            what = "holds a backslash and an n, and no line break, which only double quotes make"
            hint = "write the text in double quotes"
            sure = place.startswith("response.")
            yield Finding("escape", (), f"{place}: {what}: {shown(found[0])}", hint, refuses=sure)


def _told(recipe: Recipe) -> Iterator[Finding]:
    """Note a prompt that holds what the model is to write."""
    columns = {}
    for name in ("prompt", "thinking", "answer"):
        text = getattr(recipe.data, name) or ""
        columns[name] = {field for _, field, _, _ in string.Formatter().parse(text) if field}
    for name in ("thinking", "answer"):
        for column in sorted(columns["prompt"] & columns[name]):
            what = f"data.prompt holds {{{column}}}, which is the {name} (data.{name})"
            hint = "leave it out of the prompt, or the model reads what it is to find"
            yield Finding("told", (), what, hint, refuses=False)


def _launcher(recipe: Recipe, env: Mapping[str, str]) -> Iterator[Finding]:
    """Refuse a launcher's config that can't serve the recipe, and name one that can."""
    deepspeed = launched_with("DEEPSPEED", env)
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if deepspeed and stage == "3" and recipe.model.quantization == "nf4":
        what = "model.quantization: ZeRO-3 can't shard nf4 weights"
        hint = (
            "launch with accelerate_configs/fsdp2.yaml, which does, or with deepspeed_zero2.yaml, "
            "where each GPU holds them all; or write model.quantization=none"
        )
        yield Finding("launcher", (), what, hint)
    if deepspeed or launched_with("FSDP", env):
        what = "FSDP and DeepSpeed cut the model up: its answers aren't written or graded"
        hint = f"after it, on one process: sftkey evaluate runs/{recipe.name}"
        yield Finding("not-graded", (), f"{what} in the run", hint, refuses=False)


def _learning_rates(recipe: Recipe) -> Iterator[Finding]:
    """Warn of a learning rate far from what its kind of training usually takes."""
    kind = "full fine-tuning" if recipe.lora is None else "LoRA"
    usual = USUAL_LEARNING_RATES[kind]
    for stage in recipe.stages:
        rate = trainer_setting(recipe.stage_trainer(stage), "learning_rate")
        far = FACTOR * 1.001  # a rate that is just ten times off isn't far, however it is rounded
        if usual / far <= rate <= usual * far:
            continue
        side, where = "above" if rate > usual else "below", f"stages.{stage.name}"
        far_off = f"lies more than {FACTOR:g} times {side} what {kind} usually takes"
        what = f"{where}: the learning rate {rate:g} {far_off}"
        hint = f"usual is around {usual:g}: {where}.trainer.learning_rate={usual:g}"
        yield Finding("learning-rate", (), what, hint, refuses=False)


def _epochs(recipe: Recipe) -> Iterator[Finding]:
    """Say where a stage ends by its steps, and not by the epochs that stand beside them."""
    for stage in recipe.stages:
        trainer, shared = recipe.stage_trainer(stage), "max_steps" not in stage.trainer
        steps, epochs = trainer_setting(trainer, "max_steps"), trainer.get("num_train_epochs")
        if steps > 0 and epochs is not None and (shared or "num_train_epochs" in stage.trainer):
            what = f"stages.{stage.name}: max_steps ends it after {steps:,} steps"
            hint = "leave one of them out"
            message = f"{what}, and num_train_epochs, {epochs:g}, does nothing"
            yield Finding("epochs-unused", (), message, hint, refuses=False)


def _end_untrained(recipe: Recipe) -> Iterator[Finding]:
    """Refuse stages of which none trains the end of turn, unless an adapter has before them."""
    if not any(weights_by_segment(stage.loss_on)[Segment.END] for stage in recipe.stages):
        yield Finding(
            "end-untrained",
            (),
            "stages: none of them trains the end of turn, so the model won't learn to stop there",
            "loss_on: key in the last stage, or weights with `end`; model.adapter goes on from an "
            "adapter that was trained to stop",
        )


WHOLE = "take the model's weights that aren't quantized"


def quantized_findings(recipe: Recipe, skeleton: Skeleton) -> Iterator[Finding]:
    """Find what keeps weights that come quantized from being loaded, or trained.

    transformers is asked, of this machine: a missing package refuses the recipe, but a missing GPU
    doesn't, since the run may find one.

    Raises:
        ModelError: Names the setting of config.json, and what was expected.
    """
    name, told = recipe.model.name_or_path, getattr(skeleton.config, "quantization_config", None)
    if not isinstance(told, dict):
        return
    where, method = "config.json: quantization_config", skeleton.quantized
    try:
        with quiet():
            quantizer: Any = AutoHfQuantizer.from_config(told, pre_quantized=True)
            quantizer.validate_environment(device_map=None)
            whole = getattr(quantizer.quantization_config, "dequantize", False)
            trained = bool(whole or quantizer.is_trainable)
    except (*UNREADABLE, RuntimeError) as error:
        hint = f"install what it names, or {WHOLE}" if isinstance(error, ImportError) else WHOLE
        if not isinstance(error, RuntimeError) or torch.cuda.is_available():
            raise ModelError(name, f"{where}: {first_line(error)}", hint) from error
        what = f"{name}: whether weights of {method} can be loaded wasn't tried without a GPU"
        yield Finding("not-rehearsed", (), f"{what}: {first_line(error)}", WHOLE, refuses=False)
        return
    if not trained:
        raise ModelError(name, f"{where}: transformers can't train weights of {method}", WHOLE)
    if recipe.lora is None and not whole:
        what = f"`lora: null` trains the model's own weights; got some that {method} quantized"
        raise ModelError(name, f"{where}: {what}", f"write lora: {{…}}, or {WHOLE}")
    is_nf4 = told.get("load_in_4bit") and told.get("bnb_4bit_quant_type") == "nf4"
    if recipe.model.quantization == "nf4" and not is_nf4:
        what = f"model.quantization: the weights come quantized already, by {method}; got nf4"
        raise ModelError(name, what, f"write model.quantization=none, or {WHOLE}")
    if not whole and not is_nf4:
        what = f"{name}: stages are tried on whole weights, and not on those of {method}"
        yield Finding("not-rehearsed", (), what, "its first step will tell", refuses=False)


def stop_findings(recipe: Recipe, renderer: Renderer) -> Iterator[Finding]:
    """Find an end of turn that doesn't stop generation, or that a base model never learned.

    A chat template may come with a base model that has never seen its end of turn, and LoRA on the
    linear layers trains neither its embedding nor its row of the output head.
    """
    published, verified = published_stops(recipe.model)
    inside = renderer.written_special_ids[: -len(renderer.end_ids)]
    if early := [number for number in inside if number in published]:
        what = f"{recipe.model.name_or_path}: generation stops at {_shown(renderer, early[0])}"
        hint = "choose response.thinking and response.answer without it"
        yield Finding("stop-inside", (), f"{what}, which stands in the response", hint)
    if not verified:
        yield not_verified(recipe, renderer)
    elif set(published).isdisjoint(renderer.end_ids):
        yield _other_stop(recipe, renderer, published)
    settings = read_json(model_source(recipe.model), "generation_config.json") or {}
    aside = sorted(
        name
        for name, value in settings.items()
        if name not in KEPT and not name.startswith("_") and value not in (None, False)
    )
    if aside:
        what = f"generation_config.json sets {', '.join(aside)}; answers here are written without"
        message = f"{recipe.model.name_or_path}: {what} them"
        hint = "nothing to do: they are measured alike for every model, and the file is saved on"
        yield Finding("generation-settings", (), message, f"{hint} as is", refuses=False)


def _other_stop(recipe: Recipe, renderer: Renderer, published: Sequence[int]) -> Finding:
    """Refuse an end of turn that the model may not know, or note that others don't stop there."""
    name, end = recipe.model.name_or_path, _shown(renderer, renderer.end_id)
    stops = ", ".join(_shown(renderer, number) for number in published)
    what = f"{name}: generation stops at {stops}, and what ends a turn here is {end}"
    known = renderer.kind == "plain" and renderer.end_token == renderer.tokenizer.eos_token
    tied = not known and getattr(skeleton_of(recipe.model).text, "tie_word_embeddings", False)
    if known or _row_is_trained(recipe, renderer.end_id, tied):
        hint = f"other engines need eos_token_id: {[renderer.end_id, *published]}"
        return Finding("stop-not-published", (), what, hint, refuses=False)
    what += ": the model may never have learned it, and the recipe doesn't train its row"
    return Finding("end-not-learned", (), what, _way_out(renderer, published, tied))


def not_verified(recipe: Recipe, renderer: Renderer) -> Finding:
    """Say that nobody has published what stops this model."""
    end = _shown(renderer, renderer.end_id)
    what = f"stop not verified: no generation config says whether {end} stops generation"
    hint = f"other engines need eos_token_id: {renderer.end_id}"
    message = f"{recipe.model.name_or_path}: {what}"
    return Finding("stop-not-verified", (), message, hint, refuses=False)


def _shown(renderer: Renderer, number: int) -> str:
    token = renderer.tokenizer.convert_ids_to_tokens(number)
    return f"{number}, no token of this tokenizer" if token is None else f"{token!r} ({number})"


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
    known = list(filter(None, map(renderer.tokenizer.convert_ids_to_tokens, published)))
    if not known:
        return f"take the generation_config.json that belongs to the model; or {train}"
    if renderer.kind == "chat" and renderer.tokenizer.eos_token in known:
        return f"response.frame: plain; or {train}"
    plain = "response.frame: plain, " if renderer.kind == "chat" else ""
    return f"{plain}response.end: {json.dumps(known[0])}; or {train}"
