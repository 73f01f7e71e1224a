"""The package keeps its structure: directions of imports, no circles, small files, a fast hall."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from structure import cycles, function_lengths, graph, modules, reachable

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sftkey"
HALL = {
    "cli",
    "console",
    "process",
    "train",
    "check",
    "ls",
    "plan",
    "show",
    "adapt",
    "evaluate",
    "compare",
    "study",
    "diagnose",
    "stage_diagnosis",
    "generate",
    "merge",
    "trained",
}
# Modules that are parts of a place of the design, which would be too long in one file.
PART_OF = {
    "adapter": "model",
    "device": "model",
    "files": "errors",
    "grid": "recipe",
    "key_adapter": "model",
    "packaged": "model",
    "saving": "model",
    "source": "model",
    "switching": "generation",
    "writing": "generation",
    "recipe_checks": "recipe",
    "recipe_errors": "recipe",
    "recipe_fields": "recipe",
    "schedule": "recipe",
    "strategies": "recipe",
    "evaluation.study_cells": "running",
    "evaluation.study_choice": "running",
    "evaluation.study_plan": "running",
    "evaluation.study_record": "running",
    "evaluation.study_run": "running",
    "upstream": "recipe",
    "yaml_source": "recipe",
}
ROOMS = {"recipe", "model", "data", "generation"}
# What each place may import of ours, beside itself; `errors` is open to all.
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "recipe": set(),
    "model": {"recipe"},
    "data": {"recipe"},
    "generation": {"model", "data"},
    "planning": ROOMS,
    "training": ROOMS,
    "evaluation": ROOMS,
    "sharing": ROOMS,
    "running": {*ROOMS, "training", "evaluation"},  # of studies, which train
    **{
        command: {*ROOMS, "planning", "training", "evaluation", "running", "sharing", *HALL}
        for command in HALL
    },
}
RECIPES_LIBRARIES = {"pydantic", "pydantic_core", "yaml", *sys.stdlib_module_names}
HEAVY = {
    *("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate"),
    "openai",
}
LIGHT = [
    "sftkey.cli",
    "sftkey.ls",
    "sftkey.plan",
    "sftkey.adapt",
    "sftkey.train",
    "sftkey.compare",
    "sftkey.recipe",
    "sftkey.data.response",
    "sftkey.evaluation.grading",
    "sftkey.evaluation.judge",
    "sftkey.evaluation.statistics",
    "sftkey.evaluation.results",
    "sftkey.evaluation.comparison",
    "sftkey.evaluation.diagnosis",
    "sftkey.evaluation.thinking",
    "sftkey.evaluation.study",
    "sftkey.study",
]
# 250 and 40 are the aims of the design; the tests leave a tenth for what doesn't divide well.
MOST_LINES_OF_A_FILE = 275
MOST_LINES_OF_A_FUNCTION = 45


def place(module: str) -> str:
    """Name the place of the design that a module belongs to."""
    first, second = [*module.split("."), "", ""][1:3]
    return PART_OF.get(f"{first}.{second}") or PART_OF.get(first, first)


def wrong_directions(root: Path, allowed: dict[str, set[str]] = MAY_IMPORT) -> list[str]:
    """List the imports that go against the design, those inside functions too."""
    wrong = []
    for module, imported in graph(root).items():
        here = place(module)
        if here not in allowed:
            wrong.append(f"{module}: no place of the design")
            continue
        ours = {place(target) for target in imported if target.split(".")[0] == root.name}
        wrong += [
            f"{module} imports {p}" for p in sorted(ours - allowed[here] - {here, "errors", ""})
        ]
    return wrong


def heavy_at_import(root: Path, module: str) -> set[str]:
    """Name the heavy libraries that importing a module would import."""
    return reachable(graph(root, whole=False), module) & HEAVY


def test_imports_follow_the_design() -> None:
    """No module imports what its place may not, not even inside a function."""
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


def test_there_is_no_utils() -> None:
    """Everything has a place that says what it is for."""
    names = {file.stem for file in modules(PACKAGE).values()}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_files_are_small() -> None:
    """A file is read in one sitting."""
    sizes = {str(f): len(f.read_text().splitlines()) for f in modules(PACKAGE).values()}
    assert {f: size for f, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_small() -> None:
    """A function fits a screen, its docstring aside."""
    lengths = dict(function_lengths(PACKAGE))
    assert {f: size for f, size in lengths.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """What the fast commands import reaches no library that takes seconds."""
    assert module in modules(PACKAGE)
    assert heavy_at_import(PACKAGE, module) == set()


def loaded_by(*arguments: str) -> set[str]:
    """Name the heavy libraries that a call of the command line loads, in a process of its own."""
    code = (
        "import sys; from sftkey.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("ls",),
        ("compare", "no-such-run"),
        ("train", "recipes/smollm2-135m/demo.yaml", "stages.key.trainer.learning_rte=1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_fast_commands_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """The lists, the check of form and the comparison start without torch."""
    assert loaded_by(*arguments) == set()


@pytest.fixture
def crooked(tmp_path: Path) -> Path:
    """Make a package that breaks every rule."""
    root = tmp_path / "sftkey"
    files = {
        "__init__.py": "",
        "recipe.py": "def load():\n    from sftkey.model import load\n",
        "model.py": "import torch\nfrom sftkey import recipe\n",
        "utils.py": "if True:\n    import torch\n",
        "train.py": "from sftkey.model import load\n",
        "ls.py": "def ls():\n    import torch\n\ntry:\n    import yaml\nfinally:\n    pass\n",
        "long.py": "def long():\n" + "    pass\n" * 300,
    }
    for name, text in files.items():
        root.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_checkers_fail_on_a_crooked_package(crooked: Path) -> None:
    """Each checker finds what was built in against it, and nothing else."""
    assert wrong_directions(crooked) == [
        "sftkey.long: no place of the design",
        "sftkey.recipe imports model",
        "sftkey.utils: no place of the design",
    ]
    assert cycles(graph(crooked)) == [
        ["sftkey.model", "sftkey.recipe", "sftkey.model"],
        ["sftkey.recipe", "sftkey.model", "sftkey.recipe"],
    ]
    assert heavy_at_import(crooked, "sftkey.train") == {"torch"}
    assert heavy_at_import(crooked, "sftkey.ls") == set()
    assert "torch" in reachable(graph(crooked), "sftkey.ls")
    assert dict(function_lengths(crooked))["sftkey.long.long"] == 301
    assert loaded_by("--help") == set()


def test_a_lazy_import_in_a_method_is_not_import_time(tmp_path: Path) -> None:
    """Importing a module runs no methods, no imports for types alone, no program's block."""
    root = tmp_path / "sftkey"
    root.mkdir()
    text = (
        "class A:\n    import trl\n    def f(self):\n        import datasets\n"
        "if TYPE_CHECKING:\n    import accelerate\nelse:\n    import peft\n"
        "if __name__ == '__main__':\n    import torch\n"
    )
    (root / "ls.py").write_text(text)
    assert heavy_at_import(root, "sftkey.ls") == {"peft", "trl"}
