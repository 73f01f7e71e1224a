"""What hurts users of other trainers, reproduced: the gate refuses it, with the rows.

The numbers are those of the list of fifteen complaints, gathered from the threads of LLaMA-Factory,
ms-swift, axolotl, unsloth, TRL, open-r1 and others. Where the fault is one of a trainer's own code
(a cut that takes the tail, a mask that is ignored), the test puts that fault into ours. What no
gate can catch is tested where it is done: 1 (test_labels), 3 (test_collator), 4 (test_stages: the
hand-off), 5 (test_adapter), 12 (test_comparison: the base model's row), 13 (test_adapter: saving
asks nobody), 14 (test_device).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from sftkey.checks.findings import Finding, Report
from sftkey.checks.gate import _rows_report as check
from sftkey.checks.masks import BUG
from sftkey.data.collator import KeyCollator, pack_rows
from sftkey.data.tokenization import Row
from sftkey.errors import RecipeError
from sftkey.recipe.load import load_recipe
from tests.support.model_folders import write_rows

Gate = Callable[..., Report]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ROWS = [
    {"prompt": f"Q{n}", "thinking": "1 + 1 = 2\n" * (n + 1), "answer": str(n)} for n in range(3)
]
ALL = "3 rows, 0, 1, 2"


@pytest.fixture
def gate(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Gate:
    """Return a function that checks a recipe over three rows."""

    def run(*overrides: str, rows: Any = ROWS) -> Report:
        source = write_rows(tmp_path / "these.jsonl", rows)
        return check(load_recipe(tiny_recipe(data={"source": source}), overrides), {})

    return run


def found(report: Report) -> dict[str, list[str]]:
    """Return the messages of what refuses, by code."""
    messages: dict[str, list[str]] = {}
    for finding in report.refusals:
        messages.setdefault(finding.code, []).append(finding.message)
    return messages


def test_complaint_2_the_cutoff_removes_the_end_of_turn(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that takes a row's tail loses the answer and what ends it: the model never stops."""

    def cut(rows: Sequence[Row], *_: Any) -> list[Row]:
        return [
            replace(row, input_ids=row.input_ids[:50], segment_ids=row.segment_ids[:50])
            for row in rows
        ]

    whole = gate("data.max_length=50")
    assert found(whole) == {}
    assert whole.statistics["rows"]["train"] == 1  # the others are dropped whole, and counted
    monkeypatch.setattr("sftkey.data.row_cache.fit", cut)
    report = gate("data.max_length=49")  # other rows than those in the cache
    assert found(report) == {
        "end-untrained": [
            f"train: stages.{stage}: doesn't train '<|im_end|>' as the last token: 2 rows, 1, 2"
            for stage in ("completion", "key")
        ],
        "nothing-trained": ["train: stages.key: trains no token: 1 row, 2"],
        "no-key": ["train: no token of an answer: 1 row, 2"],
        "answer-cut": ["train: doesn't end in '</Answer><|im_end|>': 2 rows, 1, 2"],
    }
    assert {finding.hint for finding in report.refusals if finding.code == "answer-cut"} == {BUG}


def test_complaint_6_masking_together_with_packing(gate: Gate) -> None:
    """Packs train the very tokens that their rows train alone; TRL's own packing is refused."""
    report = gate("data.packing=true")
    assert found(report) == {}
    rows = report.prepared.train
    trained = []
    for batch in (KeyCollator(0, "key")(list(of)) for of in (rows, pack_rows(rows, 512))):
        trained.append(sorted(batch["labels"][batch["labels"] != -100].tolist()))
    assert trained[0] == trained[1]
    with pytest.raises(RecipeError) as caught:
        gate("trainer.packing=true")
    assert str(caught.value).partition("1 problem\n")[2] == (
        "  override trainer.packing=true: refused: write `data.packing`"
    )


def test_complaint_7_the_prompt_is_no_prefix_after_a_template_change(
    gate: Gate, tmp_path: Path
) -> None:
    """A template whose prompt isn't what its training text begins with can't be trained."""
    template = tmp_path / "changed.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nSure: {% endif %}"
    )
    (finding,) = gate(f"model.chat_template={template}").findings
    assert finding.code == "frame"
    assert finding.message.partition(": ")[2] == (
        "the generation prompt is no prefix of the training text: "
        "one goes on with 'Sure: ', the other with ''"
    )
    assert finding.hint == "give a model.chat_template of your own"


