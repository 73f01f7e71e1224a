"""Rows that hold answers alone: the model is to write the reasoning itself."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from sftkey.adapt.columns import (
    ANSWER,
    BOX,
    HAS_TAG,
    OPTIONS,
    RESPONSE,
    THINKING,
    TURN_MARK,
    Table,
    find_rule,
    is_about,
    plain,
)
from sftkey.adapt.prompt import single_options
from sftkey.adapt.readings import (
    MOST_ANSWER,
    answer_columns,
    answer_fields,
    chat_fields,
    last_answer,
    prompt_and_chats,
    system_field,
    unread_system,
)
from sftkey.data.examples import columns_of, think_tags
from sftkey.data.messages import SAYS_NOTHING, SYSTEM
from sftkey.data.response import Response
from sftkey.recipe.rules import UNDECIDED
from sftkey.training.own_thinking import NUM_PROBED

SENTENCES = re.compile(r"[.!?:;]\s+\S|\n")


def read_answers_only(table: Table) -> dict[str, Any] | None:
    """Return the fields that read prompt and answer, if nothing in any row can be a reasoning."""
    prompt, chats = prompt_and_chats(table)
    if (prompt is not None and prompt.startswith(UNDECIDED)) or unread_system(table):
        return None
    if len(chats) == 1:
        return _conversation(table, chats[0], prompt)
    return None if chats or prompt is None else _columns(table, prompt)


def _columns(table: Table, prompt: str) -> dict[str, Any] | None:
    """Read a column of short answers, or one of texts whose think block is always empty."""
    asked = table.asked(prompt)
    answers = answer_columns(table, prompt)
    responses = [name for name in table.called(RESPONSE) if name not in asked]
    named = answers or [name for name in responses if table.is_written(name)]
    if len(named) != 1:
        return None
    texts, blocks = _without_empty_blocks(table.texts(named[0]))
    if not _is_short(texts, bool(answers)):
        return None
    # Of several columns of answers all say the same, else there would be several left.
    same = [name for name in table.called(ANSWER) if answers and table.is_written(name)]
    known = {*asked, *named, *same, *table.called(SYSTEM), *single_options(table).values()}
    known |= set(table.called(OPTIONS))
    wholes = table.wholes(asked)
    if any(_may_reason(table, name, wholes) for name in _beside(table, known)):
        return None
    answer = {"response": named[0], **blocks} if blocks else answer_fields(table, named[0])
    return {"prompt": prompt, **system_field(table), **answer}


def _conversation(table: Table, column: str, prompt: str | None) -> dict[str, Any] | None:
    """Read a column of conversations whose last answers are short."""
    read = table.messages(column)
    last = [last_answer(chat) for chat in read]
    if any(turn.keys() - {"role", "content", "reasoning_content", "train"} for turn in last):
        return None
    texts, blocks = _without_empty_blocks([turn["content"] for turn in last])
    thought = any(turn.get("reasoning_content", "").strip() for turn in last)
    if thought or not _is_short(texts, is_answer=False):
        return None
    fields = chat_fields(table, column, prompt)
    asked = table.asked(fields.get("prompt", ""))
    wholes = ["\n".join(message["content"] for message in chat) for chat in read]
    known = {column, *asked, *table.called(SYSTEM)}
    if any(_may_reason(table, name, wholes) for name in _beside(table, known)):
        return None
    return {**fields, **system_field(table), **blocks}


def _without_empty_blocks(texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Remove the think block of texts that all have one, and an empty one; return its rule, too."""
    parts = [think_tags(text) for text in texts]
    behind = [part[1] for part in parts if isinstance(part, tuple) and not part[0]]
    if texts and len(behind) == len(texts):
        return behind, {"split_rule": "think_tags"}
    return list(texts), {}


def _is_short(texts: Sequence[str], is_answer: bool) -> bool:
    """Tell whether texts are answers alone; what is called a response may be two sentences."""
    if max(map(len, texts)) > MOST_ANSWER or find_rule(texts).share:
        return False
    signs = (BOX, HAS_TAG, TURN_MARK)
    if any(sign.search(text) for sign in signs for text in texts) or "####" in "".join(texts):
        return False
    return not any("\n" in text if is_answer else SENTENCES.search(text) for text in texts)


def _beside(table: Table, known: Collection[str]) -> list[str]:
    """List all other columns of the rows, also those that no template can name."""
    return [name for name in columns_of(table.rows) if name not in known]


def _may_reason(table: Table, column: str, wholes: Sequence[str]) -> bool:
    """Tell whether a column could be read as a reasoning, beside the whole text of each row."""
    values = [value for value in table.values(column) if value not in SAYS_NOTHING]
    if not any(str(value).strip() for value in values):
        return False
    if column in table.called(THINKING) or not table.is_written(column):
        return True
    texts = table.texts(column)
    stands = all(text in whole for text, whole in zip(texts, wholes, strict=True))
    if stands or table.is_words(column):
        return False
    about = is_about(plain(column), THINKING) and max(map(len, texts)) <= MOST_ANSWER
    return not about and table.num_kinds(column) * 20 >= len(set(wholes))


def own_notes(response: Response) -> list[str]:
    """Say why the recipe lets the model write the reasoning, what that means, and what else is."""
    tags = [response.thinking_open.strip(), response.thinking_close.strip()]
    written = " … ".join(filter(None, tags))
    return [
        "no column holds a reasoning: the model writes its own (`thinking: own`), and the key "
        "behind it is trained alone",
        f"so the model must think already, in {written}: train asks it {NUM_PROBED} questions "
        "first, and refuses it if fewer than half of its thinkings are valid. Where a stage of "
        "yours taught it, `model.adapter` names that stage's adapter. Else give the rows a column "
        "of reasoning, or name a file of thinkings in `own.file`",
    ]
