"""What many rows cost: from a file to rows that are checked, and the three proofs of each row.

    python tests/benchmarks/rows_at_scale.py [--rows 200000] [--repeats 1]
    python tests/benchmarks/rows_at_scale.py --proofs [--rows 40000] [--repeats 3]

The first compares what `check` does with all rows of a file, and does again where they lie in the
cache, with the tokenizer's own call on the same texts. The second compares making the rows of
`data.source: made` with making them unproven: that a prompt is what the template writes for its
row, that a row comes back, that nothing it says is ignored. Each side is a process of its own, in
turn, with an empty cache. Processor time counts beside the clock's: other programs don't slow it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from measuring import Bar

NUM_ROWS = 200_000
NUM_AT_ONCE = 1000  # texts of one call of the tokenizer
TOKENIZER, ROWS = "tokenizer", "rows.jsonl"
Job = Callable[[], Any]


def make(folder: Path, num_rows: int) -> None:
    """Write rows of GSM8K's length and a tokenizer trained on them, with a model's config."""
    import tokenizing

    examples = tokenizing.made_examples(num_rows)
    tokenizer = tokenizing.made_tokenizer(examples[:1000])
    tokenizer.save_pretrained(folder / TOKENIZER)
    config = {"model_type": "llama", "vocab_size": len(tokenizer)}
    (folder / TOKENIZER / "config.json").write_text(json.dumps(config))
    with (folder / ROWS).open("w") as file:
        for each in examples:
            row = {"prompt": each.prompt, "thinking": each.thinking, "answer": each.answer}
            file.write(json.dumps(row) + "\n")


def recipe_of(folder: Path, source: dict[str, Any]) -> Any:
    """Return a recipe of two stages over the rows."""
    from sftkey.recipe.schema import Recipe

    return Recipe(
        name="rows",
        model={"name_or_path": str(folder / TOKENIZER), "quantization": "none"},
        lora={"r": 8},
        data={"max_length": 1024, "overlap": "drop", **source},
        trainer={"learning_rate": 1e-4},
        stages=[{"name": name, "loss_on": name} for name in ("completion", "key")],
        eval={"num_questions": 1, "max_new_tokens": 64, "grader": "number"},
    )


def call(folder: Path, num_rows: int) -> Job:
    """Return the tokenizer's own call on the texts of all rows."""
    from sftkey.data.splits import load_splits
    from sftkey.data.tokenization import _write

    recipe, renderer = framed(folder, {"source": str(folder / ROWS)})
    written = (_write(each, renderer) for each in load_splits(recipe.data, 0).train)
    texts = [text.prompt + text.rest for text in written]  # type: ignore[union-attr]
    assert len(texts) == num_rows

    def tokenize_all() -> None:
        for start in range(0, num_rows, NUM_AT_ONCE):
            renderer.tokenizer(texts[start : start + NUM_AT_ONCE])

    return tokenize_all


def framed(folder: Path, source: dict[str, Any]) -> tuple[Any, Any]:
    """Return a recipe with its renderer."""
    from sftkey.data.renderer import Renderer
    from sftkey.models.loading import load_tokenizer

    recipe = recipe_of(folder, source)
    return recipe, Renderer.read(load_tokenizer(recipe.model), recipe.response)


def check(folder: Path, num_rows: int) -> Job:
    """Return what the gate does with all rows, reading them included."""
    from sftkey.checks.gate import unreadable_answers
    from sftkey.checks.masks import read_masks
    from sftkey.data.prepare import prepare_splits
    from sftkey.data.splits import load_splits

    recipe, renderer = framed(folder, {"source": str(folder / ROWS)})

    def check_all() -> None:
        prepared = prepare_splits(recipe, load_splits(recipe.data, 0), renderer)
        assert len(prepared.train) == num_rows
        assert not read_masks(recipe, renderer, prepared.train).faults
        assert not unreadable_answers(recipe, prepared)

    return check_all


