"""Parts of the site that are made when it is built, so that they can't go stale.

A page has a comment, `<!-- made: recipe -->` for one, where the function of that name in `MADE`
writes: the recipe's keys from its schema, the commands from the command line, the library's names
from their docstrings. The home page is README.md.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
PICTURE = re.compile(r"\]\((?:\.\./)?((?:recipes|tests)/[\w./-]+\.png)\)")
# What the schema's types are called on the page; a type that has no name here stops the build.
WORDS = {
    **dict.fromkeys(["str", "Text", "ModelName", "Sha256", "BaseUrl", "VariableName"], "text"),
    "TemplateFile": "a file",
    **dict.fromkeys(["RunName", "StageName"], "a name"),
    **dict.fromkeys(["Number", "float"], "a number"),
    **dict.fromkeys(["int", "Seed"], "a whole number"),
    "bool": "true or false",
    "Count": "a whole number above 0",
    "Positive": "a number above 0",
    "Template": "a template",
    "SplitRule": "a rule",
    "Rows": "a count, a share, a split or a file",
    "Tags": "two texts",
    "Weights": "a mapping",
    "LossOn": "`completion`, `key`, `answer` or weights",
    "Grid": "lists by name",
    "ContextCache": "`auto`, `off` or a size",
    **dict.fromkeys(["ModelSection", "DataSection", "ResponseSection", "EvalSection"], "a section"),
    **dict.fromkeys(["StageSection", "OwnThinking", "EarlyStop", "JudgeSection"], "a section"),
    **dict.fromkeys(["OwnStrategy", "StudyRecipe", "Choice"], "a section"),
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that lie beside the code."""
    from mkdocs.structure.files import File

    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for name in PICTURE.findall(page.read_text(encoding="utf-8")):
            if not files.get_file_from_path(name):
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the parts that are made, and make links hold on the site as they do in a checkout."""
    whole = re.sub(r"<!-- made: (\w+) -->", lambda made: MADE[made[1]](), markdown)
    return PICTURE.sub(r"](\1)", whole)


def readme() -> str:
    """Give README.md as the home page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def recipe() -> str:
    """Describe every key of a recipe."""
    from sftkey.recipe.schema import Recipe

    return "\n".join(_sections(Recipe, "", "The top of the file"))


def study() -> str:
    """Describe every key of a study."""
    from sftkey.study.schema import Study

    return "\n".join(_sections(Study, "", "The top of a study's file"))


def refused() -> str:
    """List the upstream fields that a recipe may not set."""
    from sftkey.recipe import upstream_rules as rules

    of_lora = rules.REFUSED_LORA_KEYS | rules.UNSERVED_LORA_KEYS
    refusals = rules.REFUSED_TRAINER_KEYS, of_lora, rules.REFUSED_KEY_LORA_KEYS
    lines = ["| key | why, or what to write |", "| --- | --- |"]
    for place, keys in zip(("trainer", "lora", "stages[].lora"), refusals, strict=True):
        lines += [f"| `{place}.{key}` | {why} |" for key, why in keys.items()]
    return "\n".join(lines)


def strategies() -> str:
    """List the built-in strategies of a study with their stages."""
    from sftkey.study.schema import OWN_KEYS, STRATEGIES

    lines = ["| strategy | stages |", "| --- | --- |"]
    for name, strategy in STRATEGIES.items():
        stages = [
            {key: each[key] for key in each if key not in ("name", *OWN_KEYS)}
            for each in strategy.stages
        ]
        more = f", tags {_flow(dict(strategy.response))}" if strategy.response else ""
        more += ", as many trained tokens as the key stage" if strategy.matched else ""
        owned = {key for each in strategy.stages for key in OWN_KEYS if each.get(key)}
        more += ", as long as two stages, with one schedule" if "long" in owned else ""
        more += ", with the weight that makes the key half of all" if "balanced" in owned else ""
        lines.append(
            f"| `{name}` | {', then '.join(f'`{_flow(each)}`' for each in stages)}{more} |"
        )
    return "\n".join(lines)


def commands() -> str:
    """Describe every command with its arguments, options and examples."""
    from typer.main import get_command

    from sftkey.cli import COMMANDS, app

    lines = []
    examples = {function.__name__: each for function, each in COMMANDS.items()}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += [f"## sftkey {name}", "", str(command.help), ""]
        lines += ["| argument or option | what it does |", "| --- | --- |"]
        for each in command.params:
            shown = ", ".join(each.opts) if each.param_type_name == "option" else ""
            metavar = str(each.metavar or "") if shown else str(each.metavar or each.name).upper()
            lines.append(f"| `{f'{shown} {metavar}'.strip()}` | {_cell(each.help or '')} |")
        lines += ["", "```bash", *examples[name], "```", ""]
    return "\n".join(lines)


