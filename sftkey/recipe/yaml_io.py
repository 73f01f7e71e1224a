"""YAML read with the place of each key, overridden by dotted paths, and written for people."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sftkey.errors import Problem, RecipeError, did_you_mean, shown
from sftkey.files import explained_disk, read_text, refuse_existing

Keys = tuple[str | int, ...]
MOST_BYTES = 1 << 20  # of a recipe
MOST_VALUES = 50_000  # in a recipe, those counted again that an alias repeats
MOST_DEEP = 50
MOST_DIGITS = 300  # of a whole number
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
NOT_DECIMAL = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class _Loader(yaml.SafeLoader):
    """YAML's safe types without dates: whoever writes `revision: 2024-08-06` means text."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line and the place that it sets."""

    text: str
    keys: Keys = ()


@dataclass
class RecipeSource:
    """What a recipe file and its overrides say, and where each part of it stands."""

    data: dict[str, Any]  # plain values, not yet checked
    # For the keys that lead to a value, its line or the override that set it.
    origins: dict[Keys, int | Override] = field(default_factory=dict)
    # What is wrong already in the writing, such as a key that stands twice.
    problems: list[Problem] = field(default_factory=list)

    def problem(self, keys: Keys, what: str) -> Problem:
        """Say what is wrong with a value, in terms of where the user wrote it."""
        origin: int | Override | None = None
        for length in range(len(keys), -1, -1):
            if origin := self.origins.get(keys[:length]):
                break
        if isinstance(origin, Override):
            inside = "" if keys == origin.keys else f"{dotted(keys)}: "
            return Problem(f"override {origin.text}", inside + what)
        return Problem(dotted(keys), what, line=origin)


def read(path: Path) -> RecipeSource:
    """Read a recipe file."""
    try:
        text = read_text(path, MOST_BYTES)
    except ValueError as error:
        what, hint = str(error), None
        if isinstance(error.__cause__, FileNotFoundError):
            what = "expected a recipe file; there is none"
            hint = "`sftkey ls` shows the recipes that there are"
        elif (path / "recipe.yaml").is_file():
            hint = f"a run's recipe is {path / 'recipe.yaml'}"
        raise RecipeError(str(path), what, hint) from None
    source = RecipeSource({})
    try:
        data = _load(text, (), source, None)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = Problem("", f"expected YAML; got {_reason(error)}", mark and mark.line + 1)
        raise RecipeError(str(path), [problem]) from None
    if not isinstance(data, dict):
        got = "an empty file" if data is None else shown(data)
        raise RecipeError(str(path), f"expected a mapping with the recipe's sections; got {got}")
    source.data = data
    return source


def write_new(path: Path, text: str) -> None:
    """Write a recipe into a new file, and never over one that came meanwhile."""
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with explained_disk(path.parent, litter=path), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(str(path), f"can't be written: {error.strerror}") from error


def replace(source: RecipeSource, name: str, section: Any) -> None:
    """Put a section of the program's own in the place of the source's; it stands on no line."""
    source.data[name] = section
    for old in [old for old in source.origins if old[:1] == (name,)]:
        del source.origins[old]


def override(source: RecipeSource, text: str) -> None:
    """Lay one `key=value` over the source; what can't be laid is added to its problems."""
    names, equals, value_text = text.partition("=")
    where = f"override {text}"
    if not equals or not names:
        source.problems.append(Problem(where, "expected key=value, such as trainer.max_steps=10"))
        return
    try:
        # An error names a stage `stages[1]`.
        named = re.sub(r"^stages\[(\d+)\]", r"stages.\1", names)
        parent, keys = _enter(source, named.split("."), Override(text))
    except ValueError as error:
        source.problems.append(Problem(where, str(error)))
        return
    for old in [old for old in source.origins if old[: len(keys)] == keys]:
        del source.origins[old]
    origin = Override(text, keys)
    source.origins[keys] = origin
    try:
        parent[keys[-1]] = _load(value_text, keys, source, origin)
    except (yaml.YAMLError, RecursionError) as error:
        source.problems.append(Problem(where, f"expected YAML after `=`; got {_reason(error)}"))


def _enter(source: RecipeSource, names: list[str], origin: Override) -> tuple[Any, Keys]:
    """Go down to the mapping or list that holds the last name, making the mappings on the way."""
    parent: Any = source.data
    keys: Keys = ()
    for position, name in enumerate(names):
        if isinstance(parent, list) and keys == ("stages",):
            key: str | int = _stage_number(parent, name)
        elif isinstance(parent, dict):
            key = name
        else:
            raise ValueError(f"expected a mapping at {dotted(keys)}; got {shown(parent)}")
        keys = (*keys, key)
        if position < len(names) - 1:
            if isinstance(parent, dict) and parent.get(name) is None:
                parent[name] = {}
                source.origins[keys] = Override(origin.text, keys)
            parent = parent[key]
    return parent, keys


def _stage_number(stages: list[Any], name: str) -> int:
    names = [str(stage.get("name")) if isinstance(stage, dict) else "" for stage in stages]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(stages):
        return int(name)
    known = did_you_mean(name, names) or f"; the stages are {', '.join(filter(None, names))}"
    raise ValueError(f"no stage `{name}`{known}")


def _load(text: str, keys: Keys, source: RecipeSource, origin: Override | None) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if origin and "#" in text[node.end_mark.index if node else 0 :]:
            raise _not_plain("a comment; text with ` #` is written in quotes", node)
        return None if node is None else _Walk(loader, source, origin).value(node, keys)
    finally:
        loader.dispose()


