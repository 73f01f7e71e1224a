"""Find a recipe by path or short name, read file and overrides, and tell two recipes apart."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sftkey.errors import RecipeError, did_you_mean, shown
from sftkey.recipe import yaml_io
from sftkey.recipe.rules import check_together
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
from sftkey.recipe.upstream_rules import REFUSED_TRAINER_KEYS, Finding, check_upstream
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
    _refuse_foreign(source.data, path)
    for text in overrides:
        yaml_io.override(source, text)
    for name, section in (replaced or {}).items():
        yaml_io.replace(source, name, section)
    findings = [*check_upstream(source.data), *check_together(_with_defaults(source.data))]
    return read_as(Recipe, source, path, findings, _known_keys)


def _refuse_foreign(data: dict[str, Any], path: str | Path) -> None:
    """Refuse a study's file, or a config of another trainer, in one line and not key by key."""
    if data.keys().isdisjoint(("model", "data", "stages", "trainer")):
        study = {"recipes", "arms"} <= data.keys()
        got = ", ".join([*list(data)[:3], *(["…"] if len(data) > 3 else [])])
        what = f"expected a recipe, with model, data and stages; got {got}"
        hint = "`sftkey adapt MODEL --data FILE` writes a recipe for your model and rows"
        raise RecipeError(str(path), what, f"`sftkey study {path}` runs it" if study else hint)


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
    "string_too_long": "text of at most {max_length} characters",
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
    """Return what a file says as a model of this kind."""
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
    # A number, or what YAML makes of braces, brackets and colons.
    unquoted = isinstance(got, int | float) or (got and isinstance(got, dict | list))
    quotes = " (text is written in quotes)" if unquoted else ""
    if kind not in _EXPECTED:  # what pydantic finds by itself
        return keys, f"{details['msg']}; got {shown(got)}"
    expected = _EXPECTED[kind].format(**context)
    return keys, f"expected {expected}; got {shown(got)}{quotes if expected == 'text' else ''}"


PACKAGE = Path(__file__).parents[1]
# A wheel carries the recipes inside the package; a checkout has them beside it.
RECIPES = next(
    (folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir()),
    PACKAGE / "recipes",
)


def recipe_files(folder: Path) -> Iterator[Path]:
    """Find the recipes; studies and their results lie beside them and are none."""
    for file in sorted(folder.rglob("*.yaml")):
        inside = file.relative_to(folder)
        if not file.name.startswith("study-") and "results" not in inside.parts:
            yield file


def short_names(folder: Path = RECIPES) -> dict[str, Path]:
    """Return the files by their short names: a recipe's folder and its own name."""
    return {short_name(file, folder): file for file in recipe_files(folder)}


def short_name(file: Path, folder: Path = RECIPES) -> str:
    """Return a recipe's short name; of one that lies elsewhere its path, as it was given."""
    if file.absolute().is_relative_to(folder):
        return file.absolute().relative_to(folder).with_suffix("").as_posix()
    return str(file)


def find_recipe(target: Path, folder: Path = RECIPES) -> Path:
    """Return the file that a command's RECIPE means: a path that exists, else a short name's.

    Raises:
        RecipeError: It is neither. A missing YAML file that resembles no short name is returned:
            whoever reads it says that there is none.
    """
    if os.path.exists(target):
        return target
    known, name = short_names(folder), target.as_posix()
    if name in known:
        return Path(shortest(known[name]))
    written = name.removesuffix(".yaml").removeprefix(f"{folder.name}/")
    meant = did_you_mean(written, known)
    if target.suffix in (".yaml", ".yml") and not meant:
        return target
    what = f"expected a recipe's file, or a name of `sftkey ls`; there is none{meant}"
    raise RecipeError(str(target), what, "`sftkey ls` shows the recipes that there are")


def describe(file: Path, folder: Path = RECIPES) -> dict[str, Any]:
    """Read what `ls` shows of a recipe; `gpu_memory_gib` is None until it has been measured."""
    recipe = load_recipe(file)
    head = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    measured = re.search(r"^# Fits:.*?([\d.]+) GiB", head[0], re.MULTILINE) if head else None
    return {
        "recipe": short_name(file, folder),
        "file": shortest(file),
        "name": recipe.name,
        "model": recipe.model.name_or_path,
        "data": " ".join(filter(None, (recipe.data.source, recipe.data.config, recipe.data.task))),
        "method": method(recipe),
        "stages": [stage.name for stage in recipe.stages],
        "gpu_memory_gib": float(measured[1]) if measured else None,
    }


def shortest(file: Path) -> str:
    """Write a path as `sftkey train` takes it from here: relative where that leads downwards."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith(os.pardir) else relative


def method(recipe: Recipe) -> str:
    """Name how the recipe trains: all weights, or an adapter over whole or quantized ones."""
    if recipe.lora is None:
        return "full"
    return "LoRA" if recipe.model.quantization == "none" else "QLoRA"
