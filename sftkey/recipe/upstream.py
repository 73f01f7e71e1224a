"""The fields of `SFTConfig` and `LoraConfig`, read from the installed sources."""

import ast
import functools
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
)

from sftkey.errors import did_you_mean, shown

# What a run's figures come from, beside sftkey.
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
# Base classes first, so that a later class replaces what it declares anew.
SFT_CONFIG = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
LORA_CONFIG = (("peft", "tuners/lora/config.py", "LoraConfig"),)

# `5e-5` is a number to everybody but YAML 1.1, which wants `5.0e-5`.
NUMBER_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
MOST_LISTED = 10  # of more names a message gives the number, where one of them is near


def as_number(value: Any) -> Any:
    """Turn text such as `5e-5` into the number that it is; leave everything else."""
    if isinstance(value, str) and NUMBER_TEXT.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    return value


def size_bytes(text: str) -> int | None:
    """Read a size of memory or files, where a GB is 2^30 bytes; None of another text.

    >>> size_bytes("1.5GB"), size_bytes("12 mib"), size_bytes("12")
    (1610612736, 12582912, None)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(M|G)i?B\s*", text, re.IGNORECASE)
    return round(float(found[1]) * (2**20 if found[2] in "mM" else 2**30)) if found else None


def _as_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    return [_as_numbers(item) for item in value] if isinstance(value, list) else as_number(value)


class _Object:
    """Stands for upstream's own classes, of which YAML can hold no object."""


Number = Annotated[int | float, BeforeValidator(as_number)]  # a whole number stays one
Anything = Annotated[Any, BeforeValidator(_as_numbers)]
GENERICS: dict[str, Any] = {"list": list, "dict": dict, "tuple": tuple}
FROM_ENUM = "from an enum"
CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True)
TYPES: dict[str, Any] = {
    "int": int,
    "float": Number,
    "bool": bool,
    "str": str,
    "dict": dict[str, Anything],
    "list": list[Anything],
    "Any": Anything,
}
WORDS: dict[Any, str] = {
    int: "a whole number",
    Number: "a number",
    bool: "true or false",
    str: "text",
    list[Anything]: "a list",
    type(None): "null",
    _Object: "nothing that YAML can hold",
}


@dataclass(frozen=True)
class Field:
    """One field of an upstream config."""

    statement: ast.AnnAssign  # `name: type = default`
    owner: ast.ClassDef  # the class that it stands in
    file: Path  # the source of the class

    @property
    def default(self) -> Any:
        """The `8` of `= 8` or `= field(default=8, …)`; None where it isn't a plain value."""
        value = self.statement.value
        if isinstance(value, ast.Call):
            value = next((each.value for each in value.keywords if each.arg == "default"), None)
        if isinstance(value, ast.Name):
            value = _last_value(self.owner, value.id)
        try:
            return None if value is None else ast.literal_eval(value)
        except ValueError:
            return None

    @functools.cached_property
    def type(self) -> Any:
        """The type of what a recipe may say here."""
        return _type(self.statement.annotation, self.file, _listed_choices(self.statement.value))

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that stand in its type."""
        return tuple(each for each in _literals(self.type) if isinstance(each, str))

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type, config=CONFIG)

    def convert(self, value: Any) -> Any:
        """Turn a recipe's value into what upstream takes."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            near = did_you_mean(value, self.choices)
            many = near and len(self.choices) > MOST_LISTED
            expected = f"one of {len(self.choices)} names" if many else _described(self.type)
            raise ValueError(f"expected {expected}; got {shown(value)}{near}") from None


@functools.cache
def sft_config_fields() -> dict[str, Field]:
    """Read the fields of the installed `trl.SFTConfig` with those of its bases."""
    return _fields(SFT_CONFIG)


@functools.cache
def lora_config_fields() -> dict[str, Field]:
    """Read the fields that the installed `peft.LoraConfig` itself declares."""
    return _fields(LORA_CONFIG)


def _fields(classes: tuple[tuple[str, str, str], ...]) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for package, name, class_name in classes:
        file = _folder(package) / name
        owner = _class(file, class_name)
        if owner is None:
            raise LookupError(f"{file.name} has no class {class_name}")
        for statement in owner.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = Field(statement, owner, file)
    return fields


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _class(file: Path, name: str) -> ast.ClassDef | None:
    classes = (each for each in _tree(file).body if isinstance(each, ast.ClassDef))
    return next((each for each in classes if each.name == name), None)


