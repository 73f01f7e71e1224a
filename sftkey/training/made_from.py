"""What a run was made from: its rows, as fingerprints in the run folder, and what computed it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from accelerate import PartialState

from sftkey.data.prepare import Prepared
from sftkey.data.response import Example
from sftkey.errors import Problem, RunError
from sftkey.files import read_json, text_hash, value_hash, write_json
from sftkey.models.device import Device
from sftkey.recipe.schema import Recipe
from sftkey.recipe.upstream import LIBRARIES
from sftkey.training.losses import own_losses
from sftkey.training.run_folder import ROWS, Ledger, put_back

ASKS = ("template", "tokenizer", "test")
TRAINS = ("train", "validation", "template", "tokenizer")
ALL = (*TRAINS, "test")
# Two tokenizers of one vocabulary cut something of it differently.
PROBE = "The 12,345.67  naïve ÉTUDES don't I'LL \n\n\tx² + 2=4; 日本語 🙂 <|x|> internationally"


def row_hashes(rows: Sequence[Example]) -> list[str]:
    """Return a hash of each row: its prompt, reasoning and answer, and its place in the source."""
    return [text_hash(repr((row.prompt, row.thinking, row.answer, *row.key)))[:16] for row in rows]


def made_from(recipe: Recipe, prepared: Prepared) -> dict[str, list[str]]:
    """Return hashes of the rows that train, validate and are asked, of template and tokenizer.

    Of the tokenizer they are of its vocabulary and of what it makes of a text: its file may be
    written otherwise by another version of its library.
    """
    tokenizer = prepared.renderer.tokenizer
    template, vocabulary = tokenizer.chat_template, sorted(tokenizer.get_vocab().items())
    tokens = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return {
        "train": row_hashes(prepared.train_examples),
        "validation": row_hashes(prepared.validation_examples),
        "test": row_hashes(prepared.questions(recipe)),
        "template": [text_hash(repr(template))[:16]],
        "tokenizer": [text_hash(repr((vocabulary, tokens)))[:16]],
    }


def fingerprints(rows: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of each split's rows, from what `made_from` returns."""
    return {name: value_hash(each) for name, each in rows.items()}


def require_same_rows(ledger: Ledger, prepared: Prepared, splits: Collection[str]) -> None:
    """Refuse other rows than those that the run has used; note those that it begins to use."""
    now = made_from(ledger.recipe, prepared)
    hashes = fingerprints(now)
    answered = any((ledger.folder / "evaluation").glob("[!.]*.json*"))
    written = ("checkpoints/checkpoint-*", "thinkings.*")  # steps that would be lost
    begun = any(record.status == "trained" for record in ledger.stages) or any(
        any(ledger.folder.glob(f"stages/*/{each}")) for each in written
    )
    used = dict.fromkeys(TRAINS, begun) | {"test": answered}
    differing = [
        name
        for name in splits
        if used[name] and ledger.rows.get(name, hashes[name]) != hashes[name]
    ]
    if differing:
        raise _other_rows(ledger, now, differing)
    noted = [name for name in splits if ledger.rows.get(name) != hashes[name]]
    if noted:
        before = _kept(ledger)
        write_json(ledger.folder / ROWS, before | {name: now[name] for name in noted})
        ledger.rows |= {name: hashes[name] for name in noted}
        ledger.save()


def _kept(ledger: Ledger) -> dict[str, list[str]]:
    """Read the hashes row by row, where they are those of the ledger; they only make the counts."""
    try:
        kept = read_json(ledger.folder / ROWS)
    except RunError:
        return {}
    whole = {name for name, each in fingerprints(kept).items() if ledger.rows.get(name) == each}
    return {name: rows for name, rows in kept.items() if name in whole}


def _other_rows(ledger: Ledger, now: dict[str, list[str]], differing: list[str]) -> RunError:
    kept = _kept(ledger)
    problems = [Problem(name, _difference(name, kept.get(name), now[name])) for name in differing]
    hint = put_back(ledger.folder)
    if differing == ["test"]:
        hint = (
            f"put them back; or move {ledger.folder / 'evaluation'} aside: all stages then answer "
            "these questions"
        )
    return RunError(str(ledger.folder), problems, hint)


def _difference(name: str, before: list[str] | None, now: list[str]) -> str:
    if name in ("template", "tokenizer"):
        what = "chat template" if name == "template" else name
        return f"the {what} isn't the one that this run began with"
    if before is None:
        return "the rows aren't those that this run began with"
    num = max(len(before), len(now)) - (Counter(before) & Counter(now)).total()
    if not num:
        return "the same rows stand in another order than when this run began"
    rows = "1 row differs" if num == 1 else f"{num} rows differ"
    return f"{rows} from those that this run began with ({len(before)} then, {len(now)} now)"


# What a run's figures depend on beside its recipe, its rows and the versions of its libraries.
SURROUNDINGS = ("device", "compute_dtype", "world_size")
PACKAGES = ("sftkey", *LIBRARIES)


def surroundings(recipe: Recipe, device: Device) -> dict[str, Any]:
    """Return what a run's figures depend on beside its recipe, as the ledger keeps it."""
    return {
        "device": device.kind,
        "compute_dtype": str(device.compute_dtype).removeprefix("torch."),
        "world_size": PartialState().num_processes,
        "versions": {name: version(name) for name in PACKAGES},
        "own_losses": own_losses(recipe),
    }


def changed_facts(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say in a line which versions, device or number of processes a run goes on with."""
    was, are = ({**each, **each.get("versions", {})} for each in (before, now))
    differing = [
        f"{name} {was[name]} -> {are[name]}"
        for name in (*SURROUNDINGS, *PACKAGES)
        if name in was and was[name] != are[name]
    ]
    return [f"goes on in other surroundings: {', '.join(differing)}"] if differing else []


def rounded_by(facts: dict[str, Any], batch_rows: int) -> dict[str, Any]:
    """Return what decides how losses are rounded that were read in batches of so many rows."""
    return {"rows": batch_rows, **{name: facts.get(name) for name in (*SURROUNDINGS, "versions")}}
