"""`sftkey chat` answers line after line, as the answers are written, with thinkings folded."""

import doctest
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import sftkey.commands.ask
from sftkey.cli import main
from sftkey.commands.ask import chat, readable
from sftkey.data.response import Response
from sftkey.data.sources import chat_prompt
from sftkey.errors import RunError
from sftkey.pipeline import Reply, TrainedRun
from sftkey.recipe.schema import DataSection
from tests.commands import test_generate
from tests.support.runs import made_run

TAGS = Response("<T>\n", "\n</T>", "\n<A>\n", "\n</A>")
WHOLE = "<T>\n2 + 2\nis < 5\n</T>\n<A>\n4 </b>\n</A>"
run = test_generate.run  # the fixture


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let these lines stand on stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.parametrize(
    ("text", "response", "thinking", "expected"),
    [
        (WHOLE, TAGS, False, "4 </b>"),
        (WHOLE, TAGS, True, "2 + 2\nis < 5\n\n4 </b>"),
        ("It is <b>4</b>.\n", TAGS, False, "It is <b>4</b>."),
        ("<T>\nnever closed", TAGS, False, "<T>\nnever closed"),
        ("why</think>\n\n4", Response("", "</think>", "\n\n", ""), False, "4"),
        ("why</think>\n\n4", Response("", "</think>", "\n\n", ""), True, "why\n\n4"),
        ("2 + 2 = 4", Response("", "", "", ""), False, "2 + 2 = 4"),
        ("<T>a</T>no tag", TAGS, False, "no tag"),
    ],
)
def test_what_was_shown_is_never_taken_back(
    text: str, response: Response, thinking: bool, expected: str
) -> None:
    """However a text comes in, more of it only adds to what stands there; no tag flashes up."""
    shown = [readable(text[:end], response, thinking) for end in range(len(text) + 1)]
    shown.append(readable(text, response, thinking, whole=True))
    assert all(after.startswith(before) for before, after in pairwise(shown))
    assert shown[-1] == expected


def test_doctests_hold() -> None:
    """The example of what can be shown is what comes."""
    assert doctest.testmod(sftkey.commands.ask) == (0, 2)


def test_answers_come_as_they_are_written(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen stage answers each line that isn't empty as `ask` does, the thinking folded."""
    folder, recipe = run
    asked = TrainedRun(folder)
    replies = [asked.ask(question) for question in (test_generate.QUESTION, "2 + 2?")]
    typed(monkeypatch, test_generate.QUESTION, "", "2 + 2?")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["chat", str(folder)])
    assert not end.value.code
    captured = capsys.readouterr()
    response = Response.from_section(recipe.response)
    shown = [readable(reply.text, response, False, whole=True) for reply in replies]
    assert captured.out == "".join(f"{each}\n" for each in shown)
    assert replies[0].answer == shown[0]
    assert replies[0].thinking not in captured.out
    assert captured.err.startswith(f"{folder}, key: a question a line\n")


def test_a_text_comes_in_growing_pieces(run: tuple[Path, Any]) -> None:
    """Each piece is the text so far, from the first token on; of a frozen stage behind thinking."""
    trained = TrainedRun(run[0])
    for stage, fewest in (("completion", 10), ("key", 2)):
        pieces: list[str] = []
        reply = trained.ask(test_generate.QUESTION, stage, on_text=pieces.append)
        assert len(pieces) >= fewest
        assert all(b.startswith(a) for a, b in pairwise(pieces))
        assert pieces[-1] == reply.text.rstrip("\ufffd")
    assert pieces[0].endswith(run[1].response.thinking[1])


def test_base_and_stages_answer_side_by_side(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each under its name, every model loaded once."""
    folder, _ = run
    loaded: list[int] = []
    load = sftkey.training.stage_model.load_stage

    def counted(recipe: Any, ledger: Any, device: Any, renderer: Any, number: int) -> Any:
        loaded.append(number)
        return load(recipe, ledger, device, renderer, number)

    monkeypatch.setattr("sftkey.training.stage_model.load_stage", counted)
    typed(monkeypatch, "2 + 2?", "3 + 3?")
    chat(folder, stages=True, max_new_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("base:", "completion:", "key:")] == 2 * [
        *("base:", "completion:", "key:"),
    ]
    assert loaded == [0, 1, 2]
    with pytest.raises(RunError, match="--stages: expected it without --stage; got --stage key"):
        chat(folder, stages=True, stage="key")


def test_a_conversation_is_remembered_until_it_is_forgotten(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all turns are trained, earlier ones stand in the prompt without their thinking."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1, response={"turns": "all"})
    asked: list[tuple[str, list[tuple[str, str]]]] = []

    def ask(self: Any, question: str, stage: str, *rest: Any, turns: Any, on_text: Any) -> Reply:
        asked.append((question, list(turns)))
        if question == "stop":
            raise KeyboardInterrupt
        return Reply("so", f"not {question}", "", True)

    monkeypatch.setattr(TrainedRun, "ask", ask)
    typed(monkeypatch, "a", "stop", "b", "/new", "c")
    chat(folder)
    first = ("a", "not a")
    assert asked == [("a", []), ("stop", [first]), ("b", [first]), ("c", [])]


def test_a_question_alone_has_no_turns_before_it(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of single questions has never seen a conversation."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1)
    turns: list[Any] = []

    def ask(*arguments: Any, **options: Any) -> Reply:
        turns.append(list(options["turns"]))
        return Reply("so", "4", "", True)

    monkeypatch.setattr(TrainedRun, "ask", ask)
    typed(monkeypatch, "a", "b")
    chat(folder)
    assert turns == [[], []]


def test_the_prompt_is_that_of_a_conversations_row() -> None:
    """The system message stands once, each question in the recipe's template."""
    data = DataSection(source="my.jsonl", system="S", prompt="Q: {question}")
    assert chat_prompt(data, [("1?", "one")], "2?") == (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q: 1?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Q: 2?"},
    )
