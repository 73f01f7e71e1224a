import doctest
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftkey.data import labels as module
from sftkey.data.labels import PADDING, labels_for, weights_by_segment
from sftkey.data.response import Segment
from sftkey.recipe.loss_on import GROUPS, SEGMENTS

WEIGHTS = st.dictionaries(
    st.sampled_from([*SEGMENTS, *GROUPS]), st.sampled_from([0.0, 0.1, 1.0, 2.5]), min_size=1
)
LOSS_ON = st.sampled_from(["completion", "key", "answer"]) | WEIGHTS
ROWS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([PADDING, *Segment])), min_size=1, max_size=12
)


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


def test_names_are_the_recipes() -> None:
    """Recipe and labels speak of the same segments and groups."""
    assert tuple(segment.name.lower() for segment in Segment) == SEGMENTS
    assert set(module.GROUPS) == set(GROUPS)


@pytest.mark.parametrize(
    ("loss_on", "weights"),
    [
        ("completion", (0, 1, 1, 1, 1)),
        ("key", (0, 0, 1, 1, 1)),
        ("answer", (0, 0, 0, 1, 0)),
        ({"key": 1.0, "completion": 0.1}, (0, 0.1, 1, 1, 1)),
        ({"end": 0.0, "key": 2.0}, (0, 0, 2, 2, 0)),
        ({"prompt": 0.5}, (0.5, 0, 0, 0, 0)),
    ],
)
def test_weights_by_segment(loss_on: Any, weights: tuple[float, ...]) -> None:
    """A segment named itself wins over its group, and the key over the completion."""
    assert weights_by_segment(loss_on) == weights


def test_completion_and_key_of_a_row() -> None:
    """Stage 1 trains all but the prompt, stage 2 what follows the thinking: labels by hand."""
    ids = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17])
    segments = torch.tensor([0, 0, 1, 1, 2, 3, 2, 4])
    labels, weights = labels_for(ids, segments, "completion")
    assert labels.tolist() == [-100, -100, 12, 13, 14, 15, 16, 17]
    assert weights.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    labels, weights = labels_for(ids, segments, "key")
    assert labels.tolist() == [-100, -100, -100, -100, 14, 15, 16, 17]
    assert weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_end_of_turn_is_trained_though_it_is_the_pad_token() -> None:
    """With pad = end of turn = 2, the last real 2 is trained and the padding isn't."""
    ids = torch.tensor([[10, 13, 2, 2, 2]])
    segments = torch.tensor([[0, 3, 4, PADDING, PADDING]])
    labels, weights = labels_for(ids, segments, "key")
    assert labels.tolist() == [[-100, 13, 2, -100, -100]]
    assert weights.tolist() == [[0, 1, 1, 0, 0]]


@given(row=ROWS, loss_on=LOSS_ON)
def test_weight_is_zero_exactly_where_nothing_is_trained(row: Any, loss_on: Any) -> None:
    """Label and weight say the same of every token, each by its own segment alone."""
    ids, segments = (torch.tensor(column) for column in zip(*row, strict=True))
    labels, weights = labels_for(ids, segments, loss_on)
    table = weights_by_segment(loss_on)
    for place, (number, segment) in enumerate(row):
        weight = 0.0 if segment == PADDING else table[segment]
        assert weights[place] == torch.tensor(weight)
        assert labels[place] == (number if weight else -100)
    assert labels.dtype == torch.int64
    assert weights.dtype == torch.float32


@given(row=ROWS, loss_on=LOSS_ON)
def test_any_shape_gives_the_same(row: Any, loss_on: Any) -> None:
    """A batch is labelled row by row, and the inputs stay as they were."""
    ids, segments = (torch.tensor(column) for column in zip(*row, strict=True))
    batch = (torch.stack([ids, ids]), torch.stack([segments, segments]))
    kept = [tensor.clone() for tensor in batch]
    for one, both in zip(
        labels_for(ids, segments, loss_on), labels_for(*batch, loss_on), strict=True
    ):
        assert torch.equal(torch.stack([one, one]), both)
    assert all(torch.equal(a, b) for a, b in zip(kept, batch, strict=True))
