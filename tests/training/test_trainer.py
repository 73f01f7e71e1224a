import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from sftkey.data.labels import PADDING
from sftkey.data.response import Segment
from sftkey.training.losses import token_losses
from sftkey.training.trainer import KeyTrainer
from sftkey.training.validating import row_sums, segment_means
from tests.support.models import EQUAL

PROMPT_TOKENS = 5
THINKING_TOKENS = (2, 60, 4, 33, 7, 2, 48, 3)  # trained tokens differ by more than 5 x
ANSWER_TOKENS = (1, 9, 1, 2, 8, 1, 1, 7)  # in the key stage too


def made_rows(vocabulary: int) -> Dataset:
    """Make eight rows of random ids whose segments differ in length."""
    dice = random.Random(3)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "segment_ids": []}
    for thinking, answer in zip(THINKING_TOKENS, ANSWER_TOKENS, strict=True):
        lengths = (PROMPT_TOKENS, thinking, 2, answer, 1)
        segments = [int(s) for s, n in zip(Segment, lengths, strict=True) for _ in range(n)]
        rows["segment_ids"].append(segments)
        rows["input_ids"].append([dice.randrange(vocabulary) for _ in segments])
    return Dataset.from_dict(rows)


def made_trainer(
    model: Any,
    tokenizer: Any,
    folder: Path,
    loss_on: Any = "key",
    context: Any = "exact",
    **settings: Any,
) -> KeyTrainer:
    """Make a trainer over the eight rows, on the CPU, without dropout or shuffling."""
    args = config(folder, **settings)
    rows = made_rows(len(tokenizer))
    validation = rows.select(range(7))
    return KeyTrainer(model, args, loss_on, tokenizer, rows, validation, context=context)


def config(folder: Path, **settings: Any) -> SFTConfig:
    """Build arguments for eight rows a step, no half precision."""
    return SFTConfig(
        **{
            "output_dir": str(folder),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "remove_unused_columns": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 3,
            "learning_rate": 0.3,
            "optim": "sgd",  # Adam turns rounding errors near 0 into whole steps
            "train_sampling_strategy": "sequential",
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
            "disable_tqdm": True,
            **settings,
        }
    )


