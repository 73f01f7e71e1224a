"""The modules that a recipe's `lora` names; what matches nothing, or does nothing, is refused."""

import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftkey.bounds import SECONDS, Late, bounded
from sftkey.errors import ModelError, Problem, did_you_mean, shown

LINEAR = (torch.nn.Linear, Conv1D)  # bitsandbytes' linear modules are torch's, too
CARRIERS = (*LINEAR, torch.nn.Embedding)
SINGLE_ROWS = "trainable_token_indices trains single rows"
NEEDS_TIE = f"lora.ensure_weight_tying=true trains both; {SINGLE_ROWS}"


def refuse_unmatched(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Refuse what names no module or parameter of the model, or what would act on nothing.

    peft warns of some of it, and goes on without.
    """
    check_targets(model, lora.get("target_modules"))
    problems = [*_unmatched(model, lora), *_tied(model, lora)] or [*_none_left(model, lora)]
    if problems:
        raise ModelError("lora", [Problem(key, what) for key, what in problems])


def _unmatched(model: PreTrainedModel, lora: dict[str, Any]) -> Iterator[tuple[str, str]]:
    modules = {name for name, _ in model.named_modules() if name}
    targets = target_names(model, lora.get("target_modules") or [])
    yield from _absent("modules_to_save", lora.get("modules_to_save"), modules)
    parameters = {name for name, _ in model.named_parameters()}
    yield from _absent("target_parameters", lora.get("target_parameters"), parameters)
    yield from _exclusions(lora.get("exclude_modules"), targets)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            if not matched(key, rf"(.*\.)?({pattern})", targets):
                yield key, f"{pattern!r} matches no target module{_near(pattern, targets)}"
    yield from _layers(model, lora)
    if lora.get("layer_replication"):
        yield "layer_replication", "an adapter on replicated layers can't be merged"
    yield from _rows(model, lora.get("trainable_token_indices"), modules)


def _none_left(model: PreTrainedModel, lora: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Refuse targets of which other settings leave none, by peft's own rule."""
    targets, layers = lora.get("target_modules") or [], lora.get("layers_to_transform")
    names = sorted(target_names(model, targets))
    whole = [targets] if isinstance(targets, str) else sorted({*targets}.intersection(names))
    if whole and layers not in (None, []):
        names_of_all = ", ".join(short_names(linear_modules(model)))
        what = "peft reads it beside a list of target_modules without their layers alone"
        yield "layers_to_transform", f"{what}; got {whole[0]!r}; take from {names_of_all}"
        return
    wanted = short_names(set(names)) if isinstance(targets, str) else targets
    told: Any = SimpleNamespace(**{**lora, "target_modules": wanted})
    if names and not any(check_target_module_exists(told, name) for name in names):
        others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        beside = " and ".join(key for key in others if lora.get(key))
        yield "target_modules", f"{beside} leave none of the {len(names)} modules that it names"


def _absent(key: str, wanted: Iterable[str] | None, names: set[str]) -> Iterator[tuple[str, str]]:
    for each in wanted or ():
        if not any(_is_one_of(name, [each]) for name in names):
            yield key, f"the model has no {each}{_near(each, names)}"


def _near(word: str, names: set[str]) -> str:
    """Look for a near name among whole names, their last parts, and what lies between."""
    depth = word.count(".") + 1
    ends = {".".join(name.split(".")[-depth:]) for name in names}
    return did_you_mean(word, sorted(ends)) or did_you_mean(word, short_names(names))


def _exclusions(excluded: Any, targets: set[str]) -> Iterator[tuple[str, str]]:
    if isinstance(excluded, str):
        if not matched("exclude_modules", excluded, targets):
            yield "exclude_modules", f"{excluded!r} excludes none of the target modules"
        return
    yield from (
        (key, what.replace("the model has", "the target modules hold"))
        for key, what in _absent("exclude_modules", excluded, targets)
    )


def _layers(model: PreTrainedModel, lora: dict[str, Any]) -> Iterator[tuple[str, str]]:
    wanted: Any = lora.get("layers_to_transform")
    numbers = [wanted] if isinstance(wanted, int) else list(wanted or ())
    count = model.config.get_text_config().num_hidden_layers
    for number in numbers:
        if not 0 <= number < count:
            yield "layers_to_transform", f"expected layers from 0 to {count - 1}; got {number}"


def _rows(model: PreTrainedModel, rows: Any, modules: set[str]) -> Iterator[tuple[str, str]]:
    key = "trainable_token_indices"
    by_module = rows if isinstance(rows, dict) else {"": rows or []}
    embedding: Any = model.get_input_embeddings()
    size = embedding.num_embeddings
    if isinstance(rows, dict):
        yield from _absent(key, rows, modules)
    for ids in by_module.values():
        for number in ids:
            if not 0 <= number < size:
                yield key, f"expected ids from 0 to {size - 1}; got {number}"


def _tied(model: PreTrainedModel, lora: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Refuse half of a tied pair: peft trains a copy, and the other half stays as it was."""
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    ensured = bool(lora.get("ensure_weight_tying"))
    named = [(name.rpartition(".")[2], each) for name, each in model.named_modules()]
    pair = {name for name, each in named if each is inside or each is head}
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if not tied:
        if ensured:
            yield "ensure_weight_tying", "this model's head and embedding are not tied"
        return
    for each in lora.get("modules_to_save") or ():
        last = each.rpartition(".")[2]
        known = last in EMBEDDING_LAYER_NAMES  # of others peft ties no copy, whatever it is told
        if last in pair and not (ensured and known):
            what = f"{each} is tied to the model's other end, and peft would untie its copy"
            yield "modules_to_save", f"{what}; {NEEDS_TIE if known else SINGLE_ROWS}"
    rows = lora.get("trainable_token_indices")
    end = name_of(model, head).rpartition(".")[2]
    for each in rows if isinstance(rows, dict) else ():
        if each.rpartition(".")[2] == end:
            what = f"{each} is tied to the embedding, and peft would untie its rows"
            yield "trainable_token_indices", f"{what}; write the ids alone, as a list"
    touched = short_names(target_names(model, lora.get("target_modules") or []))
    for name in sorted(pair.intersection(touched)):
        what = f"{name} is tied to the output head, so that the adapter could not be merged"
        yield "target_modules", f"{what}; {SINGLE_ROWS}"


def check_targets(model: PreTrainedModel, targets: Any) -> None:
    """Refuse targets that match nothing (peft goes on if others do), and the output head."""
    one_by_one = [targets] if isinstance(targets, str) else [[each] for each in targets or ()]
    absent = sorted("".join(each) for each in one_by_one if not target_names(model, each))
    head = name_of(model, model.get_output_embeddings())
    names = re.split(r"[,\s]+", targets.strip()) if isinstance(targets, str) else []
    if absent and names and all(target_names(model, [each]) for each in names):
        what = "expected a list, since a text is a pattern of whole names"
        what += f"; got {shown(targets)}; write [{', '.join(names)}]"
    elif absent:
        what = f"the model has no linear module {', '.join(absent)}"
    elif targets and head in target_names(model, targets):
        what = f"{head} can't carry an adapter: the loss multiplies by its weights themselves"
    else:
        return
    linear = ", ".join(short_names(linear_modules(model)))
    raise ModelError("lora.target_modules", what, f"take from {linear}, or all-linear")


def target_names(model: torch.nn.Module, targets: str | list[str] | set[str]) -> set[str]:
    """Return the full names of the modules that peft would put an adapter on."""
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return linear_modules(model)
    names = {name for name, each in _modules(model) if isinstance(each, CARRIERS)}
    if isinstance(targets, str):
        return matched("target_modules", targets, names)
    return {name for name in names if _is_one_of(name, targets)}


def weights_of(model: torch.nn.Module, wanted: Iterable[str]) -> set[torch.nn.Parameter]:
    """Return the weights of the modules that `modules_to_save` names; tied modules share them."""
    named = (module for name, module in _modules(model) if _is_one_of(name, wanted))
    return {weight for module in named for weight in module.parameters()}


def _is_one_of(name: str, wanted: Iterable[str]) -> bool:
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def matched(key: str, pattern: str, names: set[str]) -> set[str]:
    """Return the names that a pattern of `lora` matches whole, as peft matches them."""
    try:
        with bounded(num_bytes=None):
            return {name for name in names if re.fullmatch(pattern, name)}
    except Late:
        what = f"{shown(pattern)} takes more than {SECONDS:g} seconds on the modules' names"
    except re.error as error:
        what = f"expected a regular expression; got {shown(pattern)}: {error}"
    hint = "write it without a repeat of what repeats itself, such as (a*)*"
    raise ModelError(f"lora.{key}", what, hint)


def linear_modules(model: Any) -> set[str]:
    """Return the full names of all linear modules but the output head."""
    linear = {name for name, each in _modules(model) if isinstance(each, LINEAR)}
    return linear - {name_of(model, model.get_output_embeddings())}


def _modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Return the modules under the names that they have without adapters."""
    for name, module in model.named_modules():
        if ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


def name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """Return the full name of a module of a model; nothing where it is none of its own."""
    return next((name for name, each in model.named_modules() if each is module), "")


def short_names(names: set[str]) -> list[str]:
    """Return the last parts of full module names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})
