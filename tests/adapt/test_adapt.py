"""A recipe is written for a model from its config and tokenizer; the gate has the last word."""

from pathlib import Path
from typing import Any

import pytest

from sftkey.adapt import adapt as planning_adapt
from sftkey.checks import mask_proof as proof
from sftkey.checks.gate import _rows_report as check
from sftkey.checks.gate import check_recipe
from sftkey.cli import main
from sftkey.commands.adapt import adapt
from sftkey.data.preview import preview_rows
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.tokenization import Refusal, Row, tokenize
from sftkey.errors import DataError, FrameError, ModelError, RecipeError, RunError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from tests.data.test_renderer import standing_in
from tests.support.families import FAMILIES
from tests.support.model_folders import model_folder, sums, write_rows
from tests.support.tokenizers import CHATML, made


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove on fewer rows than users get, and write for a machine that has CUDA."""
    monkeypatch.setattr(planning_adapt, "NUM_PROOF_ROWS", 40)
    monkeypatch.setattr(planning_adapt, "has_cuda", lambda: True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of forty rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(40))
    return tmp_path


def written(tokenizer: Any, stops: list[str] | None = None, **config: Any) -> Recipe:
    """Adapt a model of this tokenizer to the rows, and load what was written."""
    model_folder(Path("model"), tokenizer, stops, **config)
    adapt("model", data="rows.jsonl", output=Path("q.yaml"))
    return load_recipe("q.yaml")


def refusals(recipe: Recipe) -> list[str]:
    """Return what the gate refuses."""
    return [str(finding) for finding in check(recipe).refusals]


WHOLE = r"""# model (llama, 0.1M parameters) on rows.jsonl: stage by stage.
# Run:  accelerate launch -m sftkey.train q.yaml
# Written by `sftkey adapt` from the model's config and tokenizer; no weights were read.
name: model-rows
seed: 42
model:
  name_or_path: model
  quantization: nf4               # for a GPU of unknown size; none where there is room
  attn_implementation: sdpa
lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all-linear      # down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: 14 modules
  # the row of <|im_end|>: the model stops at </s>, and may never have learned this one
  trainable_token_indices: {embed_tokens: [4], lm_head: [4]}
data:
  source: rows.jsonl
  prompt: "{question}"            # the columns are question, cot, answer
  thinking: "{cot}"
  answer: "{answer}"
  validation: 4                   # rows of train, seeded
  test: 4                         # rows of train, seeded
  overlap: drop                   # a training row whose question is asked later is left out
  max_length: 64                  # the longest row has 52 tokens
  too_long: drop                  # no key is ever cut
response:
  frame: chat                     # the chat template's turns, which end with <|im_end|>
  thinking: ["<Thinking>\n", "\n</Thinking>\n"]  # the model has no thinking tags of its own
  # the line's end goes with the thinking: this tokenizer joins it to the tag before
  answer: ["<Answer>\n", "\n</Answer>"]
trainer:
  # one row at a time, until you know what fits your GPU; more in place of accumulation
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 16  # rows a step, on one GPU
  learning_rate: 1.0e-4           # half of what QLoRA takes (arXiv 2305.14314); not tuned: choose on validation rows
  num_train_epochs: 2
  warmup_steps: 0.05              # below 1: a share of all steps
  logging_steps: 10
stages:
  - {name: completion, loss_on: completion}
  - {name: key, loss_on: key, trainer: {learning_rate: 2.0e-5, num_train_epochs: 1}}  # the key is short
eval:
  num_questions: 4
  max_new_tokens: 64              # 99.5% of the data's completions are no longer
  grader: number                  # all answers are numbers
"""  # noqa: E501


def test_the_recipe_reads_alone(here: Path) -> None:
    """Every section is there, each value with the reason for it."""
    written(made("look_ahead", CHATML), ["</s>"])
    assert Path("q.yaml").read_text() == WHOLE


@pytest.mark.parametrize(
    ("family", "renderer", "thinking"),
    [
        ("qwen3-8b", "chat", ("<think>\n", "\n</think>\n\n")),
        ("deepseek-r1-distill-qwen-1.5b", "chat", ("", "\n</think>\n\n")),
        ("gpt-oss-20b", "chat", ("<|channel|>analysis<|message|>", "<|end|>")),
        ("llama-3.2-1b-instruct", "chat", ("<Thinking>\n", "\n</Thinking>\n")),
        ("qwen3-8b-base", "plain", ("<Thinking>\n", "\n</Thinking>\n")),
        ("mistral-7b-instruct-v0.3", "chat", ("<Thinking>\n", "\n</Thinking>\n")),
    ],
)
def test_families_pass_the_gate(
    here: Path, family: str, renderer: str, thinking: tuple[str, str]
) -> None:
    """What is written for a family's tokenizer goes through the real check."""
    member = FAMILIES[family]
    recipe = written(member.standing_in(), [member.end, *member.stops])
    assert (recipe.response.frame, recipe.response.thinking) == (renderer, thinking)
    assert "trainable_token_indices" not in (recipe.lora or {})
    assert refusals(recipe) == []


