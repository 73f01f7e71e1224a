"""A run's folder: recipe, ledger of its stages, and whether each file is whole."""

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import BaseModel, Field

from sftkey.errors import Problem, RecipeError, RunError
from sftkey.files import (
    changed_files,
    file_hash,
    files_below,
    free_name,
    read_json,
    refuse_irregular,
    remove_litter,
    text_hash,
    value_hash,
    write_json,
    write_text,
)
from sftkey.recipe.load import changed_keys, load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE, prefix_key, stage_names
from sftkey.training.run_lock import lock_run

LEDGER, COPY, RECIPE, ROWS = "ledger.json", "ledger.copy.json", "recipe.yaml", "rows.json"
REWRITTEN = "`sftkey train` on the recipe that began this run writes it anew"


@dataclass
class StageRecord:
    """What the ledger knows of one stage."""

    name: str
    status: Literal["open", "trained"] = "open"  # trained: its adapter is whole
    num_steps: Annotated[int, Field(ge=0, lt=2**53)] = 0
    seconds: float = 0.0
    # Under `start` and `end` the loss of every segment in nats a token.
    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    gradient_norm: dict[str, float] | None = None  # in studies: of each segment's loss, at first
    shared_from: str | None = None  # the run beside this one that trained it, if another did
    grid: dict[str, Any] | None = None  # what a grid tried and kept
    behind_cache: dict[str, float] | None = None  # a frozen stage's first losses, and a full pass's
    read_as: dict[str, Any] | None = None  # batches and surroundings of its last validation
    worse: str | None = None  # that its validation loss ended higher, by more than chance
    answers: list[dict[str, float]] | None = None  # by epoch, how many were right, for `early_stop`


class LedgerFile(BaseModel):
    """What stands in `ledger.json`."""

    facts: dict[str, Any]
    stages: list[StageRecord]
    rows: dict[str, str] = {}
    files: dict[str, str] = {}


class Ledger:
    """`ledger.json` of a run folder, and its copy, which is read where the first is broken.

    `files` holds the sha256 of what is finished, by its path in the run folder, and `rows` that of
    the rows of each split. Runs that were begun before there were such have none, and are read.
    The `main` process alone writes it.

    Raises:
        RunError: Neither the file nor its copy is whole.
    """

    def __init__(self, folder: Path, recipe: Recipe, main: bool = True) -> None:
        self.folder, self.recipe, self.main = folder, recipe, main
        self.facts: dict[str, Any] = {}
        self.rows, self.files = dict[str, str](), dict[str, str]()
        self.notes: list[str] = []  # what the person must know before anything starts
        self.stages = [StageRecord(stage.name) for stage in recipe.stages]
        self.lock: FileLock | None = None  # held as long as anybody has this ledger
        if content := read_ledger(folder):
            self.facts, self.stages = content["facts"], content["stages"]
            self.rows, self.files = content["rows"], content["files"]
        if not main:
            self.require_stages()

    def require_stages(self) -> None:
        """Refuse a recipe whose stages aren't those that were trained: one of another run."""
        known = [record.name for record in self.stages]
        names = [stage.name for stage in self.recipe.stages]
        if known != names:
            what = f"expected the stages of {LEDGER}, {', '.join(known)}; got {', '.join(names)}"
            raise RunError(str(self.folder / RECIPE), what, REWRITTEN)

    def stage_folder(self, number: int) -> Path:
        """Return the folder of the stage at `number` from 0: `stages/1-completion`, say."""
        return self.folder / "stages" / f"{number + 1}-{self.stages[number].name}"

    def adapter(self, number: int) -> Path:
        """Return the folder of what a stage has trained: its adapter, or its whole model."""
        return self.stage_folder(number) / "adapter"

    def generations(self, name: str) -> Path:
        """Return the file of a stage's answers, or of the base model's; it is there when whole."""
        return self.folder / "evaluation" / f"{name}.jsonl"

    def log(self, number: int) -> Path:
        """Return the file of a stage's logged steps."""
        return self.stage_folder(number) / "log.jsonl"

    def save(self) -> None:
        """Write the ledger."""
        if not self.main:
            return
        content = {
            "facts": self.facts,
            "stages": [record.__dict__ for record in self.stages],
            "rows": self.rows,
            "files": self.files,
        }
        content["sha256"] = value_hash(content)
        for name in (LEDGER, COPY):
            write_json(self.folder / name, content)

    def finish(self, *paths: Path) -> None:
        """Note the hashes of finished files, and of all files of finished folders, and save."""
        if self.main:
            for file in (file for path in paths for file in files_below(path)):
                self.files[self._name(file)] = file_hash(file)
            self.save()

    def forget(self, path: Path) -> None:
        """Forget the hashes of a file, or of all files of a folder, that lie there no more."""
        gone = {*self._known(path)}
        self.files = {file: known for file, known in self.files.items() if file not in gone}

    def _known(self, path: Path) -> list[str]:
        """List the finished files that are this one, or lie in this folder."""
        name = self._name(path)
        return [file for file in self.files if file == name or file.startswith(f"{name}/")]

    def broken(self, below: Path | None = None, leaving: Collection[str] = ()) -> dict[Path, str]:
        """Return what became of finished files that are no longer as they were written.

        It looks at one file or folder, by default at all, `leaving` out some folders.
        """
        looked_at = self.files if below is None else self._known(below)
        known = {self.folder / file: self.files[file] for file in looked_at}
        return changed_files(
            {file: sha for file, sha in known.items() if str(file.parent) not in leaving}
        )

    def require(self, path: Path) -> None:
        """Refuse a finished file or folder that is no longer as it was written."""
        for file, what in self.broken(path).items():
            raise broken_file(self.folder, file, what)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def require_whole(folder: Path, *patterns: str) -> None:
    """Refuse finished files of a run, of such names, that are no longer as they were written."""
    files = (read_ledger(folder) or {}).get("files", {})
    asked = {name for pattern in patterns for name in fnmatch.filter(files, pattern)}
    for file, what in changed_files({folder / name: files[name] for name in asked}).items():
        raise broken_file(folder, file, what)


