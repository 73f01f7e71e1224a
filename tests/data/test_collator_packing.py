import doctest
import json
import random
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from sftkey.data import collator as module
from sftkey.data.collator import KeyCollator, pack_counts, pack_rows
from sftkey.data.response import Segment
from sftkey.errors import DataError, ModelError
from sftkey.training import stage_model as packs_module
from sftkey.training.log import read_log
from sftkey.training.losses import add_token_losses, token_losses
from sftkey.training.stage_model import refuse_mixed_rows
from sftkey.training.trainer import GroupedByLength, KeyTrainer
from tests.support.models import EQUAL, VOCABULARY, made_family, plain_losses, with_lora
from tests.support.tiny import made_model
from tests.training.test_run import Killed, done, kill_at_step
from tests.training.test_trainer import config, made_rows, training_lines

EVERYTHING = {"prompt": 0.5, "thinking": 0.25, "key": 1.0}  # the first token of a row has a weight
CAPACITY = 80
MakeRecipe = Callable[..., Path]


def rows_of(vocabulary: int) -> Dataset:
    """Return eight rows of 11 to 77 tokens; every token is random, the first one too."""
    return made_rows(vocabulary)


def packed_batch(vocabulary: int, **settings: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Pack the eight rows; give the packs and their batch for the key trainer."""
    packs = list(pack_rows(rows_of(vocabulary), CAPACITY))
    collate = KeyCollator(0, EVERYTHING, for_key_trainer=True, **settings)
    return packs, collate(packs)


def packed_against_alone(model: Any, **settings: Any) -> float:
    """Return the largest distance of a token's loss packed from its loss in its row alone."""
    packs, batch = packed_batch(VOCABULARY, **settings)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
    add_token_losses(model)
    found = token_losses(model, inputs)
    if settings:  # one line holds all packs
        found, starts = found[0], torch.tensor([len(pack["input_ids"]) for pack in packs]).cumsum(0)
        lines = [found[start:] for start in [0, *starts.tolist()]]
    else:
        lines = list(found)
    distance, number = 0.0, 0
    for line, pack in zip(lines, packs, strict=False):
        start = 0
        for length in pack["seq_lengths"]:
            ids = torch.tensor([pack["input_ids"][start : start + length]])
            alone = plain_losses(model, {"input_ids": ids, "labels": ids})[0]
            packed = line[start : start + length - 1]
            distance = max(distance, (packed - alone).abs().max().item())
            start, number = start + length, number + 1
    assert number == 8
    return distance


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("name", "attention"),
    [*product(["llama", "qwen3", "gemma3"], ["sdpa", "eager"]), ("gemma2", "eager")],
)
def test_losses_packed_equal_those_of_the_rows_alone(name: str, attention: str) -> None:
    """On full and sliding windows, every token of every row, in several packs of a batch."""
    model = made_family(name, attn_implementation=attention)
    refuse_mixed_rows(model)
    assert packed_against_alone(model.train()) < EQUAL


@pytest.mark.usefixtures("in_float64")
def test_packs_in_one_line_have_the_same_losses() -> None:
    """Flash attention needs all packs of a batch in one line; the losses are the same there."""
    assert packed_batch(VOCABULARY, one_line=True)[1]["input_ids"].shape[0] == 1
    assert packed_against_alone(made_family("gemma3"), one_line=True) < EQUAL


@pytest.mark.usefixtures("in_float64")
def test_an_adapter_trains_on_the_same_losses(tmp_path: Path) -> None:
    """PEFT hands positions on."""
    model = with_lora("qwen3", tmp_path).eval()
    add_token_losses(model.get_base_model())
    _, batch = packed_batch(VOCABULARY)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
    found = token_losses(model, inputs)
    merged = model.merge_and_unload()
    assert (found - token_losses(merged, inputs)).abs().max() < EQUAL


def test_positions_that_run_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with rows alone fails where positions don't begin anew."""
    monkeypatch.setattr(
        "sftkey.data.collator._positions",
        lambda packs, length: torch.arange(length).expand(len(packs), length),
    )
    assert packed_against_alone(made_family("llama")) > 0.1


def test_the_first_token_of_a_row_is_no_label() -> None:
    """The last token of the row before it can't predict it, whatever weight its segment has."""
    packs, batch = packed_batch(VOCABULARY)
    assert any(len(pack["seq_lengths"]) > 1 for pack in packs)
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == -100).all()
    assert not batch["loss_weights"][first].any()
    inside = ~first & (batch["segment_ids"] >= 0)
    assert torch.equal(batch["labels"][inside], batch["input_ids"][inside])
    assert torch.equal(batch["loss_weights"] > 0, batch["labels"] != -100)


