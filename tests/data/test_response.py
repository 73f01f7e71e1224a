import doctest

import pytest
from hypothesis import assume, given

from sftkey.data import response as module
from sftkey.data.response import Parsed, Response, Segment
from sftkey.recipe.schema import ResponseSection
from tests.support.timing import takes_linear_time
from tests.support.tokenizers import TEXT

DEFAULT = Response.from_section(ResponseSection())
NATIVE = Response("<think>\n", "\n</think>", "\n\n", "")
OPENED = Response("", "\n</think>", "\n\n", "")  # the prompt ends in `<think>`
HASH = Response("", "", "\n#### ", "")
LINES = Response("", "", "\n", "")  # without tags: the answer is the last line


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("response", [DEFAULT, NATIVE, OPENED, HASH])
@given(thinking=TEXT, answer=TEXT)
def test_round_trip(response: Response, thinking: str, answer: str) -> None:
    """What is rendered parses back to the same texts, blanks at the edges included."""
    tags = [tag.strip() for tag in vars(response).values() if tag.strip()]
    assume(not any(tag in text for tag in tags for text in (thinking, answer)))
    # What stands where the two meet may not read as the boundary itself.
    boundary = response.thinking_close + response.answer_open
    assume(boundary not in thinking + boundary[:-1])
    parsed = response.parse(response.render(thinking, answer))
    assert parsed == Parsed(thinking, answer, strict=True)


@given(thinking=TEXT, answer=TEXT)
def test_texts_with_tags_build_and_nothing_is_stripped(thinking: str, answer: str) -> None:
    """The pieces hold both texts as they are, whatever they hold."""
    pieces = DEFAULT.pieces(thinking, answer)
    assert [segment for segment, _ in pieces] == [
        Segment.THINKING,
        Segment.ANSWER_TAG,
        Segment.ANSWER,
        Segment.ANSWER_TAG,
    ]
    assert pieces[0][1] == f"<Thinking>\n{thinking}\n</Thinking>"
    assert pieces[2][1] == answer
    assert "".join(text for _, text in pieces) == DEFAULT.render(thinking, answer)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("<Thinking>a</Thinking><Answer>7</Answer>", Parsed("a", "7", True)),
        (" <Thinking>a</Thinking>\n\n<Answer> 7 </Answer>\n", Parsed("a", "7", True)),
        ("<Thinking>\n\n</Thinking>\n<Answer>\n\n</Answer>", Parsed("", "", True)),
        ("So: <Thinking>a</Thinking><Answer>7</Answer>", Parsed("a", "7", False)),
        ("<Thinking>a</Thinking><Answer>7</Answer> Done.", Parsed("a", "7", False)),
        ("<Thinking>a</Thinking> so <Answer>7</Answer>", Parsed("a", "7", False)),
        (
            "<Thinking>a</Thinking><Answer>6</Answer><Answer>7</Answer>",
            Parsed("a", "7", False),
        ),
        ("<Thinking>a</Thinking><Answer>7", Parsed("a", "7", False)),
        ("<Thinking>a</Thinking>7</Answer>", Parsed("a", None, False)),
        ("<Answer>6</Answer> no, <Answer>", Parsed(None, "6", False)),
        ("<Thinking>a and a", Parsed(None, None, False)),
        (
            "<Thinking>a</Thinking>b</Thinking><Answer>7</Answer>",
            Parsed("a</Thinking>b", "7", False),
        ),
        ("<Thinking>\n a \n</Thinking>\n<Answer>\n 7 \n</Answer>", Parsed(" a ", " 7 ", True)),
        ("7", Parsed(None, None, False)),
        ("", Parsed(None, None, False)),
    ],
)
def test_strict_is_the_whole_form_and_else_the_last_answer_counts(
    text: str, parsed: Parsed
) -> None:
    """Fmt holds for thinking, answer and nothing else; the answer is found all the same."""
    assert DEFAULT.parse(text) == parsed


@pytest.mark.parametrize(
    ("response", "text", "parsed"),
    [
        (NATIVE, "<think>\na\n</think>\n\n7", Parsed("a", "7", True)),
        (NATIVE, "a</think>7", Parsed("a", "7", False)),
        (NATIVE, "<think>\na", Parsed(None, None, False)),
        (OPENED, "a\n</think>\n\n7", Parsed("a", "7", True)),
        (OPENED, "a</think>b</think>7", Parsed("a</think>b", "7", False)),
        (HASH, "2 + 5 = 7\n#### 7", Parsed("2 + 5 = 7", "7", True)),
        (HASH, "a\n#### 6\n#### 7", Parsed(None, "7", False)),
        (Response("", "", "", ""), "7", Parsed("", "7", True)),
        (LINES, "2 + 5 = 7\n7 + 1 = 8\n8", Parsed("2 + 5 = 7\n7 + 1 = 8", "8", True)),
        (LINES, "a\n8\n", Parsed("a", "8", True)),
        (LINES, "It is 8.", Parsed(None, "It is 8.", False)),
    ],
)
def test_tags_may_be_empty(response: Response, text: str, parsed: Parsed) -> None:
    """Native thinking, a prompt that has opened it, and marks before the answer parse alike."""
    assert response.parse(text) == parsed


TAGS = [*DEFAULT.render("|", "|").split("|"), "<Thinking>", "</Thinking>", "<Answer>", "</Answer>"]


@pytest.mark.parametrize("response", [DEFAULT, NATIVE, OPENED, HASH, LINES])
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "<Thinking>\n{}\n</Thinking>\n<Answer>\n{}\n</Answer>",
        "<Thinking>{}</Thinking>{}<Answer>7</Answer>",
    ],
)
@pytest.mark.fault("texts that take long to read")
def test_parsing_takes_linear_time(response: Response, form: str) -> None:
    """Four times the length takes four times as long, whatever a model repeats."""
    for piece in [" ", "\n", "7", "<", "#", "<think>\n", "\n</think>\n\n", *TAGS]:
        assert takes_linear_time(
            lambda length, piece=piece: response.parse(
                form.replace("{}", piece * (length // len(piece)))
            )
        ), piece
