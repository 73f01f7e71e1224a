"""`sftkey generate` asks a run one question, as its data would put it."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftkey.data.sources
from sftkey.cli import main
from sftkey.commands.ask import generate
from sftkey.data.sources import question_prompt
from sftkey.errors import RunError
from sftkey.generation.generate import generate as write
from sftkey.generation.key_switch import find_switch
from sftkey.models.device import Device
from sftkey.models.key_pass import acting, context_adapters
from sftkey.recipe.schema import DataSection
from sftkey.training.stage_model import load_stage
from tests.support.runs import STAGES, asking_run, frame_of, ledger_of, made_run

LIBRARY = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
SPECIAL = "<|endoftext|><|im_start|><|im_end|>"
QUESTION = "How many legs do 3 cats have?"


def written(run: Path, recipe: Any, number: int, switching: bool) -> str:
    """Let a stage's model answer, without the command."""
    import torch

    renderer = frame_of(recipe)
    device = Device("cpu", 0, torch.float32)
    model = load_stage(recipe, ledger_of(run, recipe), device, renderer, number)
    prompt = renderer.prompt_ids(question_prompt(recipe.data, QUESTION))
    settings = {"stop_ids": [renderer.end_id], "max_new_tokens": 24, "batch_size": 1}
    with acting(model, context_adapters(model)):
        switch = find_switch(model, renderer) if switching else None
        ((_, generation),) = write(model, renderer.tokenizer, [prompt], switch=switch, **settings)
    return generation.text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Any]:
    """Return a run with a frozen key stage; what its first stage writes holds its closing tag."""
    folder = tmp_path_factory.mktemp("probe")
    text = written(*made_run(folder, tiny_folder, num_trained=1), 1, switching=False)
    # Some letters out of the middle, which stand there for the first time.
    pairs = [text[n : n + 2] for n in range(len(text) // 3, len(text))]
    tag = next(
        pair
        for n, pair in enumerate(pairs, start=len(text) // 3)
        if pair.isascii() and pair.isalnum() and pair not in SPECIAL and text.find(pair) == n
    )
    response = {"thinking": ["", tag], "answer": ["", ""]}
    folder = tmp_path_factory.mktemp("run")
    return made_run(folder, tiny_folder, response=response)


def test_the_key_comes_from_the_frozen_stage(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last stage answers: with the thinking of the one before it, and another key."""
    folder, recipe = run
    generate(folder, QUESTION, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["thinking", "answer", "text", "stopped"]
    assert found["text"] == written(folder, recipe, 2, switching=True)
    before = written(folder, recipe, 1, switching=False)
    close = recipe.response.thinking[1]
    assert found["text"].partition(close)[:2] == before.partition(close)[:2]
    assert found["text"] != before
    assert found["thinking"] == found["text"].rpartition(close)[0].strip()
    assert found["answer"] == found["text"].rpartition(close)[2].strip()


def test_a_stage_and_the_base_are_asked_by_name(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--stage` names a trained stage or the base; on the base the fewest tokens are written."""
    folder, recipe = run
    with pytest.raises(SystemExit) as end:
        main(["generate", str(folder), QUESTION, "--stage", "completion", "--json"])
    assert not end.value.code
    text = json.loads(capsys.readouterr().out)["text"]
    assert text == written(folder, recipe, 1, switching=False)
    generate(folder, QUESTION, stage="base", as_json=True, max_new_tokens=3)
    assert not text.startswith(json.loads(capsys.readouterr().out)["text"])


def test_plain_text_shows_thinking_and_answer(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question may stand on stdin; thinking and answer stand under their names."""
    folder, recipe = run
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    generate(folder)
    captured = capsys.readouterr()
    thinking, _, answer = written(folder, recipe, 2, switching=True).rpartition(
        recipe.response.thinking[1]
    )
    assert captured.out == f"thinking:\n{thinking.strip()}\n\nanswer:\n{answer.strip()}\n"
    assert captured.err == "note: it didn't stop within 24 tokens\n"


def test_text_without_an_answer_is_shown_whole(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no tag was written, the text is printed, with a note."""
    folder, recipe = made_run(tmp_path, tiny_folder, num_trained=1)
    generate(folder, QUESTION, max_new_tokens=5)
    captured = capsys.readouterr()
    assert written(folder, recipe, 1, switching=False).startswith(captured.out[:-1])
    assert captured.err == (
        "note: no answer was found in this text\nnote: it didn't stop within 5 tokens\n"
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"prompt": "Q: {question}\n{{}}\n"}, "Q: 2 + 2?\n{}\n"),
        ({"prompt": "{meta[q]}"}, "2 + 2?"),
        ({"prompt": "{question}\nA) {a}\nB) {b}"}, "2 + 2?"),
        ({}, "2 + 2?"),
        (
            {"source": "gsm8k", "system": "S"},
            ({"role": "system", "content": "S"}, {"role": "user", "content": "2 + 2?"}),
        ),
    ],
)
def test_the_prompt_is_a_rows(data: dict[str, Any], expected: Any) -> None:
    """One column of the template takes the question; several can't."""
    assert question_prompt(DataSection(**{"source": "my.jsonl", **data}), "2 + 2?") == expected


def test_the_prompts_doctest_holds() -> None:
    """The examples of the prompt are what the code gives."""
    import doctest

    found = doctest.testmod(sftkey.data.sources)
    assert (found.failed, found.attempted) == (0, 3)


def test_several_columns_are_noted(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the question can't be put into the template, that is said."""
    data = {"source": "rows.jsonl", "prompt": "{question}\n{choices}"}
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1, data=data)
    generate(folder, QUESTION, max_new_tokens=1)
    assert capsys.readouterr().err.startswith(
        "note: data.prompt puts 2 columns together; the question is taken as all of it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            {"stage": "kee"},
            "{run}: --stage: expected one of base, completion, key; got 'kee'",
        ),
        (
            {"stage": "key"},
            "{run}: --stage: 'key' isn't trained yet\nhint: go on with: "
            "sftkey train {run}/recipe.yaml",
        ),
        (
            {"max_new_tokens": 10**9},
            "max_new_tokens: expected at most the model's 512 positions; got 1,000,000,000",
        ),
        ({"question": "\ud800"}, "question: half of a surrogate pair, which is no text"),
        (
            {"question": " \n"},
            'question: expected a text; got none\nhint: sftkey generate {run} "How many …?", '
            "or the question on stdin",
        ),
    ],
    ids=["unknown", "untrained", "long", "surrogate", "empty"],
)
def test_what_cannot_be_asked_is_refused(
    arguments: dict[str, Any], error: str, tmp_path: Path, tiny_folder: Path
) -> None:
    """A stage, a length or a question that can't be is said before a word is written."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1)
    with pytest.raises(RunError) as raised:
        generate(folder, **{"question": QUESTION, **arguments})
    assert str(raised.value) == error.format(run=folder)


def test_a_run_without_a_trained_stage_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """Then only the base could answer, which nobody asked for."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=0)
    with pytest.raises(RunError) as raised:
        generate(folder, QUESTION)
    assert str(raised.value) == (
        f"{folder}: expected a trained stage; there is none yet\n"
        f"hint: train it: sftkey train {folder}/recipe.yaml; or take --stage base"
    )


