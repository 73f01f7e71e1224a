"""The package keeps its structure: imports in order, no circles, small files, fast commands."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.structure import cycles, function_lengths, graph, modules, reachable

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sftkey"
# Data flows down this list: each may import itself and those above it.
ORDER = (
    "errors",
    "files",
    "bounds",
    "activity",
    "tables",
    "recipe",
    "data",
    "models",
    "generation",
    "memory_plan",
    "training",
    "evaluation",
    "checks",
    "adapt",
    "diagnosis",
    "pipeline",
    "study",
    "sharing",
    "commands",
    "cli",
    "train",
    "__main__",
)
RECIPES_LIBRARIES = {"pydantic", "pydantic_core", "yaml", *sys.stdlib_module_names}
HEAVY = {
    *("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate"),
    "openai",
}
LIGHT = [
    "sftkey.cli",
    "sftkey.train",
    "sftkey.commands.adapt",
    "sftkey.commands.recipes",
    "sftkey.commands.results",
    "sftkey.commands.study",
    "sftkey.recipe",
    "sftkey.data.response",
    "sftkey.data.splits",
    "sftkey.diagnosis.rule",
    "sftkey.evaluation.comparison",
    "sftkey.evaluation.grading",
    "sftkey.evaluation.judge",
    "sftkey.evaluation.results",
    "sftkey.evaluation.statistics",
    "sftkey.evaluation.thinking",
    "sftkey.study.schema",
]
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 45


def wrong_directions(root: Path) -> list[str]:
    """List the imports that go up the list, those inside functions too, and who isn't on it."""
    wrong = []
    for module, imported in graph(root).items():
        if module == root.name:
            continue
        here = module.split(".")[1]
        if here not in ORDER:
            wrong.append(f"{module}: not in the list")
            continue
        places = {target.split(".")[1] for target in imported if target.startswith("sftkey.")}
        below = sorted(places & {*ORDER[ORDER.index(here) + 1 :]})
        wrong += [f"{module} imports {place}" for place in below]
    return wrong


def heavy_at_import(root: Path, *names: str) -> dict[str, set[str]]:
    """Name the heavy libraries that importing each of some modules would import."""
    edges = graph(root, whole=False)
    return {name: reachable(edges, name) & HEAVY for name in names}


def test_imports_follow_the_design() -> None:
    """No module imports from a package below its own, not even inside a function."""
    assert wrong_directions(PACKAGE) == []


def test_recipes_need_the_standard_library_pydantic_and_yaml() -> None:
    """The check of a recipe's form can't come to import torch, not even inside a function."""
    edges = graph(PACKAGE)
    for module in ("sftkey.errors", "sftkey.recipe"):
        outside = {name for name in reachable(edges, module) if not name.startswith("sftkey")}
        assert outside <= RECIPES_LIBRARIES


def test_no_import_is_circular() -> None:
    """No module reaches itself, imports inside functions counted."""
    assert cycles(graph(PACKAGE)) == []


def printing(root: Path) -> list[str]:
    """List where a module below the commands prints, or ends the process.

    `training/log.py` shows a run's progress with rich, which is no `print`.
    """
    found = []
    for module, file in modules(root).items():
        if module.split(".")[1:2] in (["commands"], ["cli"]):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call in ("print", "exit", "sys.exit"):
                found.append(f"{module}: {call}")
    return sorted(found)


def test_only_commands_print_and_exit() -> None:
    """Whoever imports the library gets objects and errors, and a logger to listen to."""
    assert printing(PACKAGE) == []


def test_there_is_no_utils() -> None:
    """Everything has a place that says what it is for."""
    names = {file.stem for file in modules(PACKAGE).values()}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


# Names of two classes still; the list may only shrink.
TWICE = {"Adapted", "Change", "Device", "Field", "Fit"}


def test_the_name_of_a_class_means_one_thing() -> None:
    """Whoever searches for a class finds one."""
    trees = [ast.parse(file.read_text()) for file in modules(PACKAGE).values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} <= TWICE


