"""The gate finds everything at once, says each thing whole, and stands before every training."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftkey.training.stage_model
from sftkey.checks.findings import Finding, Report
from sftkey.checks.gate import _rows_report as check
from sftkey.checks.gate import check_recipe as gate_of
from sftkey.checks.gate import require_trainable
from sftkey.checks.mask_proof import Proof
from sftkey.checks.masks import judged_findings
from sftkey.checks.rows import dropped_findings
from sftkey.commands.check import check as command
from sftkey.commands.train import train
from sftkey.data.prepare import prepare_splits
from sftkey.data.refused import UNSPLIT
from sftkey.data.response import Example
from sftkey.data.tokenization import tokenize
from sftkey.errors import CheckError, RecipeError
from sftkey.evaluation.grading import grade
from sftkey.recipe.load import load_recipe
from sftkey.training.run import read_rows, start
from tests.support.model_folders import write_rows

Gate = Callable[..., Report]
ROWS = [
    {"prompt": f"Q{n}", "thinking": "1 + 1 = 2\n" * (n + 1), "answer": str(n)} for n in range(9)
]
WITHOUT_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def gate(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Gate:
    """Return a function that writes rows and a recipe over them, and checks it."""

    def run(*overrides: str, rows: Any = ROWS, env: Any = None, **sections: Any) -> Report:
        source = write_rows(tmp_path / "these.jsonl", rows)
        recipe = tiny_recipe(**{"data": {"source": source}, **sections})
        return check(load_recipe(recipe, overrides), env or {})

    return run


@pytest.fixture
def base_model(tiny_folder: Path, tmp_path: Path) -> Path:
    """Make a base model's folder: its chat template ends turns with a token it never learned."""
    folder = tmp_path / "base-model"
    shutil.copytree(tiny_folder, folder)
    for file, eos in (
        ("generation_config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
    ):
        text = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**text, **eos}))
    return folder


def of_model(folder: Path) -> str:
    """Return the override of `model` for a folder."""
    return f"model={{name_or_path: {folder}, quantization: none}}"


def tie(folder: Path) -> None:
    """Say in the config that the head shares its weights with the embedding."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def test_a_frozen_stage_finds_where_each_thinking_ends(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Without tags white space ends it, which it mustn't hold; other contexts train such rows."""
    rows = [{**row, "thinking": "1 + 1 = 2" + "\n2" * (n == 3)} for n, row in enumerate(ROWS)]
    source = write_rows(tmp_path / "these.jsonl", rows)
    response = {"thinking": ["", ""], "answer": ["\n", ""]}
    found = {}
    for context in ("exact", "frozen"):
        stages = [{"name": "key", "loss_on": "key", "context": context}]
        recipe = tiny_recipe(data={"source": source}, response=response, stages=stages)
        found[context] = gate_of(load_recipe(recipe)).refusals
    assert not found["exact"]
    (finding,) = found["frozen"]
    assert (finding.code, finding.rows) == ("switch", (3,))
    assert str(finding) == (
        "train: the thinkings of these rows hold '\\n', which ends a thinking here: 1 row, 3\n"
        "    hint: write a closing tag, or an opening tag of the answer; or context: exact"
    )


def test_a_right_recipe_has_no_findings_and_its_counts(gate: Gate) -> None:
    """The statistics say what the stages train, how long, and how small the key is."""
    report = gate("data.validation=2", "data.test=2", "trainer.max_steps=3")
    assert report.findings == ()
    assert report.prepared is not None
    numbers = json.loads(json.dumps(report.statistics))
    assert numbers["rows"] == {"train": 5, "validation": 2, "test": 2}
    tokens = numbers["tokens"]["train"]
    completion = sum(tokens.values()) - tokens["PROMPT"]
    key = completion - tokens["THINKING"]
    epochs = 3 * 2 * 2 / 5  # steps, accumulation, batch; rows
    whole = round(epochs * sum(tokens.values()))
    assert numbers["num_processes"] == 1
    assert numbers["stages"] == {
        "completion": {"steps": 3, "tokens": whole, "trained_tokens": round(epochs * completion)},
        "key": {"steps": 3, "tokens": whole, "trained_tokens": round(epochs * key)},
    }
    shares = [
        sum(segment >= 2 for segment in row) / sum(segment >= 1 for segment in row)
        for row in report.prepared.train["segment_ids"]
    ]
    assert numbers["key_share"] == {
        "median": round(sorted(shares)[2], 4),
        "min": round(min(shares), 4),
        "max": round(max(shares), 4),
    }


