"""What a frozen key stage costs beside plain TRL's step, and a grid of eight beside one adapter."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from measuring import Bar, Spread, alternate
from models import adapted_model
from sides import Batch, Sides, tokenizer

from sftkey.models.adapters import add_lora
from sftkey.recipe.stages import KeyAdapterSpec
from sftkey.training.frozen import FrozenTrainer

GRID = 8  # learning rates


def bars(
    sides: Sides, batch: Batch, repeats: int, say: Callable[[dict[str, Any]], None]
) -> list[Bar]:
    """Measure plain TRL, one key adapter and a grid of eight in turn, on the same batch."""
    one, grid = trainer(sides, 1), trainer(sides, GRID)
    jobs: dict[str, Callable[[], Any]] = {
        "trl": partial(sides.step, "trl", batch),
        "frozen": partial(step, sides, one, batch),
        f"grid of {GRID}": partial(step, sides, grid, batch),
    }
    for job in jobs.values():
        job()
    seconds = alternate(jobs, repeats, sides.device)
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        say(
            {
                "method": name,
                "rows": batch.num_rows,
                "tokens": batch.length,
                "key_tokens": batch.num_key,
                "seconds": round(spread.median, 4),
                "fastest": round(spread.least, 4),
                "slowest": round(spread.most, 4),
            }
        )
    trl, frozen, eight = seconds.values()
    return [
        Bar("frozen_over_trl", _ratio(trl, frozen), 2.7),
        Bar("grid_of_8", _ratio(eight, frozen), 2.5, at_most=True),
    ]


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def trainer(sides: Sides, num_adapters: int) -> Any:
    """Make a frozen stage's trainer on the sides' model, whose adapter is the context's."""
    model: Any = adapted_model(sides.shape, sides.device)
    model.requires_grad_(False)
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    names = ["key"] if num_adapters == 1 else [f"key-{number}" for number in range(num_adapters)]
    members = [
        KeyAdapterSpec(name, {}, lora, sides.rate if name != "key" else None, 0) for name in names
    ]
    for member in members:
        model = add_lora(model, lora, 0, member.name)
    rows = Batch(1, 16, 4).rows(sides.shape.vocabulary)
    settings = {"args": sides.arguments(), "tokenizer": tokenizer(), "eval_dataset": rows}
    made = FrozenTrainer(members, model=model, loss_on="key", train_dataset=rows, **settings)
    return sides.ready(made)


def step(sides: Sides, made: Any, batch: Batch) -> None:
    """Take one whole step; new adapters do nothing yet, so that the loss is that of all others."""
    loss = sides.train(made, batch, "key") / len(made.members)
    sides.compare(batch, "key", loss)
