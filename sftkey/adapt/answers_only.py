"""Rows of questions and short answers in which nothing can be a reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sftkey.adapt.columns import ABOUT, ANSWER, OPTIONS, RESPONSE, SYSTEM, THINKING, Table, plain
from sftkey.adapt.prompt import inside, prompt_of, single_options
from sftkey.adapt.readings import MOST_ANSWER, answer_columns, answer_fields, system_field
from sftkey.adapt.split import BOX, HAS_TAG, find_rule
from sftkey.checks.recipe import UNDECIDED
from sftkey.data.response import Response
from sftkey.training.own_thinking import NUM_PROBED

SENTENCES = re.compile(r"[.!?:;]\s+\S|\n")
# Numbers, names, dates, links, hashes: no blank and no script that writes without blanks.
WORD = re.compile(r"[!-~]*\Z")


def read_answers_only(table: Table) -> dict[str, Any] | None:
    """Return the fields that read prompt and answer, if no column can hold a reasoning.

    Args:
        table: All rows: a reasoning that only the last one holds is one.
    """
    prompt = prompt_of(table)
    if prompt is None or prompt.startswith(UNDECIDED):
        return None
    asked = re.findall(r"\{([^{}:]+)[:}]", prompt)
    answers = answer_columns(table, prompt)
    responses = [name for name in table.called(RESPONSE) if name not in asked]
    named = answers or [name for name in responses if table.is_written(name)]
    if len(named) != 1 or not _is_short(table.texts(named[0]), bool(answers)):
        return None
    # Of several columns of answers all say the same, else there would be several left.
    same = [name for name in table.called(ANSWER) if answers and table.is_written(name)]
    known = {*asked, *named, *same, *table.called(SYSTEM), *single_options(table).values()}
    known |= set(table.called(OPTIONS))
    if any(_may_reason(table, name, asked) for name in table.columns if name not in known):
        return None
    base = {} if prompt == "{prompt}" else {"prompt": prompt}
    return {**base, **system_field(table), **answer_fields(table, named[0])}


def _is_short(texts: Sequence[str], is_answer: bool) -> bool:
    """Tell whether texts are answers alone; what is called a response may be two sentences."""
    if max(map(len, texts)) > MOST_ANSWER or find_rule(texts).share:
        return False
    if any(BOX.search(text) or HAS_TAG.search(text) or "####" in text for text in texts):
        return False
    return not any("\n" in text if is_answer else SENTENCES.search(text) for text in texts)


def _may_reason(table: Table, column: str, asked: Sequence[str]) -> bool:
    """Tell whether a column could be read as a reasoning."""
    values = [value for value in table.values(column) if value not in (None, "", [], {})]
    if not any(str(value).strip() for value in values):
        return False
    if column in table.called(THINKING) or not table.is_written(column):
        return True
    texts = table.texts(column)
    if all(WORD.match(text) for text in texts) or inside(table, column, asked):
        return False
    is_about = ABOUT & set(plain(column).split("_")) and max(map(len, texts)) <= MOST_ANSWER
    return not is_about and table.varies(column, asked[0])


def own_notes(response: Response) -> list[str]:
    """Say why the recipe lets the model write the reasoning, what that means, and what else is."""
    tags = [response.thinking_open.strip(), response.thinking_close.strip()]
    written = " … ".join(filter(None, tags))
    return [
        "no column holds a reasoning: the model writes its own (`thinking: own`), and the key "
        "behind it is trained alone",
        f"so the model must think already, in {written}: train asks it {NUM_PROBED} questions "
        "first, and refuses it if fewer than half of its thinkings are valid. Else give the rows a "
        "column of reasoning, or name a file of thinkings in `own.file`",
    ]