def test_every_sample_of_own_thinking_is_a_row(gate: Gate) -> None:
    """Three samples a row: three times the steps and tokens of a stage over the reference's."""
    stages = [
        {"name": "key", "loss_on": "key"},
        {"name": "own", "loss_on": "key", "thinking": "own", "own": {"samples": 3}},
    ]
    trainer = {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    found = gate(stages=stages, trainer=trainer).statistics["stages"]
    assert {name: 3 * count for name, count in found["key"].items()} == found["own"]


def test_the_launchers_processes_share_the_steps(gate: Gate) -> None:
    """Steps are counted for as many processes as the launcher starts."""
    trainer = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 2e-4}
    report = gate(trainer=trainer, env={"WORLD_SIZE": "3"})
    assert report.statistics["num_processes"] == 3
    assert report.statistics["stages"]["key"]["steps"] == 3


def test_everything_is_found_at_once(gate: Gate) -> None:
    """Neither a missing model nor missing data hides what can be found without them."""
    report = gate(
        "model.name_or_path=./nowhere",
        "data.source=./nothing.jsonl",
        "stages.completion.loss_on=answer",
        "stages.key.loss_on=answer",
        "trainer.learning_rate=0",
    )
    assert [finding.code for finding in report.findings] == [
        "learning-rate",
        "end-untrained",
        "model",
        "data",
    ]
    assert [finding.message for finding in report.refusals] == [
        "stages: none of them trains the end of turn, so the model won't learn to stop there",
        "./nowhere: no such folder",
        "nothing.jsonl: no such file",
    ]
    assert report.statistics == {}
    assert report.prepared is None


BAD_ROWS = [
    *ROWS,
    {"prompt": "E", "thinking": "a", "answer": " "},
    {"prompt": "S", "thinking": "a", "answer": "<|im_start|>"},
    {"prompt": "L", "thinking": "a b " * 400, "answer": "7"},
    ROWS[0] | {"answer": "8"},
]
BAD_ROWS_FOUND = [
    ("no-key", (9,), "train: the answer is empty: 1 row, 9", UNSPLIT.hint),
    (
        "overlap",
        (0, 12),
        "train: prompt also in test: 2 rows, 0, 12",
        "rows count from 0; data.overlap: drop leaves these rows out",
    ),
    (
        "special-token-text",
        (10,),
        "train: the answer holds the text of the special token '<|im_start|>': 1 row, 10",
        UNSPLIT.hint,
    ),
    (
        "too-long",
        (11,),
        "train: longer than 1024 tokens: 1 row, 11",
        "raise data.max_length; data.too_long: drop leaves these rows out, trim_thinking shortens "
        "their thinking",
    ),
]


@pytest.fixture
def asked_again(tmp_path: Path) -> str:
    """Return the override of `data.test` for a file with train's first row."""
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    return f"data.test={file}"


def test_rows_that_the_recipe_does_not_let_drop_refuse_it(gate: Gate, asked_again: str) -> None:
    """Every kind of such rows is found in one go, with its numbers and what to do."""
    report = gate(asked_again, "data.too_long=error", rows=BAD_ROWS)
    assert list(report.findings) == [Finding(*found) for found in BAD_ROWS_FOUND]


def test_rows_that_the_recipe_lets_drop_are_noted(gate: Gate, asked_again: str) -> None:
    """What the recipe allows is said with the rows' numbers, and refuses nothing."""
    overrides = ("data.overlap=drop", "data.unsplit_rows=drop", "data.too_long=drop")
    report = gate(asked_again, *overrides, rows=BAD_ROWS)
    assert list(report.findings) == [
        Finding(code, rows, message, None, refuses=False)
        for code, rows, message, _ in BAD_ROWS_FOUND
    ]
    assert report.statistics["rows"] == {"train": 8, "validation": 0, "test": 1}


