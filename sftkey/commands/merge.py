"""Write what a stage has trained as a model folder."""

from __future__ import annotations

import sys
from pathlib import Path

from sftkey.sharing.stage import refuse_frozen, shared_stage


def merge(folder: Path, output: Path, stage: str | None = None) -> None:
    """Write a model folder that answers in other programs as the stage does in its run.

    The stage's adapter is merged into the unquantized base; a model that was trained whole is
    copied. The chat template and the generation config hold what the recipe says beside weights.

    Args:
        folder: A run folder.
        output: A new folder.
        stage: A trained stage; default the last one that is trained.

    Raises:
        SFTKeyError: The stage has no adapter that can be merged, or the merge failed.
    """
    shared = shared_stage(folder, stage)
    refuse_frozen(shared)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.sharing.merging import write_model

    found = write_model(shared.recipe, shared.weights, output)
    if found:
        print(
            f"{output}: {shared.weights} merged into {shared.recipe.model.name_or_path} in "
            f"{found.dtype}; on a probe the adapter changes logits by up to {found.effect:.3g}, "
            f"the merged model is within {found.distance:.3g} of it",
            file=sys.stderr,
        )
    print(output)
