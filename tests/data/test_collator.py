import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sftkey.data import collator as module
from sftkey.data.collator import KeyCollator
from sftkey.data.labels import PADDING
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import DataError, ModelError, RecipeError
from sftkey.recipe.schema import ResponseSection
from tests.support.models import EQUAL

WEIGHTS = {"thinking": 0.25, "key": 1.0}


@pytest.fixture
def rows(tiny_tokenizer: Any) -> list[dict[str, Any]]:
    """Return three rows of unequal lengths; the tokenizer pads with the end of turn."""
    renderer = Renderer.read(tiny_tokenizer, ResponseSection())
    thinkings = ("1 + 1 = 2", "", "1 + 1 = 2, and 2 + 1 = 3")
    made = tokenize([Example("Count.", text, "3", n) for n, text in enumerate(thinkings)], renderer)
    return [vars(row) for row in made if isinstance(row, Row)]


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


def test_rows_come_back_whole(rows: list[dict[str, Any]], tiny_tokenizer: Any) -> None:
    """Each row stands at the left of its line, the rest is padding that is seen nowhere."""
    pad = tiny_tokenizer.pad_token_id
    assert pad == tiny_tokenizer.eos_token_id
    batch = KeyCollator(pad, "completion", for_key_trainer=True)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    for place, row in enumerate(rows):
        length, rest = len(row["input_ids"]), longest - len(row["input_ids"])
        assert batch["input_ids"][place].tolist() == row["input_ids"] + [pad] * rest
        assert batch["segment_ids"][place].tolist() == row["segment_ids"] + [PADDING] * rest
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * rest
        assert batch["labels"][place, length:].tolist() == [-100] * rest
        assert batch["loss_weights"][place, length:].tolist() == [0.0] * rest


@pytest.mark.parametrize("loss_on", ["completion", "key"])
def test_end_of_turn_is_trained_in_every_row(
    rows: list[dict[str, Any]], tiny_tokenizer: Any, loss_on: str
) -> None:
    """The last label of each row is the end of turn, though padding has its id."""
    batch = KeyCollator(tiny_tokenizer.pad_token_id, loss_on)(rows)
    for labels in batch["labels"]:
        trained = labels[labels != -100]
        assert trained[-1] == tiny_tokenizer.eos_token_id
        assert (trained == tiny_tokenizer.eos_token_id).sum() == 1


def test_stages_train_what_they_say(rows: list[dict[str, Any]], tiny_tokenizer: Any) -> None:
    """The trained tokens decode to the completion in stage 1, to the key in stage 2."""
    texts = {}
    for loss_on in ("completion", "key", "answer"):
        labels = KeyCollator(tiny_tokenizer.pad_token_id, loss_on)(rows[:1])["labels"][0]
        texts[loss_on] = tiny_tokenizer.decode(labels[labels != -100])
    completion = "<Thinking>\n1 + 1 = 2\n</Thinking>\n<Answer>\n3\n</Answer><|im_end|>"
    assert texts["completion"] == completion
    assert completion.endswith(texts["key"])
    assert texts["key"].strip().startswith("<Answer>")
    assert "Thinking" not in texts["key"]
    assert texts["answer"].strip() == "3"


def test_batch_of_tensors(rows: list[dict[str, Any]]) -> None:
    """Names, shapes and types are what trainers expect; alone there are no names of our own."""
    alone = KeyCollator(0)(rows)
    assert list(alone) == ["input_ids", "attention_mask", "labels"]
    ours = KeyCollator(0, WEIGHTS, for_key_trainer=True)(rows)
    assert list(ours) == [*alone, "segment_ids", "loss_weights"]
    assert {tensor.shape for tensor in ours.values()} == {ours["labels"].shape}
    types = {name: tensor.dtype for name, tensor in ours.items()}
    assert types.pop("loss_weights") == torch.float32
    assert set(types.values()) == {torch.int64}


def test_length_is_a_multiple(rows: list[dict[str, Any]]) -> None:
    """The batch is lengthened, never shortened."""
    longest = max(len(row["input_ids"]) for row in rows)
    length = KeyCollator(0, pad_to_multiple_of=16)(rows)["input_ids"].shape[1]
    assert length % 16 == 0
    assert longest <= length < longest + 16