def test_a_message_names_twenty_rows(gate: Gate) -> None:
    """The count is whole, the list of numbers short."""
    odd = [{"prompt": f"R{n}", "thinking": "<|im_end|>", "answer": "7"} for n in range(25)]
    (finding,) = gate(rows=[*odd, *ROWS]).findings
    listed = ", ".join(map(str, range(20)))
    assert finding.rows == tuple(range(20))
    assert finding.message == (
        "train: the thinking holds the text of the special token '<|im_end|>': "
        f"25 rows, {listed}, …"
    )


@pytest.mark.parametrize(
    ("code", "refuses"),
    [("overlap", True), ("too-long", False), ("no-key", True), ("unusable", True)],
)
def test_only_error_makes_rows_that_are_left_out_refuse(code: str, refuses: bool) -> None:
    """Which key of the recipe decides hangs on the code of the reason, not on its words."""
    data = load_recipe(Path("recipes/smollm2-135m/gsm8k.yaml")).data  # drops what is too long
    counts = {"train: because": {"count": 2, "rows": [1, 4], "code": code}}
    (finding,) = dropped_findings(data, counts)
    assert (finding.code, finding.refuses) == (code, refuses)
    assert finding.message == "train: because: 2 rows, 1, 4"


def test_what_adapt_could_not_decide_refuses(gate: Gate) -> None:
    """A marked value is named, and what hangs on it isn't tried."""
    report = gate("data.source='DECIDE: a file with prompt, thinking and answer'")
    assert report.findings == (
        Finding(
            "undecided",
            (),
            "data.source is still to be decided: a file with prompt, thinking and answer",
            "write a value in the place of `DECIDE: …`",
        ),
    )


@pytest.mark.parametrize(
    ("override", "said", "refuses"),
    [
        (r'data.system="in \boxed{}"', r"data.system: holds a control character", True),
        (r'data.prompt="\frac{{1}}{{2}} {prompt}"', "data.prompt: holds a control character", True),
        (r'data.prompt="\right) {prompt}"', "data.prompt: holds a control character", True),
        (
            r'data={source: x, response: y, split_rule: "(?P<thinking>.*)\b(?P<answer>.*)"}',
            "data.split_rule: holds a control character",
            True,
        ),
        (
            r"response.thinking=['<think>\n', '\n</think>']",
            "response.thinking[0]: holds a backslash and an n",
            True,
        ),
        (r"data.prompt='{prompt}\n\nOne number.'", "data.prompt: holds a backslash", False),
        (r"data.system='in \boxed{}, and x \neq 1'", None, False),
        (r'data.system="One\r\n\tnumber."', None, False),
    ],
)
def test_what_yamls_quotes_made_of_a_backslash_is_found(
    override: str, said: str | None, refuses: bool, gate: Gate
) -> None:
    r"""`\b` in double quotes is a backspace; `\n` in single ones is no line break."""
    found = [each for each in gate(override).findings if each.code == "escape"]
    told = [(each.message[: len(said or "")], each.refuses) for each in found[:1]]
    assert told == ([(said, refuses)] if said else [])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (r'data.prompt="{prompt}\nHint: {answer}"', ["{answer}, which is the answer"]),
        (r'data.prompt="{prompt}\n{thinking}"', ["{thinking}, which is the thinking"]),
        (r'data.prompt="{prompt}\nNo {{answer}}."', []),
    ],
)
def test_a_prompt_that_holds_the_answer_is_noted(
    override: str, told: list[str], gate: Gate
) -> None:
    """A model that reads its answer learns nothing of finding it."""
    names = ("data.thinking='{thinking}'", "data.answer='{answer}'")
    report = gate(override, *names)
    found = [each for each in report.findings if each.code == "told"]
    assert [each.message for each in found] == [
        f"data.prompt holds {what} (data.{what.split()[-1]})" for what in told
    ]
    assert not report.refusals