def broken_file(folder: Path, file: Path, what: str) -> RunError:
    """Say that a file of a run is broken, and how one goes on."""
    way = f"put it back from a copy; or train again with `--fresh`, which moves {folder} aside"
    if file.parent.name == "evaluation":
        way = f"`sftkey evaluate {folder}` writes it anew"
    return RunError(str(file), f"expected what the run wrote; {what}", way)


def put_back(folder: Path) -> str:
    """Say how one goes on where rows or weights aren't those that a run began with."""
    return (
        "put them back; or `name=…` begins another run on these, and `--fresh` moves "
        f"{folder} aside and begins anew"
    )


def read_ledger(folder: Path) -> dict[str, Any] | None:
    """Read the ledger of a run, or its copy; None where no run has begun."""
    for name in (LEDGER, COPY):
        try:
            content = read_json(folder / name)
            known = content.pop("sha256", None)
            if known == value_hash(content) or (known is None and "files" not in content):
                return dict(LedgerFile.model_validate(content))
        except (RunError, ValueError, TypeError, KeyError, RecursionError):
            continue
    left = [each for each in (LEDGER, COPY) if (folder / each).exists()]
    if left or any(folder.glob("stages/*")):
        what = "it is gone" if not (folder / LEDGER).exists() else "it holds something else"
        raise broken_file(folder, folder / LEDGER, f"{what}, and {COPY} can't replace it")
    return None


def open_run(recipe: Recipe, folder: Path, fresh: bool = False) -> Ledger:
    """Begin a run, or find the one that this recipe, or one with other later stages, began.

    A `fresh` one moves what stands in the way aside, under a new name.

    Raises:
        RunError: The folder can't be written, is another process's, or holds a run of another
            recipe.
    """
    try:
        if fresh and folder.exists():
            lock = lock_run(folder)
            try:
                folder.rename(free_name(folder.with_name(f"{folder.name}.{_stamp()}")))
            finally:
                lock.release(force=True)  # its file has gone with the folder
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run(folder)
        ledger = _opened(recipe, folder)
        ledger.lock = lock
        return ledger
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            str(folder),
            f"expected a folder that can be written; got '{reason}'",
            "free the folder, or run where you may write",
        ) from error


def _stamp() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def _opened(recipe: Recipe, folder: Path) -> Ledger:
    """Read or begin the run in a folder that this process has for itself."""
    refuse_irregular(folder.rglob("*"))
    remove_litter(folder)
    ledger = Ledger(folder, recipe)
    for name in ("stages", "evaluation"):
        (folder / name).mkdir(exist_ok=True)
    text, file = recipe.to_yaml(), folder / RECIPE
    same = ledger.files.get(RECIPE) == text_hash(text)
    changed = file.exists() and not same and (begun := load_recipe(file)) != recipe
    if changed:
        keep_stages(ledger, begun)
    ledger.require_stages()
    edited = ledger.broken(file)
    if changed or not file.exists() or (same and edited):
        write_text(file, text)
    elif edited:  # by hand; `evaluate` reads it from there
        ledger.notes.append(f"{file}: it has changed since the run wrote it; {REWRITTEN}")
    if same or changed or not edited:
        ledger.finish(file)
    set_aside_broken(ledger)
    return ledger


REMADE = ("evaluation", "diagnosis")  # their files are written anew from the adapters