@pytest.mark.parametrize(
    ("tied", "rows"), [(True, [4]), (False, {"embed_tokens": [4], "lm_head": [4]})]
)
def test_an_end_that_the_base_never_learned_is_trained(here: Path, tied: bool, rows: Any) -> None:
    """The gate passes the recipe with the row of its end, and refuses it without."""
    recipe = written(made("look_ahead", CHATML), ["</s>"], tie_word_embeddings=tied)
    assert recipe.lora is not None
    assert recipe.lora["trainable_token_indices"] == rows
    assert refusals(recipe) == []
    lora = {key: value for key, value in recipe.lora.items() if key != "trainable_token_indices"}
    assert len(refusals(recipe.model_copy(update={"lora": lora}))) == 1


def test_an_end_that_nothing_is_known_of_is_trained(here: Path) -> None:
    """Neither a generation config nor the tokenizer's own end of text speaks for it."""
    recipe = written(made("look_ahead", CHATML), eos_token_id=None)
    assert recipe.lora is not None
    assert recipe.lora["trainable_token_indices"] == {"embed_tokens": [4], "lm_head": [4]}
    assert "# the row of <|im_end|>: nothing says that the model stops there" in (
        Path("q.yaml").read_text()
    )


def test_without_data_the_source_is_left_to_the_user(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is chosen and proven; the gate asks for the data alone."""
    model_folder(Path("model"), made("look_ahead", CHATML), ["<|im_end|>"])
    adapt("model", output=Path("q.yaml"))
    recipe = load_recipe("q.yaml")
    asked = "a data set: a built-in name, a hub id, a file or a folder"
    assert recipe.data.source == f"DECIDE: {asked}"
    assert refusals(recipe) == [
        f"data.source is still to be decided: {asked}\n"
        "    hint: write a value in the place of `DECIDE: …`"
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "to be decided: data.source; `sftkey check` refuses the recipe until then"
    assert out[2] == f"  {asked}"
    assert out[3].startswith("masks proven on 40 hard rows: ")


def test_without_a_frame_the_template_is_left_to_the_user(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GLM's turns have no end: there is nothing to prove until the user gives a template."""
    recipe = written(standing_in("glm4moe"))
    assert str(recipe.model.chat_template).startswith("DECIDE: a template of your own; ")
    (refusal,) = refusals(recipe)
    assert refusal.startswith("model.chat_template is still to be decided: a template of your own")
    assert "masks not proven: what stands above must be decided first" in capsys.readouterr().out


def test_columns_left_to_the_user_are_refused_by_the_gate(here: Path) -> None:
    """A guess that would be a lie is a question instead."""
    write_rows(here / "rows.jsonl", [{"id": "1", "body": "x"}] * 40)
    recipe = written(made("look_ahead", CHATML), ["<|im_end|>"])
    refusal, *others = refusals(recipe)
    assert refusal.startswith("data.prompt is still to be decided: a template, ")
    assert len(others) == 2  # thinking and answer, said at once


def test_one_stage_in_place_of_two_trains_as_long(here: Path) -> None:
    """Its loss is on the whole completion, five-fold on the key; other stages leave no place."""
    two = written(made("look_ahead", CHATML), ["</s>"])
    epochs = [two.stage_trainer(stage)["num_train_epochs"] for stage in two.stages]
    adapt("model", data="rows.jsonl", output=Path("one.yaml"), one_stage=True)
    one = load_recipe("one.yaml")
    assert [stage.loss_on for stage in one.stages] == [{"completion": 1.0, "key": 5.0}]
    assert one.stage_trainer(one.stages[0])["num_train_epochs"] == sum(epochs)
    assert refusals(one) == []
    with pytest.raises(RecipeError, match="got the stages of q"):
        adapt("model", like=Path("q.yaml"), one_stage=True)
    write_rows(here / "rows.jsonl", [{"question": "Q", "answer": "7"}] * 9)
    with pytest.raises(RecipeError, match="got stages behind the model's own thinking"):
        adapt("model", data="rows.jsonl", one_stage=True)


OWN = {"name": "key", "loss_on": "key", "thinking": "own"}


@pytest.mark.parametrize(
    ("family", "tags"),
    [
        ("qwen3-8b", "<think> … </think>"),
        ("deepseek-r1-distill-qwen-1.5b", "</think>"),  # its prompt opens the thinking
    ],
)
def test_answers_alone_are_trained_behind_the_models_own_thinking(
    here: Path, capsys: pytest.CaptureFixture[str], family: str, tags: str
) -> None:
    """The recipe passes the whole gate, with room for thinking, and the key alone is trained."""
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(50)]
    write_rows(here / "rows.jsonl", rows)
    member = FAMILIES[family]
    stops = [member.end, *member.stops]
    recipe = written(member.standing_in(), stops, max_position_embeddings=4096)
    (stage,) = recipe.stages
    assert stage.model_dump(exclude_defaults=True) == OWN | {"context": "frozen"}
    assert recipe.data.thinking is None
    assert recipe.data.max_length > 2048
    assert recipe.eval.max_new_tokens > 2048
    report = check_recipe(recipe)
    assert report.refusals == []
    assert report.prepared is not None
    for row in preview_rows(recipe, report.prepared, 50):
        trained = {token["segment"] for token in row["tokens"] if token["trained"]["key"]}
        context = {token["segment"] for token in row["tokens"] if not token["trained"]["key"]}
        assert {"ANSWER", "END"} <= trained <= {"ANSWER_TAG", "ANSWER", "END"}
        assert context == {"PROMPT", "THINKING"}
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("no column holds a reasoning: the model writes its own ")
    assert out[2].startswith(f"so the model must think already, in {tags}: train asks it 16 ")
    assert "to be decided" not in "".join(out)


