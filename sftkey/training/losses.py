"""Per-token losses, where the head runs on labelled positions only; their weights; a divergence."""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.func import functional_call
from torch.nn.functional import kl_div, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer import utils as trl_utils

from sftkey.data.labels import IGNORED
from sftkey.data.response import Segment
from sftkey.errors import RecipeError
from sftkey.files import text_hash
from sftkey.generation.generate import inferring
from sftkey.memory_plan.held import (
    BESIDE_LOGITS,
    NARROWEST_TILE,
    TILE_LOGITS,
    TILE_ROWS,
    WIDEST_TILE,
)
from sftkey.models.adapters import without_adapters
from sftkey.models.key_pass import key_adapters
from sftkey.recipe.schema import Recipe
from sftkey.training.detached import key_losses, read_context, refuse_other_caches

Context = Literal["exact", "detached", "frozen"]
Logits = Callable[[torch.Tensor], torch.Tensor]

Weighting = Callable[..., torch.Tensor]
NUM_LIKELIEST = 20  # tokens that an entropy is taken over
MOST_ENTROPY = 3.0  # nats of 20 tokens: ln 20, rounded


@dataclass(frozen=True)
class Beside:
    """What is computed of hidden states in the same pass as the losses."""

    # Takes hidden states `(n, H)` and the model's head, which gives their logits `(n, V)`; returns
    # `(n,)` values.
    compute: Callable[[torch.Tensor, Logits], torch.Tensor]
    places: torch.Tensor | None = None  # `(B, T)`, at which positions; None: where there is a label


def token_losses(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], context: Context = "exact"
) -> torch.Tensor:
    """Return the negative log-likelihood of every labelled token, in nats.

    It is one call of the model with a keyword, so that DDP, FSDP and PEFT see it as any other.

    Args:
        model: A causal language model that `add_token_losses` was given, wrapped or not.
        inputs: `input_ids` and `labels`, each `(B, T)`, and whatever else the model takes;
            `frozen` takes `key_starts`, `(B,)`. `beside` is a sequence of `Beside`.
        context: `detached`: what lies before the key is read without gradient; `frozen`: the
            model's key adapters act from `key_starts` on besides.

    Returns:
        `(B, T - 1)`: entry `t` belongs to the token at `t + 1`; 0 where its label is -100. For
        several key adapters `(N * B, T - 1)`: one copy of the batch behind another. With `beside`
        `(1 + n, …)`: the losses, and the values of each, at entry `t` those of position `t`.

    >>> add_token_losses(model)
    >>> ids = torch.tensor([[11, 12, 13, 14]])
    >>> labels = torch.tensor([[-100, -100, 13, 14]])
    >>> token_losses(model, {"input_ids": ids, "labels": labels}).shape
    torch.Size([1, 3])
    """
    losses: torch.Tensor = model(**inputs, token_losses=context)
    return losses


def joint_losses(
    model: torch.nn.Module, inputs: Sequence[dict[str, Any]], context: Context
) -> list[torch.Tensor]:
    """Return of each micro-batch what `token_losses` returns, but for rounding.

    Their contexts are read one after another, and all keys go through the model in one pass. The
    context is `detached` or `frozen`; `beside` stands in the first one's inputs.
    """
    first, *others = inputs
    losses: list[torch.Tensor] = model(**first, token_losses=context, others=others)
    return losses


def add_token_losses(model: PreTrainedModel, context: Context = "exact") -> None:
    """Teach a model the keyword `token_losses`; without it, the model does what it did.

    The head is TRL's: soft-capping, scaling and sharded weights are as it knows them.

    Args:
        model: The causal language model inside any wrapper.
        context: How the losses will be asked for.

    Raises:
        ModelError: The model keeps more of a context than keys and values; `exact` alone can
            have such a model.

    >>> add_token_losses(model)
    >>> ids = torch.tensor([[11, 12, 13, 14]])
    >>> model(input_ids=ids, labels=ids, token_losses="exact").shape
    torch.Size([1, 3])
    """
    if context != "exact":
        refuse_other_caches(model)
    trl_utils.add_fused_lm_head(model)
    fused = model.forward

    @wraps(type(model).forward)  # `generate` looks at the signature
    def forward(
        self: Any,
        *args: Any,
        token_losses: Context | None = None,
        others: Sequence[dict[str, Any]] | None = None,
        beside: Sequence[Beside] = (),
        **kwargs: Any,
    ) -> Any:
        if token_losses is None:
            return fused(*args, **kwargs)
        head = partial(_labelled_losses, self.base_model, fused, beside=beside)
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            head = partial(head, output_router_logits=False)  # of a loss that isn't ours
        if token_losses != "exact":
            kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT's
            read = [read_context(self, **_predicted(each)) for each in (kwargs, *(others or ()))]
            names = key_adapters(self) if "key_starts" in kwargs else []
            losses = [each[..., :-1] for each in key_losses(self, head, read, names)]
            return losses[0] if others is None else losses
        # Nothing reads a cache here, and beside one packed rows would see each other.
        return head(**_predicted({**kwargs, "use_cache": False}))[..., :-1]

    model.forward = types.MethodType(forward, model)


