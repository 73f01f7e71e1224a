"""What a data set's columns mean: which hold prompt, thinking and answer, how long the rows are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftkey.adapt.columns import (
    ANSWER,
    BOX,
    ENOUGH,
    HAS_TAG,
    NOTHING,
    OPTIONS,
    RESPONSE,
    THINKING,
    Table,
    find_rule,
    is_about,
    plain,
)
from sftkey.adapt.prompt import single_options
from sftkey.adapt.readings import (
    MOST_ANSWER,
    Reading,
    answer_columns,
    answer_fields,
    chat_fields,
    decide,
    last_answer,
    prompt_and_chats,
    read,
    system_field,
    unread_system,
    why_not,
)
from sftkey.checks.recipe import UNDECIDED
from sftkey.data.examples import Loaded, columns_of, think_tags
from sftkey.data.messages import SYSTEM
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Response, Segment
from sftkey.data.sources import BUILT_IN, has_splits, load_rows, with_defaults
from sftkey.data.splits import MOST_EMPTY
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import DataError
from sftkey.evaluation.grading import unreadable
from sftkey.recipe.schema import DataSection
from sftkey.training.own_thinking import NUM_PROBED

TEMPLATES = ("source", "prompt", "thinking", "answer", "response")
NUM_ODD = 3  # rows that are printed
SHOWN = 40  # characters of each of their ends
MOST_ROWS = 10_000  # are tokenized for their lengths
MOST_HELD_OUT = 200  # rows for validation, and for the test
# 1,5 may be three halves or a list, so it is no number here.
NUMBER = re.compile(r"[-+$€£]*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*|(?<=\d)/\d+)?(?<=[\d.])\s*%?")
FORMULA = re.compile(r"\\[a-zA-Z]|\^|\$[^$]+\$")


@dataclass(frozen=True)
class DataChoice:
    """The recipe's `data`, and why.

    Args:
        fields: Of the section, without the lengths.
        why: Reasons by key.
        examples: What the rows become; none where something is undecided.
        notes: What the user should know of it, a line each.
        own: No column holds a reasoning, so the model writes its own.
    """

    fields: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own: bool = False

    @property
    def undecided(self) -> list[str]:
        """The keys that the user must decide."""
        return [key for key, value in self.fields.items() if str(value).startswith(UNDECIDED)]


def choose_data(source: str, seed: int, plain: bool) -> DataChoice:
    """Guess how the rows of a source are read, and which of them are held out.

    Args:
        source: A built-in name, a hub id, a file or a folder.
        seed: Of the recipe.
        plain: The frame is plain: prompts are texts, and end with a line.

    Raises:
        DataError: The source can't be read.
    """
    rows = load_rows(DataSection(source=source), seed, "train")
    fields: dict[str, Any] = {}
    why = {"source": "built in: sftkey knows its columns"}
    notes: list[str] = []
    own = False
    if source not in BUILT_IN:
        reading, table, own = _decide(source, rows)
        fields = reading.fields
        why, notes = _told(reading, table)
        notes = [*why_not(table), *notes] if own else notes
    choice = DataChoice({"source": source, **fields}, why, notes=notes, own=own)
    if plain:
        _make_plain(choice)
    if choice.undecided:
        return choice
    loaded = read(source, rows, choice.fields | {"source": source}, reasoning=not own)
    if len(loaded.unsplit) > (1 - ENOUGH) * len(rows) or not loaded.examples:
        reason = loaded.unsplit[0].reason
        ask = f"{UNDECIDED} {len(loaded.unsplit)} of {len(rows)} rows can't be read ({reason}); "
        choice.fields["thinking"] = f"{ask}mend them, or write this out with unsplit_rows: drop"
        return choice
    if loaded.unsplit:
        choice.fields["unsplit_rows"] = "drop"
        reason = loaded.unsplit[0].reason
        why["unsplit_rows"] = f"{len(loaded.unsplit)} of {len(rows)} rows, at first: {reason}"
    notes += _counted(loaded, rows, own)
    examples = loaded.examples
    empty = [example for example in examples if not example.thinking.strip()]
    if not own and len(empty) > MOST_EMPTY * len(examples):
        choice.fields["empty_thinking"] = "drop"
        why["empty_thinking"] = f"{len(empty)} of {len(examples)} rows; keep trains them, too"
        examples = [example for example in examples if example.thinking.strip()]
    _hold_out(choice, seed, len(examples))
    return DataChoice(choice.fields, why, examples, notes, own)


def _decide(source: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Reading, Table, bool]:
    """Find the reading of rows, and whether it reads answers alone: nothing else is left to ask."""
    reading, table = decide(source, rows)
    if str(reading.fields.get("thinking", "")).startswith(UNDECIDED):
        whole = Table(rows, columns_of(rows))
        for each in (whole, whole.flattened()):
            fields = read_answers_only(each)
            if fields is not None:
                return Reading(fields, explicit=False), each, True
    return reading, table, False


def _make_plain(choice: DataChoice) -> None:
    """Fit the fields to a plain frame, which takes texts alone."""
    data = DataSection(**{k: v for k, v in choice.fields.items() if k in TEMPLATES})
    if data.prompt is None and data.source not in BUILT_IN:
        choice.fields["prompt"] = f"{UNDECIDED} one text; the plain frame takes no messages"
    if "system_column" in choice.fields:
        column = choice.fields.pop("system_column")
        choice.fields["system"] = (
            f"{UNDECIDED} null, or {{{column}}} in the prompt; a plain text has no system"
        )
    if not choice.undecided:
        choice.fields["prompt"], choice.why["prompt"] = plain_prompt(data)


def _told(reading: Reading, table: Table) -> tuple[dict[str, str], list[str]]:
    """Say which columns aren't used, how many rows a rule splits, and which of them are odd."""
    used = "\n".join(str(value) for value in reading.fields.values())
    rest = [name for name in table.columns if not _uses(name, reading, used)]
    why: dict[str, str] = {}
    notes = []
    if reading.fields.get("prompt"):
        why["prompt"] = f"the columns are {', '.join(table.columns)}"
    elif reading.fields.get("response", "messages"):
        why["source"] = "it holds conversations"
    asked = any(str(value).startswith(UNDECIDED) for value in reading.fields.values())
    if rest and not asked:
        notes.append(f"columns that aren't used: {', '.join(rest)}")
    column = reading.fields.get("response", "" if "prompt" in reading.fields else "messages")
    chats = table.messages(column) if column in table.columns and table.is_messages(column) else []
    if num := sum(bool(chat) and chat[-1]["role"] != "assistant" for chat in chats):
        notes.append(f"{num} conversations go on behind their last answer; that isn't read")
    fit = reading.fit
    if fit is not None and "split_rule" in reading.fields:
        right = fit.num_texts - len(fit.odd)
        why["split_rule"] = f"splits {right} of {fit.num_texts} rows"
        notes.append(f"data.split_rule {why['split_rule']}")
        if fit.odd:
            notes.append("rows that look odd:")
        notes += [
            f"  row {place}, {reason}: {_excerpt(table.rows[place].get(column))}"
            for place, reason in list(fit.odd.items())[:NUM_ODD]
        ]
    return why, notes


