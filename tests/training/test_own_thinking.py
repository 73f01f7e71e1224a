"""A stage over the model's own thinking: its rows hold that, and nothing of the reference's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftkey.data.prepare import Prepared
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.diagnosis.run import refuse_empty_thinking
from sftkey.errors import DataError, RecipeError, RunError
from sftkey.evaluation.grading import grade
from sftkey.generation import key_switch as writing
from sftkey.generation.generate import Generation
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import OwnThinking, ResponseSection, StageSection
from sftkey.training import own_thinking
from sftkey.training.own_thinking import Writer, count_right, own_examples
from sftkey.training.run import read_rows, start
from tests.support.tokenizers import CHATML, made
from tests.training.test_run import Killed

MakeRecipe = Callable[..., Path]
FIRST = {"name": "completion", "loss_on": "completion"}


def own(**fields: Any) -> dict[str, Any]:
    """Return a stage over own thinking."""
    return {"name": "key", "loss_on": "key", "thinking": "own", **fields}


def stage(**how: Any) -> StageSection:
    """Return the same as a part of a recipe."""
    return StageSection(name="key", loss_on="key", thinking="own", own=OwnThinking(**how))


@pytest.fixture
def prepared(tiny_recipe: MakeRecipe) -> Prepared:
    """Return the rows of the tiny recipe."""
    return read_rows(load_recipe(tiny_recipe(stages=[FIRST, own()])))


def writes(monkeypatch: pytest.MonkeyPatch, thinking: str) -> list[dict[int, Any]]:
    """Let every model write this thinking and the answer 0; gives what it was asked."""
    asked: list[dict[int, Any]] = []

    def write(file: Path, prompts: Any) -> Any:
        if file.name.startswith("thinkings"):
            asked.append(dict(prompts))
        text = f"<Thinking>\n{thinking}\n</Thinking>\n<Answer>\n0\n</Answer>"
        return {index: Generation(text, 9, True) for index in prompts}

    writes_as(monkeypatch, write)
    return asked


def writes_as(monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Any], Any]) -> None:
    """Let every model write what a function of the file and its prompts returns."""
    monkeypatch.setattr(own_thinking, "write_parts", lambda *given, **_: {given[4]: given[3]})
    monkeypatch.setattr(own_thinking, "generated_in", write)


def trained_rows(
    recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[Any]]:
    """Return a run, and the rows that its trainers got, stage by stage."""
    from sftkey.training import run as module

    rows: list[Any] = []
    make = module.make_trainer

    def keep(recipe: Any, stage: Any, **settings: Any) -> Any:
        rows.append(settings["train_dataset"])
        return make(recipe, stage, **settings)

    monkeypatch.setattr(module, "make_trainer", keep)
    loaded = load_recipe(recipe)
    run = start(loaded, folder / loaded.name, grade=grade)
    list(run.stages())
    return run, rows


def test_rows_hold_own_thinking_and_the_references_answer_as_key(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither reference thinking nor reference answer stands in the context of any row."""
    asked = writes(monkeypatch, "I guess so, I do")
    recipe = tiny_recipe(stages=[FIRST, own()])
    run, (_, rows) = trained_rows(recipe, tmp_path, monkeypatch)
    examples = {example.index: example for example in run.prepared.train_examples}
    assert len(rows) == len(examples) == 24
    for row in rows:
        context = [i for i, s in zip(row["input_ids"], row["segment_ids"], strict=True) if s < 2]
        thinking = [i for i, s in zip(row["input_ids"], row["segment_ids"], strict=True) if s == 1]
        answer = [i for i, s in zip(row["input_ids"], row["segment_ids"], strict=True) if s == 3]
        example = examples[row["index"]]
        shown = run.tokenizer.decode(context)
        assert example.thinking not in shown
        assert run.tokenizer.decode(thinking).startswith(
            "<Thinking>\nI guess so, I do\n</Thinking>"
        )
        assert example.answer not in run.tokenizer.decode(thinking)
        assert run.tokenizer.decode(answer) == example.answer
        assert row["segment_ids"][-1] == Segment.END
    prompts = {tuple(ids) for ids in asked[0].values()}
    assert prompts == {tuple(run.prepared.renderer.prompt_ids(e.prompt)) for e in examples.values()}
    counts = json.loads((run.ledger.stage_folder(1) / "thinkings.json").read_text())
    seconds = counts.pop("seconds")
    assert 0 < seconds < 60
    assert counts == {
        **{"written": 24, "not closed": 0, "empty": 0, "not kept": 0, "used": 24},
        **{"refused": {}, "tokens": 24 * 9},
    }


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"samples": 2, "keep": "all"}, ["a", "b", "c", "d"]),
        ({"samples": 2, "keep": "right"}, ["a"]),
        ({"samples": 2, "keep": "wrong"}, ["b", "c", "d"]),
        ({"samples": 2, "keep": "mixed"}, ["a", "b"]),
    ],
)
def test_thinkings_are_kept_by_what_they_led_to(
    how: dict[str, Any], kept: list[str], prepared: Prepared
) -> None:
    """The first question is answered right and wrong, the second wrong twice, others not closed."""
    num = len(prepared.train_examples)
    right = prepared.train_examples[0].answer
    texts = dict.fromkeys(range(2 * num), "<Thinking>\nnever closed")
    for key, thinking, answer in (
        (0, "a", right),
        (num, "b", "no"),
        (1, "c", "no"),
        (num + 1, "d", "x"),
    ):
        texts[key] = f"<Thinking>\n{thinking}\n</Thinking>\n<Answer>\n{answer}\n</Answer>"
    written = {key: Generation(text) for key, text in texts.items()}
    written[2] = Generation("<Thinking>\n \n</Thinking>\n<Answer>\n4\n</Answer>")
    used, counts = own_examples(stage(**how), prepared, written, "exact", grade)
    assert [example.thinking for example in used] == kept
    assert all(isinstance(example, Example) for example in used)
    assert counts == {
        "written": 2 * num,
        "not closed": 2 * num - 5,
        "empty": 1,
        "not kept": 4 - len(kept),
        "used": len(kept),
    }