@pytest.mark.parametrize(
    ("lora", "rate", "said"),
    [
        ({"r": 4}, 2.1e-3, "the learning rate 0.0021 lies more than 10 times above what LoRA"),
        ({"r": 4}, 1.9e-5, "the learning rate 1.9e-05 lies more than 10 times below what LoRA"),
        (None, 1.1e-4, "the learning rate 0.00011 lies more than 10 times above what full"),
        (None, 0.0, "the learning rate 0 lies more than 10 times below what full"),
        ({"r": 4}, 2e-3, None),
        ({"r": 4}, 2e-5, None),
        (None, 1e-4, None),
        (None, 1e-6, None),
    ],
)
def test_a_learning_rate_ten_times_out_is_noted(
    lora: Any, rate: float, said: str | None, gate: Gate
) -> None:
    """It refuses nothing, for it may be meant."""
    stages = [{"name": "key", "loss_on": "key"}]
    report = gate(lora=lora, stages=stages, trainer={"learning_rate": rate})
    if said is None:
        assert report.findings == ()
        return
    (finding,) = report.findings
    kind, usual = ("full fine-tuning", "1e-05") if lora is None else ("LoRA", "0.0002")
    assert said in finding.message
    assert finding.message.startswith("stages.key: ")
    assert finding.message.endswith(f" what {kind} usually takes")
    assert finding.hint == f"usual is around {usual}: stages.key.trainer.learning_rate={usual}"
    assert (finding.code, finding.refuses) == ("learning-rate", False)


def test_upstreams_own_learning_rate_counts_where_the_recipe_has_none(gate: Gate) -> None:
    """TRL's default is a tenth of what LoRA takes, which is not yet too far."""
    assert gate(trainer={"max_steps": 1}, stages=[{"name": "key", "loss_on": "key"}]).findings == ()


@pytest.mark.parametrize(
    ("trainer", "own", "noted"),
    [
        ({"max_steps": 3, "num_train_epochs": 2}, {}, True),
        ({"num_train_epochs": 2}, {"max_steps": 3}, False),  # the epochs are other stages'
        ({"max_steps": 3}, {"num_train_epochs": 2}, True),
        ({"max_steps": -1, "num_train_epochs": 2}, {}, False),
    ],
)
def test_epochs_beside_steps_are_noted(
    trainer: dict[str, Any], own: dict[str, Any], noted: bool, gate: Gate
) -> None:
    """Upstream counts the steps alone, and says nothing."""
    stages = [{"name": "key", "loss_on": "key", "trainer": own}]
    findings = gate(trainer=trainer | {"learning_rate": 2e-4}, stages=stages).findings
    assert [finding.code for finding in findings] == ["epochs-unused"] * noted
    assert not any(finding.refuses for finding in findings)


ZERO_3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_a_config_that_cannot_serve_the_recipe_is_refused(gate: Gate) -> None:
    """The launcher's environment says which config it is; the hint names one that can.

    What none of them can is said, too: a model that is cut up writes no answers.
    """
    report = gate("model.quantization=nf4", env=ZERO_3)
    ungraded = Finding(
        "not-graded",
        (),
        "FSDP and DeepSpeed cut the model up: its answers aren't written or graded in the run",
        "after it, on one process: sftkey evaluate runs/tiny",
        refuses=False,
    )
    assert report.findings == (
        Finding(
            "launcher",
            (),
            "model.quantization: ZeRO-3 can't shard nf4 weights",
            "launch with accelerate_configs/fsdp2.yaml, which does, or with deepspeed_zero2.yaml, "
            "where each GPU holds them all; or write model.quantization=none",
        ),
        ungraded,
    )
    assert gate("model.quantization=none", env=ZERO_3).findings == (ungraded,)
    zero_2 = {**ZERO_3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    assert gate("model.quantization=nf4", env=zero_2).findings == (ungraded,)


def test_an_evaluation_without_validation_rows_is_found(gate: Gate) -> None:
    """What training would refuse later, the gate refuses with all else."""
    (finding,) = gate("stages.key.trainer.eval_strategy=steps").findings
    assert finding == Finding(
        "recipe",
        (),
        "tiny: stages.key.trainer.eval_strategy: 'steps' needs validation rows; got none",
        "write data.validation: a number of rows of train",
    )


def test_a_system_message_that_the_template_drops_refuses(gate: Gate, tmp_path: Path) -> None:
    """All rows with one are named, and the others are looked at all the same."""
    template = tmp_path / "without_system.jinja"
    template.write_text(WITHOUT_SYSTEM)
    rows: list[dict[str, Any]] = [*ROWS, ROWS[0] | {"prompt": "R", "answer": ""}]
    for number in (2, 5):
        rows[number] = {
            **ROWS[number],
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Q{number}"},
            ],
        }
    report = gate(f"model.chat_template={template}", rows=rows)
    assert report.findings == (
        Finding("no-key", (9,), "train: the answer is empty: 1 row, 9", UNSPLIT.hint or ""),
        Finding(
            "template",
            (2, 5),
            "train: the chat template drops the system message: 2 rows, 2, 5",
            "mend these messages, or choose another model.chat_template; data.unsplit_rows: drop "
            "leaves them out",
        ),
    )
    assert report.statistics["rows"]["train"] == 7