def _uses(name: str, reading: Reading, used: str) -> bool:
    chat = not {"prompt", "response"} & reading.fields.keys() and name == "messages"
    named = name in (reading.fields.get("response"), reading.fields.get("system_column"))
    return chat or named or re.search(rf"\{{{re.escape(name)}[}}\[:!]", used) is not None


def _excerpt(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"


def _counted(loaded: Loaded, rows: Sequence[Mapping[str, Any]], own: bool) -> list[str]:
    """Say what is left out, how many thinkings are empty, and which turns aren't trained."""
    notes = []
    if loaded.unsplit:
        notes.append(f"{len(loaded.unsplit)} of {len(rows)} rows are left out:")
        notes += [f"  row {each.index}: {each.reason}" for each in loaded.unsplit[:NUM_ODD]]
    empty = sum(not example.thinking.strip() for example in loaded.examples)
    if empty and not own:
        notes.append(f"{empty} of {len(loaded.examples)} thinkings are empty")
    turns = sum(
        message["role"] == "assistant"
        for example in loaded.examples
        if not isinstance(example.prompt, str)
        for message in example.prompt
    )
    if turns:
        notes.append(
            f"{turns} earlier assistant turns aren't trained; `response.turns: all` trains them"
        )
    return notes


def plain_prompt(data: DataSection) -> tuple[str, str]:
    """Let a plain prompt end with its line: tokens at a blank's end would be others in training."""
    prompt = with_defaults(data).prompt or "{prompt}"
    prompt = prompt if prompt.endswith("\n") else f"{prompt}\n"
    return prompt, "a plain text, in which the answer begins on a line of its own"


def _hold_out(choice: DataChoice, seed: int, num_examples: int) -> None:
    """Hold rows out for validation and test: splits of these names, else a tenth of train each."""
    source = choice.fields["source"]
    count = min(MOST_HELD_OUT, num_examples // 10)
    for name in ("validation", "test"):
        if has_splits(DataSection(source=source)) and _has_split(source, seed, name):
            choice.fields[name] = name
        elif count:
            choice.fields[name] = count
            choice.why[name] = "rows of train, seeded"
    if count:
        choice.fields["overlap"] = "drop"
        choice.why["overlap"] = "a training row whose question is asked later is left out"


def _has_split(source: str, seed: int, name: str) -> bool:
    try:
        load_rows(DataSection(source=source), seed, name)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows and of completions, and what to allow for them."""

    max_length: int
    max_new_tokens: int
    why: str


def measure(
    examples: Sequence[Example], renderer: Renderer, most: int | None, thinking: int = 0
) -> Lengths:
    """Choose the sequence length: what 99.5 of 100 rows need, or all of them where that is close.

    Args:
        examples: The data.
        renderer: The run's renderer.
        most: The longest row that the model can read, if it says so.
        thinking: Tokens to leave for the thinking that the model writes itself.
    """
    some = examples[:: math.ceil(len(examples) / MOST_ROWS)]
    rows = [row for row in tokenize(some, renderer) if isinstance(row, Row)]
    if not rows:
        raise DataError("--data", "no row can be tokenized in this model's frame")
    if most is not None:
        thinking = max(min(thinking, most - max(len(row.input_ids) for row in rows)), 0)
    whole = sorted(thinking + len(row.input_ids) for row in rows)
    written = sorted(thinking + sum(s != Segment.PROMPT for s in row.segment_ids) for row in rows)
    new = _rounded(_percentile(written))
    if most is not None and thinking:
        new = min(new, most - max(row.segment_ids.count(Segment.PROMPT) for row in rows))
    nearly, longest = _rounded(_percentile(whole)), _rounded(whole[-1])
    length, why = nearly, f"holds 99.5% of the rows; the longest has {whole[-1]} tokens"
    if longest <= 1.25 * nearly:
        length, why = longest, f"the longest row has {whole[-1]} tokens"
    if thinking:
        why += f", {thinking} of them left for the model's own thinking"
    if most is not None and length > most:
        length, why = most, f"the model's positions end there; {why}"
    return Lengths(length, new, why)


def _percentile(lengths: Sequence[int]) -> int:
    return lengths[math.ceil(0.995 * len(lengths)) - 1]


def _rounded(length: int) -> int:
    return math.ceil(length / 64) * 64


def choose_grader(examples: Sequence[Example]) -> tuple[str, str]:
    """Choose the grader that fits the answers, and say why."""
    answers = [example.answer.strip() for example in examples[:1000]]
    if all(NUMBER.fullmatch(answer) for answer in answers) and not unreadable(
        dict(enumerate(answers)), "number"
    ):
        return "number", "all answers are numbers"
    if all(re.fullmatch(r"\(?[A-Z]\)?\.?", answer) for answer in answers):
        return "choice", "all answers are letters"
    formulas = sum(FORMULA.search(answer) is not None for answer in answers)
    short = all(len(answer) <= SHOWN for answer in answers)
    if formulas > len(answers) / 5 or (formulas and short):
        which = "many" if formulas > len(answers) / 5 else "some"
        return "math", f'{which} answers are formulas; needs: python -m pip install "sftkey[math]"'
    return "exact", "the answers are texts, compared as such"


SENTENCES = re.compile(r"[.!?:;]\s+\S|\n")


def read_answers_only(table: Table) -> dict[str, Any] | None:
    """Return the fields that read prompt and answer, if nothing in the rows can be a reasoning.

    Args:
        table: All rows: a reasoning that only the last one holds is one.
    """
    prompt, chats = prompt_and_chats(table)
    if (prompt is not None and prompt.startswith(UNDECIDED)) or unread_system(table):
        return None
    if len(chats) == 1:
        return _conversation(table, chats[0], prompt)
    return None if chats or prompt is None else _columns(table, prompt)


def _columns(table: Table, prompt: str) -> dict[str, Any] | None:
    """Read a column of short answers, or one of texts whose think block is always empty."""
    asked = re.findall(r"\{([^{}:]+)[:}]", prompt)
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
    wholes = list(map("\n".join, zip(*map(table.texts, asked), strict=True)))
    if any(_may_reason(table, name, wholes) for name in table.columns if name not in known):
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
    asked = re.findall(r"\{([^{}:]+)[:}]", fields.get("prompt", ""))
    wholes = ["\n".join(message["content"] for message in chat) for chat in read]
    known = {column, *asked, *table.called(SYSTEM)}
    if any(_may_reason(table, name, wholes) for name in table.columns if name not in known):
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
    if any(BOX.search(text) or HAS_TAG.search(text) or "####" in text for text in texts):
        return False
    return not any("\n" in text if is_answer else SENTENCES.search(text) for text in texts)


def _may_reason(table: Table, column: str, wholes: Sequence[str]) -> bool:
    """Tell whether a column could be read as a reasoning, beside the whole text of each row."""
    values = [value for value in table.values(column) if value not in NOTHING]
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
        "first, and refuses it if fewer than half of its thinkings are valid. Else give the rows a "
        "column of reasoning, or name a file of thinkings in `own.file`",
    ]
