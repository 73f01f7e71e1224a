import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftkey.data import row_cache
from sftkey.data import row_cache as content
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.row_cache import SCHEMA, CachedRows, content_key, tokenized_rows
from sftkey.data.tokenization import Refusal, Row, fit, tokenize
from sftkey.errors import DataError
from sftkey.recipe.schema import ResponseSection
from tests.support.tokenizers import CHATML, KINDS, SPECIAL, TEXT, made

SETTINGS = {"max_length": 60, "trim": False}
EXAMPLES = [
    Example("Q", "3 cats: 12\n2 birds: 4\n", "16", 4),
    Example("Q", "a </s>", "7", 5),
    Example("Q", "3 cats: 12\n2 birds: 4\n" * 9, "16", 6),
    Example(({"role": "user", "content": "Q"},), "", "8", 6),
]


@pytest.fixture
def renderer() -> Renderer:
    """Return a frame over a made tokenizer."""
    return Renderer.read(made("look_ahead", CHATML), ResponseSection())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the entries of a cache that is empty."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    return tmp_path / "rows"


@pytest.fixture
def made_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the examples of each tokenization."""
    counted: list[int] = []
    original = row_cache.tokenize_batches

    def counting(examples: Sequence[Example], renderer: Renderer) -> Any:
        counted.append(len(examples))
        return original(examples, renderer)

    monkeypatch.setattr(row_cache, "tokenize_batches", counting)
    return counted


def contents(found: tuple[Dataset, CachedRows]) -> tuple[list[Any], list[Any]]:
    """Return rows and what became of the others as plain lists, as JSON has them."""
    rows, outcome = found
    return list(rows), json.loads(json.dumps(list(vars(outcome).items())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trim", [False, True])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(TEXT, TEXT | st.sampled_from(SPECIAL), TEXT), min_size=1, max_size=5),
    max_length=st.integers(20, 120),
)
def test_rows_are_those_of_tokenizing_all_at_once(
    kind: str,
    trim: bool,
    texts: list[tuple[str, str, str]],
    max_length: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches, Arrow and JSON change nothing: not a row, not a refusal, not a count."""
    monkeypatch.setattr("sftkey.data.tokenization.BATCH_SIZE", 2)
    probed = Renderer.read(made(kind, CHATML), ResponseSection())
    examples = [Example(f"Q{p}", 2 * t, a, 2 * n) for n, (p, t, a) in enumerate(texts)]
    whole = tokenize(examples, probed)
    fitted = fit(whole, examples, probed, max_length, trim)
    first = tokenized_rows(examples, probed, max_length, trim)
    assert contents(first) == contents(tokenized_rows(examples, probed, max_length, trim))
    rows, outcome = first
    kept = [row for row in fitted if isinstance(row, Row)]
    assert list(rows) == [{name: vars(row)[name] for name in SCHEMA.names} for row in kept]
    segments = [segment for row in kept for segment in row.segment_ids]
    assert list(outcome.tokens.values()) == [segments.count(number) for number in range(5)]
    assert [tuple(each) for each in outcome.refused] == [
        (place, row.reason, row.code)
        for place, row in enumerate(fitted)
        if isinstance(row, Refusal)
    ]
    lengths = [len(row.input_ids) if isinstance(row, Row) else 0 for row in whole]
    assert [tuple(each) for each in outcome.long] == [
        (place, length) for place, length in enumerate(lengths) if length > max_length
    ]
    assert outcome.trimmed == [
        place
        for place, (one, other) in enumerate(zip(whole, fitted, strict=True))
        if isinstance(other, Row) and one != other
    ]


def test_second_start_reads(renderer: Renderer, folder: Path, made_batches: list[int]) -> None:
    """Equal content is tokenized once, and mapped into memory, not read into it."""
    first = tokenized_rows(EXAMPLES, renderer, 60, trim=False)
    second = tokenized_rows(list(EXAMPLES), replace(renderer), 60, trim=False)
    assert made_batches == [4]
    assert contents(first) == contents(second)
    rows, outcome = second
    assert [row["index"] for row in rows] == [4, 6]
    assert [place for place, _, _ in outcome.refused] == [1, 2]
    (entry,) = folder.iterdir()
    assert rows.cache_files == [{"filename": str(entry / "rows.arrow")}]


def with_template(template: str) -> Renderer:
    """Probe a template."""
    return Renderer.read(made("look_ahead", template), ResponseSection())


