"""Print a stage's model card."""

from __future__ import annotations

from pathlib import Path

from sftkey.sharing.stage import shared_stage


def card(folder: Path, stage: str | None = None) -> None:
    """Print the card that `sftkey push` would put on the hub.

    Args:
        folder: A run folder.
        stage: A trained stage; default the last one that is trained.

    Raises:
        RunError: The folder is no run, or the stage isn't trained.
    """
    shared = shared_stage(folder, stage, "describe")
    from sftkey.sharing.card import model_card

    print(model_card(shared), end="")