def test_weights_reach_sftkeys_trainer(rows: list[dict[str, Any]]) -> None:
    """Each token's weight is its segment's."""
    batch = KeyCollator(0, WEIGHTS, for_key_trainer=True)(rows)
    thinking = batch["segment_ids"] == Segment.THINKING
    assert set(batch["loss_weights"][thinking].tolist()) == {0.25}
    assert set(batch["loss_weights"][~thinking].tolist()) == {0.0, 1.0}


def test_weights_are_refused_alone() -> None:
    """A plain SFTTrainer would swallow them without a word."""
    with pytest.raises(RecipeError) as raised:
        KeyCollator(0, WEIGHTS)
    assert str(raised.value) == (
        "KeyCollator: expected loss_on without weights other than 0 and 1, "
        "got {'thinking': 0.25, 'key': 1.0}; "
        "a plain SFTTrainer ignores loss_weights without a word\n"
        "hint: train this stage with sftkey's trainer (`sftkey train`), "
        "or choose loss_on: completion, key or answer"
    )


def test_weights_of_one_are_a_choice_of_segments() -> None:
    """Weights that only choose need no trainer of ours."""
    assert KeyCollator(0, {"answer": 1.0, "end": 1.0}).loss_on == {"answer": 1.0, "end": 1.0}


@pytest.mark.usefixtures("in_float64")
def test_plain_sft_trainer_trains_on_the_key(
    rows: list[dict[str, Any]], tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """In somebody's own script the collator decides what is trained, and the loss is the key's."""
    dataset = Dataset.from_list(rows)  # input_ids, segment_ids, index
    collator = KeyCollator(tiny_tokenizer.pad_token_id, "key")
    args = SFTConfig(
        output_dir=str(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_steps=2,
        per_device_train_batch_size=3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    with torch.no_grad():
        expected = tiny_model.eval()(**collator(rows)).loss.item()
    trainer = SFTTrainer(tiny_model, args, collator, dataset, processing_class=tiny_tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(expected, rel=EQUAL)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"input_ids": [5, 8, 2]}, "expected rows with input_ids and segment_ids; got input_ids\n"),
        ({"input_ids": [5, 8], "segment_ids": [0, 3, 4]}, "got 2 tokens and 3 segments\n"),
        ({"input_ids": [5, 8, 2], "segment_ids": [0, 3]}, "got 3 tokens and 2 segments\n"),
        (
            {"input_ids": [5, 8], "segment_ids": [0, 3], "seq_lengths": [3]},
            "got 2 tokens and 2 segments, and seq_lengths of 3\n",
        ),
    ],
)
def test_rows_without_a_segment_for_each_token_are_refused(row: dict[str, Any], what: str) -> None:
    """A label would stand on padding, or a token of the row count as such."""
    whole = {"input_ids": [5, 8, 2], "segment_ids": [0, 3, 4]}
    whole |= {"seq_lengths": [3]} if "seq_lengths" in row else {}
    with pytest.raises(DataError) as refused:
        KeyCollator(2)([whole, row])
    assert what in str(refused.value)
    dropped = "remove_unused_columns=False" in str(refused.value)
    assert dropped == ("segment_ids" not in row)


@pytest.mark.parametrize("loss_on", ["keys", "thinkng", {"kye": 1.0}, {"key": 0.0}])
def test_a_loss_that_would_train_nothing_is_refused(loss_on: Any) -> None:
    """All labels would be ignored, without a word."""
    with pytest.raises(RecipeError, match="KeyCollator: loss_on: "):
        KeyCollator(2, loss_on)


@pytest.mark.parametrize(("pad", "shown"), [(None, "nothing"), ("</s>", "'</s>'")])
def test_a_padding_token_is_an_id(pad: Any, shown: str) -> None:
    """Neither none nor a text."""
    with pytest.raises(ModelError, match=f"expected a tokenizer with a padding token, got {shown}"):
        KeyCollator(pad)
