"""A stage's model as a folder that needs nothing beside it, and answers as its run asked it."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sftkey.activity import activity
from sftkey.data.renderer import Renderer, render, stop_ids
from sftkey.data.response import as_messages
from sftkey.data.sources import question_prompt
from sftkey.errors import FrameError, RunError, first_line
from sftkey.files import appearing, refuse_existing
from sftkey.generation.generate import generation_config
from sftkey.models.adapters import load_adapter, peft_warnings_logged
from sftkey.models.device import Device
from sftkey.models.loading import load_model, load_renderer, unpack
from sftkey.models.source import base_identity
from sftkey.recipe.schema import DataSection, Recipe

QUESTION = "How many are 2 and 2?"


def baked_template(renderer: Renderer, data: DataSection) -> str:
    """Return a chat template that makes the run's prompt of a user's question alone.

    Messages that have all of it already, a row's own system message for one, stay as they are.

    Raises:
        FrameError: The template doesn't write the run's prompt.
    """
    # The recipe's text before a question, after it, and between where it stands twice.
    pieces = as_messages(question_prompt(data, QUESTION))[-1]["content"].split(QUESTION)
    if renderer.kind == "plain":
        template = _plain_template(renderer, pieces)
    else:  # variables are set where the caller doesn't
        template = "".join(
            f"{{%- if {it} is not defined %}}{{%- set {it} = {_literal(value)} %}}{{%- endif %}}"
            for it, value in renderer.chat_template_kwargs.items()
        )
        template += _system(data.system) + _around(pieces)
        template += renderer.tokenizer.get_chat_template()
    _prove(renderer, data, template)
    return template


def _system(system: str | None) -> str:
    """Put a system message before messages that have none."""
    if system is None:
        return ""
    message = f"[{{'role': 'system', 'content': {_literal(system)}}}]"
    return (
        "{%- if messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{%- set messages = {message} + messages %}}{{%- endif %}}"
    )


def _around(pieces: list[str]) -> str:
    """Put the recipe's text around each question that hasn't got it."""
    if not any(pieces):
        return ""
    content = "message['content']"
    return (
        "{%- set sftkey = namespace(messages=[]) %}{%- for message in messages %}"
        f"{{%- if message['role'] == 'user' and {content} is string"
        f" and not {_is_whole(content, pieces)} %}}"
        "{%- set message = {'role': 'user', 'content': "
        f"{_put_around(content, pieces)}}} %}}{{%- endif %}}"
        "{%- set sftkey.messages = sftkey.messages + [message] %}{%- endfor %}"
        "{%- set messages = sftkey.messages %}"
    )


def _put_around(content: str, pieces: list[str]) -> str:
    """Join in Jinja what stands around a question with the question itself."""
    return "(" + f" ~ {content} ~ ".join(map(_literal, pieces)) + ")"


def _is_whole(content: str, pieces: list[str]) -> str:
    """Ask in Jinja whether a message's content has the text around a question already."""
    before, *between, after = pieces
    conditions = [
        f"{content}.startswith({_literal(before)})",
        f"{content}.endswith({_literal(after)})",
        *(f"{_literal(text)} in {content}" for text in between),
        f"{content} | length > {len(''.join(pieces))}",
    ]
    return f"({' and '.join(conditions)})"


def _plain_template(renderer: Renderer, pieces: list[str]) -> str:
    """Write a template for a model that was trained without one: the question, and nothing else."""
    tokens = renderer.tokenizer.convert_ids_to_tokens(list(renderer.bos_ids))
    bos = "".join(map(str, tokens))
    text = content = "messages[0]['content']"
    if any(pieces):
        whole = _is_whole(content, pieces)
        text = f"({content} if {whole} else {_put_around(content, pieces)})"
    refusal = "this model was trained on single questions without a system message"
    template = (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
        f"{{{{- raise_exception({_literal(refusal)}) }}}}{{%- endif %}}{{%- set text = {text} %}}"
    )
    if bos:
        first = str(renderer.tokenizer.bos_token or bos)
        template += (
            f"{{%- if not text.startswith({_literal(first)}) %}}"
            f"{{{{- {_literal(bos)} }}}}{{%- endif %}}"
        )
    return template + "{{- text }}"


def _literal(value: Any) -> str:
    """Write a value as Jinja reads it."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with another chat template."""
    other: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def asked_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]
) -> list[int]:
    """Return the ids that a program without our code feeds for a question or messages."""
    text = render(tokenizer, as_messages(prompt), {})
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _prove(renderer: Renderer, data: DataSection, template: str) -> None:
    """Compare what a question, and the run's whole prompt, become with what the run feeds."""
    baked = with_template(renderer.tokenizer, template)
    prompt = question_prompt(data, QUESTION)
    wanted = renderer.prompt_ids(prompt)
    for asked in (QUESTION, prompt):
        ids = asked_ids(baked, asked)
        if ids != wanted:
            got = renderer.tokenizer.decode(ids)
            raise FrameError(
                renderer.tokenizer.name_or_path or "tokenizer",
                f"the chat template can't carry the recipe's prompt: expected "
                f"{renderer.tokenizer.decode(wanted)!r}; got {got!r}",
                "serve the adapter beside its base, with the prompts of `sftkey prompts RUN`",
            )


