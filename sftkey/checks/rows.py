"""What the gate reads off the rows as texts: those left out, and those that lose something."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftkey.checks.findings import Finding, of_rows
from sftkey.data.refused import left_out, numbered
from sftkey.data.renderer import Renderer, ids_set_before
from sftkey.data.template import THINK_TAG, reads_of
from sftkey.data.tokenization import DROPS_THINKING
from sftkey.recipe.schema import DataSection

SAME_PROMPT = (
    "inference gets the same prompt; give a model.chat_template that keeps it, if it counts"
)


def lenient(data: DataSection) -> DataSection:
    """Drop where the recipe says error, so that all that is wrong comes to light at once."""
    too_long = "drop" if data.too_long == "error" else data.too_long
    return data.model_copy(update={"unsplit_rows": "drop", "overlap": "drop", "too_long": too_long})


def dropped_findings(data: DataSection, dropped: Mapping[str, Any]) -> Iterator[Finding]:
    """Find the rows that are left out; they refuse the recipe if it doesn't allow it.

    Args:
        data: The recipe's section.
        dropped: By "split: reason", as `Prepared.counts` has them.
    """
    for each in left_out(data, dropped):
        message = f"{each.split}: {each.what}"
        yield Finding(each.code, each.rows, message, each.hint, each.hint is not None)


def empty_findings(rows: Mapping[str, Sequence[int]]) -> Iterator[Finding]:
    """Find the rows that are trained with an empty thinking, few enough to be let through."""
    for split, numbers in rows.items():
        hint = "data.empty_thinking: drop leaves these rows out"
        what = f"{split}: the thinking is empty"
        yield of_rows("empty-thinking", what, numbers, hint, refuses=False)


def frame_findings(renderer: Renderer) -> Iterator[Finding]:
    """Find thinking that the template writes beside the response's own, and a begin that lacks."""
    yield from _begin_findings(renderer)
    if not THINK_TAG.search(renderer.assistant_prefix):
        return
    opening = "<think>\n" if "<think>" in renderer.assistant_prefix else ""
    native = f"response.thinking: {json.dumps([opening, chr(10) + '</think>'])}"
    switch = "model.chat_template_kwargs: {enable_thinking: false}; or "
    knows = "enable_thinking" in reads_of(renderer.tokenizer).variables
    yield Finding(
        "template-inserts",
        (),
        f"the chat template inserts {renderer.assistant_prefix!r} before every answer, beside the "
        "response's own thinking",
        f"{switch if knows else ''}the template's own tags, {native}",
    )


def _begin_findings(renderer: Renderer) -> Iterator[Finding]:
    """Note a template without the token that the tokenizer sets before every other text."""
    begin = renderer.tokenizer.bos_token_id
    if renderer.kind == "plain" or begin not in ids_set_before(renderer.tokenizer):
        return
    if begin not in renderer.prompt_ids("Q"):
        token = renderer.tokenizer.bos_token
        what = f"the chat template doesn't begin with {token!r}, which the tokenizer sets before "
        hint = "inference gets the same prompt; write it into a model.chat_template, if it counts"
        yield Finding("no-begin", (), f"{what}a text by itself", hint, refuses=False)


def noted_findings(noted: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what rows lose that are trained all the same.

    Args:
        noted: By "split: what", as `Prepared.counts` has them.
    """
    for where, counted in noted.items():
        drops = where.endswith(DROPS_THINKING)
        shown = "; ".join(counted.get("examples", ()))
        message = f"{where}: {numbered(counted['rows'], counted['count'])}"
        yield Finding(
            "template-drops-thinking" if drops else "changed",
            tuple(counted["rows"]),
            f"{message}; {shown}" if shown else message,
            SAME_PROMPT if drops else "it is trained as it stands in `sftkey show`",
            refuses=False,
        )
