"""Healthy frozen stages of the demo's model in bfloat16 start; with a fault in them they don't.

    PYTHONPATH=. python tests/benchmarks/frozen_starts.py [--seeds 10] [--steps 20] [KEY=VALUE ...]

Each seed trains a first stage and measures the start of a frozen one, then tries the same start
with the first stage's adapter half as strong again, with the adapter of the seed before, and with a
key that is read one token too late or too early. A line of JSON a seed says how far the key's loss
behind the cache lay from the full pass, how far it might, and which faults were told.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sftkey.errors import RunError
from sftkey.evaluation.grading import grade
from sftkey.training import frozen, stage_model
from sftkey.training.run import Run, start
from tests.training.test_frozen_start import scaled
from tests.whole.test_frozen_demo import up_to_the_key


def told(run: Run, owner: Any, name: str, fault: Callable[..., Any]) -> bool:
    """Tell whether the frozen stage is refused with a fault in place of a function."""
    again = start(run.recipe, run.ledger.folder, grade=grade)
    again.answers.asked = ()
    with mock.patch.object(owner, name, fault):
        try:
            list(again.stages())
        except RunError as error:
            return "expected" in str(error)
    return False


def loading(other: Path) -> Callable[..., Any]:
    """Return a `load_adapter` that takes another folder than it is told."""
    load = stage_model.load_adapter
    return lambda model, folder, *rest, **more: load(model, other, *rest, **more)


def figures(run: Run, before: Run | None) -> dict[str, Any]:
    """Return what one seed's start gave, healthy and with each fault."""
    behind, starts = run.ledger.stages[1].behind_cache, frozen.key_starts
    assert behind is not None
    faults = {"scaled": told(run, stage_model, "load_adapter", scaled)}
    if before is not None:
        faults["swapped"] = told(
            run, stage_model, "load_adapter", loading(before.ledger.adapter(0))
        )
    faults["late"] = told(run, frozen, "key_starts", lambda ids: starts(ids) + 1)
    faults["early"] = told(run, frozen, "key_starts", lambda ids: starts(ids) - 1)
    apart = abs(behind["loss"] - behind["full_pass"])
    return {"seed": run.recipe.seed, "apart": apart, "bound": behind["bound"], "told": faults}


def main() -> None:
    """Print a line a seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="of the first stage")
    parser.add_argument("overrides", nargs="*", help="laid over the recipe")
    given = parser.parse_args()
    before = None
    with tempfile.TemporaryDirectory() as folder:
        overrides = (f"trainer.max_steps={given.steps}", *given.overrides)
        for seed in range(given.seeds):
            since = time.monotonic()
            run = up_to_the_key(Path(folder), seed, *overrides)
            line = {**figures(run, before), "seconds": round(time.monotonic() - since, 1)}
            print(json.dumps(line), flush=True)
            before = run


if __name__ == "__main__":
    main()