def test_no_row_is_cut_or_lost() -> None:
    """Packs hold every row whole, once, and tell which tokens are whose."""
    rows = rows_of(VOCABULARY)
    packs = pack_rows(rows, CAPACITY)
    found = []
    for pack in packs:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) <= CAPACITY
        ids, segments = iter(pack["input_ids"]), iter(pack["segment_ids"])
        for length in pack["seq_lengths"]:
            found.append(
                ([next(ids) for _ in range(length)], [next(segments) for _ in range(length)])
            )
    assert sorted(found) == sorted(zip(rows["input_ids"], rows["segment_ids"], strict=True))
    assert pack_counts(packs, CAPACITY) == {
        "rows": 8,
        "packs": len(packs),
        "tokens": sum(map(len, rows["input_ids"])),
        "max_length": CAPACITY,
        "filled": round(sum(map(len, rows["input_ids"])) / len(packs) / CAPACITY, 4),
    }
    assert pack_rows(rows, CAPACITY)[:] == packs[:]


def test_a_row_longer_than_a_pack_is_refused() -> None:
    """TRL's packer would cut its answer off without a word."""
    with pytest.raises(DataError) as raised:
        pack_rows(rows_of(VOCABULARY), 70)
    assert str(raised.value) == (
        "data.packing: expected rows of at most 70 tokens, which a pack holds; got one of 77"
    )