def test_files_are_small() -> None:
    """A file is read in one sitting."""
    sizes = {str(f): len(f.read_text().splitlines()) for f in modules(PACKAGE).values()}
    assert {f: size for f, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_small() -> None:
    """A function fits a screen, its docstring aside."""
    lengths = dict(function_lengths(PACKAGE))
    assert {f: size for f, size in lengths.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


def test_light_modules_import_nothing_heavy() -> None:
    """What the fast commands import reaches no library that takes seconds."""
    assert {*LIGHT} <= {*modules(PACKAGE)}
    assert heavy_at_import(PACKAGE, *LIGHT) == {name: set() for name in LIGHT}


LOADED = """
import importlib, sys
import sftkey
sftkey.load_recipe("recipes/smollm2-135m/demo.yaml")
from sftkey.cli import main
for name in {names!r}:
    importlib.import_module(name)
    print(name, *{{*sys.modules}} & {heavy!r}, sep=",", file=sys.stderr)
for arguments in {commands!r}:
    try: main(arguments)
    except SystemExit: pass
    print(arguments[0], *{{*sys.modules}} & {heavy!r}, sep=",", file=sys.stderr)
"""


def loaded_by(names: Sequence[str], *commands: tuple[str, ...]) -> dict[str, set[str]]:
    """Name the heavy libraries that are loaded after each of some imports and commands.

    All happen in one process, in this order: what one loads is there for those behind it.
    """
    program = LOADED.format(names=names, commands=commands, heavy=HEAVY)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [line.split(",") for line in done.stderr.splitlines()]
    asked = [*names, *(each[0] for each in commands)]
    return {name: {*heavy} for name, *heavy in lines if name in asked}


def test_fast_commands_load_nothing_heavy() -> None:
    """The light modules, lists, a recipe's check of form and the comparison start without torch."""
    recipe = "recipes/smollm2-135m/demo.yaml"
    commands = (
        *[("--help",), ("--version",), ("ls",), ("compare", "no-such-run")],
        ("train", recipe, "stages.key.trainer.learning_rte=1"),
    )
    loaded = loaded_by(LIGHT, *commands)
    assert loaded == {name: set() for name in (*LIGHT, *(each[0] for each in commands))}


@pytest.fixture
def crooked(tmp_path: Path) -> Path:
    """Make a package that breaks every rule."""
    root = tmp_path / "sftkey"
    files = {
        "__init__.py": "",
        "recipe.py": "def load():\n    from sftkey.models import load\n",
        "models.py": "import torch\nfrom sftkey import recipe\n",
        "utils.py": "if True:\n    import torch\n    print(1)\n    sys.exit(2)\n",
        "train.py": "from sftkey.models import load\n",
        "cli.py": "def ls():\n    import torch\n\ntry:\n    import yaml\nfinally:\n    pass\n",
        "long.py": "def long():\n" + "    pass\n" * 300,
    }
    for name, text in files.items():
        root.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_checkers_fail_on_a_crooked_package(crooked: Path) -> None:
    """Each checker finds what was built in against it, and nothing else."""
    assert wrong_directions(crooked) == [
        "sftkey.long: not in the list",
        "sftkey.recipe imports models",
        "sftkey.utils: not in the list",
    ]
    assert printing(crooked) == ["sftkey.utils: print", "sftkey.utils: sys.exit"]
    assert cycles(graph(crooked)) == [
        ["sftkey.models", "sftkey.recipe", "sftkey.models"],
        ["sftkey.recipe", "sftkey.models", "sftkey.recipe"],
    ]
    heavy = heavy_at_import(crooked, "sftkey.train", "sftkey.cli")
    assert heavy == {"sftkey.train": {"torch"}, "sftkey.cli": set()}
    assert "torch" in reachable(graph(crooked), "sftkey.cli")
    assert dict(function_lengths(crooked))["sftkey.long.long"] == 301
    assert loaded_by(["accelerate"])["accelerate"] >= {"accelerate", "torch"}


def test_a_lazy_import_in_a_method_is_not_import_time(tmp_path: Path) -> None:
    """Importing a module runs no methods, no imports for types alone, no program's block."""
    root = tmp_path / "sftkey"
    root.mkdir()
    text = (
        "class A:\n    import trl\n    def f(self):\n        import datasets\n"
        "if TYPE_CHECKING:\n    import accelerate\nelse:\n    import peft\n"
        "if __name__ == '__main__':\n    import torch\n"
    )
    (root / "cli.py").write_text(text)
    assert heavy_at_import(root, "sftkey.cli") == {"sftkey.cli": {"peft", "trl"}}
