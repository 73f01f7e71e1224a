"""Read a recipe's file and overrides, and tell two recipes apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sftkey.errors import RecipeError, did_you_mean, shown
from sftkey.recipe import yaml_io
from sftkey.recipe.rules import REFUSED_TRAINER_KEYS, Finding, check_together, check_upstream
from sftkey.recipe.schema import (
    DataSection,
    EvalSection,
    JudgeSection,
    ModelSection,
    OwnThinking,
    Recipe,
    ResponseSection,
    Section,
    StageSection,
)
from sftkey.recipe.yaml_io import Keys, RecipeSource

T = TypeVar("T", bound=Section)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), replaced: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe file, lay the overrides (`stages.key.trainer.max_steps=9`) over it, check it.

    Args:
        path: The file.
        overrides: As on the command line.
        replaced: Whole sections that a program puts in the place of the file's.

    Raises:
        RecipeError: With every problem of the file and the overrides.

    >>> recipe = load_recipe("gsm8k.yaml", ["trainer.learning_rate=1e-4"])
    >>> recipe.trainer["learning_rate"]
    0.0001
    """
    source = yaml_io.read(Path(path))
    for text in overrides:
        yaml_io.override(source, text)
    for name, section in (replaced or {}).items():
        yaml_io.replace(source, name, section)
    findings = [*check_upstream(source.data), *check_together(_with_defaults(source.data))]
    return read_as(Recipe, source, path, findings, _known_keys)


def _with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of the sections to plain values; a section of another form counts as empty.

    The rules between fields read these, so that they know no default of their own.
    """
    filled = {**data, "stages": []}
    for name in ("model", "data", "response"):
        filled[name] = _filled(data.get(name), _SECTIONS[name])
    stages = data.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        own = stage.get("own") if isinstance(stage, dict) else None
        added = {"own": _filled(own, OwnThinking)} if isinstance(own, dict) else {}
        filled["stages"].append(_filled(stage, StageSection) | added)
    return filled


def _filled(values: Any, section: type[Section]) -> dict[str, Any]:
    fields = section.model_fields.items()
    defaults = {name: field.default for name, field in fields if not field.is_required()}
    return defaults | (values if isinstance(values, dict) else {})


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Return the keys, as overrides write them, whose values differ between two recipes."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    if [stage.name for stage in old.stages] == [stage.name for stage in new.stages]:
        for plain in (before, after):
            plain["stages"] = {stage["name"]: stage for stage in plain["stages"]}
    return list(_changed(before, after))


def _changed(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after, f"{path}{key}.")
        elif before != after or (key in old) != (key in new):
            yield path + key


_SECTIONS: dict[str | int, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "response": ResponseSection,
    "stages": StageSection,
    "eval": EvalSection,
}


def _known_keys(keys: Keys) -> Iterable[str]:
    if keys[0] == "stages" and "own" in keys[:-1]:
        return OwnThinking.model_fields
    if keys[:2] == ("eval", "judge") and len(keys) > 2:
        return JudgeSection.model_fields
    return (_SECTIONS[keys[0]] if len(keys) > 1 else Recipe).model_fields


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that isn't empty",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "less_than": "a number below {lt}",
    "too_short": "at least one item",
    "too_long": "two items",
}


def read_as(
    kind: type[T],
    source: RecipeSource,
    path: str | Path,
    findings: Sequence[Finding],
    known_keys: Callable[[Keys], Iterable[str]],
) -> T:
    """Return what a file says as a model of this kind.

    Args:
        kind: The whole file's: a recipe, or a study.
        source: What was read of the file.
        path: The file.
        findings: What no field can tell alone.
        known_keys: Gives the keys beside an unknown one.
    """
    model, found = None, list(findings)
    try:
        model = kind.model_validate(source.data)
    except ValidationError as error:
        for details in error.errors():
            # Of a list whose only item is wrong pydantic says, besides, that it is too short.
            if not (details["type"] == "too_short" and details["input"]):
                found.append(_finding(details, known_keys))
    problems = source.problems + [source.problem(*each) for each in found]
    if model is None or problems:
        raise RecipeError(str(path), sorted(problems, key=lambda each: each.line or math.inf))
    return model


def _finding(details: ErrorDetails, known_keys: Callable[[Keys], Iterable[str]]) -> Finding:
    """Turn an error of pydantic's into our words."""
    kind, keys, got = details["type"], details["loc"], details["input"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        if keys[-1] == "trust_remote_code":
            return keys, f"refused: {REFUSED_TRAINER_KEYS['trust_remote_code']}"
        known = known_keys(keys)
        near = did_you_mean(keys[-1], known) or f"; the keys here are {', '.join(known)}"
        return keys, f"unknown key{near}"
    if kind == "value_error":
        return keys, str(context["error"])
    if kind == "literal_error":
        allowed = re.findall(r"'(\w+)'", context["expected"])
        expected = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
        return keys, f"expected {expected}; got {shown(got)}{did_you_mean(got, allowed)}"
    if kind == "missing" and isinstance(keys[-1], str):
        return keys, "missing"
    if kind == "missing":  # the second of a pair of tags
        return keys[:-1], f"expected two items; got {shown(got)}"
    # A number, or a template that names a column and was read as a mapping.
    braces = isinstance(got, dict) and got and all(each is None for each in got.values())
    unquoted = braces or isinstance(got, int | float)
    quotes = " (text is written in quotes)" if unquoted else ""
    if kind not in _EXPECTED:  # what pydantic finds by itself
        return keys, f"{details['msg']}; got {shown(got)}"
    expected = _EXPECTED[kind].format(**context)
    return keys, f"expected {expected}; got {shown(got)}{quotes if expected == 'text' else ''}"
