"""Rows of one file, whatever it is: its first bytes say more than its name does."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sftkey.data.messages import is_conversation
from sftkey.data.values import RepeatedKeyError, each_once
from sftkey.errors import DataError, first_line
from sftkey.files import irregular

Rows = list[dict[str, Any]]

LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
TABLES = (".parquet", ".feather", ".arrow")
ENDINGS = (".json", *LINES, ".csv", ".tsv", *TABLES)
CONVERSATIONS = {"messages", "conversations", "conversation"}  # lists that are a row's own
MOST_NAMES = 1000  # of a folder, among which one near to a wrong name is looked for
MOST_LINE_BYTES = 2**26  # 64 MiB; a training row is far shorter
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*<(?:!doctype )?html\b", re.IGNORECASE)
AGAIN = "if it was copied in part, fetch it again"
EACH_ONCE = json.JSONDecoder(object_pairs_hook=each_once)


def _zstd(stream: IO[bytes]) -> IO[bytes]:
    import pyarrow

    unpacked: IO[bytes] = pyarrow.CompressedInputStream(stream, "zstd")
    return unpacked


def _only_member(stream: IO[bytes]) -> IO[bytes]:
    """Open the one file that a zip archive holds."""
    archive = zipfile.ZipFile(stream)
    if "xl/workbook.xml" in archive.namelist():
        raise ValueError("an Excel workbook; save its sheet as CSV in UTF-8")
    hidden = ("__MACOSX/", ".")
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith(hidden)]
    names = list(filter(is_data_file, names)) or names  # a README beside it is no second one
    if len(names) != 1:
        raise ValueError(f"a zip archive of {len(names)} files, where one is read; unpack it first")
    return archive.open(names[0])


# By the first bytes: how the stream is opened.
COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"PK\x03\x04": _only_member,
}
# By the first bytes: what is no table that we read, and what to do.
FOREIGN = {
    b"SQLite format 3\0": ("an SQLite database", "write its table as CSV or as lines of JSON"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save the table as CSV in UTF-8"),
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def ending(name: str) -> str:
    """Return what a file's name says of its kind, in small letters, without the compression.

    >>> ending("train.JSONL.gz"), ending("rows.zip"), ending("rows")
    ('.jsonl', '.zip', '')
    """
    path = Path(name.lower())
    inner = Path(path.stem).suffix
    return inner if path.suffix in PACKED and inner in ENDINGS else path.suffix


def is_data_file(name: str) -> bool:
    """Tell whether a name ends as the files that we read do."""
    return ending(name) in (*ENDINGS, *PACKED)


def read_file(file: Path) -> Rows:
    """Read a file's rows.

    `datasets` guesses types where a file has text: "2023-01-01" comes out as a time, 5 beside 5.5
    as 5.0, 007 as 7, NA as nothing. What is trained is text, so it must come out as it was written.

    Raises:
        DataError: There is no such file, it is no file that can be read to its end, or it holds
            something else than rows.
    """
    kind = ending(file.name)
    # A fifo or a device would be read without end.
    if what := irregular(file):
        raise DataError(str(file), f"expected a file of rows; got {what}")
    try:
        with file.open("rb") as raw, io.BufferedReader(_unpacked(raw, file)) as stream:
            # What a zip archive holds has a name of its own.
            inner = ending(stream.raw.name) if kind == ".zip" else kind
            return _rows_of(stream, file, inner)
    except FileNotFoundError as error:
        what = "a link to a file that isn't there" if file.is_symlink() else "no such file"
        raise DataError(str(file), f"{what}{_near(file)}") from error
    except UnicodeDecodeError as error:
        what = f"expected {kind.removeprefix('.') or 'text'} in UTF-8; got {error}"
        raise DataError(str(file), what, hint="save it as UTF-8, which every editor can") from error
    except csv.Error as error:
        what = f"expected {kind.removeprefix('.') or 'csv'}; got {error}"
        hint = 'a quote (") inside a cell is written twice, without a backslash'
        if "unexpected end" in str(error):
            hint = "a quote (\") isn't closed; one inside a cell is written twice"
        raise DataError(str(file), what, hint=hint) from error
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(str(file), f"can't be unpacked: {first_line(error)}") from error
    except OSError as error:
        raise DataError(str(file), f"can't be read: {error.strerror or error}") from error


def _near(file: Path) -> str:
    """Return `; did you mean …?` for a data file beside, of nearly this name but for its ending."""
    names = (each.name for each in file.parent.glob("*") if each.name != file.name)
    beside = islice(filter(is_data_file, names), MOST_NAMES)
    stems = {name.partition(".")[0].lower(): name for name in beside}
    near = get_close_matches(file.name.partition(".")[0].lower(), stems, n=1, cutoff=0.75)
    return f"; did you mean `{stems[near[0]]}`?" if near else ""


def _unpacked(stream: IO[bytes], file: Path) -> Any:
    """Return the stream, unpacked where its first bytes say that it is compressed."""
    start = stream.read(8)
    stream.seek(0)
    for magic, opened in COMPRESSED.items():
        if start.startswith(magic):
            try:
                return opened(stream)
            except (ValueError, RuntimeError) as error:
                raise DataError(str(file), f"is {first_line(error)}") from error
    return stream


def _rows_of(stream: io.BufferedReader, file: Path, kind: str) -> Rows:
    """Read an unpacked stream by its first bytes, and by the name where they say nothing."""
    start = stream.peek(4096)[:4096]
    if start.startswith(LFS_POINTER):
        raise DataError(
            str(file),
            "expected rows; got a pointer of Git LFS, which only says where they are",
            hint="`git lfs pull` in its folder fetches the file itself",
        )
    if WEB_PAGE.match(start):
        hint = "download the file itself: its address has `resolve` where its page has `blob`"
        raise DataError(str(file), "expected rows; got a web page", hint)
    if (start or kind in TABLES) and not start.strip(b"\0"):
        what = "zeros alone" if start else "an empty file"
        raise DataError(str(file), f"expected rows; got {what}", AGAIN)
    if start.startswith(tuple(COMPRESSED)):
        raise DataError(str(file), "is packed twice, or holds a packed file; unpack it first")
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) or kind in TABLES:
        return _table(io.BytesIO(stream.read()), file, start, kind)
    if kind in (".csv", ".tsv"):
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            return _csv(text, file, kind)
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[" or (first == b"{" and kind not in LINES):
        return _json(stream, file)
    if kind not in (".json", *LINES) and start.strip() and first != b"{":
        what = "expected JSON, CSV, parquet or arrow; got something else"
        hint = f"its name should end in {', '.join(ENDINGS)}, or one of these and "
        hint += ", ".join(PACKED)
        found = [said for magic, said in FOREIGN.items() if start.startswith(magic)]
        found += [("a tar archive", "unpack it first")] if start[257:262] == b"ustar" else []
        for name, way in found:
            what, hint = f"{what.partition(';')[0]}; got {name}", way
        raise DataError(str(file), what, hint=hint)
    return _json_lines(stream, file)


def _json_lines(stream: IO[bytes], file: Path) -> Rows:
    rows = []
    lines = iter(lambda: stream.readline(MOST_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_LINE_BYTES:  # it can be no row, and would fill the memory
            most = f"{MOST_LINE_BYTES >> 20} MiB"
            raise DataError(str(file), f"line {number}: expected a row; got more than {most}")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            rows.append(_object(_parse(text, file, number), file, f"line {number}"))
    if len(rows) == 1 and len(rows[0]) == 1 and not CONVERSATIONS & rows[0].keys():
        return _wrapped(rows[0]) or rows  # `{"data": [rows]}` in a file that is called lines
    return rows


def _json(stream: IO[bytes], file: Path) -> Rows:
    """Read one JSON value that holds all rows, or lines that are called JSON."""
    text = stream.read().decode("utf-8-sig")
    try:
        value = _parse(text, file, None)
    except DataError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and "Extra data" in str(error):
            return _json_lines(io.BytesIO(text.encode()), file)
        raise
    if isinstance(value, list):
        return [_object(item, file, f"item {number}") for number, item in enumerate(value)]
    return _rows_in(_object(value, file, "the file"), file)


def _rows_in(value: dict[str, Any], file: Path) -> Rows:
    """Find the rows in an object: `{"data": [rows]}`, columns, or rows by their names."""
    if (wrapped := _wrapped(value)) is not None:
        return wrapped
    inner = list(value.values())
    if any(map(is_conversation, inner)):
        return [value]
    columns = all(isinstance(item, list) for item in inner) and len(set(map(len, inner))) == 1
    # Lists that hold nothing but objects are splits: `{"train": [rows], "test": [rows]}`.
    if columns and not all(isinstance(cell, dict) for item in inner for cell in item):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*inner, strict=True)]
    if inner and all(isinstance(item, dict) for item in inner):
        by_number = all(key.isdigit() for item in inner for key in item)
        if by_number and not all(name.isdigit() for name in value):
            # pandas' `to_json`: by column, then by row.
            places = list(dict.fromkeys(key for item in inner for key in item))
            return [{name: cells.get(key) for name, cells in value.items()} for key in places]
        return inner
    names = ", ".join(list(value)[:5])
    raise DataError(
        str(file),
        f"expected a list of objects; got an object with the keys {names}",
        hint="write the rows alone, as a list or one a line",
    )


def _wrapped(value: Mapping[str, Any]) -> Rows | None:
    """Return the one list of objects that stands beside nothing but single values.

    Messages are no rows: they are one row's own.
    """
    several = [item for item in value.values() if isinstance(item, list | dict)]
    if len(several) != 1 or not isinstance(several[0], list) or not several[0]:
        return None
    if is_conversation(several[0]):
        return None
    return several[0] if all(isinstance(item, dict) for item in several[0]) else None


def _decoded(text: str) -> Any:
    try:
        return EACH_ONCE.decode(text)
    except (json.JSONDecodeError, RepeatedKeyError):
        raise
    except ValueError:  # a number of thousands of digits: read so it changes no row's text
        return json.loads(text, parse_int=str, object_pairs_hook=each_once)


def _parse(text: str, file: Path, line: int | None) -> Any:
    try:
        try:
            return _decoded(text)
        except RepeatedKeyError as error:
            place = f"line {line}" if line else "the file"
            place += _repeating(json.loads(text, parse_int=str, object_pairs_hook=_Pairs)) or ""
            what = f"{place}: expected each key once; got {error} several times"
            why = "of keys of one name only the last would be read"
            raise DataError(str(file), what, hint=why) from error
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        what = f"{place}: expected JSON; got {error.msg!r}"
        hint = "one object a line, without commas between the lines" if line else None
        ends = "Unterminated" in error.msg or error.pos >= len(text.rstrip())
        hint = AGAIN if ends and not (line and text.endswith("\n")) else hint
        raise DataError(str(file), what, hint=hint) from error
    except RecursionError as error:
        at = f"line {line}: " if line else ""
        what = f"{at}expected a row; got too many brackets"
        hint = "values inside one another so deep are no text of a row: remove them, or write "
        raise DataError(str(file), what, hint=f"{hint}them as one text") from error


class _Pairs(list[Any]):
    """An object of JSON as the pairs of its keys and values."""


def _repeating(value: Any) -> str | None:
    """Return the way to the first object that has a key several times: `[3].messages[0]`."""
    if not isinstance(value, list):
        return None
    inner = [(f".{name}", v) for name, v in value] if isinstance(value, _Pairs) else None
    if inner and len(dict(inner)) < len(inner):
        return ""
    items = inner or [(f"[{place}]", item) for place, item in enumerate(value)]
    ways = ((name, _repeating(item)) for name, item in items)
    return next((name + way for name, way in ways if way is not None), None)


def _object(item: Any, file: Path, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(str(file), f"{place}: expected an object; got {type(item).__name__}")
    return item


def _csv(text: io.TextIOWrapper, file: Path, kind: str) -> Rows:
    csv.field_size_limit(MOST_LINE_BYTES)  # the default refuses responses of more than 128 KiB
    header = text.readline(MOST_LINE_BYTES)
    if header.startswith(('{"', '[{"')):
        raise DataError(str(file), "expected a head of columns; got JSON", "name it .jsonl")
    said = re.fullmatch("sep=(.)\\s*", header)  # Excel's own line before the head
    if not said:
        text.seek(0)
    # A German or French spreadsheet writes semicolons.
    delimiter = said[1] if said else "\t" if kind == ".tsv" else ","
    if not said and delimiter not in header:
        delimiter = next((each for each in ";\t,|" if each in header), delimiter)
    blanks = f"{delimiter} " in header  # `question, "answer"`: the quotes stand behind a blank
    reader = csv.DictReader(text, strict=True, delimiter=delimiter, skipinitialspace=blanks)
    _require_each_once(reader.fieldnames or (), file, "line 1: ")
    rows: Rows = []
    for row in reader:
        if None in row:
            expected = f"expected {len(reader.fieldnames or ())} cells; got more"
            raise DataError(str(file), f"line {reader.line_num}: {expected}")
        rows.append(row)
    return rows


def _require_each_once(columns: Sequence[str], file: Path, place: str = "") -> None:
    if twice := sorted(name for name, num in Counter(columns).items() if num > 1):
        listed = ", ".join(name or "an empty name" for name in twice)
        what = f"{place}expected each column once; got {listed} several times"
        raise DataError(str(file), what, "of columns of one name only the last would be read")


def _table(stream: IO[bytes], file: Path, start: bytes, kind: str) -> Rows:
    """Read parquet, or arrow as a file (feather) or a stream (of `datasets`)."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if start.startswith(b"ARROW1"):
            return table_rows(pyarrow.ipc.open_file(stream).read_all(), file)
        if start.startswith(b"\xff\xff\xff\xff"):
            return table_rows(pyarrow.ipc.open_stream(stream).read_all(), file)
        return table_rows(pyarrow.parquet.ParquetFile(stream).read(), file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        what = kind.removeprefix(".") or "a table"
        if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
            what = f"expected {what} to its end: {first_line(error)}"
            raise DataError(str(file), what, AGAIN) from error
        raise DataError(str(file), f"expected {what}; got something else") from error


def table_rows(table: Any, file: Path) -> Rows:
    """Return the rows of an arrow table, with the values that were meant.

    float32 holds 0.1 as 0.10000000149, pandas turns whole numbers beside a gap into 4.0, and some
    writers keep text as bytes.
    """
    _require_each_once(table.column_names, file)
    rows: Rows = table.to_pylist()
    for field in table.schema:
        mend = _mending(field.type)
        if mend is None:
            continue
        try:
            for row in rows:
                row[field.name] = mend(row[field.name])
        except UnicodeDecodeError as error:
            what = f"column {field.name}: expected text; got bytes that are none in UTF-8"
            raise DataError(str(file), what) from error
        values = [row[field.name] for row in rows]
        if all(value is None or _is_whole(value) for value in values):
            for row, value in zip(rows, values, strict=True):
                row[field.name] = None if value is None else int(value)
    return rows


def _mending(kind: Any) -> Callable[[Any], Any] | None:
    """Choose how a column's values become what was meant; None where they are it already."""
    import numpy
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return lambda value: None if value is None else value.decode()
    if types.is_float32(kind) or types.is_float16(kind):
        number = numpy.float32 if types.is_float32(kind) else numpy.float16
        return lambda value: None if value is None else float(str(number(value)))
    if types.is_float64(kind):
        return lambda value: value
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _mending(kind.value_type)
        return inner and (lambda value: None if value is None else [inner(v) for v in value])
    if types.is_dictionary(kind):
        return _mending(kind.value_type)
    if types.is_map(kind):
        item = _mending(kind.item_type) or (lambda value: value)
        return lambda value: None if value is None else {key: item(v) for key, v in value}
    if types.is_struct(kind):
        fields = {field.name: mend for field in kind if (mend := _mending(field.type))}
        return _struct_mending(fields) if fields else None
    return None


def _struct_mending(fields: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def mend(value: Any) -> Any:
        if value is None:
            return None
        return {key: fields[key](v) if key in fields else v for key, v in value.items()}

    return mend


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value.is_integer()
