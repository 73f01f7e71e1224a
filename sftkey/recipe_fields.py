"""The types of a recipe's fields: what a value must be by itself."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from sftkey.errors import did_you_mean, shown
from sftkey.upstream import as_number

SEGMENTS = ("prompt", "thinking", "answer_tag", "answer", "end")
GROUPS = ("completion", "key")
SPLIT_RULES = ("think_tags", "boxed", "hash_marks")


def _loss_on(value: Any) -> Any:
    words = ("completion", "key", "answer")
    if isinstance(value, str) and value in words:
        return value
    if not isinstance(value, dict):
        near = did_you_mean(value, words)
        raise ValueError(f"expected completion, key, answer or weights; got {shown(value)}{near}")
    known = (*SEGMENTS, *GROUPS)
    weights = {name: as_number(weight) for name, weight in value.items()}
    for name, weight in weights.items():
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"no segment or group has the name `{name}`{near}")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            got = shown(value[name])
            raise ValueError(f"expected 0 or a number above as weight of `{name}`; got {got}")
    if not any(weights.values()):
        raise ValueError(f"expected a weight above 0, else nothing is trained; got {shown(value)}")
    return {name: float(weight) for name, weight in weights.items()}


def _rows(given: Any) -> Any:
    value = as_number(given)
    share = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and value > 0 and value is not True
    if value is None or share or count or (isinstance(value, str) and value):
        return value
    expected = "a number of rows, a share below 1, a split or a file"
    raise ValueError(f"expected {expected}; got {shown(given)}")


def _grid(value: Any) -> Any:
    """Check each list of values; `5e-5` is text to YAML."""
    wanted: dict[str, tuple[str, Any]] = {
        "learning_rate": ("numbers above 0", lambda x: isinstance(x, int | float) and x > 0),
        "r": ("whole numbers above 0", lambda x: isinstance(x, int) and x > 0),
        "seed": ("whole numbers from 0", lambda x: isinstance(x, int) and x >= 0),
    }
    if not isinstance(value, dict) or not value:
        names = ", ".join(wanted)
        raise ValueError(f"expected lists of values for {names}; got {shown(value)}")
    grid = {}
    for name, values in value.items():
        if name not in wanted:
            near = did_you_mean(name, wanted) or f"; there are {', '.join(wanted)}"
            raise ValueError(f"a grid has no `{name}`{near}")
        expected, holds = wanted[name]
        numbers = [as_number(x) for x in values] if isinstance(values, list) else []
        if not numbers or not all(holds(x) and x is not True for x in numbers):
            raise ValueError(f"expected a list of {expected} as {name}; got {shown(values)}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"expected each {name} once; got {shown(values)}")
        grid[name] = numbers
    return grid


def _run_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        expected = "letters, digits, `.`, `-` and `_`, since a folder gets this name"
        raise ValueError(f"expected {expected}; got {shown(value)}")
    return value


def _stage_name(value: str) -> str:
    if value.lower() == "base":
        raise ValueError("`base` is the model before all stages; write another name")
    if value.isdigit():
        raise ValueError(f"expected a name that isn't a number; got {shown(value)}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        expected = "letters, digits, `-` and `_`, since files get this name"
        raise ValueError(f"expected {expected}; got {shown(value)}")
    return value


def _template(value: str) -> str:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        hint = "a brace of the text itself is written twice"
        raise ValueError(f"expected a template; got {shown(value)}: {error} ({hint})") from None
    if "" in columns:
        raise ValueError(f"expected a column's name in each pair of braces; got {shown(value)}")
    return value


def _split_rule(value: str) -> str:
    if value in SPLIT_RULES:
        return value
    expected = f"{', '.join(SPLIT_RULES)} or a regular expression with groups thinking and answer"
    got = shown(value) + did_you_mean(value, SPLIT_RULES)
    try:
        groups = re.compile(value).groupindex
    except re.error as error:
        raise ValueError(f"expected {expected}; got {got}: {error}") from None
    if not {"thinking", "answer"} <= groups.keys():
        raise ValueError(f"expected {expected}; got {got}")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"expected 64 hexadecimal digits; got {shown(value)}")
    return value


def _model_name(value: str) -> str:
    if value.startswith("pypi:") and not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[^\s=]+", value):
        raise ValueError(f"expected pypi:PACKAGE==VERSION; got {shown(value)}")
    return value


def _base_url(value: str) -> str:
    """Take an address; one with a user, a password or a query isn't written into an error."""
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", value):
        expected = "http://… or https://…, without a user, a password or a query"
        got = "one with them" if re.search("[@?]", value) else shown(value)
        raise ValueError(f"expected {expected}; got {got}")
    return value


def _variable_name(value: str) -> str:
    """Take the name of an environment variable; a key that stands here is not shown."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        expected = "the name of an environment variable in capitals, OPENAI_API_KEY say"
        raise ValueError(f"expected {expected}: the key itself never stands in a recipe")
    return value


Text = Annotated[str, Field(min_length=1)]
Number = Annotated[float, BeforeValidator(as_number)]
Count = Annotated[int, Field(ge=1)]
# YAML has lists where we have pairs, which types that guess at nothing would refuse.
Tags = Annotated[tuple[str, str], Field(strict=False)]
RunName = Annotated[str, AfterValidator(_run_name)]
StageName = Annotated[str, AfterValidator(_stage_name)]
ModelName = Annotated[Text, AfterValidator(_model_name)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Template = Annotated[str, AfterValidator(_template)]
SplitRule = Annotated[Text, AfterValidator(_split_rule)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Rows = Annotated[int | float | str | None, PlainValidator(_rows)]
Grid = Annotated[dict[str, list[Any]], PlainValidator(_grid)]
LossOn = Annotated[
    Literal["completion", "key", "answer"] | dict[str, float], PlainValidator(_loss_on)
]