@dataclass
class _Walk:
    """Turns YAML nodes into plain values and notes where each key stands."""

    loader: _Loader
    source: RecipeSource
    origin: Override | None
    open_nodes: list[yaml.Node] = field(default_factory=list)
    num_values: int = 0

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            raise _not_plain(f"more than {MOST_VALUES:,} values, those of aliases counted", node)
        if len(self.open_nodes) > MOST_DEEP:
            raise _not_plain(f"values nested more than {MOST_DEEP} deep", node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if any(node is each for each in self.open_nodes):
            raise _not_plain("an alias inside of what it stands for", node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise _not_plain(f"a value of the kind {node.tag}", node)
        self.open_nodes.append(node)
        value = self.items(node, keys)
        self.open_nodes.pop()
        return value

    def scalar(self, node: yaml.Node) -> Any:
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
            raise _not_plain(f"a whole number of {len(node.value)} characters", node)
        if node.tag in NUMBERS and NOT_DECIMAL.fullmatch(node.value):
            what = "which YAML takes for a number in base 8 or 60"
            ways = "write a number without the zero, and text in quotes"
            raise _not_plain(f"{node.value}, {what}; {ways}", node)
        try:
            value = self.loader.construct_object(node)
        except ValueError:
            raise _not_plain(f"{shown(node.value)} as {node.tag}", node) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _not_plain(f"{node.value}, which is no finite number", node)
        if value is not None and not isinstance(value, str | int | float):
            raise _not_plain(f"a value of the kind {node.tag}", node)
        if isinstance(value, str) and not value.isascii():
            try:  # JSON writes what lies beyond 16 bits in two halves, which YAML leaves apart
                value = value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise _not_plain("half a character, such as \\ud800", node) from None
        return value

    def items(self, node: yaml.Node, keys: Keys) -> Any:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.note((*keys, number), item)
            return [self.value(item, (*keys, number)) for number, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if merge else self.value(key_node, keys)
            if merge or not isinstance(key, str):
                self.refuse(keys, key_node, f"expected a name as key; got {shown(key)}")
                continue
            if key in mapping:
                self.refuse((*keys, key), key_node, "this key stands twice")
            self.note((*keys, key), key_node)
            mapping[key] = self.value(value_node, (*keys, key))
        return mapping

    def note(self, keys: Keys, node: yaml.Node) -> None:
        self.source.origins[keys] = self.origin or node.start_mark.line + 1

    def refuse(self, keys: Keys, node: yaml.Node, what: str) -> None:
        problem = Problem(dotted(keys), what, line=node.start_mark.line + 1)
        self.source.problems.append(self.source.problem(keys, what) if self.origin else problem)


def _not_plain(what: str, node: yaml.Node | None) -> yaml.YAMLError:
    mark = None if node is None else node.start_mark
    return yaml.constructor.ConstructorError(problem=what, problem_mark=mark)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"values nested more than {MOST_DEEP} deep"
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return " ".join(str(reason).split())


class _Dumper(yaml.SafeDumper):
    """Writes text with line breaks in double quotes, which keep every kind of them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write(data: dict[str, Any]) -> str:
    """Write plain values so that `read` gives the very same."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def dotted(keys: Iterable[str | int]) -> str:
    """Write keys as users do: `stages[1].trainer.max_steps`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


WIDTH = 118
REASON_COLUMN = 34
# YAML folds or refuses these inside quotes.
UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class Line:
    """One key of a section, with the reason for its value."""

    key: str
    value: Any
    why: str = ""


WrittenSection = tuple[str, Sequence[Line]]


def write_recipe(head: Iterable[str], sections: Iterable[WrittenSection]) -> str:
    """Write a recipe: comment lines, then sections in order.

    A section without a name holds keys of the top level; the lines of `stages` are a list.
    """
    lines = [f"# {text}" for text in head]
    for name, entries in sections:
        if name and entries:
            lines.append(f"{name}:")
        indent = "  " if name else ""
        for entry in entries:
            lines += _entry(entry, indent, "- " if name == "stages" else f"{entry.key}: ")
    return "\n".join(lines) + "\n"


def _entry(entry: Line, indent: str, before: str) -> list[str]:
    text = f"{indent}{before}{inline(entry.value)}"
    if not entry.why:
        return [text]
    beside = f"{text:<{REASON_COLUMN - 2}}  # {entry.why}"
    if len(beside) <= WIDTH:
        return [beside]
    above = textwrap.wrap(entry.why, WIDTH - len(indent) - 2, break_on_hyphens=False)
    return [*(f"{indent}# {line}" for line in above), text]


def inline(value: Any) -> str:
    """Write a value on one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)}: {inline(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value)  # numbers, booleans and null are JSON's


def _number(value: float) -> str:
    """Write a number as YAML reads one: `1.0e-4`, where Python has `1e-05`."""
    digits, e, power = repr(value).partition("e")
    if value and abs(value) < 1e-3 and not e:
        digits, e, power = f"{value:e}".partition("e")
        digits = digits.rstrip("0")
    if not e:
        return digits
    digits = digits if "." in digits else f"{digits}.0"
    digits = f"{digits}0" if digits.endswith(".") else digits
    return f"{digits}e{int(power):+d}"


def _text(value: str) -> str:
    """Write text bare where it is read as such, else in quotes."""
    if re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII) and yaml.safe_load(value) == value:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
