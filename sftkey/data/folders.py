"""Which files of a folder, a glob or a snapshot of the hub hold a split's rows."""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sftkey.data.readers import Rows, is_data_file, read_file, table_rows
from sftkey.errors import DataError, first_line

SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?\Z")
SLICE = re.compile(r"(?P<split>.+?)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]\Z")
# The names that `datasets` knows for the three splits.
ALSO = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
KNOWN = {name for names in ALSO.values() for name in names}
# Files that `save_to_disk`, the hub and git put beside the data.
BESIDE = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
MOST_DEEP = 4


def sliced(rows: Rows, start: str | None, stop: str | None) -> Rows:
    """Take a part of the rows, as `train[:1000]` and `train[10%:]` do in `datasets`."""

    def place(text: str | None) -> int | None:
        if text is None:
            return None
        number = int(text.removesuffix("%"))
        return round(number * len(rows) / 100) if text.endswith("%") else number

    return rows[place(start) : place(stop)]


def is_glob(text: str) -> bool:
    """Tell whether a text is a pattern for files: `train[:9]` is a part of a split."""
    return glob.has_magic(text) and not SLICE.match(text)


def read_matching(text: str) -> Rows:
    """Read a file, or the files of a glob in the order of their names."""
    path = Path(text).expanduser()
    if path.exists() or not is_glob(text):
        return read_file(path)
    files = sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in files if not file.is_dir()]
    if not files:
        raise DataError(text, "expected files; none matches the pattern")
    return read_files(files)


def read_files(files: Sequence[Path]) -> Rows:
    """Read files one after another."""
    return [row for file in files for row in read_file(file)]


def read_folder(folder: Path, split: str, config: str | None) -> Rows:
    """Read a split of a folder: files, shards, subfolders, a snapshot, or one of `save_to_disk`."""
    match = SLICE.match(split)
    if match:
        return sliced(read_folder(folder, match["split"], config), match["start"], match["stop"])
    named = _named_in_readme(folder, config)
    if named is not None:
        if split not in named:
            raise _no_split(folder, split, named)
        return _read_whole(_named_files(folder, named[split]), folder)
    inside = folder / (config or "")
    folder = inside if inside.is_dir() else folder
    saved = _saved(folder, split)
    if saved is not None:
        return saved
    files = _of_split(folder, split)
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        what = (
            f"expected one kind of file for the split {split!r}; found {', '.join(sorted(kinds))}"
        )
        raise DataError(str(folder), what)
    return _read_whole(files, folder)


def _read_whole(files: Sequence[Path], folder: Path) -> Rows:
    """Read files of a split; of `train-00000-of-00002` the other part must be there, too."""
    parts = [match for file in files if (match := _part(file))]
    there = {(each.string[: each.start()], int(each["number"])) for each in parts}
    wanted = {(each.string[: each.start()], int(each["count"])) for each in parts}
    for name, count in sorted(wanted):
        missing = [each for each in range(count) if (name, each) not in there]
        if missing:
            what = f"expected {count} parts of {name!r}; part {missing[0]}, counted from 0, "
            what += f"and {len(missing) - 1} others are" if missing[1:] else "is"
            hint = "fetch the others, too, or name the files that are meant as a pattern: *.parquet"
            raise DataError(str(folder), f"{what} missing", hint)
    return read_files(files)


def _part(file: Path) -> re.Match[str] | None:
    """Find which part of how many a file says to be: `train-00000-of-00002`."""
    return SHARD.search(_stem(file))


def _saved(folder: Path, split: str) -> Rows | None:
    """Read what `save_to_disk` of `datasets` wrote, if the folder is such a one."""
    if (folder / "dataset_dict.json").is_file():
        names = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
        name = next((each for each in _names(split) if each in names), None)
        if name is None:
            raise _no_split(folder, split, names)
        folder = folder / name
    elif not (folder / "state.json").is_file():
        return None
    elif split != "train":
        raise _no_split(folder, split, ["train"])
    import datasets

    try:
        return table_rows(datasets.load_from_disk(str(folder)).with_format("arrow")[:], folder)
    except (OSError, ValueError, KeyError) as error:
        what = f"can't be read as `save_to_disk` writes it: {first_line(error)}"
        raise DataError(str(folder), what) from error