def test_stages_that_read_a_reasoning_are_not_taken_over_without_one(here: Path) -> None:
    """Of another recipe's stages those stay that read the model's own thinking alone."""
    write_rows(here / "rows.jsonl", [{"question": "Q", "answer": "7"}] * 9)
    model_folder(Path("model"), made("look_ahead", CHATML), ["</s>"])
    Path("one.yaml").write_text(LIKE)
    (stage,) = like(data="rows.jsonl").stages
    assert stage.model_dump(exclude_defaults=True) == OWN
    Path("q.yaml").unlink()
    given = "loss_on: {thinking: 0.1, key: 1.0}"
    Path("one.yaml").write_text(LIKE.replace(given, "loss_on: key, thinking: own"))
    (stage,) = like(data="rows.jsonl").stages
    assert stage.model_dump(exclude_defaults=True) == OWN | {"name": "only"}


LIKE = """name: one
seed: 7
model: {name_or_path: some/model}
lora: {r: 8, lora_alpha: 8, target_modules: [q_proj], trainable_token_indices: [1]}
data: {source: rows.jsonl, prompt: "{question}", thinking: "{cot}", test: 4, max_length: 256}
trainer: {per_device_train_batch_size: 4, gradient_accumulation_steps: 3, learning_rate: 3e-4}
stages: [{name: only, loss_on: {thinking: 0.1, key: 1.0}}]
eval: {grader: number}
"""


def like(model: str = "model", **options: Any) -> Recipe:
    """Adapt a model to what another recipe does."""
    adapt(model, like=Path("one.yaml"), output=Path("q.yaml"), **options)
    return load_recipe("q.yaml")


