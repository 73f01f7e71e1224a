"""What is installed is whole: the README's two commands, the pins, the wheel and its contents."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN_JOB = (
    'python -m pip install -e ".[demo]" && '
    "accelerate launch -m sftkey.train recipes/smollm2-135m/demo.yaml"
)
TESTS = 'python -m pip install -e ".[test]" && python -m pytest'
SHIPPED = ("recipes/**/*.yaml", "accelerate_configs/*.yaml")


def entries() -> list[str]:
    """Return the lines of pyproject.toml that ask for something, our own extras left out."""
    text = (ROOT / "pyproject.toml").read_text()  # by lines: a reader of TOML came with 3.11
    block = text.partition("\ndependencies = [")[2].partition("\n[project.scripts]")[0]
    lines = [line for line in block.splitlines() if line.startswith('  "')]
    return [line for line in lines if not line.startswith('  "sftkey')]


def requirements() -> list[Requirement]:
    """Parse what pyproject.toml asks for, core and extras."""
    return [Requirement(line.split('"')[1]) for line in entries()]


def pins() -> dict[str, str]:
    """Read constraints.txt: name → version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in pairs}


@pytest.mark.parametrize("command", [MAIN_JOB, TESTS])
def test_the_readme_has_the_two_commands(command: str) -> None:
    """Each stands alone in a fence, as it is to be typed."""
    assert f"```bash\n{command}\n```\n" in README


def test_every_file_that_the_docs_name_is_there() -> None:
    """A recipe or a module that is named in the README or on a page exists."""
    pages = README + "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("docs/*.md"))
    named = re.findall(r"`((?:recipes|sftkey|tests|docs|accelerate_configs)/[\w./-]*\w)`", pages)
    named += re.findall(r"(recipes/[\w.-]+/[\w.-]+\.yaml)", pages)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_dependency_has_its_pin() -> None:
    """The pins are of what pyproject.toml asks for, each within what it allows."""
    wanted = {requirement.name.lower(): requirement for requirement in requirements()}
    assert sorted(wanted) == sorted(pins())
    assert [n for n, version in pins().items() if not wanted[n].specifier.contains(version)] == []


def test_every_dependency_has_its_reason() -> None:
    """Each line of a dependency says in a comment what it is for."""
    assert [line for line in entries() if ",  # " not in re.sub(" +", "  ", line)] == []


def test_no_build_of_torch_is_named() -> None:
    """A pin of a build would fetch CUDA where the CPU build is at hand, or the other way round."""
    assert pins()["torch"] == "2.13.0"
    assert [str(r.specifier) for r in requirements() if r.name == "torch"] == ["<=2.13.0,>=2.11"]


def pip(*arguments: str, python: str = sys.executable) -> None:
    """Call pip; skip where it can't reach the registry that builds need."""
    command = [python, "-m", "pip", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip reaches no registry, and a build needs setuptools from there")
    assert done.returncode == 0, done.stderr


def listed(python: str, folder: Path, **environment: str) -> str:
    """Return what `sftkey ls --json` prints in a folder that isn't the checkout."""
    command = [python, "-m", "sftkey", "ls", "--json"]
    whole = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run(command, cwd=folder, env=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what a build reads, so that none leaves anything in this checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("sftkey", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.network
def test_a_wheel_carries_modules_recipes_and_configs(tmp_path: Path, checkout: Path) -> None:
    """After a plain install, far from the checkout, `sftkey ls` lists every recipe."""
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(checkout))
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    for file in (*(ROOT / "sftkey").rglob("*.py"), *(ROOT / "sftkey").rglob("*.jinja")):
        assert (target / file.relative_to(ROOT)).is_file()
    for file in (file for pattern in SHIPPED for file in ROOT.glob(pattern)):
        assert (target / "sftkey" / file.relative_to(ROOT)).is_file()
    assert (next(target.glob("*.dist-info")) / "licenses" / "LICENSE").is_file()
    out = listed(sys.executable, tmp_path, PYTHONPATH=str(target))
    assert str(Path("target", "sftkey", "recipes", "smollm2-135m", "demo.yaml")) in out


@pytest.mark.network
def test_an_editable_install_finds_the_checkouts_recipes(tmp_path: Path, checkout: Path) -> None:
    """After `pip install -e`, `sftkey ls` lists the recipes of the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip("install", "--no-deps", "--editable", str(checkout), python=python)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    out = listed(python, tmp_path)
    assert str(Path("checkout", "recipes", "smollm2-135m", "demo.yaml")) in out