def test_complaint_8_the_stop_token_was_never_trained(
    gate: Gate, tiny_folder: Path, tmp_path: Path
) -> None:
    """A base model with a chat template, LoRA on its linear layers: generation never ends."""
    folder = tmp_path / "base-model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    report = gate(f"model={{name_or_path: {folder}, quantization: none}}")
    assert found(report) == {
        "end-not-learned": [
            f"{folder}: generation stops at '<|endoftext|>' (0), and what ends a turn here is "
            "'<|im_end|>' (2): the model may never have learned it, and the recipe doesn't train "
            "its row"
        ]
    }


def test_complaint_8_no_stage_trains_the_stop_token(gate: Gate) -> None:
    """With the loss on the answer's text alone, nothing teaches the model to stop behind it."""
    report = gate("stages=[{name: answer, loss_on: answer}]")
    assert found(report) == {
        "end-untrained": [
            "stages: none of them trains the end of turn, so the model won't learn to stop there"
        ]
    }


def test_complaint_9_truncation_masks_everything(gate: Gate) -> None:
    """A length that no row fits in leaves nothing to train, and no run that "succeeds"."""
    (finding,) = gate("data.max_length=20").findings
    assert finding.message.partition("these.jsonl: ")[2] == (
        "no rows are left in train: longer than 20 tokens (3 of 3)"
    )
    assert (finding.code, finding.hint) == ("data", "raise data.max_length")


def test_complaint_10_all_labels_are_masked(gate: Gate) -> None:
    """A stage without a token to train is refused: in all rows, or in some of them."""
    (finding,) = gate('response.answer=["", ""]', "stages.key.loss_on={answer_tag: 1}").findings
    assert finding.message.partition("these.jsonl: ")[2] == (
        "stages.key.loss_on: no row of train has a token of these segments"
    )
    rows = [*ROWS, {"prompt": "E", "thinking": "", "answer": "7"}]
    tags = ('response.thinking=["", ""]', "stages.completion.loss_on={thinking: 1}")
    (finding,) = gate(*tags, rows=rows).findings
    assert finding == Finding(
        "nothing-trained",
        (3,),
        "train: stages.completion: trains no token: 1 row, 3",
        "leave these rows out, or choose another loss_on",
    )


@pytest.mark.parametrize("masked", [False, True])
def test_complaint_11_trains_on_the_prompt_or_on_nothing(
    masked: bool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of ones trains the prompt, a mask of zeros nothing; the proof sees both."""

    def labels_for(ids: torch.Tensor, segments: torch.Tensor, loss_on: Any) -> Any:
        weights = (torch.zeros if masked else torch.ones)(ids.shape)
        return torch.where(weights > 0, ids, -100), weights

    for reader in ("data.collator", "checks.masks", "checks.mask_proof"):
        monkeypatch.setattr(f"sftkey.{reader}.labels_for", labels_for)
    messages = found(gate("stages=[{name: key, loss_on: key}]"))
    assert messages.pop("masks") == [
        "train: an oracle that decodes finds masks wrong, at first: stage `completion` does not "
        f"train exactly what follows the prompt: {ALL}"
    ]
    nothing = f"train: stages.key: trains no token: {ALL}"
    assert messages.get("nothing-trained") == ([nothing] if masked else None)


def test_complaint_15_the_template_inserts_a_think_block(gate: Gate) -> None:
    """Qwen3's template sets an empty one before answers; both ways out are named, and work."""
    template = f"model.chat_template={TEMPLATES / 'qwen3.jinja'}"
    (finding,) = gate(template).findings
    assert finding == Finding(
        "template-inserts",
        (),
        "the chat template inserts '<think>\\n\\n</think>\\n\\n' before every answer, beside the "
        "response's own thinking",
        "model.chat_template_kwargs: {enable_thinking: false}; or the template's own tags, "
        'response.thinking: ["<think>\\n", "\\n</think>"]',
    )
    assert gate(template, "model.chat_template_kwargs={enable_thinking: false}").findings == ()
    native = ('response.thinking=["<think>\\n", "\\n</think>"]', 'response.answer=["\\n\\n", ""]')
    assert gate(template, *native).findings == ()


def test_complaint_15_the_template_deletes_earlier_thinking(gate: Gate) -> None:
    """What it takes out of earlier turns is the same at inference: it is said, with the rows."""
    turns = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    rows = [*ROWS, {"prompt": turns, "thinking": "x", "answer": "4"}]
    report = gate(
        f"model.chat_template={TEMPLATES / 'qwen3.jinja'}",
        "model.chat_template_kwargs={enable_thinking: false}",
        rows=rows,
    )
    assert report.findings == (
        Finding(
            "template-drops-thinking",
            (3,),
            "train: the chat template drops the thinking of an earlier assistant message: 1 row, 3",
            "inference gets the same prompt; give a model.chat_template that keeps it, "
            "if it counts",
            refuses=False,
        ),
    )