def test_another_recipe_gives_data_stages_and_settings(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but what is the model's own; a step sees as many rows, one at a time."""
    Path("one.yaml").write_text(LIKE)
    model_folder(Path("model"), made("look_ahead", CHATML), ["<|im_end|>"])
    recipe, other = like(), load_recipe("one.yaml")
    said = "no row was read: data and lengths are those of one.yaml; `sftkey check q.yaml` reads "
    assert capsys.readouterr().out.splitlines()[1] == f"{said}the rows"
    assert (recipe.name, recipe.seed) == ("model-rows", 7)
    assert recipe.model.name_or_path == "model"
    assert recipe.lora == {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    assert (recipe.data, recipe.stages, recipe.eval) == (other.data, other.stages, other.eval)
    assert recipe.trainer == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 12,
        "learning_rate": 3e-4,
    }
    assert refusals(recipe) == []
    text = Path("q.yaml").read_text()
    assert text.startswith("# model (llama, 0.1M parameters), as in one.yaml: stage by stage.\n")
    assert "  r: 8                            # as in one.yaml, like what follows\n" in text


def test_full_fine_tuning_stays_full(here: Path) -> None:
    """Where the other recipe trains all weights, this one does, unquantized."""
    text = LIKE.replace("name_or_path: some/model", "name_or_path: some/model, quantization: none")
    text = "".join(
        "lora: null\n" if each.startswith("lora") else each for each in text.splitlines(True)
    )
    Path("one.yaml").write_text(text)
    model_folder(Path("model"), made("look_ahead", CHATML), ["</s>"])
    recipe = like()
    assert (recipe.lora, recipe.model.quantization) == (None, "none")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, {"prompt": "{question}\n"}),
        (
            {"system": "Be brief."},
            {"system": "DECIDE: null, or in the prompt; a plain text has no system"},
        ),
        (
            {"prompt": None, "thinking": None, "response": "messages", "split_rule": "boxed"},
            {"prompt": "DECIDE: one text; the plain frame takes no messages"},
        ),
    ],
    ids=["text", "system", "messages"],
)
def test_chats_data_in_a_plain_frame(
    here: Path, data: dict[str, Any], expected: dict[str, str]
) -> None:
    """Prompts get their line's end; what only a chat has is left to the user."""
    Path("one.yaml").write_text(LIKE)
    source = load_recipe("one.yaml")
    changed = source.model_copy(update={"data": source.data.model_copy(update=data)})
    Path("one.yaml").write_text(changed.to_yaml())
    model_folder(Path("model"), made("look_ahead"), ["</s>"])
    recipe = like()
    assert recipe.response.frame == "plain"
    assert {key: getattr(recipe.data, key) for key in expected} == expected


def test_plain_prompts_lose_their_line_in_a_chat(here: Path) -> None:
    """The template ends the question's turn itself."""
    text = (
        LIKE.replace('"{question}"', '"{question}\\n"') + "response: {frame: plain, turns: all}\n"
    )
    Path("one.yaml").write_text(text)
    model_folder(Path("model"), made("look_ahead", CHATML), ["<|im_end|>"])
    recipe = like()
    assert (recipe.data.prompt, recipe.response.turns) == ("{question}", "all")


def test_other_data_goes_before_the_other_recipes(here: Path) -> None:
    """With both, the data is the user's and the settings are the recipe's."""
    Path("one.yaml").write_text(LIKE)
    write_rows(here / "mine.jsonl", [{"prompt": "Q", "thinking": "c", "answer": "7"}] * 40)
    model_folder(Path("model"), made("look_ahead", CHATML), ["<|im_end|>"])
    recipe = like(data="mine.jsonl")
    assert (recipe.data.source, recipe.data.prompt) == ("mine.jsonl", "{prompt}")
    assert recipe.lora is not None
    assert recipe.lora["r"] == 8


def test_rows_longer_than_the_models_positions_are_not_allowed(here: Path) -> None:
    """The other recipe's length holds as far as the model reads."""
    Path("one.yaml").write_text(LIKE)
    model_folder(
        Path("model"), made("look_ahead", CHATML), ["<|im_end|>"], max_position_embeddings=128
    )
    assert like().data.max_length == 128


def test_quantized_weights_are_not_quantized_again(here: Path) -> None:
    """gpt-oss comes in MXFP4."""
    recipe = written(
        FAMILIES["gpt-oss-20b"].standing_in(),
        ["<|return|>"],
        model_type="gpt_oss",
        num_local_experts=4,
        head_dim=8,
        quantization_config={"quant_method": "mxfp4"},
    )
    assert (recipe.model.quantization, recipe.model.attn_implementation) == ("none", "eager")
    text = Path("q.yaml").read_text()
    assert "# the weights come quantized already: mxfp4\n" in text
    assert "the experts' weights are no modules, and stay as they are\n" in text


def test_a_recipe_of_a_collection_is_named_by_its_path(here: Path) -> None:
    """Folders are made, and the name is that of the place."""
    model_folder(Path("model"), made("look_ahead", CHATML), ["<|im_end|>"])
    file = Path("recipes", "My Model", "rows.yaml")
    adapt("model", data="rows.jsonl", output=file)
    assert load_recipe(file).name == "my-model-rows"
    assert f"# Run:  accelerate launch -m sftkey.train {file}\n" in file.read_text()