def test_an_earlier_message_that_the_template_rewrites_refuses(gate: Gate, tmp_path: Path) -> None:
    """Text of a conversation may not get lost on the way."""
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'][:20] if m['role'] == 'user' else m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    odd = {**ROWS[4], "prompt": [{"role": "user", "content": "How many legs have 4 cats?"}]}
    report = gate(f"model.chat_template={template}", rows=[*ROWS[:4], odd])
    assert report.findings == (
        Finding(
            "template",
            (4,),
            "train: the chat template drops or rewrites a message of the user: 1 row, 4",
            "mend these messages, or choose another model.chat_template; data.unsplit_rows: drop "
            "leaves them out",
        ),
    )


def test_chat_messages_in_a_plain_frame_refuse(gate: Gate) -> None:
    """Nobody knows how to write roles without a template; the rows are named."""
    odd = {**ROWS[4], "prompt": [{"role": "user", "content": "Q"}]}
    (finding,) = gate("response.frame=plain", rows=[*ROWS[:4], odd]).findings
    assert finding == Finding(
        "template",
        (4,),
        "train: plain takes a prompt as text, got chat messages: 1 row, 4",
        "mend these messages, or choose another model.chat_template; data.unsplit_rows: drop "
        "leaves them out",
    )


def test_without_a_generation_config_stop_is_not_verified(gate: Gate, base_model: Path) -> None:
    """It is said, and the recipe may be trained."""
    (base_model / "generation_config.json").unlink()
    (finding,) = gate(of_model(base_model)).findings
    assert finding == Finding(
        "stop-not-verified",
        (),
        f"{base_model}: stop not verified: no generation config says whether '<|im_end|>' (2) "
        "stops generation",
        "other engines need eos_token_id: 2",
        refuses=False,
    )


NOT_LEARNED = (
    "{}: generation stops at '<|endoftext|>' (0), and what ends a turn here is '<|im_end|>' (2): "
    "the model may never have learned it, and the recipe doesn't train its row"
)


@pytest.mark.parametrize(
    ("tied", "rows"), [(False, "{embed_tokens: [2], lm_head: [2]}"), (True, "[2]")]
)
def test_an_end_of_turn_that_the_base_never_learned_refuses(
    tied: bool, rows: str, gate: Gate, base_model: Path
) -> None:
    """Both ways out work: the plain frame, and training the row that writes it."""
    if tied:
        tie(base_model)
    (finding,) = gate(of_model(base_model)).findings
    assert finding == Finding(
        "end-not-learned",
        (),
        NOT_LEARNED.format(base_model),
        f"response.frame: plain; or train its row: lora.trainable_token_indices: {rows}",
    )
    assert gate(of_model(base_model), "response.frame=plain").findings == ()
    (noted,) = gate(of_model(base_model), f"lora.trainable_token_indices={rows}").findings
    assert noted == Finding(
        "stop-not-published",
        (),
        f"{base_model}: generation stops at '<|endoftext|>' (0), and what ends a turn here is "
        "'<|im_end|>' (2)",
        "other engines need eos_token_id: [2, 0]",
        refuses=False,
    )


