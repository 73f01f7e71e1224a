"""What becomes of settings that were reported to train wrongly, or to fail after hours.

    PYTHONPATH=. python tests/benchmarks/settings.py [RECIPE …]

Each is put into a recipe over a tiny model, made in-process, and `check` is asked: the table of
docs/reliability.md, one row a setting. Then the seconds that a rehearsal takes on each recipe.
"""

import argparse
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig

from sftkey.checks import rehearsal
from sftkey.checks.gate import check_recipe
from sftkey.models.facts import skeleton_of
from sftkey.recipe.load import load_recipe
from sftkey.training.run import read_rows
from tests.checks.test_rehearsal import NAMES, SOUND, refused
from tests.support.tiny import made_model, made_tokenizer, write_recipe

# As large as a model of 7 billion parameters.
WIDE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def table(recipe: Path) -> None:
    """Print a row for each setting: what it gives."""
    print("| setting | what `check` says |\n| --- | --- |")
    for override in (*SOUND, *NAMES):
        said = refused(recipe, override)
        notes = []
        if not said:
            findings = check_recipe(load_recipe(recipe, (override,))).findings
            notes = [each.message for each in findings]
        cell = "; ".join(said or notes) or "passes: one step, evaluation, save and reload are done"
        cell = cell.replace(str(recipe), "recipe.yaml").replace("|", "\\|")
        print(f"| `{override}` | {cell} |")


def seconds(file: Path) -> None:
    """Measure a rehearsal alone; the rows are read before."""
    recipe = load_recipe(file)
    prepared = read_rows(recipe)
    rehearsal._PASSED.clear()
    start = time.perf_counter()
    findings = list(rehearsal.rehearsal_findings(recipe, prepared, skeleton_of(recipe.model)))
    taken = time.perf_counter() - start
    print(f"{recipe.model.name_or_path}: {taken:.1f} s, {len(findings)} findings")


def main() -> None:
    """Print the table, and the seconds of each recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path)
    recipes = parser.parse_args().recipes
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), made_tokenizer()
        made_model(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        recipe = write_recipe(folder, folder / "model")
        table(recipe)
        wide = LlamaConfig(**WIDE, vocab_size=152064)  # no weights: none are read
        wide.save_pretrained(folder / "wide")
        tokenizer.save_pretrained(folder / "wide")
        (folder / "of-wide").mkdir()
        for each in [recipe, write_recipe(folder / "of-wide", folder / "wide"), *recipes]:
            seconds(each)


if __name__ == "__main__":
    main()