def library() -> str:
    """Describe every public name by its signature and its docstring."""
    import sftkey

    lines = []
    for name in sorted(getattr(sftkey, "__all__", [])):
        thing = getattr(sftkey, name)
        if not callable(thing):
            continue
        first, _, rest = (inspect.getdoc(thing) or "").partition("\n")
        lines += [f"## {name}", "", first, "", "```python", _signature(name, thing), "```", ""]
        if rest.strip():
            lines += ["```text", rest.strip(), "```", ""]
    return "\n".join(lines)


MADE: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (readme, recipe, study, refused, strategies, commands, library)
}


def sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """List a model and those inside it, each with the dotted place where it stands in a file."""
    yield place, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            listed = "[]" if "tuple" in str(field.annotation) else ""
            named = ".NAME" if "dict" in str(field.annotation) else ""
            yield from sections(inner, f"{place}{name}{listed}{named}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Find the models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _sections(model: type[BaseModel], place: str, title: str) -> Iterator[str]:
    for where, section in sections(model, place):
        yield f"### {f'`{where[:-1]}`' if where else title}\n"
        yield f"{(inspect.getdoc(section) or '').strip()}\n"
        yield "| key | value | default | what it does, and an example |"
        yield "| --- | --- | --- | --- |"
        for name, (kind, sentence) in described(section).items():
            inner = any(_models(section.model_fields[name].annotation))
            example = "" if inner else f"<br>{example_of(where + name)}"
            cells = kind, _default(section, name), sentence + example
            yield f"| `{name}` | {' | '.join(map(_cell, cells))} |"
        yield ""


def described(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Read each key's type and the sentence below it from the source of a model."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = getattr(getattr(after, "value", None), "value", None)
            sentence = " ".join(text.split()) if isinstance(text, str) else ""
            found[node.target.id] = (_words(node.annotation), sentence)
    return found


def _words(node: ast.expr) -> str:
    """Say in words which values a type takes."""
    if isinstance(node, ast.BinOp):  # X | None
        sides = [_words(side) for side in (node.left, node.right)]
        return " or ".join(side for side in sides if side)
    if isinstance(node, ast.Constant):
        return "" if node.value is None else f"`{node.value}`"
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = ast.unparse(node.value)
        if outer == "Literal":
            return ", ".join(_words(each) for each in inner)
        if outer == "Annotated":
            return _words(inner[0]) + _bounds(ast.unparse(node))
        return "a mapping" if outer == "dict" else f"a list, each {_words(inner[0])}"
    name = ast.unparse(node)
    return WORDS[name]


def _bounds(annotation: str) -> str:
    low = re.search(r"ge=(\d+)", annotation)
    above = re.search(r"gt=(\d+)", annotation)
    high = re.search(r"le=(\d+)", annotation)
    text = f" from {low[1]}" if low else f" above {above[1]}" if above else ""
    return text + (f" to {high[1]}" if high else "")


def _default(section: type[BaseModel], name: str) -> str:
    field = section.model_fields[name]
    if field.is_required():
        return "needed"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return f"`{_flow(field.default)}`"


@cache
def _examples() -> tuple[dict[str, Any], ...]:
    files = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
    return tuple(yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)


def example_of(key: str) -> str:
    """Give a key with a value that an example of docs/examples/ has."""
    for whole in _examples():
        for value in _at(whole, key.split(".")):
            return f"`{key.rpartition('.')[2]}: {_flow(value)}`"
    return ""


def _at(node: Any, keys: list[str]) -> Iterator[Any]:
    """Find the values at a dotted place; `stages[]` are all stages, `NAME` is any key."""
    if not keys:
        yield node
        return
    name, listed = keys[0].removesuffix("[]"), keys[0].endswith("[]")
    if not isinstance(node, dict):
        return
    found = node.values() if name == "NAME" else [node[name]] if name in node else []
    for value in found:
        for each in value if listed else [value]:
            yield from _at(each, keys[1:])


def _flow(value: Any) -> str:
    """Write a value as YAML in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(
        plain, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True
    )
    text = text.removesuffix("...\n").strip()
    return json.dumps(plain, ensure_ascii=False) if "\n" in text else text  # JSON is YAML, too


def _signature(name: str, thing: Any) -> str:
    try:
        return f"{name}{inspect.signature(thing)}"
    except (TypeError, ValueError):
        return name


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
