"""A file is read by what it holds: packed, wrapped, by columns, or refused with what to do."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from sftkey.data import readers
from sftkey.data.readers import read_file
from sftkey.errors import DataError

ROWS = [{"q": f"{n} + 1?", "cot": "Add one.", "a": str(n + 1)} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def message_of(file: Path) -> str:
    """Return the error that reading ends in."""
    with pytest.raises(DataError) as caught:
        read_file(file)
    return str(caught.value).replace(f"{file}", "FILE")


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.JSONL", "r.ndjson", "r.jsonlines", "r.jl", "r.json", "r.txt", "r"]
)
def test_lines_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    """What stands in the file says that it is lines of JSON."""
    file = tmp_path / name
    file.write_text(LINES)
    assert read_file(file) == ROWS


WRAPPED = {
    "list": ROWS,
    "data": {"data": ROWS},
    "rows": {"version": 1, "rows": ROWS},
    "columns": {key: [row[key] for row in ROWS] for key in ROWS[0]},
    "names": {f"id-{n}": row for n, row in enumerate(ROWS)},
    "numbers": {str(n): row for n, row in enumerate(ROWS)},
    "pandas": {key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]},
}


@pytest.mark.parametrize("value", WRAPPED.values(), ids=WRAPPED)
def test_a_value_that_holds_all_rows(tmp_path: Path, value: Any) -> None:
    """A list, a wrapped one, columns, rows by their names: what libraries write as JSON."""
    for name in ("r.json", "r"):
        (tmp_path / name).write_text(json.dumps(value, indent=1))
        assert read_file(tmp_path / name) == ROWS


@pytest.mark.parametrize("kind", ["list", "data"])
def test_a_whole_value_in_a_file_of_lines(tmp_path: Path, kind: str) -> None:
    """A list or a wrapped one is no row, whatever the file is called."""
    (tmp_path / "r.jsonl").write_text(json.dumps(WRAPPED[kind]))
    assert read_file(tmp_path / "r.jsonl") == ROWS


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
@pytest.mark.parametrize("column", ["messages", "chat"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("speaker", "text")])
def test_one_conversation_is_one_row(
    tmp_path: Path, name: str, column: str, keys: tuple[str, str]
) -> None:
    """It isn't taken for a list of rows, whatever its column and the file are called."""
    row = {column: [dict(zip(keys, ("Human", "Q"), strict=True))]}
    (tmp_path / name).write_text(json.dumps(row))
    assert read_file(tmp_path / name) == [row]


def zipped(data: bytes, *names: str) -> bytes:
    """Pack data under these names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", lambda data: pyarrow.compress(data, "zstd", asbytes=True)),
        ("zip", lambda data: zipped(data, "folder/r.jsonl", "__MACOSX/x")),
    ],
)
@pytest.mark.parametrize("inner", ["r.jsonl.", "r."])
def test_packed_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inner: str,
    ending: str,
    pack: Callable[[bytes], bytes],
) -> None:
    """Five packers, with or without the inner name; a cut file is one error."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"{inner}{ending}"
    data = pack(LINES.encode())
    file.write_bytes(data)
    assert read_file(file) == ROWS
    file.write_bytes(data[:-20])
    message = message_of(file)
    assert message.startswith("FILE: ")
    assert "\n" not in message