@pytest.mark.fault("settings that would hang or train nothing")
def test_a_stage_without_thinkings_is_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that never closes its thinking has nothing to train the key on."""
    asked = []

    def write(file: Path, prompts: Any) -> Any:
        asked.append(file.name)
        return {index: Generation("so", 1, index > 2) for index in prompts}

    writes_as(monkeypatch, write)
    with pytest.raises(DataError) as error:
        trained_rows(tiny_recipe(stages=[FIRST, own()]), tmp_path, monkeypatch)
    assert str(error.value) == (
        "stages.key: thinking: own: expected a model that thinks; 0 of 8 thinkings are valid "
        "(closed with '\\n</Thinking>' and not empty), 3 answers never stopped\n"
        "hint: train a stage on whole completions with a reasoning first; or write the model's own "
        "tags as response.thinking (now ['<Thinking>\\n', '\\n</Thinking>']), or raise "
        "eval.max_new_tokens"
    )
    assert asked == ["probe.jsonl"]  # a few questions told so, before all were asked


@pytest.mark.fault("settings that would hang or train nothing")
def test_a_model_that_closes_empty_thinkings_is_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the probe: an empty thinking is closed, and says nothing all the same."""
    asked = []

    def write(file: Path, prompts: Any) -> Any:
        asked.append(file.name)
        return {index: Generation("<Thinking>\n\n</Thinking>\n7", 1, True) for index in prompts}

    writes_as(monkeypatch, write)
    with pytest.raises(DataError, match="0 of 8 thinkings are valid"):
        trained_rows(tiny_recipe(stages=[FIRST, own()]), tmp_path, monkeypatch)
    assert asked == ["probe.jsonl"]