def test_other_content_is_another_entry(renderer: Renderer) -> None:
    """Whatever changes a row changes the name; what doesn't, leaves it."""
    key = content_key(EXAMPLES, renderer, SETTINGS)
    first, *others = EXAMPLES
    added = KINDS["look_ahead"]()
    added.chat_template = CHATML
    added.add_tokens(["cats"])
    response = ResponseSection(answer=("\n<A>\n", "\n</A>"))
    changed = [
        content_key([replace(first, prompt="R"), *others], renderer, SETTINGS),
        content_key([replace(first, thinking="3"), *others], renderer, SETTINGS),
        content_key([replace(first, answer="17"), *others], renderer, SETTINGS),
        content_key([replace(first, index=3), *others], renderer, SETTINGS),
        content_key([*others, first], renderer, SETTINGS),
        content_key(others, renderer, SETTINGS),
        content_key(EXAMPLES, renderer, SETTINGS | {"max_length": 61}),
        content_key(EXAMPLES, renderer, SETTINGS | {"trim": True}),
        content_key(EXAMPLES, with_template(CHATML.replace("<|im_s", "<s><|im_s")), SETTINGS),
        content_key(EXAMPLES, with_template("{# a remark #}" + CHATML), SETTINGS),
        content_key(EXAMPLES, replace(renderer, chat_template_kwargs={"a": 1}), SETTINGS),
        content_key(EXAMPLES, Renderer.read(made("look_ahead", CHATML), response), SETTINGS),
        content_key(
            EXAMPLES, Renderer.read(made("byte_level", CHATML), ResponseSection()), SETTINGS
        ),
        content_key(EXAMPLES, Renderer.read(added, ResponseSection()), SETTINGS),
        content_key(
            EXAMPLES[:3],
            Renderer.read(renderer.tokenizer, ResponseSection(frame="plain")),
            SETTINGS,
        ),
    ]
    assert len({key, *changed}) == len(changed) + 1
    again = KINDS["look_ahead"]()
    again.chat_template = CHATML
    again(["a", "a b c"], padding=True)  # leaves its padding in the backend
    assert content_key(list(EXAMPLES), Renderer.read(again, ResponseSection()), SETTINGS) == key


def test_another_version_is_another_entry(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of another sftkey, of changed code or other libraries are made anew."""
    key = content_key(EXAMPLES, renderer, SETTINGS)
    changes: list[tuple[str, Any]] = [
        ("__version__", "0.0.1"),
        ("_sources", lambda: "other"),
        ("version", lambda name: f"9.{name}"),
    ]
    keys = {key}
    for name, value in changes:
        with monkeypatch.context() as patched:
            patched.setattr(content, name, value)
            keys.add(content_key(EXAMPLES, renderer, SETTINGS))
    assert len(keys) == 4


def test_template_that_writes_the_date_is_another_entry_each_day(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of yesterday hold yesterday's date, which inference would not feed."""
    dated = with_template("{% set today = strftime_now('%d %b %Y') %}" + CHATML)
    keys = [content_key(EXAMPLES, each, SETTINGS) for each in (renderer, dated)]

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2999, 1, 1)

    monkeypatch.setattr(content, "date", Tomorrow)
    assert content_key(EXAMPLES, renderer, SETTINGS) == keys[0]
    assert content_key(EXAMPLES, dated, SETTINGS) != keys[1]


def cut_rows(entry: Path) -> None:
    """Lose the end of the rows."""
    rows = entry / "rows.arrow"
    rows.write_bytes(rows.read_bytes()[:-9])


def flip_a_bit(entry: Path) -> None:
    """Change the rows, not their size."""
    rows = entry / "rows.arrow"
    written = bytearray(rows.read_bytes())
    written[-60] ^= 1
    rows.write_bytes(written)


def cut_about(entry: Path) -> None:
    """Lose the end of what became of the others."""
    about = entry / "about.json"
    about.write_text(about.read_text()[:-20])


def other_about(entry: Path) -> None:
    """Leave something else there that is JSON."""
    (entry / "about.json").write_text("[]")


def without_rows(entry: Path) -> None:
    """Lose the rows."""
    (entry / "rows.arrow").unlink()


@pytest.mark.parametrize(
    "damage",
    [cut_rows, flip_a_bit, cut_about, other_about, without_rows],
    ids=lambda it: it.__name__,
)
@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_damaged_entry_is_made_anew(
    damage: Callable[[Path], None], renderer: Renderer, folder: Path, made_batches: list[int]
) -> None:
    """What isn't what was written is never trained on."""
    whole = contents(tokenized_rows(EXAMPLES, renderer, 60, trim=False))
    (entry,) = folder.iterdir()
    damage(entry)
    assert contents(tokenized_rows(EXAMPLES, renderer, 60, trim=False)) == whole
    assert contents(tokenized_rows(EXAMPLES, renderer, 60, trim=False)) == whole
    assert made_batches == [4, 4]


