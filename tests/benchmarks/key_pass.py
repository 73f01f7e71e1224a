"""What one pass over the keys of an accumulated step saves beside a pass a micro-batch."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import Bar, Spread, alternate
from sides import Batch, Sides

from sftkey.data.collator import KeyCollator
from sftkey.recipe.schema import KEY_BATCH_TOKENS

ACCUMULATION = 8  # micro-batches of one row


def bars(
    sides: Sides, length: int, share: float, repeats: int, say: Callable[[dict[str, Any]], None]
) -> list[Bar]:
    """Measure both in turn on the same rows; count the passes with gradient of the joint step."""
    batch = Batch(ACCUMULATION, length, round(length * share))
    jobs = {
        name: partial(step, sides, batch, tokens)
        for name, tokens in (("pass a micro-batch", 1), ("one pass", KEY_BATCH_TOKENS))
    }
    losses = {name: job() for name, job in jobs.items()}
    one, joint = losses.values()
    assert abs(one - joint) < (2e-2 if sides.shape.quantized else 1e-4), losses
    num_passes = passes(sides, jobs["one pass"])
    seconds = alternate(jobs, repeats, sides.device)
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        say(
            {
                "method": f"detached, {name}",
                "rows": f"{ACCUMULATION} x 1",
                "tokens": batch.length,
                "key_tokens": batch.num_key,
                "seconds": round(spread.median, 4),
                "fastest": round(spread.least, 4),
                "slowest": round(spread.most, 4),
            }
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return [
        Bar("key_pass_once", statistics.median(ratios), 1.3),
        Bar("key_passes_a_step", num_passes, 1, at_most=True),
    ]


def step(sides: Sides, batch: Batch, tokens: int) -> float:
    """Take a whole step, and return its loss."""
    loss = gradients(sides, batch, tokens)
    trainer = sides.ours
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss


def gradients(sides: Sides, batch: Batch, tokens: int) -> float:
    """Go through the micro-batches of a step, handed out as transformers' trainer does."""
    trainer = sides.ours
    trainer.context, trainer.key_batch_tokens = "detached", tokens
    collate = KeyCollator(0, "key", for_key_trainer=True)
    rows = batch.rows(sides.shape.vocabulary)
    given = iter([collate([row]) for row in rows])
    batches, count = trainer.get_batch_samples(given, ACCUMULATION, trainer.args.device)
    losses = [trainer.training_step(trainer.model, each, count) for each in batches]
    return float(torch.stack(losses).sum())


def passes(sides: Sides, job: Callable[[], Any]) -> int:
    """Return how often a step runs the model below its head with gradient."""
    found = 0

    def passed(module: torch.nn.Module, args: Any) -> None:
        nonlocal found
        found += torch.is_grad_enabled()

    decoder = sides.ours.accelerator.unwrap_model(sides.ours.model).get_base_model().base_model
    hook = decoder.register_forward_pre_hook(passed)
    job()
    hook.remove()
    return found