def test_a_zip_of_several_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is meant, nobody knows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.zip").write_bytes(zipped(b"{}", "a.jsonl", "b.jsonl"))
    assert message_of(tmp_path / "r.zip") == (
        "FILE: is a zip archive of 2 files, where one is read; unpack it first"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            zipped(b"<x/>", "[Content_Types].xml", "xl/workbook.xml"),
            "is an Excel workbook; save its sheet as CSV in UTF-8",
        ),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1",
            "expected JSON, CSV, parquet or arrow; got an old Excel or Word file\n"
            "hint: save the table as CSV in UTF-8",
        ),
        (
            b"SQLite format 3\0\0",
            "expected JSON, CSV, parquet or arrow; got an SQLite database\n"
            "hint: write its table as CSV or as lines of JSON",
        ),
    ],
)
def test_files_of_other_programs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    """Each with the way to rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.xlsx").write_bytes(data)
    assert message_of(tmp_path / "r.xlsx") == f"FILE: {message}"


def test_a_readme_beside_the_one_file_of_a_zip_is_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What people pack says what it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.zip").write_bytes(zipped(LINES.encode(), "README.md", "r.jsonl"))
    assert read_file(tmp_path / "r.zip") == ROWS


AGAIN = "hint: if it was copied in part, fetch it again"
PAGE = "hint: download the file itself: its address has `resolve` where its page has `blob`"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        *(
            (f"r.{kind}", b"\n<!DOCTYPE html>\n<p>", f"expected rows; got a web page\n{PAGE}")
            for kind in ("jsonl", "csv", "parquet", "json")
        ),
        ("r.parquet", b"", f"expected rows; got an empty file\n{AGAIN}"),
        ("r.jsonl", bytes(5000), f"expected rows; got zeros alone\n{AGAIN}"),
        (
            "r.jsonl",
            LINES[:-4].encode(),
            f"line 3, column 41: expected JSON; got 'Unterminated string starting at'\n{AGAIN}",
        ),
        (
            "r.json",
            json.dumps(ROWS)[:-2].encode(),
            f"line 1, column 137: expected JSON; got \"Expecting ',' delimiter\"\n{AGAIN}",
        ),
    ],
)
def test_what_a_download_left(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    """The page in place of the file, nothing, zeros, or a half."""
    (tmp_path / name).write_bytes(data)
    assert message_of(tmp_path / name) == f"FILE: {message}"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """Nobody is told to mean the file that was named."""
    (tmp_path / "r.jsonl").symlink_to("nowhere")
    assert message_of(tmp_path / "r.jsonl") == "FILE: a link to a file that isn't there"


def test_two_splits_in_one_file_are_no_columns(tmp_path: Path) -> None:
    """Neither if they have as many rows."""
    (tmp_path / "r.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    assert message_of(tmp_path / "r.json") == (
        "FILE: expected a list of objects; got an object with the keys train, test\n"
        "hint: write the rows alone, as a list or one a line"
    )


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """Only the last of them would be read."""
    (tmp_path / "r.csv").write_text("A title,,\nquestion,cot,answer\n")
    assert "expected each column once; got an empty name several times" in message_of(
        tmp_path / "r.csv"
    )
    table = pyarrow.Table.from_arrays([pyarrow.array(["7"])] * 2, ["answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    assert message_of(tmp_path / "r.parquet") == (
        "FILE: expected each column once; got answer several times\n"
        "hint: of columns of one name only the last would be read"
    )
    (tmp_path / "r.csv").write_text("question,answer,answer\nQ,c,7\n")
    assert message_of(tmp_path / "r.csv") == (
        "FILE: line 1: expected each column once; got answer several times\n"
        "hint: of columns of one name only the last would be read"
    )


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("r.jsonl", LINES + '{"q": "Q", "a": "1", "a": "2"}', "line 4"),
        ("r.json", LINES + '{"q": "Q", "a": "1", "a": "2"}', "line 4"),
        ("r.jsonl", '{"m": [{"role": "user"}, {"a": "1", "a": "2"}]}', "line 1.m[1]"),
        ("r.json", '[{"a": "1"}, {"q": {"a": "1", "a": "2"}}]', "the file[1].q"),
        ("r.json", '{"data": [{"a": ' + "9" * 5000 + ', "a": "2"}]}', "the file.data[0]"),
        ("r.json", '{"a": [1], "a": [2]}', "the file"),
        ("r.json", '{"a": "1", "a": "2"}\n' + LINES, "line 1"),
    ],
)
def test_keys_of_one_name_are_refused(tmp_path: Path, name: str, text: str, where: str) -> None:
    """Only the last of them would be read; the row is named, and the place in it."""
    (tmp_path / name).write_text(text)
    assert message_of(tmp_path / name) == (
        f"FILE: {where}: expected each key once; got a several times\n"
        "hint: of keys of one name only the last would be read"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.tsv", "q\ta\n1,5?\t007\n"),
        ("r.csv", "q;a\n1,5?;007\n"),
        ("r.CSV", 'q,a\n"1,5?",007\n'),
        ("r.csv", "q|a\n1,5?|007\n"),
        ("r.csv", "sep=;\nq;a\n1,5?;007\n"),
        ("r.csv", 'q, a\n"1,5?", "007"\n'),
    ],
)
def test_tables_of_text(tmp_path: Path, name: str, text: str) -> None:
    """Tabs, a spreadsheet's semicolons, commas; cells stay as they were written."""
    (tmp_path / name).write_text(text)
    assert read_file(tmp_path / name) == [{"q": "1,5?", "a": "007"}]


def test_json_under_the_name_of_a_table_is_refused(tmp_path: Path) -> None:
    """Its first row would be a head."""
    (tmp_path / "r.csv").write_text('{"q": "1", "a": "2"}\n')
    said = "FILE: expected a head of columns; got JSON\nhint: name it .jsonl"
    assert message_of(tmp_path / "r.csv") == said


def test_tables_of_arrow(tmp_path: Path) -> None:
    """Parquet, feather and the stream that `datasets` writes are told by their first bytes."""
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "rows")
    pyarrow.feather.write_feather(table, tmp_path / "r.feather")
    with pyarrow.ipc.new_stream(tmp_path / "r.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows", "r.feather", "r.arrow"):
        assert read_file(tmp_path / name) == ROWS