def _predicted(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs whose labels stand where they are predicted."""
    return {**inputs, "labels": pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)}


def _labelled_losses(
    backbone: torch.nn.Module,
    fused: Callable[..., Any],
    labels: torch.Tensor,
    beside: Sequence[Beside] = (),
    **inputs: Any,
) -> torch.Tensor:
    """Run the model and score the labels; positions without one don't reach the head.

    Args:
        backbone: The model below its head.
        fused: The model's forward with TRL's head.
        labels: `(B, T)`, at each position the token that it predicts, or -100.
        beside: What else is computed of the hidden states.
        inputs: What the backbone takes.

    Returns:
        `(B, T)` losses; 0 where there is no label. With `beside` `(1 + n, B, T)`.
    """
    labelled = labels != IGNORED
    outputs: list[Any] = []

    def compact(module: torch.nn.Module, args: Any, output: Any) -> None:
        states = output.last_hidden_state
        outputs.append(type(output)(last_hidden_state=states))
        output.last_hidden_state = states[labelled.to(states.device)][None]

    inputs["fused_lm_head"] = True
    if not beside and trl_utils._use_triton(labels.device):  # TRL's own head leaves them out
        return -fused(**inputs, shift_labels=labels).log_probs
    hook = backbone.register_forward_hook(compact)
    try:
        with _tiles_for(int(labelled.sum()), labels.device):
            found = fused(**inputs, shift_labels=labels[labelled][None]).log_probs
    finally:
        hook.remove()
    losses = _scattered(-found, labelled)
    if not beside:
        return losses
    (output,) = outputs
    logits = partial(_own_logits, backbone, fused, type(output))
    values = [losses]
    for each in beside:
        places = labelled if each.places is None else each.places
        states = output.last_hidden_state[places.to(output.last_hidden_state.device)]
        values.append(_scattered(each.compute(states, logits).to(losses.dtype), places))
    return torch.stack(values)


def _scattered(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Put values where they belong, `(B, T)`; 0 elsewhere."""
    places = places.to(values.device)
    return values.new_zeros(places.shape).masked_scatter(places, values)


def _own_logits(
    backbone: torch.nn.Module, fused: Callable[..., Any], kind: type[Any], states: torch.Tensor
) -> torch.Tensor:
    """Return the logits `(n, V)` of hidden states `(n, H)`, as the model computes them.

    The model's own forward runs with a backbone that returns these states: scaling, soft-capping
    and an adapter on the head are as it knows them.
    """
    before = vars(backbone).get("forward")
    backbone.forward = lambda *args, **kwargs: kind(last_hidden_state=states[None])
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        logits: torch.Tensor = fused(input_ids=ids, use_cache=False).logits[0]
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
    return logits if logits.dtype == torch.float64 else logits.float()


def in_tiles(
    compute: Callable[..., torch.Tensor], num_logits: int, *rows: torch.Tensor
) -> torch.Tensor:
    """Call a function on a few rows at a time; what a tile computes is freed after it.

    Where gradients flow, the backward pass computes each tile anew.

    Args:
        compute: Takes a tile of each of `rows` and returns one value a row, `(n,)`.
        num_logits: What one row takes: a tile has so many rows that `BESIDE_LOGITS` hold them.
        rows: `(N, …)` each.
    """
    size = max(BESIDE_LOGITS // num_logits, 1)
    tiles = zip(*(each.split(size) for each in rows), strict=True)
    found = [checkpoint(compute, *tile, use_reentrant=False) for tile in tiles]
    return torch.cat(found)


@contextmanager
def _tiles_for(num_tokens: int, device: torch.device) -> Iterator[None]:
    """Narrow TRL's tiles of logits to what a CPU's cache holds; it looks at each call."""
    width = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if device.type == "cpu":
        rows = max(min(num_tokens, TILE_ROWS), 1)
        narrow = max(TILE_LOGITS // rows, NARROWEST_TILE)
        narrow = min(narrow, WIDEST_TILE)
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = narrow
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = width


def dft(segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return each token's probability, through which no gradient flows (arXiv 2508.05629)."""
    return torch.exp(-losses)


def eaft(segment_ids: torch.Tensor, losses: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Return how unsure the model is of each token, from 0 to 1 (arXiv 2601.02151).

    Where it is sure of another token, the data's hardly counts. As in LLaMA-Factory's
    `use_eaft_loss`, with its default alpha of 1: the entropy of the 20 likeliest tokens, over 3.
    """
    return entropies / MOST_ENTROPY


def likeliest_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy among the 20 likeliest tokens of logits `(n, V)`: `(n,)` nats.

    >>> likeliest_entropy(torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    tensor([0.6931, 0.1909])
    """
    top = logits.topk(min(NUM_LIKELIEST, logits.shape[-1])).values.log_softmax(-1)
    return -(top.exp() * top).sum(-1)


BUILT_IN: dict[str, Weighting | None] = {"nll": None, "dft": dft, "eaft": eaft}


def takes_entropies(weighting: Weighting | None) -> bool:
    """Tell whether a function has a parameter of the name `entropies`."""
    return weighting is not None and "entropies" in inspect.signature(weighting).parameters


def find_weighting(loss: str) -> Weighting | None:
    """Return the function of a stage's `loss`; None for `nll`, which weighs all alike.

    Args:
        loss: `nll`, `dft`, `eaft`, or `module:function`. The function takes the segment of each
            trained token, `(B, T - 1)`, -1 where none is trained, and the losses in nats,
            `(N, B, T - 1)`, without gradient; it returns factors of that shape, or of the
            segments'. A parameter `entropies` gets those of `likeliest_entropy`, shaped as the
            losses.

    >>> find_weighting("dft")(torch.tensor([[3]]), torch.tensor([[0.0]]))
    tensor([[1.]])
    """
    if loss in BUILT_IN:
        return BUILT_IN[loss]
    module, _, name = loss.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        hint = "its folder must be on PYTHONPATH, or be installed"
        raise RecipeError(f"loss: {loss}", f"expected a function; {error}", hint) from None
    if not callable(found):
        raise RecipeError(f"loss: {loss}", f"expected a function; got {type(found).__name__}")
    weighting: Weighting = found
    return weighting


def own_losses(recipe: Recipe) -> dict[str, str]:
    """Return the hash of each module that holds a function of a stage's `loss`, for the record."""
    found = {}
    for stage in recipe.stages:
        if stage.loss not in BUILT_IN:
            weighting = find_weighting(stage.loss)
            source = inspect.getsource(inspect.getmodule(weighting) or Any)
            found[stage.loss] = text_hash(source)
    return found


class _Calling(torch.nn.Module):
    """Calls a function; what it reads of the model can be replaced with `functional_call`."""

    def __init__(self, model: torch.nn.Module, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> torch.Tensor:
        return self.function(*args)


class StageStart:
    """A copy of what a stage trains, as the stage starts.

    Of a stage with adapters that is little; of one that trains all weights it is the whole model
    once more. Whatever isn't trained is read from the model itself, which isn't wrapped, and is
    before its first step and before a checkpoint is loaded.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, num_logits: int) -> None:
        self.model, self.num_logits = model, num_logits
        self.weights = {
            f"model.{name}": parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """Call a function while the model has the weights of the start, without dropout."""
        calling = _Calling(self.model, function)
        with inferring(self.model):
            found: torch.Tensor = functional_call(calling, self.weights, args)
        return found

    def divergence(self, inputs: Mapping[str, Any], segment_ids: torch.Tensor) -> Beside:
        """Return what computes KL(start ‖ now) where a token of the thinking is predicted, in nats.

        Over the whole vocabulary, a tile of positions at a time: of the start only hidden states
        are kept until then.
        """
        places = pad(thinking_targets(inputs, segment_ids), (0, 1))
        start = self.call(self._states, inputs, places)

        def compute(states: torch.Tensor, logits: Logits) -> torch.Tensor:
            return in_tiles(partial(self._divergence, logits), self.num_logits, states, start)

        return Beside(compute, places)

    def _states(self, inputs: Mapping[str, Any], places: torch.Tensor) -> torch.Tensor:
        base = without_adapters(self.model)
        read = {name: value for name, value in inputs.items() if name not in ("labels", "beside")}
        states: torch.Tensor = base.base_model(**read, use_cache=False).last_hidden_state
        return states[places.to(states.device)]

    def _divergence(self, logits: Logits, now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Return `(n,)` from hidden states `(n, H)` of both."""
        before = self.call(logits, start).log_softmax(-1)
        after = logits(now).log_softmax(-1)
        return kl_div(after, before, reduction="none", log_target=True).sum(-1)


def thinking_targets(inputs: Mapping[str, Any], segment_ids: torch.Tensor) -> torch.Tensor:
    """Tell which tokens belong to the thinking and have one before them in their row.

    Args:
        inputs: With `position_ids` where rows are packed.
        segment_ids: `(B, T)`.

    Returns:
        `(B, T - 1)`: entry `t` is of the token at `t + 1`.

    >>> thinking_targets({}, torch.tensor([[0, 1, 1, 2, 3, 4]]))
    tensor([[ True,  True, False, False, False]])
    """
    found = segment_ids[:, 1:] == Segment.THINKING
    if "position_ids" in inputs:
        found &= inputs["position_ids"][:, 1:] > 0
    return found
