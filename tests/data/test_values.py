"""Options get their letters, places become letters, JSON in texts is read."""

from typing import Any

import pytest

from sftkey.data.examples import make_examples
from sftkey.data.values import (
    RowError,
    letter,
    lettered,
    options_in,
    parsed_json,
    row_json,
    trimmed,
)
from sftkey.recipe.schema import DataSection


@pytest.mark.parametrize(
    "options",
    [
        ["a pen", "a bird"],
        {"A": "a pen", "B": "a bird", "C": None},
        {"label": ["A", "B"], "text": ["a pen", "a bird"]},
        [{"label": "A", "text": "a pen"}, {"label": "B", "text": "a bird"}],
        [{"text": "a pen"}, {"text": "a bird"}],
        '["a pen", "a bird"]',
        "['a pen', 'a bird']",
        ["A) a pen", "B) a bird"],
    ],
)
def test_options_in_all_their_forms(options: Any) -> None:
    """Lists, mappings, JSON and what pandas prints: a line each."""
    assert lettered(options, "choices") == "A) a pen\nB) a bird"


@pytest.mark.parametrize("labels", [["1", "2"], [1, 2]])
def test_labels_of_their_own_stay(labels: list[Any]) -> None:
    """An answer says one of them."""
    assert lettered({"label": labels, "text": ["x", "y"]}, "choices") == "1) x\n2) y"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("a pen", "`choices` holds a str, no list of options"),
        (7, "`choices` holds a int, no list of options"),
        (["x"] * 27, "`choices` holds a list, no list of options"),
        ([], "`choices` holds no options"),
        ([["x"], ["y"]], "`choices` holds no options"),
        ([{"score": 1}], "`choices` holds no options"),
        ("['a pen' 'a bird']", "`choices` holds a str, no list of options"),
    ],
)
def test_what_holds_no_options(options: Any, message: str) -> None:
    """Numpy prints no commas: what Python would make of it is one text."""
    with pytest.raises(RowError) as raised:
        lettered(options, "choices")
    assert str(raised.value) == message


def test_options_in_is_empty_where_there_are_none() -> None:
    """Nothing is raised by looking."""
    assert options_in(["x", "y"]) == [("A", "x"), ("B", "y")]
    assert options_in("no list") == options_in(None) == []


@pytest.mark.parametrize(
    ("place", "first", "expected"), [(0, 0, "A"), ("25", 0, "Z"), (1, 1, "A"), ("26", 1, "Z")]
)
def test_places_become_letters(place: Any, first: int, expected: str) -> None:
    """Counted from 0 or from 1."""
    assert letter(place, "answer", first) == expected


@pytest.mark.parametrize(
    ("place", "first"), [(0, 1), (26, 0), (27, 1), ("B", 0), (-1, 0), (1.5, 0)]
)
def test_what_is_no_place(place: Any, first: int) -> None:
    """There is no letter before A and none behind Z."""
    with pytest.raises(RowError) as raised:
        letter(place, "answer", first)
    message = f"`answer` is {str(place)!r}, no place of an option, counted from {first}"
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ("{'a': None}", {"a": None}),
        ("[1, 2", "[1, 2"),
        ("{1, 2}", "{1, 2}"),
        ("[open('x')]", "[open('x')]"),
        ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000),
        ("7", "7"),
        (7, 7),
    ],
)
def test_json_in_a_text(text: Any, value: Any) -> None:
    """Lists and mappings alone are read, and nothing is run."""
    assert parsed_json(text) == value


@pytest.mark.parametrize(
    ("text", "expected"), [("  7 \n", "7"), ("\n \n  a\n  b \n", "  a\n  b"), ("", "")]
)
def test_white_space_around_a_text(text: str, expected: str) -> None:
    """The indentation of the first of several lines stays."""
    assert trimmed(text) == expected


def test_a_key_that_an_object_has_twice_refuses_its_row() -> None:
    """Only the last of them would be read, be it in a column, a message or an argument."""
    twice = '{"answer": "1", "answer": "2"}'
    for text in (twice, f"[{twice}]"):
        with pytest.raises(RowError, match="the key 'answer' several times in one object"):
            row_json(text)
    rows = [{"prompt": "Q", "thinking": "c", "record": text} for text in (twice, '{"answer": "1"}')]
    loaded = make_examples(rows, DataSection(source="x", answer="{record[answer]}"))
    assert [each.answer for each in loaded.examples] == ["1"]
    (refused,) = loaded.unsplit
    assert refused.reason == "JSON with the key 'answer' several times in one object"
    chats = [{"messages": f'[{{"role": "user", "content": "Q"}}, {twice}]'}]
    (refused,) = make_examples(chats, DataSection(source="x")).unsplit
    assert refused.reason == "JSON with the key 'answer' several times in one object"