@functools.cache  # a class body of thousands of nodes
def _last_value(owner: ast.ClassDef, name: str) -> ast.expr | None:
    """Find what a class body sets a name to: a later value is for newer libraries."""
    values = [
        each.value
        for each in ast.walk(owner)
        if isinstance(each, ast.Assign) and [_name(target) for target in each.targets] == [name]
    ]
    return values[-1] if values else None


def _listed_choices(value: ast.expr | None) -> tuple[str, ...]:
    """Read `field(metadata={"choices": [...]})`, where it is a plain list."""
    for node in ast.walk(value) if value else ():
        if isinstance(node, ast.Dict):
            for key, item in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    return _constants(item.elts) if isinstance(item, ast.List) else ()
    return ()


def _constants(nodes: list[ast.expr]) -> tuple[Any, ...]:
    return tuple(node.value for node in nodes if isinstance(node, ast.Constant))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _type(node: ast.expr, file: Path, choices: tuple[str, ...]) -> Any:
    """Build the type that an annotation writes; of text only the choices, if there are any."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Constant):
        return type(node.value)  # None
    if isinstance(node, ast.BinOp):
        return _union(_type(each, file, choices) for each in (node.left, node.right))
    if not isinstance(node, ast.Subscript):
        name = _name(node)
        if name == "str" and choices:
            return _one_of(choices)
        return TYPES.get(name) or _enum(name, file) or _Object
    name = _name(node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return _one_of(_constants(parts))
    types = [_type(each, file, choices) for each in parts]
    if name in ("Optional", "Union"):
        return _union([*types, type(None)] if name == "Optional" else types)
    kind = GENERICS[name][tuple(types)] if name in GENERICS else _Object
    # YAML has lists and no tuples, in a recipe and where the resolved one is written.
    return Annotated[kind, Strict(False), AfterValidator(list)] if name == "tuple" else kind


def _union(types: Iterable[Any]) -> Any:
    members = [
        member
        for each in types
        for member in (get_args(each) if get_origin(each) is Union else [each])
        if member is not _Object
    ]
    # `SchedulerType | str` means one of the enum's names.
    if any(FROM_ENUM in get_args(each) for each in members):
        members = [each for each in members if each is not str]
    return Union[tuple(members)] if members else _Object  # noqa: UP007


def _one_of(wanted: tuple[Any, ...]) -> Any:
    """Build the type of a few values, compared as written: to pydantic's own, 1 would be True.

    Brackets stand for any text: peft writes `pissa_niter_[number of iters]`.
    """
    forms = [re.sub(r"\\\[.*?\\\]", ".+", re.escape(repr(each))) for each in wanted]

    def check(value: Any) -> Any:
        if value is False and "no" in wanted:  # YAML reads a bare `no` so
            return "no"
        if not re.fullmatch("|".join(forms), repr(value)):
            raise ValueError("another value")
        return value

    return Annotated[Literal[wanted], PlainValidator(check)]


def _enum(name: str, file: Path) -> Any:
    """Build the type of an enum's values; None if the name is another class's."""
    for statement in _tree(file).body:
        if isinstance(statement, ast.ImportFrom) and name in [a.name for a in statement.names]:
            file = file.parents[max(statement.level, 1) - 1] / f"{statement.module}.py"
            break
    found = _class(file, name) if file.exists() else None
    if found is None or not any(_name(base).endswith("Enum") for base in found.bases):
        return None
    values = [each.value for each in found.body if isinstance(each, ast.Assign)]
    return Annotated[_one_of(_constants(values)), FROM_ENUM]


def _literals(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for part in get_args(kind):
            yield from _literals(part)


def _described(kind: Any) -> str:
    words = list(dict.fromkeys(_words(kind)))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _words(kind: Any) -> Iterator[str]:
    """Name each member of a type in the words of whoever writes YAML."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in WORDS:
        yield WORDS[kind]
    elif origin is Literal:
        yield from (str(each).lower() if isinstance(each, bool) else str(each) for each in parts)
    elif origin in (Union, Annotated):
        for each in parts if origin is Union else parts[:1]:
            yield from _words(each)
    elif origin is list:
        yield f"a list (each: {_described(parts[0])})"
    elif origin is tuple:
        yield "a list of " + " and ".join(map(_described, parts))
    else:
        yield "a mapping"
