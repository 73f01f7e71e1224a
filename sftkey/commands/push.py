"""Put what a stage has trained on the hub."""

from __future__ import annotations

from pathlib import Path

from sftkey.sharing.stage import refuse_frozen, shared_stage


def push(
    folder: Path,
    repo: str,
    *,
    stage: str | None = None,
    private: bool = False,
    merged: bool = False,
) -> None:
    """Push adapter, tokenizer and card, and print the address of the commit.

    Args:
        folder: A run folder.
        repo: `owner/name`; made if there is none.
        stage: A trained stage; default the last one that is trained.
        private: Make it a private repository.
        merged: Push the merged model.

    Raises:
        SFTKeyError: The stage isn't trained or can't be merged, or the hub doesn't take it.
    """
    shared = shared_stage(folder, stage, "push")
    if merged:
        refuse_frozen(shared)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.sharing.push import push as pushed

    print(pushed(shared, repo, private=private, merged=merged))
