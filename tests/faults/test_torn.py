"""Any file of a run, broken in any way, is named in one error, or the run ends as it would."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftkey import files
from sftkey.cli import main
from sftkey.errors import DiskError, SFTKeyError
from tests.support.tiny import write_recipe
from tests.training.test_run import Killed, kill_at_step
from tests.training.test_run_folder import data, finish, go_on

pytestmark = pytest.mark.slow
TRAINER = {"per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1, "logging_steps": 1}


def garble(file: Path) -> None:
    """Put bytes by chance in the place of the file's own."""
    size = max(file.stat().st_size, 1)
    file.write_bytes(random.Random(size).randbytes(size))


BREAK: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbled": garble,
    "deleted": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Kill a run in its last stage, behind a checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    write_recipe(folder, tiny_folder, data=data(folder), trainer=TRAINER)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(patch, "key", 2)
        with pytest.raises(Killed):
            finish(go_on(folder))
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, cut: Path) -> Path:
    """Go on with the cut run to its end."""
    folder = shutil.copytree(cut, tmp_path_factory.mktemp("ended") / "run")
    finish(go_on(folder))
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """Return all that a person takes out of a run: adapters, answers and grades."""
    run = folder / "runs" / "tiny"
    found = [*run.glob("stages/*/adapter/*"), *run.glob("evaluation/*.json*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in found}


def files_of(folder: Path) -> list[str]:
    """List the files of a folder's run, but for its lock."""
    run = folder / "runs" / "tiny"
    found = [str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()]
    return sorted(name for name in found if not name.startswith((".lock", ".running")))


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("moment", ["cut", "ended"])
def test_a_run_with_a_broken_file_says_so_or_ends_as_it_would(
    moment: str,
    how: str,
    cut: Path,
    ended: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Every file, one after another; no other error comes, and nothing else is changed."""
    wanted, source = results(ended), cut if moment == "cut" else ended
    names, wrong = files_of(source), list[str]()
    record_property("tries", len(names))
    for name in names:
        folder = shutil.copytree(source, tmp_path / "tried")
        BREAK[how](folder / "runs" / "tiny" / name)
        try:
            finish(go_on(folder))
        except SFTKeyError as error:
            if Path(name).name not in str(error) and str(Path(name).parent) not in str(error):
                wrong.append(f"{name}: not named by {error}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            found = results(folder)
            changed = [each for each in wanted if found.get(each) != wanted[each]]
            if changed:
                wrong.append(f"{name}: others came, without a word: {', '.join(changed)}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


WRITTEN = (
    *("recipe.yaml", "ledger.json", "ledger.copy.json", "rows.json", "data.json", ".running.json"),
    *("rows.arrow", "base.jsonl", "key.json", "key.graded.jsonl", "whole.json", "validation.json"),
    *("log.jsonl", "adapter_model.safetensors", "adapter_config.json"),
)


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_disk_that_is_full_at_a_write_ends_the_run_once(
    name: str, cut: Path, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error and no litter; after space was freed the same command ends as it would."""
    shutil.copy(cut / "tiny.yaml", tmp_path)
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path / "cache"))
    sync = files.sync

    def full(path: Path) -> None:
        if path.name == name or path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(DiskError, match="the disk is full: "):
            finish(go_on(tmp_path))
    left = [str(path) for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]
    unsealed = [
        str(path)
        for path in tmp_path.glob("runs/tiny/stages/*/checkpoints/*")
        if not (path / "whole.json").exists()
    ]
    assert left + unsealed == []
    finish(go_on(tmp_path))
    found, wanted = results(tmp_path), results(ended)
    assert {each for each in wanted if found.get(each) != wanted[each]} == set()


READING = (
    ["compare", "runs/tiny", "--json"],
    ["errors", "runs/tiny", "--stage", "key", "--json"],
    ["report", "runs/tiny"],
    ["card", "runs/tiny"],
    ["generate", "runs/tiny", "Count on from 3.", "--json"],
)
# Counts of the data, which a report and a card show where they are.
LEFT_OUT = ("deleted", "data.json")


def read(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield each command that reads a run, its exit code, and what it gave or said."""
    page = folder / "runs" / "tiny" / "report.html"
    for command in READING:
        code: Any = 0
        try:
            main(command)
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        shown = page.read_text() if command[0] == "report" and not code else out
        yield command[0], code, err if code else shown


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
@pytest.mark.parametrize("how", BREAK)
def test_a_command_that_reads_a_broken_file_names_it(
    how: str,
    ended: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """Or it gives what it gives otherwise; the checkpoints of a finished stage aren't read."""
    names = [name for name in files_of(ended) if "checkpoint" not in name]
    place, wrong = tmp_path / "tried", list[str]()
    monkeypatch.chdir(shutil.copytree(ended, place))
    whole = {name: shown for name, _, shown in read(place, capsys)}
    record_property("tries", len(names) * len(READING))
    for name in names:
        file = place / "runs" / "tiny" / name
        kept = file.read_bytes()
        BREAK[how](file)
        for command, code, shown in read(place, capsys):
            named = file.name in shown or str(file.parent.relative_to(place)) in shown
            if (code, named) != (2, True) if code else shown != whole[command]:
                wrong.append(f"{command}, {name}: {code}, {shown[-300:]}")
        file.write_bytes(kept)
    left_out = f"report, {LEFT_OUT[1]}", f"card, {LEFT_OUT[1]}"
    if how == LEFT_OUT[0]:
        wrong = [each for each in wrong if not each.startswith(left_out)]
    assert not wrong, "\n".join(wrong)