@pytest.mark.fault("settings that would hang or train nothing")
def test_nothing_kept_is_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model thinks, and no answer is right."""
    writes(monkeypatch, "so")
    with pytest.raises(DataError) as error:
        trained_rows(tiny_recipe(stages=[own(own={"keep": "right"})]), tmp_path, monkeypatch)
    assert str(error.value) == (
        "stages.key: thinking: own leaves no row to train on: no thinking was closed and kept\n"
        "hint: write own.keep: all, or train an earlier stage for longer"
    )


def test_what_stands_around_an_answer_is_no_part_of_it() -> None:
    """Another engine may keep the end of turn, where no tag closes the answer."""
    section = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
    renderer = Renderer.read(made("look_ahead", CHATML), section)
    written = {0: Generation(f"<think>\nso\n</think>\n\n4{renderer.end}")}
    assert count_right(renderer, [Example("2 + 2?", "so", "4")], written, "exact", grade) == 1


@pytest.mark.fault("a kill")
def test_a_killed_writing_goes_on_where_it_stopped(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is not written again, and the same thinkings come out."""
    sections = {"eval": {"num_questions": 2, "max_new_tokens": 4, "batch_size": 5}}
    recipe = load_recipe(tiny_recipe(stages=[own()], **sections))
    whole = start(recipe, tmp_path / "whole", grade=grade)
    model = whole._load(0)

    def thinkings(folder: Path) -> dict[int, Generation]:
        folder.mkdir(exist_ok=True)
        renderer, progress = whole.prepared.renderer, whole.progress
        writer = Writer(recipe, renderer, model, folder, progress, "key")
        own = recipe.stages[0].own_thinking
        asked = whole.prepared.train_examples
        return writer.write("thinkings", asked, own.samples, own.temperature)

    expected = thinkings(tmp_path / "once")
    assert len({each.text for each in expected.values()}) > 1  # sampled
    batches = 0
    write = writing.write

    def die(*args: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Killed
        return write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(writing, "write", die)
        with pytest.raises(Killed):
            thinkings(tmp_path / "killed")
    assert thinkings(tmp_path / "killed") == expected
    (file,) = (tmp_path / "killed").glob("thinkings.part0of1.jsonl")
    assert len(file.read_text().splitlines()) == len(expected)


@pytest.mark.parametrize("empty", [True, False])
def test_empty_thinking_asks_for_a_yes(
    empty: bool, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The run stops before such a stage, with all that was trained kept."""
    recipe = load_recipe(tiny_recipe(stages=[FIRST, own()]))
    run = start(recipe, tmp_path / "run", grade=grade)
    file = tmp_path / "run" / "diagnosis" / "completion.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"own_thinking_is_empty": empty, "num_rows": 8}))
    refuse_empty_thinking(run, "base")
    refuse_empty_thinking(run, "key")
    if not empty:
        refuse_empty_thinking(run, "completion")
        return
    with pytest.raises(RunError) as error:
        refuse_empty_thinking(run, "completion")
    assert str(error.value) == (
        "stages.key: thinking: own asks for thinkings that carry something; by 8 validation rows "
        "after completion, the answers are no better for them\n"
        f"hint: `sftkey train` with --yes goes on; {file} has the figures"
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"loss_on": "completion"},
            "stages[0].thinking: own thinking is no reference, and loss_on trains it here "
            "(thinking); write loss_on: key, or own: {keep: right}",
        ),
        ({"thinking": "reference", "own": {}}, "stages[0].own: only with `thinking: own`"),
        (
            {"own": {"keep": "mixed"}},
            "stages[0].own.keep: mixed keeps questions that were answered right once and wrong "
            "once: it needs own.samples of 2 or more",
        ),
        (
            {"own": {"sample": 2}},
            "stages[0].own.sample: unknown key; did you mean `samples`?",
        ),
    ],
)
def test_a_wrong_stage_gets_one_error(
    fields: dict[str, Any], what: str, tiny_recipe: MakeRecipe
) -> None:
    """Before anything is loaded."""
    file = tiny_recipe(stages=[own(**fields)])
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert [f"{each.where}: {each.what}" for each in error.value.problems] == [what]
