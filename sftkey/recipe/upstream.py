"""The fields of `SFTConfig` and `LoraConfig`, read from the installed sources."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.errors import did_you_mean, shown

# Base classes first, so that a later class replaces what it declares anew.
SFT_CONFIG = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
LORA_CONFIG = (("peft", "tuners/lora/config.py", "LoraConfig"),)

# `5e-5` is a number to everybody but YAML 1.1, which wants `5.0e-5`.
NUMBER_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
PLAIN_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
}


@dataclass(frozen=True)
class Field:
    """One field of an upstream config: its type, the texts it is limited to, its default."""

    annotation: ast.expr
    choices: tuple[str, ...] = ()
    default: Any = None

    def convert(self, value: Any) -> Any:
        """Give the value as upstream takes it.

        Raises:
            ValueError: The value isn't one of the field; the message says what was expected.
        """
        if isinstance(value, str) and self.choices and value not in self.choices:
            near = did_you_mean(value, self.choices)
            names = f"one of {len(self.choices)} names" if near else ", ".join(self.choices)
            raise ValueError(f"expected {names}; got {shown(value)}{near}")
        fits, converted = _convert(self.annotation, value)
        if not fits:
            raise ValueError(f"expected {_describe(self.annotation)}; got {shown(value)}")
        return converted


def as_number(value: Any) -> Any:
    """Turn text such as `5e-5` into the number that it is; leave everything else."""
    if isinstance(value, str) and NUMBER_TEXT.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    return value


@functools.cache
def sft_config_fields() -> dict[str, Field]:
    """Give the fields of the installed `trl.SFTConfig` with those of its bases."""
    return _fields(SFT_CONFIG)


@functools.cache
def lora_config_fields() -> dict[str, Field]:
    """Give the fields that the installed `peft.LoraConfig` itself declares."""
    return _fields(LORA_CONFIG)


def _fields(classes: tuple[tuple[str, str, str], ...]) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for package, file, name in classes:
        path = _folder(package) / file
        for statement in _class(path, name).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                choices = _listed_choices(statement.value) or _enum_choices(
                    path, statement.annotation
                )
                default = _default(statement.value)
                fields[statement.target.id] = Field(statement.annotation, choices, default)
    return fields


def _default(value: ast.expr | None) -> Any:
    """Read `= 8` or `= field(default=8, …)`; None where the default isn't a plain value."""
    if isinstance(value, ast.Call):
        value = next((each.value for each in value.keywords if each.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(path: Path, name: str) -> ast.ClassDef:
    for statement in _tree(path).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
    raise LookupError(f"{path.name} has no class {name}")


def _listed_choices(default: ast.expr | None) -> tuple[str, ...]:
    """Read `field(metadata={"choices": [...]})`, where it is a plain list."""
    for node in ast.walk(default) if default else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    return _texts(value.elts) if isinstance(value, ast.List) else ()
    return ()


def _enum_choices(path: Path, annotation: ast.expr) -> tuple[str, ...]:
    """Read the values of `SchedulerType` where the annotation is `SchedulerType | str`."""
    names = [_name(member) for member in _members(annotation)]
    enums = [name for name in names if name not in PLAIN_NAMES and _is_enum_name(name)]
    if "str" not in names or len(enums) != 1:
        return ()
    for statement in _tree(path).body:
        if isinstance(statement, ast.ImportFrom) and enums[0] in [a.name for a in statement.names]:
            path = path.parent / f"{statement.module}.py"
            break
    body = _class(path, enums[0]).body
    return _texts([statement.value for statement in body if isinstance(statement, ast.Assign)])


def _texts(nodes: list[ast.expr]) -> tuple[str, ...]:
    return tuple(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _is_enum_name(name: str) -> bool:
    return name.endswith(("Names", "Type", "Strategy", "Option"))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _members(node: ast.expr) -> list[ast.expr]:
    """Give the members of a union, in whichever way it is written; else the annotation itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _members(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return _members(node.left) + _members(node.right)
    if isinstance(node, ast.Subscript) and _name(node) == "Optional":
        return [*_members(node.slice), ast.Constant(None)]
    if isinstance(node, ast.Subscript) and _name(node) == "Union":
        return [member for part in _arguments(node) for member in _members(part)]
    return [node]


def _arguments(node: ast.expr) -> list[ast.expr]:
    """Give what stands in the brackets: `int` and `str` of `dict[int, str]`."""
    if not isinstance(node, ast.Subscript):
        return []
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _convert(annotation: ast.expr, value: Any) -> tuple[bool, Any]:
    for member in _members(annotation):
        fits, converted = _convert_member(member, value)
        if fits:
            return True, converted
    return False, value


def _convert_member(node: ast.expr, value: Any) -> tuple[bool, Any]:
    name = _name(node)
    if isinstance(node, ast.Constant):
        return value is node.value, value
    if name == "Literal":
        wanted = [arg.value for arg in _arguments(node) if isinstance(arg, ast.Constant)]
        return any(_is_literal(each, value) for each in wanted), value
    if name == "float":
        value = as_number(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, value
    if name in ("int", "bool"):
        return type(value).__name__ == name, value
    if name == "dict" or (name == "Any" and isinstance(value, dict)):
        return _convert_items(node, value)
    if name in ("list", "tuple") or (name == "Any" and isinstance(value, list)):
        return _convert_list(name, node, value)
    if name == "Any":
        return True, as_number(value)
    return (name == "str" or _is_enum_name(name)) and isinstance(value, str), value


def _is_literal(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, str) and isinstance(value, str):
        # peft writes `pissa_niter_[number of iters]` where a number stands in the value.
        return re.fullmatch(re.sub(r"\\\[.*?\\\]", ".+", re.escape(wanted)), value) is not None
    return type(value) is type(wanted) and value == wanted


def _convert_items(node: ast.expr, value: Any) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, value
    kind = _arguments(node)[1] if _arguments(node) else ast.Name("Any")
    pairs = {key: _convert(kind, item) for key, item in value.items()}
    return all(fits for fits, _ in pairs.values()), {key: pair[1] for key, pair in pairs.items()}


def _convert_list(name: str, node: ast.expr, value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list):
        return False, value
    kinds = _arguments(node) or [ast.Name("Any")]
    if name != "tuple":
        kinds = kinds * len(value)
    if len(kinds) != len(value):
        return False, value
    pairs = [_convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
    return all(fits for fits, _ in pairs), [item for _, item in pairs]


def _describe(annotation: ast.expr) -> str:
    parts: list[str] = []
    for node in _members(annotation):
        name = _name(node)
        if isinstance(node, ast.Constant):
            parts.append("null" if node.value is None else str(node.value))
        elif name == "Literal":
            wanted = [arg.value for arg in _arguments(node) if isinstance(arg, ast.Constant)]
            parts += [str(each).lower() if isinstance(each, bool) else str(each) for each in wanted]
        elif name == "list" and _arguments(node):
            parts.append(f"a list (each: {_describe(_arguments(node)[0])})")
        elif name == "tuple":
            parts.append("a list of " + " and ".join(map(_describe, _arguments(node))))
        elif name in PLAIN_NAMES:
            parts.append(PLAIN_NAMES[name])
        elif _is_enum_name(name):
            parts.append("text")
    parts = list(dict.fromkeys(parts)) or ["nothing that YAML can hold"]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]