def test_a_published_end_that_is_no_token_is_told_as_such(gate: Gate, base_model: Path) -> None:
    """The file is another model's: no frame ends with that id."""
    (base_model / "generation_config.json").write_text('{"eos_token_id": 128009}')
    (finding,) = gate(of_model(base_model)).findings
    assert finding.code == "end-not-learned"
    assert "stops at 128009, no token of this tokenizer, and what ends" in finding.message
    assert finding.hint == (
        "take the generation_config.json that belongs to the model; or train its row: "
        "lora.trainable_token_indices: {embed_tokens: [2], lm_head: [2]}"
    )


@pytest.mark.parametrize(
    ("tied", "setting", "trained"),
    [
        (False, "lora.trainable_token_indices=[2]", False),  # an untied embedding is only read
        (False, "lora.trainable_token_indices={lm_head: [2]}", True),
        (False, "lora.trainable_token_indices={lm_head: [1]}", False),
        (False, "lora.modules_to_save=[lm_head]", True),
        (False, "lora.modules_to_save=[embed_tokens]", False),
        (True, "lora.modules_to_save=[embed_tokens]", True),
        (True, "lora.modules_to_save=[norm]", False),
        (False, "lora=null", True),
    ],
)
def test_which_settings_train_the_row_that_writes_the_end(
    tied: bool, setting: str, trained: bool, gate: Gate, base_model: Path
) -> None:
    """The head's own row must be trained, unless it shares its weights with the embedding."""
    if tied:
        tie(base_model)
    findings = gate(of_model(base_model), setting).findings
    (code,) = {finding.code for finding in findings} - {"learning-rate"}
    assert code == ("stop-not-published" if trained else "end-not-learned")


def test_an_adapter_that_trains_the_row_counts(
    gate: Gate, base_model: Path, tmp_path: Path
) -> None:
    """A recipe that goes on from an adapter need not repeat what the adapter has."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"trainable_token_indices": {"lm_head": [2]}}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (finding,) = gate(of_model(base_model), f"model.adapter={adapter}").findings
    assert finding.code == "stop-not-published"


def test_a_published_stop_inside_the_response_refuses(gate: Gate, base_model: Path) -> None:
    """Generation would stop at it, before the answer."""
    (finding,) = gate(of_model(base_model), 'response.thinking=["", "<|endoftext|>"]').refusals[:1]
    assert finding.code == "stop-inside"
    assert finding.message.endswith("which stands in the response")


def test_a_plain_end_that_the_model_does_not_know_refuses(gate: Gate, base_model: Path) -> None:
    """The plain frame takes any special token; the hint names the published one."""
    overrides = ("response.frame=plain", "response.end=<|im_end|>")
    (finding,) = gate(of_model(base_model), *overrides).findings
    assert finding.message == NOT_LEARNED.format(base_model)
    assert finding.hint == (
        'response.end: "<|endoftext|>"; or train its row: '
        "lora.trainable_token_indices: {embed_tokens: [2], lm_head: [2]}"
    )


def test_a_generation_config_without_eos_stops_at_nothing(gate: Gate, base_model: Path) -> None:
    """It is as if there were none: adapt and the gate read the ends alike."""
    (base_model / "generation_config.json").write_text("{}")
    (finding,) = gate(of_model(base_model)).findings
    assert finding.code == "stop-not-verified"
    assert not finding.refuses


def test_published_settings_that_answers_do_not_follow_are_named(
    gate: Gate, base_model: Path
) -> None:
    """A note: greedy is greedy, whatever a generation config says."""
    published = {"eos_token_id": 2, "suppress_tokens": [2], "do_sample": True, "top_k": None}
    (base_model / "generation_config.json").write_text(json.dumps(published))
    [found] = gate(of_model(base_model)).findings
    assert (found.code, found.refuses) == ("generation-settings", False)
    assert found.message == (
        f"{base_model}: generation_config.json sets do_sample, suppress_tokens; answers here are "
        "written without them"
    )


def test_a_broken_generation_config_is_found(gate: Gate, base_model: Path) -> None:
    """The file is named."""
    (base_model / "generation_config.json").write_text("{")
    (finding,) = gate(of_model(base_model)).findings
    assert finding.code == "model"
    assert finding.message.startswith(
        f"{base_model / 'generation_config.json'}: expected JSON; got Expecting property name"
    )


def test_an_unknown_architecture_is_found(gate: Gate, base_model: Path) -> None:
    """Whether the head is tied can't be told then; no weights could be loaded either."""
    (base_model / "config.json").write_text('{"model_type": "unheard-of"}')
    finding = gate(of_model(base_model)).refusals[-1]
    assert finding.code == "model"
    assert finding.message.startswith(f"{base_model}: its ")


