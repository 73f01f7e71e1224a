"""The files of a split are found in folders as people, `datasets` and the hub lay them out."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftkey.data.sources import load_rows
from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection


def put(folder: Path, *names: str, content: str = "") -> None:
    """Write a file of one row, which holds its name, for each name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content or json.dumps({"from": name}) + "\n")


def files_of(source: object, split: str = "train", **fields: Any) -> list[str]:
    """Return the names of the files that a split's rows come from."""
    section = DataSection(source=str(source), **fields)
    return [row["from"] for row in load_rows(section, 0, split)]


def message_of(source: object, split: str = "train", **fields: Any) -> str:
    """Return the error that reading ends in."""
    with pytest.raises(DataError) as caught:
        files_of(source, split, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["train-00000-of-00001-1028f23e353fbe3e.jsonl"],
        ["default/train/0000.jsonl", "default/train/0001.jsonl"],
        ["train/part-0.jsonl", "train/part-1.jsonl"],
        ["part-0.jsonl", "part-1.jsonl"],
        ["rows.jsonl"],
        ["my_train_v2.jsonl"],
    ],
    ids=lambda names: names[0],
)
def test_layouts_of_folders(tmp_path: Path, names: list[str]) -> None:
    """Shards, hashes, a folder for each split, or files that name none: then all are train."""
    put(tmp_path, *names, ".cache/train.jsonl")
    put(tmp_path, "README.md", "LICENSE", content="x")
    assert files_of(tmp_path) == names


def test_other_names_of_the_splits(tmp_path: Path) -> None:
    """As `datasets` does, `validation` finds dev, val and valid; other names are taken as such."""
    put(tmp_path, "train.jsonl", "dev.jsonl", "hard.jsonl")
    assert files_of(tmp_path, "validation") == ["dev.jsonl"]
    assert files_of(tmp_path, "dev") == ["dev.jsonl"]
    assert files_of(tmp_path, "hard") == ["hard.jsonl"]
    assert message_of(tmp_path, "test") == (
        f"{tmp_path}: expected a file of the split 'test'; found dev, hard, train"
    )


