"""Pydantic's errors as problems of a recipe, in our words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sftkey.errors import did_you_mean, shown
from sftkey.recipe.yaml_io import Keys

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


def found_by_models(
    error: ValidationError, known_keys: Callable[[Keys], Iterable[str]]
) -> list[tuple[Keys, str]]:
    """Turn pydantic's errors into our words.

    Args:
        error: Of a recipe or a study.
        known_keys: Gives the keys that there are where one is unknown.
    """
    # Of a list whose only item is wrong pydantic says, besides, that it is too short.
    wrong = [each for each in error.errors() if not (each["type"] == "too_short" and each["input"])]
    return [_finding(details, known_keys) for details in wrong]


def _finding(
    details: ErrorDetails, known_keys: Callable[[Keys], Iterable[str]]
) -> tuple[Keys, str]:
    kind, keys, got = details["type"], details["loc"], details["input"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
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
    quotes = " (text is written in quotes)" if isinstance(got, int | float) else ""
    if kind not in _EXPECTED:  # what pydantic finds by itself
        return keys, f"{details['msg']}; got {shown(got)}"
    expected = _EXPECTED[kind].format(**context)
    return keys, f"expected {expected}; got {shown(got)}{quotes if expected == 'text' else ''}"
