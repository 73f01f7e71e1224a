"""Rows with answers and no reasoning: the model writes what its key is trained behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftkey.checks.gate import check_recipe
from sftkey.cli import main
from sftkey.data.prepare import Prepared
from sftkey.data.response import Example, Segment
from sftkey.errors import DataError, SFTKeyError
from sftkey.evaluation.grading import grade
from sftkey.generation.generate import Generation
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.training import own_thinking
from sftkey.training.own_thinking import HINT, own_examples, with_references
from sftkey.training.run import read_rows, start
from tests.support.model_folders import write_rows
from tests.support.real_tokenizers import real_tokenizer
from tests.support.tiny import made_model, made_tokenizer

MakeRecipe = Callable[..., Path]
OWN: dict[str, Any] = {"name": "key", "loss_on": "key", "thinking": "own"}
FIRST = {"name": "completion", "loss_on": "completion"}


@pytest.fixture
def recipe_over(tiny_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Recipe]:
    """Return what writes rows and a recipe over them."""

    def write(rows: list[Any], *stages: dict[str, Any], **data: Any) -> Recipe:
        file = tmp_path / "answers.jsonl"
        write_rows(file, rows)
        counts = {"source": str(file), "validation": 8, "test": 8, "max_length": 512}
        return load_recipe(tiny_recipe(data={**counts, **data}, stages=list(stages)))

    return write


def answers(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Make rows of questions and answers."""
    return [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), **more} for n in range(count)]


def writes(monkeypatch: pytest.MonkeyPatch, text: Callable[[int, str], str]) -> dict[str, Any]:
    """Let every model write a text by the question's place; return what each file asked."""
    asked: dict[str, Any] = {}

    def parts(
        recipe: Any, renderer: Any, model: Any, prompts: Any, whole: Path, **_: Any
    ) -> dict[Path, Any]:
        decode = renderer.tokenizer.decode
        read = {key: decode(ids) for key, ids in prompts.items()}
        asked[f"{whole.parent.name}/{whole.stem}"] = read
        return {whole: prompts}

    def write(file: Path, prompts: Any) -> Any:
        return {key: Generation(text(key, file.stem), 9, True) for key in prompts}

    monkeypatch.setattr(own_thinking, "write_parts", parts)
    monkeypatch.setattr(own_thinking, "generated_in", write)
    return asked


def thought(thinking: str, answer: str = "0") -> str:
    """Write what a model writes that thinks."""
    return f"<Thinking>\n{thinking}\n</Thinking>\n<Answer>\n{answer}\n</Answer>"


