"""Answers beyond a model's positions, and stages without a whole batch, are refused by `check`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sftkey.checks.gate import check_recipe
from sftkey.checks.rows import has_learned_positions
from sftkey.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        (
            "eval.max_new_tokens=100000",
            "positions",
            "eval.max_new_tokens: the model has 512 positions; got 100000 new tokens",
        ),
        (
            "trainer={dataloader_drop_last: true, per_device_train_batch_size: 25}",
            "no-batch",
            "stages.completion: expected at least 25 rows, a whole batch; got 24",
        ),
    ],
)
@pytest.mark.fault("settings that would hang or train nothing")
def test_what_could_not_be_done_is_refused_before_anything_starts(
    override: str, code: str, message: str, tiny_recipe: Callable[..., Path]
) -> None:
    """With the number that could."""
    found = check_recipe(load_recipe(tiny_recipe(), [override])).refusals
    assert [each.code for each in found] == [code] * len(found)
    assert found[0].message == message


def test_a_batch_that_is_just_whole_is_left(tiny_recipe: Callable[..., Path]) -> None:
    """As are answers as long as the positions."""
    batch = "trainer={dataloader_drop_last: true, per_device_train_batch_size: 24}"
    recipe = load_recipe(tiny_recipe(), [batch, "eval.max_new_tokens=512"])
    assert check_recipe(recipe).refusals == []


def test_rows_longer_than_learned_positions_are_refused(
    tiny_tokenizer: Any, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The first of them would end the training with an IndexError."""
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None}
    config = GPT2Config(n_positions=64, vocab_size=len(tiny_tokenizer), eos_token_id=2, **shape)
    for part in (GPT2LMHeadModel(config), tiny_tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    recipe = load_recipe(tiny_recipe(), [f"model.name_or_path={tmp_path / 'gpt2'}"])
    row = check_recipe(recipe).refusals[0]
    assert row.message.startswith("gpt2: it has learned 64 positions; the longest row has ")
    assert row.hint == "write data.max_length=64"


def test_learned_positions_are_told_from_rotary_ones(tiny_model: GPT2LMHeadModel) -> None:
    """A table of positions ends, and the question's tokens count too."""
    config = GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=1, vocab_size=64)
    assert has_learned_positions(GPT2LMHeadModel(config), 64)
    assert not has_learned_positions(tiny_model, 512)