def test_a_question_beyond_learned_positions_is_refused(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Their table ends there: the model would end with an IndexError, and a GPU with it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": None}
    config = GPT2Config(vocab_size=len(tiny_tokenizer), eos_token_id=2, **shape)
    for part in (GPT2LMHeadModel(config), tiny_tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    run = asking_run(tmp_path, tmp_path / "gpt2")
    refused = r"model's 128 positions; got 12 behind a prompt of \d+\nhint: ask a shorter question"
    with pytest.raises(RunError, match=refused):
        generate(run, "how many? " * 40)
    with pytest.raises(
        RunError, match=r"got 120 behind a prompt of \d\d\nhint: take \d\d or fewer"
    ):
        generate(run, "3?", max_new_tokens=120)
    generate(run, "3?")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """A folder without a resolved recipe is no run."""
    with pytest.raises(RunError) as raised:
        generate(tmp_path, QUESTION)
    assert str(raised.value) == (
        f"{tmp_path}: expected a run folder; it holds no recipe.yaml\nhint: runs lie in runs/<name>"
    )


def test_the_docs_lines_write_what_the_command_writes(
    run: tuple[Path, Any], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain transformers and peft, run as the docs have them, give the same text."""
    folder, recipe = run
    section = LIBRARY.partition("## A frozen stage in plain transformers\n")[2].partition("\n## ")[
        0
    ]
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    changes: dict[str, Callable[[], str] | str] = {
        '"</Thinking>"': repr(recipe.response.thinking[1]),
        '"max_new_tokens": 512': '"max_new_tokens": 24',
    }
    for old, new in changes.items():
        assert old in lines
        lines = lines.replace(old, str(new))
    messages = question_prompt(recipe.data, QUESTION)
    exec(lines, {"base": str(tiny_folder), "run": str(folder), "messages": list(messages)})
    printed = capsys.readouterr().out
    assert len([line for line in lines.splitlines() if line]) <= 26
    expected = written(folder, recipe, 2, switching=True)
    assert printed.startswith(expected[:-1])
    assert [stage["name"] for stage in STAGES] == ["completion", "key"]  # the docs' folders