def _no_split(folder: Path, split: str, found: Any) -> DataError:
    known = ", ".join(found) or "no data files"
    return DataError(str(folder), f"expected a file of the split {split!r}; found {known}")


def _names(split: str) -> tuple[str, ...]:
    return (split, *(name for name in ALSO.get(split, ()) if name != split))


def _of_split(folder: Path, split: str) -> list[Path]:
    """Find a split's files by the names of files and of the folders that they are in."""
    found: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        found.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    files = [file for group in found.values() for file in group]
    if split == "train" and not KNOWN & found.keys() and len({file.parent for file in files}) == 1:
        return sorted(files)  # no name speaks of a split: as in `datasets`, all is train
    name = next((each for each in _names(split) if each in found), None)
    if name is None:
        raise _no_split(folder, split, found)
    parents = sorted({str(file.parent.relative_to(folder)) for file in found[name]})
    if len(parents) > 1:
        raise DataError(
            str(folder),
            f"expected one data set; the split {split!r} is in {', '.join(parents)}",
            hint=f"choose one: `data.config: {parents[0]}`",
        )
    called = [each for each in found[name] if _part(each) and _split_of(Path(each.name)) == name]
    shards = sorted({SHARD.sub("", _stem(file)) for file in called})
    if len(shards) > 1:
        what = f"expected one data set; parts of {', '.join(shards)} are called {split!r}"
        pattern = called[0].parent / f"{shards[0]}-*"
        raise DataError(str(folder), what, f"name the files that are meant as a pattern: {pattern}")
    return found[name]


def _data_files(folder: Path) -> list[Path]:
    """List the data files in a folder and those below it, in order; hidden ones are none."""
    files = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in inside)
        if hidden or len(inside) > MOST_DEEP or file.name in BESIDE or file.is_dir():
            continue
        if is_data_file(file.name):
            files.append(file)
    return files


def _split_of(file: Path) -> str:
    """Name the split of a file: the folder's name if it is a split's, else the file's stem."""
    for parent in reversed(file.parent.parts):
        if parent.lower() in KNOWN:
            return parent.lower()
    stem = SHARD.sub("", _stem(file))
    words = [word for word in re.split("[^a-z]+", stem.lower()) if word in KNOWN]
    return words[0] if len(words) == 1 else stem


def _stem(file: Path) -> str:
    """Return a file's name without all its endings."""
    stem = file.name
    while is_data_file(stem):
        stem = Path(stem).stem
    return stem


def _named_in_readme(folder: Path, config: str | None) -> dict[str, list[str]] | None:
    """Read the patterns of files that a card names for a config's splits, as `datasets` does."""
    card = _card(folder)
    configs = card.get("configs") if isinstance(card, dict) else None
    configs = [each for each in configs or () if isinstance(each, dict) and each.get("data_files")]
    if not configs:
        return None
    names = [str(each.get("config_name", "default")) for each in configs]
    chosen = [name for name, each in zip(names, configs, strict=True) if each.get("default")]
    chosen += ["default"] if "default" in names else names if len(names) == 1 else []
    wanted = config or next(iter(chosen), None)
    if wanted not in names:
        got = "none" if config is None else repr(config)
        raise DataError(str(folder), f"data.config: expected {', '.join(names)}; got {got}")
    given = configs[names.index(wanted)]["data_files"]
    found: dict[str, list[str]] = {}
    for item in given if isinstance(given, list) else [given]:
        item = item if isinstance(item, Mapping) else {"split": "train", "path": item}
        paths: Any = item["path"] if isinstance(item.get("path"), list) else [item.get("path")]
        if not all(isinstance(each, str) for each in (item.get("split"), *paths)):
            what = "data_files: expected patterns of files, or `split` and `path` of each"
            raise DataError(str(folder / "README.md"), f"{what}; got {item}")
        found.setdefault(item["split"], []).extend(paths)
    return found


def _card(folder: Path) -> Any:
    """Read the head of a data set's card, if there is one that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        return yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _named_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Find the files of a card's patterns; one that finds none is a download in part."""
    files: list[Path] = []
    for pattern in patterns:
        matches = (folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
        found = sorted(file for file in matches if not file.is_dir())
        if not found:
            what = f"README.md names {pattern}, and there is no such file"
            hint = "fetch it, too, or name the files that are meant as a pattern: *.parquet"
            raise DataError(str(folder), what, hint)
        files += found
    return files