def set_aside_broken(ledger: Ledger) -> None:
    """Move answers, grades and diagnoses that are no longer as they were written out of the way.

    Adapters are looked at when they are loaded, or passed by as finished.
    """
    adapters = {str(ledger.adapter(number)) for number in range(len(ledger.stages))}
    for file, what in ledger.broken(leaving=adapters).items():
        if file.name == RECIPE:
            continue
        if file.parent.name not in REMADE:
            raise broken_file(ledger.folder, file, what)
        if file.exists():
            file.rename(free_name(file.with_name(f"{file.name}.broken")))
        ledger.forget(file)
        ledger.notes.append(f"{file}: {what}; it is written anew")


def keep_stages(ledger: Ledger, begun: Recipe) -> None:
    """Keep the stages that a changed recipe leaves as they were, and set aside what came after.

    Nothing is deleted: it is moved into `replaced/` of the run folder.
    """
    recipe, folder = ledger.recipe, ledger.folder
    most = min(len(begun.stages), len(recipe.stages))
    kept = next((n for n in range(most, 0, -1) if prefix_key(begun, n) == prefix_key(recipe, n)), 0)
    changed = changed_keys(begun, recipe)
    if not kept or not all(key.partition(".")[0] in ("stages", "trainer") for key in changed):
        refuse_changed(folder, recipe)
    aside = folder / "replaced" / _stamp()
    for number in range(kept, len(ledger.stages)):
        name = ledger.stages[number].name
        found = [ledger.stage_folder(number), *folder.glob(f"evaluation/{name}.*")]
        for path in [*found, folder / "diagnosis" / f"{name}.json"]:
            if path.exists():
                target = free_name(aside / path.relative_to(folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
                ledger.forget(path)
    names = [stage.name for stage in recipe.stages]
    ledger.stages = ledger.stages[:kept] + [StageRecord(name) for name in names[kept:]]
    if "end" in ledger.facts:
        ledger.facts["end"] = {"adapter": ledger._name(ledger.adapter(kept - 1))}
    ledger.files[RECIPE] = text_hash(recipe.to_yaml())
    ledger.save()  # before the recipe: a kill between the two is mended by the same command
    anew = f"trained anew: {', '.join(names[kept:])}" if names[kept:] else "no stage follows"
    ledger.notes.append(f"the recipe has changed ({', '.join(changed)})")
    ledger.notes.append(f"kept: {', '.join(names[:kept])}; {anew}")
    if aside.exists():
        ledger.notes.append(f"what they replace lies in {aside}")


def refuse_changed(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run under another recipe than the one that began it."""
    begun, problems = load_recipe(folder / RECIPE), []
    for key in changed_keys(begun, recipe):
        was, now = (_value_at(each, key) for each in (begun, recipe))
        problems.append(Problem(key, f"was {was!r} when this run began; got {now!r}"))
    if problems:
        hint = f"`name=…` begins another run beside it; `--fresh` moves {folder} aside and begins"
        raise RunError(str(folder), problems, f"{hint} anew")


def _value_at(recipe: Recipe, key: str) -> Any:
    """Return what a recipe says at a dotted path; stages go by their names."""
    value: Any = recipe.model_dump(mode="json")
    value["stages"] = {stage["name"]: stage for stage in value["stages"]}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return list(value) if key == "stages" else value


def run_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run."""
    if not (folder / RECIPE).exists():
        hint = REWRITTEN if (folder / LEDGER).exists() else "runs lie in runs/<name>"
        what = "expected a run folder; it holds no recipe.yaml"
        if not folder.is_dir():
            what = "expected a run folder; there is none"
        raise RunError(str(folder), what, hint)
    refuse_irregular(folder.rglob("*"))
    try:
        return load_recipe(folder / RECIPE)
    except RecipeError as error:
        raise RunError(error.where, error.problems, REWRITTEN) from None


def known_stages(folder: Path, recipe: Recipe, name: str | None) -> list[str]:
    """Return what `--stage` may name of a run, `base` first."""
    names = stage_names(recipe)
    if name is not None and name not in names:
        raise RunError(str(folder), f"--stage: expected one of {', '.join(names)}; got {name!r}")
    return names


def trained_stage(folder: Path, recipe: Recipe, name: str | None) -> int:
    """Return the place of a trained stage, the first being 1; 0 is the base model.

    Without a name it is the last one that is trained.
    """
    names = known_stages(folder, recipe, name)
    records = Ledger(folder, recipe, main=False).stages
    trained = [BASE, *(each.name for each in records if each.status == "trained")]
    train = f"sftkey train {folder / RECIPE}"
    if name is None and trained == [BASE]:
        what, hint = "expected a trained stage; there is none yet", f"train it: {train}; or take"
        raise RunError(str(folder), what, f"{hint} --stage base")
    if name is not None and name not in trained:
        what = f"--stage: {name!r} isn't trained yet"
        raise RunError(str(folder), what, f"go on with: {train}")
    return names.index(name or trained[-1])
