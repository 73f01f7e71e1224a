"""Which segments a stage trains: the words of `loss_on`, and the weights that they stand for."""

import re
from collections.abc import Mapping
from typing import Any

from sftkey.errors import did_you_mean, shown
from sftkey.recipe.upstream import as_number

# The parts of a row, in the order of `data.response.Segment`, and the groups that name several.
SEGMENTS = ("prompt", "thinking", "answer_tag", "answer", "end")
GROUPS = {"completion": SEGMENTS[1:], "key": SEGMENTS[2:]}  # key: all after the thinking, Eq. 4


def loss_weights(loss_on: str | Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each segment in the loss, in the order of `SEGMENTS`.

    A group's weight goes to all of its segments; a segment that is named itself keeps its own.

    >>> loss_weights({"thinking": 0.1, "key": 1.0, "end": 2.0})
    {'prompt': 0.0, 'thinking': 0.1, 'answer_tag': 1.0, 'answer': 1.0, 'end': 2.0}
    """
    named = {loss_on: 1.0} if isinstance(loss_on, str) else loss_on
    weights = dict.fromkeys(SEGMENTS, 0.0)
    for group, segments in GROUPS.items():  # completion before key, which lies in it
        if group in named:
            weights |= dict.fromkeys(segments, float(named[group]))
    return weights | {name: float(named[name]) for name in SEGMENTS if name in named}


def annealed(
    loss_on: str | Mapping[str, float], anneal: Mapping[str, float] | None
) -> str | Mapping[str, float]:
    """Return the weights that a stage ends with: those of `loss_on`, but what `anneal` names.

    >>> annealed({"thinking": 1.0, "key": 1.0}, {"key": 5.0})
    {'thinking': 1.0, 'key': 5.0}
    """
    if not anneal:
        return loss_on
    return ({loss_on: 1.0} if isinstance(loss_on, str) else dict(loss_on)) | dict(anneal)


def trained_context(loss_on: str | Mapping[str, float]) -> list[str]:
    """Return the segments before the key that a loss trains."""
    weights = loss_weights(loss_on)
    return [name for name in SEGMENTS if weights[name] > 0 and name not in GROUPS["key"]]


def checked_loss_on(value: Any) -> Any:
    """Return a stage's `loss_on`, with numbers for weights."""
    words = ("completion", "key", "answer")
    if isinstance(value, str) and value in words:
        return value
    if not isinstance(value, dict):
        near = did_you_mean(value, words)
        raise ValueError(f"expected completion, key, answer or weights; got {shown(value)}{near}")
    known = (*SEGMENTS, *GROUPS)
    weights = {name: as_number(weight) for name, weight in value.items()}
    for name, weight in weights.items():
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"no segment or group has the name `{name}`{near}")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            got = shown(value[name])
            raise ValueError(f"expected 0 or a number above as weight of `{name}`; got {got}")
    if not any(weights.values()):
        raise ValueError(f"expected a weight above 0, else nothing is trained; got {shown(value)}")
    return {name: float(weight) for name, weight in weights.items()}


def checked_weights(value: Any) -> Any:
    """Return weights by segment or group, as numbers."""
    if not isinstance(value, dict):
        raise ValueError(f"expected weights by segment or group; got {shown(value)}")
    return checked_loss_on(value)


LOSSES = ("nll", "dft", "eaft")


def checked_loss(value: str) -> str:
    """Return a stage's `loss`."""
    if value in LOSSES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return value
    near = did_you_mean(value, LOSSES)
    raise ValueError(f"expected {', '.join(LOSSES)} or module:function; got {shown(value)}{near}")