@pytest.mark.fault("a write cut short")
def test_stopped_tokenization_leaves_nothing(
    renderer: Renderer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry has its name only when it is whole."""

    def stopped(*arguments: Any) -> Any:
        yield tokenize(EXAMPLES[:2], renderer)
        raise KeyboardInterrupt

    monkeypatch.setattr(row_cache, "tokenize_batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenized_rows(EXAMPLES, renderer, 60, trim=False)
    assert list(folder.iterdir()) == []


def test_no_rows_at_all(renderer: Renderer, folder: Path) -> None:
    """A split of which every row is refused is an entry, too."""
    for _ in range(2):
        rows, outcome = tokenized_rows(EXAMPLES[1:2], renderer, 60, trim=False)
        assert len(rows) == 0
        assert len(outcome.refused) == 1


def test_folder_that_cannot_be_written_is_an_error(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the folder and how to choose another."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SFTKEY_CACHE", str(file))
    with pytest.raises(DataError) as raised:
        tokenized_rows(EXAMPLES, renderer, 60, trim=False)
    assert str(raised.value) == (
        f"{file}: the cache can't be written: Not a directory\n"
        "hint: set SFTKEY_CACHE to a folder of yours"
    )


def test_what_cannot_be_read_back_is_an_error(
    renderer: Renderer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back something else ends the run, not the rows."""
    monkeypatch.setattr(row_cache, "_read", lambda folder: None)
    with pytest.raises(DataError) as raised:
        tokenized_rows(EXAMPLES, renderer, 60, trim=False)
    where, _, what = str(raised.value).rpartition(": ")
    assert Path(where).parent == folder
    assert what == "what was written there can't be read back"


def test_entries_used_longest_ago_go(
    renderer: Renderer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of entries stays, those that were used last; reading one is using it."""
    monkeypatch.setattr(row_cache, "MOST_ENTRIES", 2)

    def use(number: int) -> str:
        before = set(folder.iterdir()) if folder.exists() else set()
        rows, _ = tokenized_rows(EXAMPLES[number : number + 1], renderer, 500, trim=False)
        for entry in before & set(folder.iterdir()):
            changed = (entry / "about.json").stat().st_mtime
            os.utime(entry / "about.json", (changed - 9, changed - 9))
        return Path(rows.cache_files[0]["filename"]).parent.name

    first, second = use(0), use(2)
    os.utime(folder / first / "about.json", (1, 1))
    assert use(0) == first
    os.utime(folder / second / "about.json", (1, 1))
    third = use(3)
    assert {entry.name for entry in folder.iterdir()} == {first, third}
    assert second not in (first, third)


def test_entries_have_a_size_together(
    renderer: Renderer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest entry stays even where it alone is too large; abandoned folders go in a day."""
    monkeypatch.setattr(row_cache, "MOST_BYTES", 10)
    folder.mkdir()
    old, young = folder / ".making-old", folder / ".making-young"
    for making in (old, young):
        making.mkdir()
    day = time.time() - 25 * 3600
    os.utime(old, (day, day))
    for number in (0, 2):
        rows, _ = tokenized_rows(EXAMPLES[number : number + 1], renderer, 500, trim=False)
    entry = Path(rows.cache_files[0]["filename"]).parent
    assert set(folder.iterdir()) == {entry, young}


PROCESSES = """
import os, sys
sys.path.insert(0, {root!r})
from tests.data.test_row_cache import EXAMPLES, contents
from tests.support.tokenizers import CHATML, made
from sftkey.data.row_cache import tokenized_rows
from sftkey.data.renderer import Renderer
from sftkey.recipe.schema import ResponseSection
renderer = Renderer.read(made("look_ahead", CHATML), ResponseSection())
for _ in range(2):
    os.fork()
rows = contents(tokenized_rows(EXAMPLES * 400, renderer, 60, trim=False))[0]
os.write(1, f"{{len(rows)}}\\n".encode())
os._exit(0)
"""


@pytest.mark.fault("a second process, a dead one's lock")
def test_processes_at_once_share_an_entry(renderer: Renderer, folder: Path) -> None:
    """Four processes that make the same entry at the same time all get it, and one stays."""
    program = [sys.executable, "-c", PROCESSES.format(root=str(Path(__file__).parents[2]))]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stdout == "800\n" * 4, done.stderr
    assert len(list(folder.iterdir())) == 1


def test_few_rows_are_in_memory_at_once(
    renderer: Renderer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are let go when they are written, so that memory doesn't grow with their number."""
    original, made, most = row_cache.tokenize_batches, [], 0

    def watched(examples: Sequence[Example], renderer: Renderer) -> Any:
        nonlocal most
        for batch in original(examples, renderer):
            made.extend(weakref.ref(row) for row in batch)
            most = max(most, sum(reference() is not None for reference in made))
            yield batch

    monkeypatch.setattr("sftkey.data.tokenization.BATCH_SIZE", 10)
    monkeypatch.setattr(row_cache, "tokenize_batches", watched)
    rows, _ = tokenized_rows(EXAMPLES[:1] * 300, renderer, 60, trim=False)
    assert len(rows) == len(made) == 300
    assert most <= 30
