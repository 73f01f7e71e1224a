"""`.ci/test` reads the README's own command, and a skip that hides a test is a failure there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "test"
TEST_COMMAND = 'python -m pip install -e ".[test]" && python -m pytest'

PROBE = """
import pytest

@pytest.mark.network
def test_of_the_network():
    "Skip."
    pytest.skip("no network")

def test_of_a_gpu():
    "Skip."
    pytest.skip("no GPU")

@pytest.mark.network
@pytest.mark.xfail(reason="known")
def test_known():
    "Fail as expected."
    raise AssertionError
"""


def command_read(folder: Path) -> str:
    """Return the command that the script's own function reads from a folder's README."""
    function = re.search(r"^command_of_readme\(\) \{.*?^\}$", SCRIPT.read_text(), re.M | re.S)
    assert function
    shell = ["bash", "-c", f"{function[0]}\ncommand_of_readme"]
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_script_reads_the_readmes_test_command() -> None:
    """The command that CI runs is the README's, character by character."""
    assert command_read(ROOT) == TEST_COMMAND


def test_a_readme_without_the_command_stops_the_script(tmp_path: Path) -> None:
    """CI can't pass because it found no tests to run."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "test")
    (tmp_path / "README.md").write_text("# sftkey\n")
    done = subprocess.run(["bash", str(tmp_path / ".ci" / "test")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "README.md: expected a fenced command under the comment <!-- test command -->; got none\n"
    )


def outcomes(folder: Path, monkeypatch: pytest.MonkeyPatch, no_skips: str) -> str:
    """Run the probe under this project's conftest, and give pytest's closing line."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  network\n  kill\n")
    (folder / "test_probe.py").write_text(PROBE)
    (folder / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    monkeypatch.setenv("SFTKEY_NO_SKIPS", no_skips)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the conftest imports what tests are made with
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    command.append("--continue-on-collection-errors")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])


def test_skips_are_skips_for_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable a machine that lacks something sees skips."""
    assert outcomes(tmp_path, monkeypatch, "") == "3 skipped, 1 xfailed"


def test_skips_are_failures_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the marked test and the module skipped whole fail; one for a GPU may still skip."""
    assert outcomes(tmp_path, monkeypatch, "1") == "1 failed, 1 skipped, 1 xfailed, 1 error"