@pytest.mark.parametrize("loss_on", ["key", {"answer": 1.0}])
def test_the_key_is_trained_behind_what_the_model_wrote(
    loss_on: Any, recipe_over: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and validation rows hold its thinking and the reference's answer, in two stages."""
    asked = writes(monkeypatch, lambda key, name: thought(f"{name} {key}"))
    second = {**OWN, "name": "again", "loss_on": loss_on}
    recipe = recipe_over(answers(), OWN, second)
    assert check_recipe(recipe).refusals == []
    from sftkey.training import run as module

    made, trained = module.make_trainer, []

    def keep(recipe: Any, stage: Any, **settings: Any) -> Any:
        trained.append((settings["train_dataset"], settings["eval_dataset"]))
        return made(recipe, stage, **settings)

    monkeypatch.setattr(module, "make_trainer", keep)
    run = start(recipe, tmp_path / "run", grade=grade)
    list(run.stages())
    for (train, validation), stage in zip(trained, ("1-key", "2-again"), strict=True):
        assert (len(train), len(validation)) == (24, 8)
        texts = [run.tokenizer.decode(row["input_ids"]) for row in train]
        for place, (text, example) in enumerate(
            zip(texts, run.prepared.train_examples, strict=True)
        ):
            assert f"<Thinking>\nthinkings {place}\n</Thinking>" in text
            assert f"<Answer>\n{example.answer}\n</Answer>" in text
        seen = run.tokenizer.decode(validation[3]["input_ids"])
        assert (
            f"validation 3\n</Thinking>\n<Answer>\n{run.prepared.validation_examples[3].answer}"
            in seen
        )
        assert f"{stage}/thinkings" in asked
    assert "2-again/validation" not in asked  # both stages are measured on the same rows
    losses = [record.validation for record in run.ledger.stages]
    assert losses[1]["start"] == pytest.approx(losses[0]["end"], abs=1e-4)
    for example in run.prepared.train_examples:  # no answer stands in a prompt
        assert all(
            f"\n{example.answer}\n" not in each for each in asked["1-key/thinkings"].values()
        )


def tagged_folder(folder: Path) -> Path:
    """Write a tiny model that stage 1 of somebody taught the paper's tags."""
    tokenizer = made_tokenizer()
    made_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen3_folder(folder: Path) -> Path:
    """Write two random layers of Qwen3 with its real tokenizer and template."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = real_tokenizer("qwen3")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("made", "written", "key"),
    [
        pytest.param(
            tagged_folder,
            "<Thinking>\n{}\n</Thinking>\n<Answer>\n0\n</Answer>",
            "\n<Answer>\n{}\n</Answer><|im_end|>",
            id="tags",
        ),
        pytest.param(
            qwen3_folder,
            "<think>\n{}\n</think>\n\n0",
            "\n\n{}<|im_end|>",
            marks=pytest.mark.network,
            id="qwen3",
        ),
    ],
)
def test_adapt_check_show_and_train_walk_the_whole_way(
    made: Callable[[Path], Path],
    written: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Of fifty rows of questions and answers nothing but keys is marked, shown and trained."""
    from sftkey.adapt import adapt
    from sftkey.training import run as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapt, "NUM_PROOF_ROWS", 20)
    write_rows(Path("rows.jsonl"), answers(50))
    writes(monkeypatch, lambda key, name: written.format(f"{name} {key}"))
    make, marked = module.make_trainer, []

    def keep(recipe: Any, stage: Any, **settings: Any) -> Any:
        trainer = make(recipe, stage, **settings)
        for row in settings["train_dataset"]:
            labels = trainer.data_collator([row])["labels"]
            marked.append(settings["tokenizer"].decode(labels[labels != -100]))
        return trainer

    monkeypatch.setattr(module, "make_trainer", keep)
    short = ["trainer.max_steps=1", "model.quantization=none", "eval.max_new_tokens=4"]
    for command in (
        ["adapt", str(made(tmp_path / "model")), "--data", "rows.jsonl", "-o", "q.yaml"],
        ["check", "q.yaml"],
        ["show", "q.yaml", "--rows", "50", "--json"],
        ["train", "q.yaml", *short],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        out = capsys.readouterr().out
        assert not end.value.code, command
        if command[0] == "show":
            rows = [json.loads(line)["tokens"] for line in out.splitlines()]
            shown = ["".join(t["text"] for t in row if t["trained"]["key"]) for row in rows]
    keys = [key.format(2 * n) for n in range(50)]
    assert shown == keys
    assert len(marked) == 40  # the others are held out
    assert set(marked) <= set(keys)
    assert len(set(marked)) == 40


def test_messages_without_reasoning_are_answers(recipe_over: Any) -> None:
    """A conversation's last turn is the answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": f"{n}."},
            ]
        }
        for n in range(40)
    ]
    report = check_recipe(recipe_over(rows, OWN))
    assert report.refusals == []
    assert report.prepared is not None
    assert report.prepared.answers_only
    with pytest.raises(DataError, match="no `reasoning_content`"):
        read_rows(recipe_over(rows, FIRST))


def test_a_stage_that_reads_a_reasoning_needs_one(recipe_over: Any) -> None:
    """Without the column it is one error, and says the way without."""
    with pytest.raises(DataError, match="no column 'thinking'") as error:
        read_rows(recipe_over(answers(), FIRST, OWN))
    assert str(error.value).endswith("rows without a reasoning need `thinking: own` in every stage")


@pytest.mark.parametrize("stage", [FIRST, {"name": "key", "loss_on": "key"}])
def test_many_empty_thinkings_refuse(stage: dict[str, Any], recipe_over: Any) -> None:
    """Train and check say the same of them, and the recipe may leave them out."""
    rows = answers(40, thinking="Add.")
    for row in rows[:16]:
        row["thinking"] = " \n"
    recipe = recipe_over(rows, stage)
    what = "train: the thinking is empty in 40% of the rows: 16 rows, 0, 1"
    (refusal,) = check_recipe(recipe).refusals
    assert (refusal.code, refusal.message[: len(what)]) == ("empty-thinking", what)
    with pytest.raises(DataError, match="the thinking is empty in 40% of the rows") as error:
        read_rows(recipe)
    assert error.value.hint == refusal.hint
    dropped = check_recipe(recipe_over(rows, stage, empty_thinking="drop"))
    assert dropped.refusals == []
    assert dropped.statistics["rows"]["train"] == 24 - 16
    kept = check_recipe(recipe_over(rows, stage, empty_thinking="keep"))
    assert kept.refusals == []
    assert kept.statistics["rows"]["train"] == 24


def test_an_empty_template_is_refused(recipe_over: Any) -> None:
    """`data.thinking: ""` makes every thinking empty."""
    with pytest.raises(DataError, match="the thinking is empty in 100% of the rows"):
        read_rows(recipe_over(answers(), FIRST, thinking=""))


def test_few_empty_thinkings_are_said(recipe_over: Any) -> None:
    """One in a hundred is let through, with its number."""
    rows = answers(100, thinking="Add.")
    rows[7]["thinking"] = ""
    report = check_recipe(recipe_over(rows, FIRST))
    assert report.refusals == []
    (note,) = [each for each in report.findings if each.code == "empty-thinking"]
    assert (note.rows, note.refuses) == ((7,), False)
    rows[8]["thinking"] = ""
    assert [each.code for each in check_recipe(recipe_over(rows, FIRST)).refusals] == [
        "empty-thinking"
    ]


@pytest.fixture
def prepared(recipe_over: Any) -> Prepared:
    """Return rows of which every second has a reasoning."""
    rows = [row | {"thinking": "Add." * (n % 2)} for n, row in enumerate(answers())]
    return read_rows(recipe_over(rows, OWN))


def stage_of(recipe_over: Any, **own: Any) -> Any:
    """Return a stage over own thinking."""
    return recipe_over(answers(), {**OWN, "own": own}).stages[0]


def test_the_hint_is_shown_and_not_trained(
    recipe_over: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of the writing tells the answer; that of the row doesn't."""
    asked = writes(monkeypatch, lambda key, name: thought("Add them."))
    run = start(recipe_over(answers(), {**OWN, "own": {"hint": "answer"}}), tmp_path, grade=grade)
    stage = run.recipe.stages[0]
    run.ledger.stage_folder(0).mkdir()
    rows = run._rows(0, run._load(0))
    for place, example in enumerate(run.prepared.train_examples):
        hint = HINT.format(answer=example.answer)
        assert hint in asked["1-key/thinkings"][place]
        assert "right answer" not in run.tokenizer.decode(rows[place]["input_ids"])
    assert all("right answer" not in each for each in asked["1-key/probe"].values())
    assert stage.own_thinking.hint == "answer"


@pytest.mark.parametrize(
    ("thinking", "speaks"),
    [
        ("2 and 2 make 4.", False),
        ("We are asked for a sum. The answer is the sum of both.", False),
        ("She was given 3 apples, and he was told to wait.", False),
        ("The right answer is 4, so I work towards it.", True),
        ("The given answer is 4.", True),
        ("As I was told, it is 4.", True),
        ("The hint says 4.", True),
        ("The correct answer was 4 already.", True),
    ],
)
def test_thinkings_that_speak_of_the_hint_are_dropped(
    thinking: str, speaks: bool, recipe_over: Any, prepared: Prepared
) -> None:
    """They would teach the model to speak of what it won't see."""
    written = {0: Generation(thought(thinking))}
    used, counts = own_examples(
        stage_of(recipe_over, hint="answer"), prepared, written, "exact", grade
    )
    assert (len(used), counts["of the hint"]) == (1 - speaks, speaks)
    used, counts = own_examples(stage_of(recipe_over), prepared, written, "exact", grade)
    assert (len(used), "of the hint" in counts) == (1, False)


def test_references_are_mixed_in(recipe_over: Any, prepared: Prepared) -> None:
    """As many as the share says, of the rows that have a reasoning."""
    used = [Example("Q?", "own", "1")] * 6
    stage = stage_of(recipe_over, mix=0.4)
    mixed = with_references(stage, prepared, used, seed=1)
    assert mixed[:6] == used
    assert [each.thinking for each in mixed[6:]] == ["Add."] * 4
    assert mixed == with_references(stage, prepared, used, seed=1)
    assert with_references(stage_of(recipe_over), prepared, used, seed=1) == used
    with pytest.raises(DataError, match=r"own\.mix: expected rows with a reasoning"):
        with_references(stage, read_rows(recipe_over(answers(), OWN)), used, seed=1)


def test_another_engine_writes(
    recipe_over: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sftkey prompts` says what to ask; its answers are checked and trained on."""
    file = tmp_path / "written.jsonl"
    recipe_over(answers(), {**OWN, "own": {"file": str(file), "samples": 2}})
    with pytest.raises(SystemExit) as end:
        main(["prompts", str(tmp_path / "tiny.yaml")])
    assert not end.value.code
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(asked) == 24
    recipe = load_recipe(tmp_path / "tiny.yaml")
    run = start(recipe, tmp_path / "run", grade=grade)
    assert asked[0]["prompt_ids"] == run.prepared.renderer.prompt_ids(
        run.prepared.train_examples[0].prompt
    )
    rows = [
        {
            "index": each["index"],
            "prompt": each["prompt"],
            "text": thought(f"so\u2028{each['index']}"),
        }
        for each in asked
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, rows[0]]]
    file.write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    written = own_thinking.read_thinkings(file, recipe.stages[0], run.prepared)
    used, counts = own_examples(recipe.stages[0], run.prepared, written, "exact", grade)
    assert (counts["written"], counts["used"]) == (25, 25)
    assert {each.index for each in used} == {each["index"] for each in asked}
    assert all(each.thinking == f"so\u2028{each.index}" for each in used)
    wrong = [
        {**rows[0], "index": 999},
        {**rows[1], "prompt": "other"},
        {"index": 1},
        *[rows[0]] * 3,
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in wrong) + "{\n")
    with pytest.raises(DataError) as error:
        own_thinking.read_thinkings(file, recipe.stages[0], run.prepared)
    assert [each.line for each in error.value.problems] == [None, 1, 2, 3, 6, 7]
    assert error.value.problems[3].what == "text: expected a text; got None"


def test_rejection_sampling_trains_the_whole_completion(recipe_over: Any) -> None:
    """With `keep: right` the loss may be on the thinking, too."""
    stage = {**OWN, "loss_on": "completion", "own": {"keep": "right"}}
    recipe = recipe_over(answers(), stage)
    assert check_recipe(recipe).refusals == []
    with pytest.raises(SFTKeyError, match="own thinking is no reference"):
        recipe_over(answers(), {**stage, "own": {"keep": "all"}})


def test_rows_shown_have_the_key_marked(recipe_over: Any, tmp_path: Path, capsys: Any) -> None:
    """`show` marks what is trained, and says that the thinking is still to be written."""
    recipe_over(answers(), OWN)
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path / "tiny.yaml"), "--json"])
    out, err = capsys.readouterr()
    row = json.loads(out.splitlines()[0])
    trained = {each["segment"] for each in row["tokens"] if each["trained"]["key"]}
    assert trained == {Segment.ANSWER_TAG.name, Segment.ANSWER.name, Segment.END.name}
    note = "note: these rows have no reasoning: the model writes it when a stage begins"
    assert note in err
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "tiny.yaml"), "data.validation=null"])
    out = capsys.readouterr().out
    assert note in out
    assert "note: no validation rows: losses before and after a stage are read on 32 " in out