def test_two_data_sets_in_one_folder_are_no_one(tmp_path: Path) -> None:
    """Rows of two configs are never joined; the error says what to write."""
    put(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    assert message_of(tmp_path) == (
        f"{tmp_path}: expected one data set; the split 'train' is in main, socratic\n"
        "hint: choose one: `data.config: main`"
    )
    assert files_of(tmp_path, config="socratic") == ["socratic/train.jsonl"]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """Half a download is no data set; a pattern reads what is there."""
    put(tmp_path, *(f"data/train-0000{part}-of-00004.jsonl" for part in (0, 3)))
    assert message_of(tmp_path) == (
        f"{tmp_path}: expected 4 parts of 'train'; part 1, counted from 0, and 1 others are missing"
        "\nhint: fetch the others, too, or name the files that are meant as a pattern: *.parquet"
    )
    assert files_of(f"{tmp_path}/data/train-*.jsonl") == [
        f"data/train-0000{part}-of-00004.jsonl" for part in (0, 3)
    ]
    put(tmp_path, "data/train-00001-of-00004.jsonl")
    assert "part 2, counted from 0, is missing" in message_of(tmp_path)


CARD = """---
configs:
- config_name: easy
  data_files: [{split: train, path: e/*.jsonl}, {split: test, path: [t.jsonl]}]
- config_name: hard
  data_files: h.jsonl
---
# Data
"""


def test_a_card_names_the_files_of_its_configs(tmp_path: Path) -> None:
    """A snapshot of the hub is read as its card says."""
    put(tmp_path, "e/1.jsonl", "e/2.jsonl", "t.jsonl", "h.jsonl")
    put(tmp_path, "README.md", content=CARD)
    assert files_of(tmp_path, config="easy") == ["e/1.jsonl", "e/2.jsonl"]
    assert files_of(tmp_path, "test", config="easy") == ["t.jsonl"]
    assert files_of(tmp_path, config="hard") == ["h.jsonl"]
    assert message_of(tmp_path) == f"{tmp_path}: data.config: expected easy, hard; got none"
    assert message_of(tmp_path, "dev", config="hard") == (
        f"{tmp_path}: expected a file of the split 'dev'; found train"
    )


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    """One data set, or one with splits; a choice of rows is kept."""
    import datasets

    rows = datasets.Dataset.from_list([{"from": str(n)} for n in range(4)])
    rows.select([3, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert files_of(tmp_path / "one") == ["3", "1"]
    assert files_of(tmp_path / "two", "test") == ["0"]
    assert files_of(tmp_path / "two", "train[1:3]") == ["1", "2"]
    assert message_of(tmp_path / "two", "dev").endswith("'dev'; found test, train")
    assert message_of(tmp_path / "one", "test").endswith("'test'; found train")
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    assert "can't be read as `save_to_disk` writes it" in message_of(tmp_path / "one")


def test_parts_of_a_split(tmp_path: Path) -> None:
    """`train[:2]` works as in `datasets`, for folders and for files."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"from": str(n)}) + "\n" for n in range(10)))
    for source in (tmp_path, file):
        assert files_of(source, "train[:2]") == ["0", "1"]
        assert files_of(source, "train[80%:]") == ["8", "9"]
        assert files_of(source, "train[-1:]") == ["9"]


def test_home_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde is the home folder, and a pattern is its files in order."""
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "d/b.jsonl", "d/a.jsonl", "d/c.txt")
    assert files_of("~/d/a.jsonl") == ["d/a.jsonl"]
    assert files_of("~/d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert files_of(f"{tmp_path}/**/[ab].jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert files_of("~/d") == ["d/a.jsonl", "d/b.jsonl"]
    assert message_of(f"{tmp_path}/*.csv") == (
        f"{tmp_path}/*.csv: expected files; none matches the pattern"
    )


def test_names_of_splits_may_be_capitals(tmp_path: Path) -> None:
    """`Test.jsonl` beside `Train.jsonl` is no part of train."""
    put(tmp_path, "Train.jsonl", "TEST.jsonl", "Dev/rows.jsonl")
    assert files_of(tmp_path) == ["Train.jsonl"]
    assert files_of(tmp_path, "test") == ["TEST.jsonl"]
    assert files_of(tmp_path, "validation") == ["Dev/rows.jsonl"]


def test_parts_of_two_splits_with_one_word_are_no_one(tmp_path: Path) -> None:
    """Rows of `train_gen` are never joined to those of `train_sft`."""
    put(tmp_path, *(f"data/train_{kind}-00000-of-00001.jsonl" for kind in ("sft", "gen")))
    assert message_of(tmp_path) == (
        f"{tmp_path}: expected one data set; parts of train_gen, train_sft are called 'train'\n"
        f"hint: name the files that are meant as a pattern: {tmp_path}/data/train_gen-*"
    )
    put(tmp_path / "one", *(f"train/{kind}-00000-of-00001.jsonl" for kind in ("code", "math")))
    assert len(files_of(tmp_path / "one")) == 2


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ("'data/**'", ["data/a.jsonl", "data/in/b.jsonl"]),
        ("[data/a.jsonl, data/in/b.jsonl]", ["data/a.jsonl", "data/in/b.jsonl"]),
        ("data/**.jsonl", ["data/a.jsonl"]),
    ],
)
def test_patterns_of_a_card(tmp_path: Path, files: str, read: list[str]) -> None:
    """Two stars find the files of a folder and of those below it; a config may be the default."""
    put(tmp_path, "data/a.jsonl", "data/in/b.jsonl", "c.jsonl")
    configs = "- {config_name: a, data_files: c.jsonl}\n"
    configs += f"- {{config_name: b, default: true, data_files: {files}}}"
    put(tmp_path, "README.md", content=f"---\nconfigs:\n{configs}\n---\n")
    assert files_of(tmp_path) == read


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            "[{split: train, path: [a.jsonl, b-*]}]",
            ": README.md names b-*, and there is no such file\n"
            "hint: fetch it, too, or name the files that are meant as a pattern: *.parquet",
        ),
        (
            "/a.jsonl",
            ": README.md names /a.jsonl, and there is no such file\n"
            "hint: fetch it, too, or name the files that are meant as a pattern: *.parquet",
        ),
        (
            "[{path: a.jsonl}]",
            "/README.md: data_files: expected patterns of files, or `split` and `path` of each; "
            "got {'path': 'a.jsonl'}",
        ),
        (
            "{train: a.jsonl}",
            "/README.md: data_files: expected patterns of files, or `split` and `path` of each; "
            "got {'train': 'a.jsonl'}",
        ),
    ],
)
def test_a_card_of_which_not_all_is_there(tmp_path: Path, files: str, message: str) -> None:
    """Half of what it names is no split, and what says no split is named."""
    put(tmp_path, "a.jsonl")
    put(tmp_path, "README.md", content=f"---\nconfigs:\n- data_files: {files}\n---\n")
    assert message_of(tmp_path) == f"{tmp_path}{message}"