def test_the_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows tried, refused by reason, wrong; an example in both stages; the nearest recipe."""
    written(made("look_ahead", CHATML), ["</s>"])
    out = capsys.readouterr().out
    head, proven, *reasons = out.partition("PROMPT")[0].splitlines()
    assert head == "q.yaml: written"
    assert proven == (
        "masks proven on 40 hard rows: 36 right, 0 wrong, 4 refused, of which none can be built:"
    )
    assert reasons == ["  4: the response's own tags stand inside the answer"]
    assert "stage completion:\n<|im_start|>user⏎\nWhat is 0 + 0?<|im_end|>⏎\n" in out
    assert (
        "\n</Thinking>⏎\n⟦<Answer>⏎\n0⏎\n</Answer><|im_end|>⟧\n" in out.partition("stage key:")[2]
    )
    assert "\nthe nearest recipe, " in out
    assert "  response.frame: " in out or "  response.answer: " in out


def test_without_a_file_the_recipe_goes_to_stdout(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that it can be piped: what proves it goes to stderr."""
    model_folder(Path("model"), made("look_ahead", CHATML), ["</s>"])
    with pytest.raises(SystemExit) as exited:
        main(["adapt", "model", "--data", "rows.jsonl"])
    assert exited.value.code == 0
    captured = capsys.readouterr()
    assert captured.out == WHOLE.replace("q.yaml", "recipe.yaml")
    assert captured.err.startswith("masks proven on 40 hard rows: ")
    assert list(here.glob("*.yaml")) == []


def test_without_cuda_no_nf4_is_proposed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe says why and what else there is, and so does the terminal."""
    monkeypatch.setattr(planning_adapt, "has_cuda", lambda: False)
    recipe = written(made("look_ahead", CHATML), ["</s>"])
    assert recipe.model.quantization == "none"
    assert "# no CUDA where this was written; nf4 where" in Path("q.yaml").read_text()
    assert capsys.readouterr().out.splitlines()[1] == (
        "no CUDA here, so the weights stay unquantized; --gpu 24GB writes for a GPU elsewhere"
    )


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that exists stays as it is, before anything else is looked at."""
    Path("q.yaml").write_text("mine")
    with pytest.raises(SystemExit) as exited:
        main(["adapt", "nowhere/at-all", "-o", "q.yaml"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == (
        "error: q.yaml: exists already, and nothing is overwritten\n"
        "hint: give another name, or move it aside\n"
    )
    assert Path("q.yaml").read_text() == "mine"


def test_a_file_that_came_meanwhile_is_not_overwritten(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote it while the masks were proven keeps it."""
    model_folder(Path("model"), made("look_ahead", CHATML), ["</s>"])
    made_recipe = planning_adapt.adapt

    def slow(*arguments: Any, **options: Any) -> Any:
        adapted = made_recipe(*arguments, **options)
        Path("q.yaml").write_text("mine")
        return adapted

    monkeypatch.setattr(planning_adapt, "adapt", slow)
    with pytest.raises(RunError) as raised:
        adapt("model", data="rows.jsonl", output=Path("q.yaml"))
    assert str(raised.value).startswith("q.yaml: exists already, and nothing is overwritten\n")
    assert Path("q.yaml").read_text() == "mine"


def test_wrong_masks_write_no_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the proof ever fail, the user gets an error and no file."""

    def mutated(examples: list[Example], renderer: Renderer) -> list[Row | Refusal]:
        rows = tokenize(examples, renderer)
        for row in rows:
            if isinstance(row, Row):
                row.input_ids.pop()
                row.segment_ids.pop()
        return rows

    monkeypatch.setattr(proof, "tokenize", mutated)
    with pytest.raises(FrameError) as raised:
        written(made("look_ahead", CHATML), ["</s>"])
    first, hint = str(raised.value).splitlines()
    assert first.startswith("model: masks are wrong on 36 of 40 hard rows, at first: text was lost")
    assert hint == (
        "hint: nothing was written; it is a bug of sftkey, please report it with the model's name"
    )
    assert not Path("q.yaml").exists()


def test_a_model_or_data_that_cannot_be_read_is_one_error(here: Path) -> None:
    """The errors are those of everything else that reads models and data."""
    Path("empty").mkdir()
    with pytest.raises(ModelError) as model:
        adapt("empty", output=Path("q.yaml"))
    assert str(model.value) == "empty: no config.json there"
    model_folder(Path("model"), made("look_ahead", CHATML))
    with pytest.raises(DataError) as data:
        adapt("model", data="none.jsonl", output=Path("q.yaml"))
    assert str(data.value) == "none.jsonl: no such file"
    assert not Path("q.yaml").exists()
