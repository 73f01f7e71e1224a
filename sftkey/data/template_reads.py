"""What a chat template reads, by its syntax tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension

if TYPE_CHECKING:
    from jinja2.parser import Parser

ASKED = "add_generation_prompt"
OF_ROWS = ("messages", "tools")  # the variables that a row brings itself
FUNCTIONS = frozenset({"raise_exception", "strftime_now"})


@dataclass(frozen=True)
class Reads:
    """What a chat template reads, by its syntax tree.

    Args:
        variables: The names that it looks up in what it is given.
        names: Its constant texts, and the attributes that it asks for.
        fixed_header: Whether asking for an answer adds the same text to every chat.
    """

    variables: frozenset[str]
    names: frozenset[str]
    fixed_header: bool


class _Generation(Extension):
    """`{% generation %}`, by which templates mark an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def read_template(template: str) -> Reads:
    """Return what a template reads.

    Raises:
        TemplateError: It is no Jinja.
    """
    env = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    tree = env.parse(template)
    variables = meta.find_undeclared_variables(tree) - set(env.globals)
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    fixed = _has_fixed_header(tree, variables - set(OF_ROWS))
    return Reads(frozenset(variables), frozenset(texts | attributes), fixed)


def _has_fixed_header(tree: nodes.Template, of_run: set[str]) -> bool:
    """Tell whether a template's end alone heeds `add_generation_prompt`, and nothing of the row.

    Args:
        tree: Its syntax tree.
        of_run: Variables that have one value in a whole run.
    """
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, nodes.If):
        return False
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    asked = [name for name in tree.find_all(nodes.Name) if name.name == ASKED]
    names = list(last.find_all(nodes.Name))
    own = (of_run - stored) | FUNCTIONS | {ASKED}
    return len(asked) == sum(name.name == ASKED for name in names) > 0 and all(
        name.ctx == "load" and name.name in own for name in names
    )
