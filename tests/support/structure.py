"""What the tests of the structure read from a package's sources: imports, and lengths."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def modules(root: Path) -> dict[str, Path]:
    """Map the dotted name of each module below a package's folder to its file."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Return the dotted name of everything that the sources import (absolute imports alone)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PROGRAM = "__name__ == '__main__'"
TYPES = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def reduced(tree: ast.Module, whole: bool) -> ast.Module:
    """Take out a program's block; unless `whole`, also functions and imports for types alone."""

    class Reduce(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
            return self.generic_visit(node) if whole else None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST:
            unrun = (PROGRAM,) if whole else (PROGRAM, *TYPES)
            if ast.unparse(node.test) in unrun:
                return self.generic_visit(ast.Module(node.orelse, []))
            return self.generic_visit(node)

    kept = Reduce().visit(tree)
    assert isinstance(kept, ast.Module)
    return kept


@cache
def graph(root: Path, whole: bool = True) -> dict[str, set[str]]:
    """Map each module to the modules and outside packages that it imports.

    Args:
        root: The package's folder.
        whole: Whether imports inside functions and imports for types alone count.
    """
    files = modules(root)
    edges = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = imported_names(reduced(tree, whole))
        edges[name] = {resolve(target, files) for target in imported} - {name}
    return edges


def resolve(target: str, files: dict[str, Path]) -> str:
    """Name the module that an import reads: one of ours, else the outside package."""
    inside = target
    while inside and inside not in files:
        inside = inside.rpartition(".")[0]
    return inside or target.split(".")[0]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return every module that can reach itself, with the way that it takes."""
    found = []
    for start in edges:
        ways = [[start, target] for target in sorted(edges[start])]
        seen: set[str] = set()
        while ways:
            way = ways.pop()
            if way[-1] == start:
                found.append(way)
                break
            if way[-1] not in seen:
                seen.add(way[-1])
                ways += [[*way, target] for target in sorted(edges.get(way[-1], ()))]
    return found


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Return all that a module imports, and what these import; its package is one of them."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [*edges.get(name, ()), *([name.rpartition(".")[0]] if "." in name else [])]
    return seen


def function_lengths(root: Path) -> Iterator[tuple[str, int]]:
    """Return each function and the number of its lines, the docstring not counted."""
    for name, file in modules(root).items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                end = node.end_lineno or node.lineno
                length = end - node.lineno + 1
                if ast.get_docstring(node):
                    doc = node.body[0]
                    length -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
                yield f"{name}.{node.name}", length