def tokenized(folder: Path, num_rows: int, proven: bool) -> Job:
    """Return the making of the made source's rows, with the three proofs of each or without."""
    from sftkey.data.row_cache import tokenized_rows
    from sftkey.data.splits import load_splits

    made = {"source": "made", "task": "orders", "num_rows": num_rows}
    recipe, renderer = framed(folder, made)
    examples = load_splits(recipe.data, 0).train

    def make_rows() -> None:
        with ExitStack() as unproven:
            for name, stand_in in UNPROVEN.items() if not proven else ():
                unproven.enter_context(mock.patch(f"sftkey.data.{name}", stand_in))
            assert len(tokenized_rows(examples, renderer, 1024, trim=False)[0]) == num_rows

    return make_rows


def _render_alone(habits: Any, messages: Any) -> str:
    from sftkey.data.template import render

    return render(habits.tokenizer, messages, habits.kwargs)


UNPROVEN: dict[str, Any] = {
    "renderer.Renderer._check_header": lambda *_: None,
    "renderer.render_prompt": _render_alone,
    "tokenization.change_of": lambda *_: None,
}
SIDES: dict[str, Callable[[Path, int], Job]] = {
    "call": call,
    "check": check,
    "again": check,  # the rows lie in the cache
    "proven": lambda folder, num_rows: tokenized(folder, num_rows, True),
    "unproven": lambda folder, num_rows: tokenized(folder, num_rows, False),
}


def measured(side: str, folder: Path, num_rows: int) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(folder), "--rows", str(num_rows)]
    env = {**os.environ, "SFTKEY_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(side: str, folder: Path, num_rows: int) -> dict[str, float]:
    """Measure one side in this process, from where its modules are imported."""
    job = SIDES[side](folder, num_rows)
    clock, processor = time.perf_counter(), time.process_time()
    job()
    return {
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def rounds(sides: tuple[str, ...], num_rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure sides in turn, every round with an empty cache."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), num_rows if "call" in sides else NUM_AT_ONCE)
            found = {}
            for side in sides:
                if side != "again":
                    shutil.rmtree(f"{folder}/cache", ignore_errors=True)
                found[side] = measured(side, Path(folder), num_rows)
                print(side, {name: round(it, 2) for name, it in found[side].items()}, flush=True)
            yield found


def ratio(found: list[dict[str, Any]], above: str, below: str, what: str) -> float:
    """Return the median of the rounds' own ratios."""
    return statistics.median(each[above][what] / each[below][what] for each in found)


def bars(num_rows: int, repeats: int) -> list[Bar]:
    """Take the bars of a large file."""
    found = list(rounds(("call", "check", "again"), num_rows, repeats))
    return [
        Bar("rows_200k", ratio(found, "check", "call", "seconds"), 1.5, at_most=True),
        Bar("rows_200k_gib", max(each["check"]["peak_gib"] for each in found), 2.0, at_most=True),
        Bar("rows_200k_again", max(each["again"]["seconds"] for each in found), 10.0, at_most=True),
    ]


def proof_bars(num_rows: int, repeats: int) -> list[Bar]:
    """Take the bar of the proofs: processor time, since both sides do the same in threads."""
    found = list(rounds(("unproven", "proven"), num_rows, repeats))
    cost = ratio(found, "proven", "unproven", "processor_seconds")
    return [Bar("proofs_over_tokenization", cost, 1.3, at_most=True)]


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--proofs", action="store_true", help="the three proofs of each row")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # one side, one process
    arguments = parser.parse_args()
    if arguments.side:
        side, folder = arguments.side
        print(json.dumps(run(side, Path(folder), arguments.rows)))
        return
    if arguments.proofs:
        print(*proof_bars(arguments.rows or 40_000, arguments.repeats), sep="\n")
    else:
        print(*bars(arguments.rows or NUM_ROWS, arguments.repeats), sep="\n")


if __name__ == "__main__":
    main()