def training_lines(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Return the log lines of training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def direct_losses(model: Any, rows: Dataset) -> list[torch.Tensor]:
    """Compute each row's token losses alone, from the whole logits."""
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        losses.append(
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        )
    return losses


LOSSES = ["completion", "key", "answer", {"thinking": 0.05, "key": 0.4}]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("loss_on", "context"),
    [*((loss_on, "exact") for loss_on in LOSSES), ("key", "detached"), ({"end": 2}, "detached")],
    ids=str,
)
def test_micro_batches_do_not_change_training(
    loss_on: Any, context: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """A step over 4 rows is the same step, cut as 4 x 1 or as 1 x 4."""
    from tests.support.tiny import made_model

    runs = []
    for size, accumulation in [(4, 1), (1, 4)]:
        trainer = made_trainer(
            made_model(tiny_tokenizer),
            tiny_tokenizer,
            tmp_path,
            loss_on,
            context,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append((training_lines(trainer), dict(trainer.model.named_parameters())))
    (whole, weights), (cut, cut_weights) = runs
    for a, b in zip(whole, cut, strict=True):
        segments = {key for key in a if key.startswith("loss_")}
        assert segments
        for key in (*segments, "loss", "grad_norm", "trained_tokens", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=EQUAL), key
    untrained = dict(made_model(tiny_tokenizer).named_parameters())
    assert not any(torch.equal(weight, untrained[name]) for name, weight in weights.items())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, cut_weights[name], rtol=EQUAL, atol=EQUAL)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("loss_on", LOSSES, ids=str)
def test_loss_is_the_weighted_mean_over_the_whole_step(
    loss_on: Any, tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """The first logged loss is Σ wₜ·NLLₜ / Σ wₜ, computed here row by row from whole logits."""
    by_segment = {
        "completion": [0, 1, 1, 1, 1],
        "key": [0, 0, 1, 1, 1],
        "answer": [0, 0, 0, 1, 0],
    }
    weights = torch.tensor(by_segment.get(str(loss_on), [0, 0.05, 0.4, 0.4, 0.4]))
    rows = made_rows(len(tiny_tokenizer)).select(range(4))
    above = below = torch.tensor(0.0)
    for row, losses in zip(rows, direct_losses(tiny_model, rows), strict=True):
        row_weights = weights[torch.tensor(row["segment_ids"][1:])]
        above, below = above + (losses * row_weights).sum(), below + row_weights.sum()
    trainer = made_trainer(
        tiny_model,
        tiny_tokenizer,
        tmp_path,
        loss_on,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    assert training_lines(trainer)[0]["loss"] == pytest.approx((above / below).item(), rel=EQUAL)


class FocusedTrainer(KeyTrainer):
    """Trains the answer's tokens by how badly they are known, and nothing else."""

    def token_weights(self, segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return (segment_ids == Segment.ANSWER) * (1 - torch.exp(-losses))


@pytest.mark.usefixtures("in_float64")
def test_a_subclass_weighs_tokens_as_it_likes(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """The loss is Σ vₜ·NLLₜ / Σ wₜ: v is the method's, w is that of `loss_on`, over the step."""
    rows = made_rows(len(tiny_tokenizer)).select(range(4))
    above, below = torch.tensor(0.0), 0
    for row, losses in zip(rows, direct_losses(tiny_model, rows), strict=True):
        segments = torch.tensor(row["segment_ids"][1:])
        of_answer = losses[segments == Segment.ANSWER]
        above = above + (of_answer * (1 - torch.exp(-of_answer))).sum()
        below += int((segments >= Segment.ANSWER_TAG).sum())
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    args = config(tmp_path, **settings)
    trainer = FocusedTrainer(tiny_model, args, "key", tiny_tokenizer, rows, rows)
    trainer.train()
    assert training_lines(trainer)[0]["loss"] == pytest.approx((above / below).item(), rel=EQUAL)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_completion_equals_completion_only_loss_of_trl(
    loss: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """`loss_on: completion` takes the very steps of TRL's `completion_only_loss`; dft, too."""
    from tests.support.tiny import made_model

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = made_rows(len(tiny_tokenizer))
    masks = [[int(s > 0) for s in segments] for segments in rows["segment_ids"]]
    theirs = SFTTrainer(
        model=made_model(tiny_tokenizer),
        args=config(
            tmp_path, dataset_kwargs=None, completion_only_loss=True, loss_type=loss, **settings
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows["input_ids"], "completion_mask": masks}),
        processing_class=tiny_tokenizer,
    )
    theirs.train()
    model, args = made_model(tiny_tokenizer), config(tmp_path, **settings)
    ours = KeyTrainer(model, args, "completion", tiny_tokenizer, rows, rows, loss=loss)
    ours.train()
    for a, b in zip(training_lines(ours), training_lines(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=EQUAL)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=EQUAL)
    # The log's losses by segment stay nats, whatever is trained.
    assert training_lines(ours)[0]["loss_answer"] > 1


@pytest.mark.usefixtures("in_float64")
def test_a_log_line_holds_the_loss_of_each_trained_segment(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """Losses by segment and token counts come from the step's own forward pass."""
    rows = made_rows(len(tiny_tokenizer)).select(range(4))
    answer = torch.cat(
        [
            losses[torch.tensor(row["segment_ids"][1:]) == Segment.ANSWER]
            for row, losses in zip(rows, direct_losses(tiny_model, rows), strict=True)
        ]
    )
    trainer = made_trainer(
        tiny_model, tiny_tokenizer, tmp_path, per_device_train_batch_size=4, max_steps=1
    )
    trainer.train()
    line = training_lines(trainer)[0]
    assert line["loss_answer"] == pytest.approx(answer.mean().item(), rel=EQUAL)
    assert {key for key in line if key.startswith("loss_")} == {
        "loss_answer",
        "loss_answer_tag",
        "loss_end",
    }
    assert line["trained_tokens"] == sum(ANSWER_TOKENS[:4]) + 4 * 3
    assert line["tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("size", [1, 3, 7])
def test_validation_gives_every_segment_token_by_token(
    size: int, tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """Seven rows give the same losses in any batch size, the untrained segments included."""
    rows = made_rows(len(tiny_tokenizer)).select(range(7))
    segments = torch.cat([torch.tensor(row["segment_ids"][1:]) for row in rows])
    losses = torch.cat(direct_losses(tiny_model, rows))
    trainer = made_trainer(tiny_model, tiny_tokenizer, tmp_path, per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    for segment in Segment:
        expected = losses[segments == segment].mean().item()
        assert metrics[f"eval_loss_{segment.name.lower()}"] == pytest.approx(expected, rel=EQUAL)
    key = losses[segments >= Segment.ANSWER_TAG].mean().item()
    assert metrics["eval_loss"] == pytest.approx(key, rel=EQUAL)


@pytest.mark.usefixtures("in_float64")
def test_padding_by_the_end_of_turn_leaves_the_end_trained(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """The tokenizer pads with the end of turn, and each row's own end still counts."""
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    end = tiny_tokenizer.eos_token_id
    rows = made_rows(len(tiny_tokenizer)).map(
        lambda row: {"input_ids": [*row["input_ids"][:-1], end]}
    )
    args = config(tmp_path, per_device_train_batch_size=8, max_steps=1)
    trainer = KeyTrainer(tiny_model, args, "key", tiny_tokenizer, rows, rows)
    ends = [losses[-1] for losses in direct_losses(tiny_model, rows)]
    trainer.train()
    expected = torch.stack(ends).mean().item()
    assert training_lines(trainer)[0]["loss_end"] == pytest.approx(expected, rel=EQUAL)


def test_adapter_weights_stay_exact_on_a_4_bit_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """TRL rounds a 4-bit model's adapter to bfloat16; ours keeps each float32 entry."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.support.tiny import made_model

    made_model(tiny_tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(
        tmp_path / "m"
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    assert base.is_loaded_in_4bit
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer = made_trainer(model, tiny_tokenizer, tmp_path, per_device_train_batch_size=2)
    after = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert any(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.usefixtures("in_float64")
def test_token_losses_are_zero_where_nothing_is_labelled(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """`token_losses` gives `(B, T - 1)`, each at the place of the token before, 0 where ignored."""
    trainer = made_trainer(tiny_model, tiny_tokenizer, tmp_path)
    row = made_rows(len(tiny_tokenizer))[0]
    ids = torch.tensor([row["input_ids"]])
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    losses = token_losses(
        trainer.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    )
    expected = direct_losses(tiny_model, Dataset.from_list([row]))[0]
    assert losses.shape == (1, ids.shape[1] - 1)
    torch.testing.assert_close(losses[0, -2:].detach(), expected[-2:], rtol=EQUAL, atol=EQUAL)
    assert not losses[0, :-2].any()


@pytest.mark.usefixtures("in_float64")
def test_a_detached_stage_begins_with_the_exact_ones_losses(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The first step's losses and the validation losses are the same; the gradient isn't."""
    from tests.support.tiny import made_model

    lines, metrics = [], []
    for context in ("exact", "detached"):
        trainer = made_trainer(
            made_model(tiny_tokenizer),
            tiny_tokenizer,
            tmp_path,
            context=context,
            per_device_train_batch_size=4,
            max_steps=1,
        )
        metrics.append(trainer.evaluate())
        trainer.train()
        lines.append(training_lines(trainer)[0])
    exact, detached = lines
    assert exact.keys() == detached.keys()
    for key in exact.keys() - {"grad_norm"}:
        assert detached[key] == pytest.approx(exact[key], rel=EQUAL), key
    assert detached["grad_norm"] != pytest.approx(exact["grad_norm"], rel=1e-2)
    for key in metrics[0]:
        if "loss" in key:
            assert metrics[1][key] == pytest.approx(metrics[0][key], rel=EQUAL)


def test_batches_are_lengthened_as_the_settings_say(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """`pad_to_multiple_of` of the trainer's settings reaches the collator."""
    trainer = made_trainer(tiny_model, tiny_tokenizer, tmp_path, pad_to_multiple_of=64)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 64 == 0


def test_sums_by_segment_leave_padding_out() -> None:
    """Means come from each segment's own tokens; a segment without tokens has no mean."""
    losses = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.5, 7.0]])
    segments = torch.tensor([[1, 1, PADDING], [1, 3, PADDING]])
    assert segment_means(row_sums(losses, segments).sum(0)) == {"thinking": 2.0, "answer": 0.5}


def test_a_validation_tells_callbacks_of_each_batch(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """As transformers' own does: so the progress line says how far it is."""
    told: list[int] = []

    class Listener(TrainerCallback):
        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
        ) -> None:
            told.append(len(eval_dataloader))

    trainer = made_trainer(tiny_model, tiny_tokenizer, tmp_path, per_device_eval_batch_size=3)
    trainer.add_callback(Listener())
    trainer.evaluate()
    assert told == [3, 3, 3]  # seven rows
