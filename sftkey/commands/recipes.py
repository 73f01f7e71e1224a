"""What is done with a recipe beside training it: list, copy, show its tokens, write its prompts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sftkey.commands.arguments import AsJSON, Overrides, RecipeArgument, RecipeOrRun
from sftkey.commands.terminal import WordConsole, say, stdout_console
from sftkey.errors import RecipeError
from sftkey.files import GIB
from sftkey.recipe.load import RECIPES, describe, load_recipe, recipe_files, short_name
from sftkey.recipe.yaml_io import write_new
from sftkey.training.run_folder import run_recipe

HOW_TO_PLAN = (
    "planned GPU memory: sftkey ls --plan, of models on this machine; "
    "of one recipe: sftkey check RECIPE --gpu 24GB --plan-only"
)
SPLITS = ("train", "validation", "test")


def ls(
    as_json: AsJSON = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Plan the GPU memory of recipes whose model is here.")
    ] = False,
) -> None:
    """List the recipes that come with sftkey."""
    files = list(recipe_files(RECIPES))
    rows = [describe(file, RECIPES) for file in files]
    if plan:
        for file, row in zip(files, rows, strict=True):
            row["planned_gib"] = planned_gib(file)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)
        if not plan:
            say(HOW_TO_PLAN)


def planned_gib(file: Path) -> float | None:
    """Plan a recipe's peak, and say so; None where its model isn't here, or isn't planned."""
    from sftkey.memory_plan.plan import peak_bytes

    peak = peak_bytes(load_recipe(file))
    if peak is None:
        return None
    say(f"{short_name(file, RECIPES)}: planned")
    return round(peak / GIB, 2)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the recipes as a table that no pipe cuts and no terminal breaks."""
    from sftkey.tables import FittedTable

    columns = ["model", "data", "method", "stages", "GPU memory"]
    columns += ["planned"] if any("planned_gib" in row for row in rows) else []
    table = FittedTable("recipe", columns, left=True)
    for row in rows:
        memory = [
            "" if row[key] is None else f"{row[key]:g} GiB"
            for key in ("gpu_memory_gib", "planned_gib")
            if key in row
        ]
        stages = ", ".join(row["stages"])
        table.add([row["recipe"], row["model"], row["data"], row["method"], stages, *memory])
    stdout_console().print(table)


def cp(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The copy; must be new.")],
) -> None:
    """Copy a recipe, to edit it."""
    name = load_recipe(recipe).name
    text = recipe.read_text(encoding="utf-8-sig")
    # The commands in its head then name the copy.
    write_new(output, text.replace(f"recipes/{short_name(recipe)}.yaml", str(output)))
    print(f"{output}: written")
    what = f"its runs go into runs/{name}; write another `name` there to keep several"
    say(f"note: {what}")


def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
    as_json: AsJSON = False,
) -> None:
    """Show which tokens each stage trains."""
    checked = load_recipe(recipe, overrides or ())
    from sftkey.checks.recipe import not_verified
    from sftkey.data.prepare import prepare
    from sftkey.data.preview import preview_rows, rendered_rows, rendered_statistics, statistics
    from sftkey.models.facts import published_stops
    from sftkey.models.loading import load_tokenizer

    prepared = prepare(checked, load_tokenizer(checked.model))
    rows = preview_rows(checked, prepared, num_rows)
    numbers = rendered_statistics(statistics(checked, prepared))
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        WordConsole(stderr=True).print(numbers)
    else:
        console = stdout_console()
        console.print(rendered_rows(rows))
        console.print(numbers)
    for remark in prepared.remarks:
        say(f"note: {remark}")
    if not published_stops(checked.model)[1]:
        say(f"note: {not_verified(checked, prepared.renderer)}")


def prompts(
    target: RecipeOrRun,
    overrides: Overrides = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="train (default), validation or test (a run's default)."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="With this stage's own.hint in the prompts.")
    ] = None,
) -> None:
    """Write prompts as text and token ids, for another engine."""
    run = target.is_dir()
    if split not in (None, *SPLITS):
        raise RecipeError("--split", f"expected one of {', '.join(SPLITS)}; got {split!r}")
    if run and overrides:
        raise RecipeError(str(target), "a run's recipe can't be changed", "give a recipe's file")
    recipe = run_recipe(target) if run else load_recipe(target, overrides or ())
    named = {each.name: each for each in recipe.stages}
    if stage is not None and stage not in named:
        raise RecipeError("--stage", f"expected one of {', '.join(named)}; got {stage!r}")
    from sftkey.data.prepare import prepare
    from sftkey.models.loading import load_tokenizer
    from sftkey.training.own_thinking import with_hint

    prepared = prepare(recipe, load_tokenizer(recipe.model))
    rows = {
        "train": prepared.train_examples,
        "validation": prepared.validation_examples,
        "test": prepared.questions(recipe) if run else prepared.test,
    }[split or ("test" if run else "train")]
    hinted = stage is not None and named[stage].own_thinking.hint
    for example in rows:
        asked = (with_hint(example) if hinted else example).prompt
        row = {
            "index": example.index,
            "turn": example.turn,
            "prompt": prepared.renderer.prompt_text(asked),
            "prompt_ids": prepared.renderer.prompt_ids(asked),
        }
        print(json.dumps(row, ensure_ascii=False))
