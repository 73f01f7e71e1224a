"""What each stage trains, token by token, read off the batch that the collator really makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from sftkey.data.collator import KeyCollator
from sftkey.data.labels import IGNORED, weights_by_segment
from sftkey.data.prepare import Prepared
from sftkey.data.response import Example, Segment, decoded
from sftkey.data.sources import with_defaults
from sftkey.data.tokenization import Refusal, Row, tokenize
from sftkey.recipe.schema import Recipe
from sftkey.tables import FittedTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


COLOURS = {
    "PROMPT": "blue",
    "THINKING": "yellow",
    "ANSWER_TAG": "magenta",
    "ANSWER": "green",
    "END": "red",
}


def preview_rows(recipe: Recipe, prepared: Prepared, num_rows: int) -> list[dict[str, Any]]:
    """Return the first rows in source order, with every token and its weight in each stage.

    Test rows are shown as they would be trained on, though no stage does.

    Returns:
        For each row `index`, `split` and `tokens`: `id`, `text`, `segment` (its name) and
        `trained` (the weight in each stage, 0 where untrained); the texts joined are the row's
        text. A refused row has `refused`, the reason, instead of tokens.
    """
    entries, rows = [], []
    for index, split, row in _first_rows(recipe, prepared, num_rows):
        entry: dict[str, Any] = {"index": index, "split": split}
        if isinstance(row, Refusal):
            entry["refused"] = row.reason
        else:
            rows.append(row)
        entries.append(entry)
    tokens = iter(row_tokens(rows, recipe, prepared.renderer.tokenizer))
    return [each if "refused" in each else each | {"tokens": next(tokens)} for each in entries]


def _first_rows(
    recipe: Recipe, prepared: Prepared, num_rows: int
) -> list[tuple[int, str, Row | Refusal]]:
    """Return index, split and row in source order; a split of its own source follows train's."""
    data = with_defaults(recipe.data)
    datasets = {"train": prepared.train, "validation": prepared.validation}
    found: list[tuple[int, str, Any]] = []
    for name, dataset in datasets.items():
        if dataset is not None:
            found += [(index, name, place) for place, index in enumerate(dataset["index"])]
    found += [(example.index, "test", example) for example in prepared.test]
    found += [(row.index, row.split, row) for row in _refused(prepared)]
    ranks = {
        name: rank if isinstance(getattr(data, name), str) else 0
        for rank, name in enumerate(("train", "validation", "test"))
    }
    found.sort(key=lambda row: (ranks[row[1]], row[0]))
    rows: list[tuple[int, str, Row | Refusal]] = []
    for index, split, what in found[:num_rows]:
        if isinstance(what, int):
            what = Row(**datasets[split][what])
        elif isinstance(what, Example):
            (what,) = tokenize([what], prepared.renderer)
        rows.append((index, split, what))
    return rows


def _refused(prepared: Prepared) -> list[Refusal]:
    """Return the refused rows: all that the tokenizer refused, the first 20 that the splits did."""
    refused = list(prepared.refusals)
    known = {(row.split, row.index) for row in refused}
    for where, counted in prepared.counts["dropped"].items():
        split, _, reason = where.partition(": ")
        refused += [
            Refusal(index, reason, counted["code"], split)
            for index in counted["rows"]
            if (split, index) not in known
        ]
    return refused


