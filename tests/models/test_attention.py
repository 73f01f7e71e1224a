from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftkey.models.key_pass import GroupedAttention, shared_keys
from tests.support.models import EQUAL


def made_inputs(heads: int, groups: int) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """Make an attention layer's module, its queries, keys and values, and a mask."""
    dice = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups  # type: ignore[assignment]
    shapes = [(2, heads, 5, 8), (2, groups, 9, 8), (2, groups, 9, 8)]
    tensors = [torch.randn(shape, generator=dice).requires_grad_() for shape in shapes]
    mask = torch.rand(2, 1, 5, 9, generator=dice) > 0.3
    mask[0, 0, 0] = False  # a token that fills up a row
    return module, tensors, mask


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["mask", "float mask", "none", "mask of each head"])
def test_it_attends_as_transformers_does(heads: int, groups: int, kind: str) -> None:
    """Outputs and gradients equal those of repeated keys and values."""
    module, tensors, mask = made_inputs(heads, groups)
    masks = {
        "mask": mask,
        "float mask": torch.zeros(mask.shape).masked_fill(~mask, -1e4),
        "none": None,
        "mask of each head": mask.expand(-1, heads, -1, -1),
    }
    results = []
    for attend in (sdpa_attention_forward, GroupedAttention()):
        output, _ = attend(module, *tensors, masks[kind], scaling=0.3)
        weights = torch.linspace(0, 1, output.numel()).view_as(output)
        results.append([output, *torch.autograd.grad((output * weights).sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=EQUAL, atol=EQUAL)


def test_transformers_attention_is_back_afterwards() -> None:
    """Only the key's pass attends otherwise."""
    with shared_keys():
        assert isinstance(ALL_ATTENTION_FUNCTIONS["sdpa"], GroupedAttention)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