def test_the_oracle_judges_rows_of_train(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong segments, which agree with themselves in the batch, are found by decoding."""

    def shifted(examples: Any, renderer: Any) -> Any:
        rows = tokenize(examples, renderer)
        for row in rows:
            row.segment_ids = [row.segment_ids[0], *row.segment_ids[:-1]]
        return rows

    monkeypatch.setattr("sftkey.checks.masks.tokenize", shifted)
    report = gate(rows=ROWS[:3])
    (finding,) = report.findings
    assert finding == Finding(
        "masks",
        (0, 1, 2),
        "train: an oracle that decodes finds masks wrong, at first: stage `completion` does not "
        "train exactly what follows the prompt: 3 rows, 0, 1, 2",
        "no recipe mends this: it is a bug of sftkey, please report it with the tokenizer's name",
    )


def test_the_oracle_sees_rows_from_all_over_train(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows so many are judged that it takes no time, the last ones among them."""
    report = gate()
    seen: list[int] = []

    def judge(renderer: Any, examples: Any, rows: Any) -> Proof:
        seen.extend(example.index for example in examples)
        return Proof(len(examples), len(examples))

    monkeypatch.setattr("sftkey.checks.masks.judge", judge)
    monkeypatch.setattr("sftkey.checks.masks.NUM_JUDGED", 3)
    assert report.prepared is not None
    examples = [Example("Q", "", "7", number) for number in range(10)]
    assert list(judged_findings(report.prepared.renderer, examples)) == []
    assert seen == [0, 3, 6, 9]


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows with a test split, and a recipe over them."""

    def write(rows: list[dict[str, str]] = ROWS, **sections: Any) -> Path:
        source = write_rows(tmp_path / "these.jsonl", rows)
        data = {"source": source, "validation": 2, "test": 2}
        return tiny_recipe(data=data, **sections)

    return write


def test_the_command_prints_counts_and_passes(
    recipe_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, everything on stdout, the verdict last."""
    command(recipe_of(), ["trainer.learning_rate=1"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines[:3] == [
        "note learning-rate: stages.completion: the learning rate 1 lies more than 10 times above "
        "what LoRA usually takes",
        "    hint: usual is around 0.0002: stages.completion.trainer.learning_rate=0.0002",
        "rows: train 5, validation 2, test 2",
    ]
    assert lines[-4].startswith("key: ")
    assert lines[-4].endswith("%")
    assert lines[-3].startswith("stage completion: 4 steps, ")
    assert lines[-2].startswith("stage key: 4 steps, ")
    assert lines[-1] == "tiny: passes"


def test_the_command_refuses_with_2(
    recipe_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """All findings are on stdout, each with its hint, and how many there are."""
    overrides = ["data.source=./nothing.jsonl", "model.name_or_path=./nowhere"]
    with pytest.raises(SystemExit) as end:
        command(recipe_of(), overrides)
    assert end.value.code == 2
    assert capsys.readouterr().out == (
        "refused model: ./nowhere: no such folder\n"
        "refused data: nothing.jsonl: no such file\n"
        "tiny: refused for 2 findings\n"
    )


def test_json_is_one_object(
    recipe_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is as DESIGN.md says."""
    odd = {"prompt": "S", "thinking": "a", "answer": "<|im_end|>"}
    file = recipe_of([odd, *ROWS])
    with pytest.raises(SystemExit) as end:
        command(file, ["data.validation=null", "data.test=null"], as_json=True)
    assert end.value.code == 2
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"findings", "statistics"}
    assert report["findings"] == [
        {
            "code": "special-token-text",
            "rows": [0],
            "message": "train: the answer holds the text of the special token '<|im_end|>': "
            "1 row, 0",
            "hint": UNSPLIT.hint,
            "refuses": True,
        }
    ]
    assert report["statistics"]["rows"] == {"train": 9, "validation": 0, "test": 0}


def test_json_holds_errors_of_form_too(
    recipe_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that reads findings gets those of the recipe's form in the same way."""
    file = recipe_of()
    overrides = ["trainer.learning_rte=1", "data.max_length=0"]
    with pytest.raises(SystemExit) as end:
        command(file, overrides, as_json=True)
    assert end.value.code == 2
    report = json.loads(capsys.readouterr().out)
    assert [finding["message"] for finding in report["findings"]] == [
        f"{file}: override trainer.learning_rte=1: unknown key; did you mean `learning_rate`?",
        f"{file}: override data.max_length=0: expected 1 or more; got 0",
    ]
    assert {finding["code"] for finding in report["findings"]} == {"recipe"}
    with pytest.raises(RecipeError):
        command(file, overrides)


def test_answers_that_the_grader_cannot_read_are_found(
    recipe_of: Callable[..., Path],
) -> None:
    """Every answer to these test rows would be wrong; elsewhere it is only said."""
    rows = [{**row, "answer": "Paris"} for row in ROWS]
    recipe = load_recipe(recipe_of(rows))
    report = gate_of(recipe)
    assert report.prepared is not None
    asked = tuple(example.index for example in report.prepared.questions(recipe))
    assert list(report.refusals) == [
        Finding(
            "references",
            asked,
            "test: the grader number can't read the answers of these rows: "
            f"2 rows, {asked[0]}, {asked[1]}",
            "choose the eval.grader that fits them: number, choice, exact or math",
        )
    ]


def test_a_grader_whose_package_is_missing_is_found(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate says what to install."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    report = gate_of(load_recipe(recipe_of(), ["eval.grader=math"]))
    assert report.findings == (
        Finding(
            "recipe",
            (),
            "eval.grader: `math` needs the package math-verify, which isn't installed",
            'python -m pip install "sftkey[math]"',
        ),
    )


def test_training_is_refused_before_any_weight(
    recipe_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error holds every finding, and no run folder is left in which a mended recipe differs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sftkey.training.stage_model, "load_model", None)
    odd = {"prompt": "S", "thinking": "a", "answer": "<|im_end|>"}
    overrides = ["data.validation=null", "data.test=null", "trainer.learning_rate=1"]
    with pytest.raises(CheckError) as caught:
        train(recipe_of([odd, *ROWS]), [*overrides, "stages=[{name: a, loss_on: answer}]"])
    assert str(caught.value) == (
        "tiny: 2 problems\n"
        "  end-untrained: stages: none of them trains the end of turn, so the model won't learn to "
        "stop there\n"
        "    hint: loss_on: key in the last stage, or weights with `end`; model.adapter goes on "
        "from an adapter that was trained to stop\n"
        "  special-token-text: train: the answer holds the text of the special token "
        f"'<|im_end|>': 1 row, 0\n    hint: {UNSPLIT.hint}"
    )
    assert not (tmp_path / "runs").exists()


def test_training_reads_its_rows_once(
    recipe_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the gate has prepared is trained; what is worth knowing is logged."""
    times: list[int] = []

    def counted(*arguments: Any) -> Any:
        times.append(1)
        return prepare_splits(*arguments)

    monkeypatch.setattr("sftkey.checks.gate.prepare_splits", counted)
    monkeypatch.setattr(sftkey.training.run, "prepare", None)
    recipe = load_recipe(recipe_of(), ["trainer.learning_rate=1"])
    run = start(recipe, tmp_path / "runs" / "tiny", read=require_trainable, grade=grade)
    assert len(times) == 1
    assert len(run.prepared.train) == 5
    assert caplog.messages[0].startswith(
        "stages.completion: the learning rate 1 lies more than 10 times above what LoRA "
        "usually takes\n    hint: usual is around 0.0002"
    )


def test_what_passes_is_what_the_recipe_alone_would_read(recipe_of: Callable[..., Path]) -> None:
    """The gate reads leniently so as to find everything; what it hands on is the same."""
    recipe = load_recipe(recipe_of())
    ours, plain = require_trainable(recipe), read_rows(recipe)
    assert ours.counts == plain.counts
    assert ours.train.to_dict() == plain.train.to_dict()
    assert ours.test == plain.test