def baked_generation_config(
    published: GenerationConfig, renderer: Renderer, recipe: Recipe
) -> GenerationConfig:
    """Return a generation config that answers as the run's evaluation did.

    Ends and first token are the published ones of the base, beside the run's own end of turn.
    """
    settings = recipe.eval
    config = generation_config(
        renderer.tokenizer,
        stop_ids(renderer, published.eos_token_id),
        settings.max_new_tokens,
        settings.temperature,
    )
    config.bos_token_id = published.bos_token_id
    return config


# How far the merged model's logits may lie from base and adapter, as a share of what the adapter
# changes: in 16 bits the merged weights are rounded.
TOLERANCE, TOLERANCE_16_BITS = 0.05, 0.5


@dataclass(frozen=True)
class Merged:
    """What a merge did to the logits of a probe: the largest differences."""

    effect: float  # of base and adapter from the base
    distance: float  # of the merged model from base and adapter
    dtype: str  # of the merged weights


@activity("writing the model")
def write_model(recipe: Recipe, weights: Path, output: Path) -> Merged | None:
    """Write a stage's model as a folder that answers as the run measured it.

    An adapter is merged into its base; a model that was trained whole is copied. The folder's chat
    template and generation config say what the recipe said beside the weights: system message, the
    text around a question, variables of the template, stop tokens, longest response.

    The base's weights are of the type they were published in, on the CPU. Where the run held them
    in NF4 they are unpacked from it: they have the values that the adapter was trained and
    measured on, from which the published ones differ by what quantization rounds away.

    Returns:
        What the merge did; None where there was none.

    Raises:
        RunError: The folder exists, or the merged model isn't base and adapter.
        ModelError: The weights can't be loaded.
    """
    refuse_existing(output)  # what may refuse comes before any weights are loaded
    renderer = load_renderer(recipe)
    template = baked_template(renderer, recipe.data)
    section = recipe.model.model_copy(update={"dtype": "auto", "unpack": "never"})
    device, found = Device("cpu", 0, torch.float32), None
    if recipe.lora is None:
        model: Any = load_model(section, device, folder=weights)
    else:
        base = load_model(section, device).eval()
        if section.quantization == "nf4":
            unpack(base)
        model, found = _merged(base, weights, recipe, renderer)
    config = baked_generation_config(model.generation_config, renderer, recipe)
    model.generation_config = config
    with appearing(output, model.get_memory_footprint()) as saving:
        model.save_pretrained(saving)
        with_template(renderer.tokenizer, template).save_pretrained(saving)
    return found


@activity("merging")
def _merged(base: Any, adapter: Path, recipe: Recipe, renderer: Renderer) -> tuple[Any, Merged]:
    """Merge an adapter into its base, and compare what that does to the logits of a probe."""
    probe = torch.tensor([renderer.encode([renderer.response.render("2 + 2 = 4", "4")])[0].ids])
    plain = _logits(base, probe)
    model: Any = load_adapter(base, adapter, base_identity(recipe.model), trainable=False)
    adapted = _logits(model.eval(), probe)
    try:
        with peft_warnings_logged():
            merged = model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        hint = "serve it beside its base, with peft or vLLM"
        raise RunError(str(adapter), f"can't be merged: {first_line(error)}", hint) from error
    found = Merged(
        effect=float((adapted - plain).abs().max()),
        distance=float((_logits(merged, probe) - adapted).abs().max()),
        dtype=str(merged.dtype).removeprefix("torch."),
    )
    _check(found, adapter)
    return merged, found


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits that are computed in float32, whatever the type of the weights.

    In 16 bits rounding alone would move them as far as a light adapter does.
    """
    with torch.no_grad(), _computing_in_float32(model):
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@contextmanager
def _computing_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Hold each module's own weights in float32 while it runs: never the whole model's."""
    kept: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            kept[module, name] = parameter.data
            parameter.data = parameter.data.float()

    def put_back(module: torch.nn.Module, *_: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = kept.pop((module, name))

    with ExitStack() as hooks:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(widen).remove)
                hooks.callback(module.register_forward_hook(put_back).remove)
        yield


def _check(found: Merged, adapter: Path) -> None:
    """Refuse a merge that did nothing, or something else."""
    if found.effect == 0:
        raise RunError(
            str(adapter),
            "this adapter changes no logit of its base, so a merge would do nothing",
            "was it trained? its stage's log.jsonl has the losses",
        )
    tolerance = TOLERANCE if found.dtype == "float32" else TOLERANCE_16_BITS
    if not found.distance <= tolerance * found.effect:
        raise RunError(
            str(adapter),
            f"merged into {found.dtype} weights the model isn't base and adapter: its logits are "
            f"off by up to {found.distance:.3g}, where the adapter changes up to "
            f"{found.effect:.3g}",
            "serve the adapter beside its base; nothing was written",
        )