def row_tokens(
    rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[list[dict[str, Any]]]:
    """Collate rows for each stage, and read segments and weights off the batches.

    Returns:
        The `tokens` of `preview_rows` for each row.
    """
    if not rows:
        return []
    batches = {
        stage.name: KeyCollator(0, stage.loss_on, for_key_trainer=True)([vars(r) for r in rows])
        for stage in recipe.stages
    }
    weights = {
        name: (batch["loss_weights"] * (batch["labels"] != IGNORED)).tolist()
        for name, batch in batches.items()
    }
    batch = next(iter(batches.values()))
    ids, segments = batch["input_ids"].tolist(), batch["segment_ids"].tolist()
    shown = []
    for place, row in enumerate(rows):
        tokens = [
            {
                "id": ids[place][n],
                "text": text,
                "segment": Segment(segments[place][n]).name,
                "trained": {name: round(weights[name][place][n], 6) for name in batches},
            }
            for n, text in enumerate(token_texts(tokenizer, row.input_ids))
        ]
        shown.append(tokens)
    return shown


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to a row; joined, they are the decoded row.

    A character of several tokens stands at the last of them; the others add nothing.
    """
    texts, start, done = [], 0, 0  # ids[start:done] give the context that ids[done:] decode in
    for stop in range(1, len(ids) + 1):
        before, after = (decoded(tokenizer, ids[start:end]) for end in (done, stop))
        whole = not after.endswith("\ufffd") or stop == len(ids)
        texts.append(after[len(before) :] if whole else "")
        if whole:
            start, done = done, stop
    return texts


def statistics(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Return rows, what was dropped and why, tokens, and what each stage's loss is made of.

    Returns:
        JSON: `rows` by split; `dropped` and `trimmed` by reason; `tokens` by split and segment;
        `loss_share` by stage and segment: the share of the weights in train, which add up to 1.
    """
    counts = prepared.counts
    tokens = counts["tokens"]["train"]
    share = {}
    for stage in recipe.stages:
        by_segment = weights_by_segment(stage.loss_on)
        weights = {segment.name: by_segment[segment] * tokens[segment.name] for segment in Segment}
        total = sum(weights.values())
        share[stage.name] = {name: weight / total for name, weight in weights.items()}
    return {
        "rows": {name: counts[name] for name in ("train", "validation", "test")},
        "dropped": counts["dropped"],
        "trimmed": counts["trimmed"],
        "tokens": counts["tokens"],
        "loss_share": share,
    }


def rendered_rows(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return rows for a terminal: a text a stage, coloured by segment, ⟦trained⟧ in brackets.

    The brackets and the weights in them say it where there are no colours.
    """
    parts: list[RenderableType] = [Text.assemble(*((f"{n} ", c) for n, c in COLOURS.items()))]
    for row in rows:
        parts.append(Text(f"\nrow {row['index']} ({row['split']})", style="bold"))
        if "refused" in row:
            parts.append(Text(f"refused: {row['refused']}", style="red"))
            continue
        for stage in row["tokens"][0]["trained"]:
            parts += [Text(f"stage {stage}:", style="underline"), _rendered(row["tokens"], stage)]
    return Group(*parts)


def _rendered(tokens: Sequence[Mapping[str, Any]], stage: str) -> Text:
    text = Text()
    for weight, run in groupby(tokens, key=lambda token: token["trained"][stage]):
        text.append("" if not weight else "⟦" if weight == 1 else f"⟦{weight:g}·", style="bold")
        for token in run:
            style = COLOURS[token["segment"]] + (" bold" if weight else " dim")
            text.append(token["text"].replace("\n", "⏎\n"), style=style)
        text.append("⟧" if weight else "", style="bold")
    return text


def rendered_statistics(numbers: Mapping[str, Any]) -> RenderableType:
    """Return the statistics for a terminal: rows, what was dropped, tokens, shares of the loss."""
    rows = ", ".join(f"{name} {count}" for name, count in numbers["rows"].items())
    lines = [Text(f"rows: {rows}")]
    for what in ("dropped", "trimmed"):
        for where, counted in numbers[what].items():
            split, _, reason = where.partition(": ")
            noun = "row" if counted["count"] == 1 else "rows"
            listed = list(map(str, counted["rows"]))
            listed += ["…"] * (counted["count"] > len(listed))
            line = f"{split}: {counted['count']} {noun} {what} ({', '.join(listed)}): {reason}"
            lines.append(Text(line, "yellow"))
    table = FittedTable("tokens", COLOURS)
    for split, tokens in numbers["tokens"].items():
        table.add([split, *(str(tokens[name]) for name in COLOURS)])
    for stage, share in numbers["loss_share"].items():
        table.add([f"loss of {stage}", *(f"{share[name]:.1%}" for name in COLOURS)])
    return Group(*lines, table)