def test_rows_that_the_packer_loses_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packs are counted against the rows."""
    from trl import pack_dataset

    rows = rows_of(VOCABULARY)
    monkeypatch.setattr(
        "trl.pack_dataset",
        lambda r, *args, **kwargs: pack_dataset(r.select([0, 1]), *args, **kwargs),
    )
    with pytest.raises(DataError) as raised:
        pack_rows(rows, CAPACITY)
    first, total = (sum(map(len, rows["input_ids"][:count])) for count in (2, 8))
    assert str(raised.value) == (
        f"data.packing: expected 8 rows with {total} tokens in the packs; got 2 with {first}"
    )


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


def test_a_hybrid_model_is_refused() -> None:
    """Its states run on from row to row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "lfm2", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ModelError) as raised:
        refuse_mixed_rows(AutoModelForCausalLM.from_config(config))
    assert str(raised.value) == (
        "lfm2: rows of this model can't be packed: its layers carry more than keys and values on: "
        "LinearAttentionLayer\nhint: write data.packing: false"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_builds_no_mask_for_packs_is_refused(
    dtype: torch.dtype, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two short rows are tried, packed and alone."""
    model = made_model(tiny_tokenizer, initializer_range=0.3).to(dtype)
    refuse_mixed_rows(model)
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None
    )
    moved, tolerance = packs_module._moved(model)
    assert moved > 3 * tolerance
    with pytest.raises(ModelError) as raised:
        refuse_mixed_rows(model)
    assert str(raised.value) == (
        "llama: rows of this model can't be packed: with attn_implementation: sdpa "
        f"a row's tokens see the row before it (they move by {moved:.1%})\n"
        "hint: write data.packing: false"
    )
    refuse_mixed_rows(model, probe=False)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("loss_on", ["completion", EVERYTHING], ids=str)
def test_a_packed_step_equals_the_step_of_its_rows(
    loss_on: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Losses, losses by segment, counts and gradients of eight rows, packed and padded."""
    rows = rows_of(len(tiny_tokenizer))
    lines = []
    for train, size in ((rows, 8), (pack_rows(rows, CAPACITY), len(pack_rows(rows, CAPACITY)))):
        settings = config(tmp_path, max_steps=2, per_device_train_batch_size=size)
        trainer = KeyTrainer(
            made_model(tiny_tokenizer), settings, loss_on, tiny_tokenizer, train, rows
        )
        trainer.train()
        lines.append(training_lines(trainer))
    for padded, packed in zip(*lines, strict=True):
        segments = {key for key in padded if key.startswith("loss_")}
        for key in (*segments, "loss", "grad_norm", "trained_tokens", "tokens"):
            assert packed[key] == pytest.approx(padded[key], rel=EQUAL), key


TRAINER = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "num_train_epochs": 2,
}
STAGES = [
    {"name": "completion", "loss_on": "completion"},
    {"name": "key", "loss_on": "key", "context": "detached"},
]


def test_a_packed_stage_and_an_unpacked_one_go_in_one_recipe(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact stage reads packs, the detached one rows; steps, counts and lines say so."""
    run = done(tiny_recipe(trainer=TRAINER, stages=STAGES), tmp_path / "runs", "data.packing=true")
    counts = json.loads((run.ledger.folder / "data.json").read_text())["packing"]
    assert counts["rows"] == 24
    assert counts["tokens"] == sum(map(len, run.prepared.train["input_ids"]))
    assert [record.num_steps for record in run.ledger.stages] == [
        2 * -(-counts["packs"] // 2),
        24,
    ]
    assert f"24 rows in {counts['packs']} packs of at most 512 tokens, " in capsys.readouterr().err
    logs = [read_log(run.ledger.stage_folder(number) / "log.jsonl") for number in (0, 1)]
    assert [sum(line["tokens"] for line in log) for log in logs] == [2 * counts["tokens"]] * 2
    trained = sum(
        segment != Segment.PROMPT for row in run.prepared.train["segment_ids"] for segment in row
    )
    assert sum(line["trained_tokens"] for line in logs[0]) == 2 * trained


@pytest.mark.parametrize("packing", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_resumed_stage_meets_the_same_order(
    packing: str, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, and grouped by length, killed in its second epoch, with dropout: bit for bit."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    recipe = tiny_recipe(lora=lora, trainer=TRAINER | {"save_steps": 3}, stages=STAGES[:1])
    overrides = (f"data.packing={packing}", "data.max_length=200")
    whole = done(recipe, tmp_path / "whole", *overrides)
    steps = whole.ledger.stages[0].num_steps
    with monkeypatch.context() as patch:
        kill_at_step(patch, "completion", steps // 2 + 2)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "killed", *overrides)
    resumed = done(recipe, tmp_path / "killed", *overrides)
    logs = [read_log(run.ledger.stage_folder(0) / "log.jsonl") for run in (whole, resumed)]
    assert len(logs[0]) == steps
    assert [line["loss"] for line in logs[1]] == [line["loss"] for line in logs[0]]
    files = [run.ledger.adapter(0) / "adapter_model.safetensors" for run in (whole, resumed)]
    expected, got = map(load_file, files)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def lengths_of_batches(trainer: KeyTrainer) -> list[list[int]]:
    """Return the rows' lengths of each batch of an epoch."""
    return [(batch["segment_ids"] >= 0).sum(1).tolist() for batch in trainer.get_train_dataloader()]


def test_rows_of_a_batch_are_alike_in_length(
    tiny_recipe: MakeRecipe, tiny_model: Any, tmp_path: Path
) -> None:
    """Unpacked stages are grouped by length; packs, and whoever asks for it, in random order."""
    from sftkey.models.device import Device
    from sftkey.recipe.load import load_recipe
    from sftkey.training.stage import stage_arguments

    file = tiny_recipe(trainer={**TRAINER, "per_device_train_batch_size": 4}, stages=STAGES)
    device = Device("cpu", 0, torch.float32)

    def strategies(*overrides: str) -> list[str]:
        recipe = load_recipe(file, overrides)
        made = [stage_arguments(recipe, stage, device, tmp_path, True) for stage in recipe.stages]
        return [each.train_sampling_strategy for each in made]

    assert strategies() == ["group_by_length", "group_by_length"]
    assert strategies("data.packing=true") == ["random", "group_by_length"]
    assert strategies("trainer.train_sampling_strategy=random") == ["random", "random"]


def test_grouped_batches_have_little_padding(
    tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """Every row is read once an epoch, beside rows about as long, in another order each epoch."""
    dice = random.Random(0)
    lengths = [dice.randrange(4, 60) for _ in range(64)]
    rows = Dataset.from_dict(
        {"input_ids": [[5] * n for n in lengths], "segment_ids": [[3] * n for n in lengths]}
    )
    spread = {}
    for strategy in ("random", "group_by_length"):
        settings = config(tmp_path, train_sampling_strategy=strategy, per_device_train_batch_size=4)
        trainer = KeyTrainer(
            made_model(tiny_tokenizer), settings, "key", tiny_tokenizer, rows, rows
        )
        batches = lengths_of_batches(trainer)
        assert sorted(chain(*batches)) == sorted(lengths)
        spread[strategy] = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread["group_by_length"] < spread["random"] / 3
    epoch = 0
    sampler = GroupedByLength(lengths, 4, 7, lambda: epoch)
    first = list(sampler)
    torch.rand(3)  # as dropout would
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first