def test_values_are_read_as_they_were_meant(tmp_path: Path) -> None:
    """0.1 in float32, whole numbers beside a gap, text as bytes, also inside lists and structs."""
    table = pyarrow.table(
        {
            "f32": pyarrow.array([0.1, 2.5], pyarrow.float32()),
            "gap": pyarrow.array([4.0, None], pyarrow.float64()),
            "real": pyarrow.array([4.0, 0.5], pyarrow.float64()),
            "nan": pyarrow.array([float("inf"), 1.0], pyarrow.float64()),
            "bytes": pyarrow.array([b"x", None], pyarrow.binary()),
            "few": pyarrow.array([b"x", None], pyarrow.binary()).dictionary_encode(),
            "map": pyarrow.array(
                [[("A", b"x")], None], pyarrow.map_(pyarrow.string(), pyarrow.binary())
            ),
            "in": pyarrow.array(
                [{"l": [b"y"], "f": 0.1}, None],
                pyarrow.struct(
                    {"l": pyarrow.list_(pyarrow.binary()), "f": pyarrow.float32()}.items()
                ),
            ),
        }
    )
    file = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(table, file)
    assert read_file(file) == [
        {
            **{"f32": 0.1, "gap": 4, "real": 4.0, "nan": float("inf"), "bytes": "x", "few": "x"},
            **{"map": {"A": "x"}, "in": {"l": ["y"], "f": 0.1}},
        },
        {
            **{"f32": 2.5, "gap": None, "real": 0.5, "nan": 1.0, "bytes": None, "few": None},
            **{"map": None, "in": None},
        },
    ]
    assert str(read_file(file)[0]["gap"]) == "4"
    pyarrow.parquet.write_table(pyarrow.table({"b": [b"\xff"]}), file)
    assert message_of(file) == "FILE: column b: expected text; got bytes that are none in UTF-8"


def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    """Whatever its name, the error says how to fetch the file itself."""
    for name in ("r.jsonl", "r.parquet", "r.csv"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert message_of(tmp_path / name) == (
            "FILE: expected rows; got a pointer of Git LFS, which only says where they are\n"
            "hint: `git lfs pull` in its folder fetches the file itself"
        )


def test_what_has_no_end_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """A pipe without writer would wait for ever, a device would fill the memory."""
    os.mkfifo(tmp_path / "r.jsonl")
    (tmp_path / "z.jsonl").symlink_to("/dev/zero")
    (tmp_path / "f.jsonl").mkdir()
    for name, kind in (("r", "a pipe"), ("z", "a device"), ("f", "a folder")):
        message = f"FILE: expected a file of rows; got {kind}"
        assert message_of(tmp_path / f"{name}.jsonl") == message


def test_a_line_that_is_no_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length is known before all of it is read."""
    monkeypatch.setattr(readers, "MOST_LINE_BYTES", 2**20)
    file = tmp_path / "r.jsonl"
    file.write_text(LINES + '{"q": "' + "x" * 2**20 + '"}')
    assert message_of(file) == "FILE: line 4: expected a row; got more than 1 MiB"


def test_odd_json(tmp_path: Path) -> None:
    """Thousands of brackets are an error, thousands of digits are what they are."""
    file = tmp_path / "r.jsonl"
    file.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert message_of(file) == (
        "FILE: line 1: expected a row; got too many brackets\nhint: values inside one another so "
        "deep are no text of a row: remove them, or write them as one text"
    )
    file.write_text('{"a": ' + "9" * 5000 + "}")
    assert str(read_file(file)[0]["a"]) == "9" * 5000
    file.write_text('{"a": ' + "9" * 5000 + " b}")
    with pytest.raises(DataError, match="expected JSON; got \"Expecting ',' delimiter\""):
        read_file(file)


def test_lines_with_commas_between_them(tmp_path: Path) -> None:
    """The hint says what a file of lines is."""
    file = tmp_path / "r.jsonl"
    file.write_text('{"a": 1},\n{"a": 2}')
    assert message_of(file) == (
        "FILE: line 1, column 9: expected JSON; got 'Extra data'\n"
        "hint: one object a line, without commas between the lines"
    )


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    """Its files are files of their own."""
    with tarfile.open(tmp_path / "r.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("r.jsonl"))
    assert message_of(tmp_path / "r.tar.gz") == (
        "FILE: expected JSON, CSV, parquet or arrow; got a tar archive\nhint: unpack it first"
    )


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_what_is_packed_twice_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """It would be bytes in no encoding."""
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(pack(b'{"a": 1}')))
    assert message_of(tmp_path / "r.jsonl.gz") == (
        "FILE: is packed twice, or holds a packed file; unpack it first"
    )


def test_half_a_table_is_refused(tmp_path: Path) -> None:
    """Its first bytes say what it is, and its end isn't there."""
    pyarrow.parquet.write_table(pyarrow.table({"a": ["1"]}), tmp_path / "r.parquet")
    (tmp_path / "r.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:-9])
    said = message_of(tmp_path / "r.parquet")
    assert said.startswith("FILE: expected parquet to its end: ")
    assert said.endswith("\nhint: if it was copied in part, fetch it again")


def test_a_table_in_a_zip_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name inside says what it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.zip").write_bytes(zipped(b"q,a\n1?,007\n", "inside/r.csv"))
    assert read_file(tmp_path / "all.zip") == [{"q": "1?", "a": "007"}]


def test_a_text_that_is_no_data_is_refused(tmp_path: Path) -> None:
    """The error says what a name should end in."""
    file = tmp_path / "notes.txt"
    file.write_text("Dear all,\n")
    assert message_of(file).startswith(
        "FILE: expected JSON, CSV, parquet or arrow; got something else\n"
        "hint: its name should end in .json, .jsonl, "
    )
