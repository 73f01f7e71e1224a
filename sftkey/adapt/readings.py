"""All the ways in which rows can be read, and the one that is right, if one alone is."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sftkey.adapt.columns import (
    ANSWER,
    BOX,
    EMPTY,
    ENOUGH,
    HAS_TAG,
    NUM_SEEN,
    OPENING,
    PROMPT,
    RESPONSE,
    THINKING,
    TURN_MARK,
    Fit,
    Table,
    find_rule,
    plain,
    table_of,
)
from sftkey.adapt.prompt import inside, options_of, prompt_of
from sftkey.data.examples import (
    USUAL,
    Loaded,
    RawRow,
    RowOptions,
    make_examples,
    make_rule,
)
from sftkey.data.messages import SAYS_NOTHING, SYSTEM
from sftkey.data.response import SAYS_NONE, Example
from sftkey.data.sources import with_defaults
from sftkey.data.values import PLACES
from sftkey.recipe.rules import UNDECIDED
from sftkey.recipe.schema import DataSection

NUM_TRIED = 20  # rows of a column in which tags are looked for
MOST_ANSWER = 40  # characters; a longer text may hold reasoning, too
# Without one of these no rule splits a text.
SIGN = re.compile(rf"\A{OPENING.pattern}|</think>|{BOX.pattern}|^####|[Aa]nswer", re.MULTILINE)
# What no part of an example begins with, ends with, or holds.
LEFT_TAG = re.compile(rf"\A\s*(?i:{HAS_TAG.pattern})|(?i:</think\w*>)\s*\Z|{TURN_MARK.pattern}")
OWN_WAY = "if rows hold no reasoning: no data.thinking, and `thinking: own` in every stage"


@dataclass(frozen=True)
class Reading:
    """One way to read the rows."""

    fields: dict[str, Any]  # of the `data` section
    # A column or tags say what is thinking; nobody guesses it from a text's end.
    explicit: bool = False
    fit: Fit | None = None  # how the rule does, if there is one

    def __str__(self) -> str:
        """Write it as lines of a recipe would say it."""
        shown = {k: v for k, v in self.fields.items() if k not in ("prompt", "system_column")}
        return ", ".join(f"{key}: {value}" for key, value in shown.items()) or "messages"


def decide(rows: Sequence[RawRow]) -> tuple[Reading, Table]:
    """Find the reading of all rows by the first; in it stands what the user must decide."""
    table = table_of(rows[:NUM_SEEN], rows)
    reading = _decide(table)
    inner = table.flattened()
    if inner.columns != table.columns and _num_asked(reading):
        other = _decide(inner)
        if _num_asked(other) < _num_asked(reading):
            return other, inner
    return reading, table


def _num_asked(reading: Reading) -> int:
    return sum(str(value).startswith(UNDECIDED) for value in reading.fields.values())


def _decide(table: Table) -> Reading:
    """Find the reading of a table's rows."""
    prompt, chats = prompt_and_chats(table)
    listed = f"the columns are {', '.join(table.columns)}"
    if prompt is None and not chats:
        first = next(iter(table.columns), "column")
        ask = f'{UNDECIDED} a template, such as "{{{first}}}"; {listed}'
        broken = [(name, table.unreadable(name)) for name in table.columns]
        ask += "".join(f"; {name}: {why}" for name, why in broken if why)
        return Reading({"prompt": ask, **_asked(table, [], listed, "")})
    system = system_field(table)
    readings: list[Reading] = []
    if prompt is not None:
        # What must be decided of the prompt hides nothing of the rest.
        whole = not prompt.startswith(UNDECIDED)
        readings += _columns(table, prompt if whole else f"{{{table.called(PROMPT)[0]}}}")
    readings += _conversations(table, chats, prompt)
    readings = [Reading({**system, **r.fields}, r.explicit, r.fit) for r in readings]
    good = _different(table.rows, _best(readings))
    asked = {"prompt": prompt} if prompt is not None and prompt.startswith(UNDECIDED) else {}
    asked |= unread_system(table)
    if len(good) == 1:
        asked |= _counted_from(table, good[0].fields.get("answer", ""))
        return Reading({**good[0].fields, **asked}, good[0].explicit, good[0].fit)
    asks = _asked(table, readings, listed, prompt or "", _near(table.rows, readings))
    if len(good) > 1:
        ways = "; or ".join(map(str, good[:4]))
        asks = dict.fromkeys(("thinking", "answer"), f"{UNDECIDED} which is meant: {ways}")
    if prompt is None:
        return Reading({**system, **asked, "thinking": asks["thinking"]})
    return Reading({"prompt": prompt, **system, **asked, **asks})


def read(rows: Sequence[RawRow], fields: dict[str, Any], options: RowOptions = USUAL) -> Loaded:
    """Make the examples that a reading gives; without reasoning theirs may be empty."""
    data = with_defaults(DataSection(**{"source": "rows", **fields}))
    return make_examples(rows, data, options)


def prompt_and_chats(table: Table) -> tuple[str | None, list[str]]:
    """Find the prompt's template, and the columns of conversations that an answer ends."""
    chats = [
        column
        for column in table.columns
        if table.is_messages(column)
        and any(each["role"] == "assistant" for chat in table.messages(column) for each in chat)
    ]
    return prompt_of(table), chats


def system_field(table: Table) -> dict[str, str]:
    """Return the field that names the column of system messages, where the messages hold none."""
    chats = chain.from_iterable(map(table.messages, filter(table.is_messages, table.columns)))
    if any(chat and chat[0]["role"] == "system" for chat in chats):
        return {}
    found = [column for column in table.called(SYSTEM) if table.is_text(column)]
    for column in found:
        if all(value is None or isinstance(value, str) for value in table.values(column)):
            return {"system_column": column}
    return {}


def unread_system(table: Table) -> dict[str, str]:
    """Ask for system messages that are no text."""
    for column in table.called(SYSTEM):
        values = [value for value in table.values(column) if value not in SAYS_NOTHING]
        if any(not isinstance(value, str) for value in values) and not system_field(table):
            what = f"{column} holds no text; make it one in the rows, or leave this line out"
            return {"system_column": f"{UNDECIDED} {what}"}
    return {}


def _best(readings: Sequence[Reading]) -> list[Reading]:
    """Keep what reads enough rows; where thinking is marked somewhere, only such readings."""
    good = [reading for reading in readings if reading.fit is None or reading.fit.good]
    explicit = [reading for reading in good if reading.explicit]
    return explicit or good


def _different(rows: Sequence[RawRow], readings: Sequence[Reading]) -> list[Reading]:
    """Keep one of the readings that give the same examples, and none that gives too few."""
    found: dict[tuple[Any, ...], Reading] = {}
    for reading in readings:
        loaded = read(rows, reading.fields)
        thought = sum(each.has_thinking for each in loaded.examples)
        if thought < ENOUGH * len(rows) or _num_tagged(loaded) > (1 - ENOUGH) * len(rows):
            continue
        found.setdefault(tuple(map(_key, loaded.examples)), reading)
    return list(found.values())


def _num_tagged(loaded: Loaded) -> int:
    """Count the examples of which a part still stands in tags, which would be trained as text."""
    parts = ((each.thinking, each.answer) for each in loaded.examples)
    return sum(any(map(LEFT_TAG.search, pair)) for pair in parts)


def _key(example: Example) -> tuple[Any, ...]:
    prompt = example.prompt
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return example.index, asked.strip(), example.thinking.strip(), example.answer.strip()


def _conversations(table: Table, chats: Sequence[str], prompt: str | None) -> Iterator[Reading]:
    """Read conversations, or a prompt and a completion that are messages both."""
    for column in chats:
        fields = chat_fields(table, column, prompt)
        last = [last_answer(chat) for chat in table.messages(column)]
        # An empty one beside a text in tags says nothing.
        if sum(bool(turn.get("reasoning_content")) for turn in last) >= ENOUGH * len(last):
            yield Reading(fields, explicit=True)
        else:
            fit = find_rule([turn["content"] for turn in last])
            yield Reading({**fields, "split_rule": fit.rule}, fit.explicit, fit)


def chat_fields(table: Table, column: str, prompt: str | None) -> dict[str, str]:
    """Return the fields that name a column of conversations, and what stands before it."""
    prompts = [each for each in table.called(("prompt", "input")) if table.is_messages(each)]
    if prompts and column not in prompts:
        return {"response": column, "prompt": f"{{{prompts[0]}}}"}
    if prompt and all(chat and chat[0]["role"] == "assistant" for chat in table.messages(column)):
        return {"response": column, "prompt": prompt}
    default = {"prompt", "thinking", "answer"} <= set(table.columns)
    return {} if column == "messages" and not default else {"response": column}


def last_answer(chat: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the last message of the assistant; an empty one where there is none."""
    answers = [message for message in chat if message["role"] == "assistant"]
    return answers[-1] if answers else {"content": ""}


def _columns(table: Table, prompt: str) -> Iterator[Reading]:
    """Read a column each for thinking and answer, or one column with a rule."""
    base = {} if prompt == "{prompt}" and "prompt" not in table.columns else {"prompt": prompt}
    asked = table.asked(prompt)
    free = [name for name in table.columns if name not in asked and table.is_text(name)]
    answers = answer_columns(table, prompt)
    beside = answers[0] if answers else free[0] if free else ""
    thoughts = [
        name
        for name in table.called(THINKING)
        if name in free and table.varies(name, beside) and not _is_label(table, name, beside)
    ]
    texts = [name for name in table.called(RESPONSE) if name in free]
    wholes = [name for name in free if name not in texts and _is_whole(table, name, asked)]
    for column in dict.fromkeys([*thoughts, *texts, *wholes]):
        fit = find_rule(table.texts(column))
        if fit.good and not _says(table, column, fit, answers):
            continue
        # One that isn't good is only named, where the user must decide.
        fields = {**base, "response": column, "split_rule": fit.rule}
        yield Reading(fields, fit.explicit or column in thoughts, fit)
        thoughts = [name for name in thoughts if name != column or not fit.good]
    rest = [name for name in answers if plain(name) in ANSWER]
    # `ground_truth_solution` may be meant, or `deepseek_solution`.
    rest = rest or [name for name in dict.fromkeys([*answers, *texts]) if name not in thoughts]
    for thought in thoughts:
        for answer in rest:
            fields = {"thinking": f"{{{thought}}}", "answer": _answer(table, answer)}
            if not inside(table, thought, [answer]):
                yield Reading({**base, **fields}, explicit=True)


def _is_whole(table: Table, column: str, asked: Sequence[str]) -> bool:
    """Tell whether a rule splits a column's texts, whatever it is called.

    Without tags that isn't so of what holds the question, too.
    """
    some = table.texts(column)[:NUM_TRIED]
    if not any(SIGN.search(text) for text in some):
        return False
    fit = find_rule(table.texts(column))
    return fit.good and (fit.explicit or not all(inside(table, name, [column]) for name in asked))


def _is_label(table: Table, column: str, beside: str) -> bool:
    """Tell whether single words are an effort (`high`) or a result, and no reasoning."""
    if not table.is_words(column):
        return False
    few = table.num_kinds(column) * 2 < len({str(row) for row in table.rows})
    numbers = all(re.fullmatch(r"[-\d.,]*", text) for text in table.texts(column))
    return few or numbers or max(map(len, table.texts(beside))) > MOST_ANSWER


def answer_columns(table: Table, prompt: str) -> list[str]:
    """Find the columns of answers; an option's text and its letter or place are one answer."""
    asked = table.asked(prompt)
    found = [name for name in table.called(ANSWER) if name not in asked and table.is_written(name)]
    options = options_of(table)
    if not options or not found:
        return found

    def place(row: int, text: str) -> int | None:
        labels, texts = zip(*options[row], strict=True)
        return next((each.index(text) for each in (labels, texts) if text in each), None)

    def says(name: str) -> list[int | None]:
        return [place(row, text.strip()) for row, text in enumerate(table.texts(name))]

    first = says(found[0])
    same = [name for name in found[1:] if None not in first and says(name) == first]
    return [name for name in found if name not in same]


def _says(table: Table, column: str, fit: Fit, answers: Sequence[str]) -> bool:
    """Tell whether a rule's answers are those of the answer's column, if there is another.

    Tags mark an answer in its full form, so there nothing is compared.
    """
    if fit.explicit or not answers or answers[0] == column:
        return True
    split = [make_rule(fit.rule)(text) for text in table.texts(column)]
    given = table.texts(answers[0])
    same = [
        isinstance(parts, tuple) and parts[1].strip(" .$") == text.strip(" .$")
        for parts, text in zip(split, given, strict=True)
    ]
    return sum(same) >= ENOUGH * len(same)


def _answer(table: Table, column: str) -> str:
    """Return the template of an answer; the place of an option becomes its letter."""
    first = _first_places(table, column)
    return f"{{{column}:{first[0]}}}" if first else f"{{{column}}}"


def answer_fields(table: Table, column: str) -> dict[str, str]:
    """Return the field that reads a column of answers, or what must be decided of it."""
    return {"answer": _answer(table, column), **_counted_from(table, column)}


def _counted_from(table: Table, answer: str) -> dict[str, str]:
    """Ask where places of options begin to count, if the rows don't show it."""
    column = answer.strip("{}").partition(":")[0]
    ways = _first_places(table, column) if column in table.columns else []
    if len(ways) < 2:
        return {}
    listed = " or ".join(f'"{{{column}:{way}}}" (from {PLACES[way]})' for way in ways)
    return {"answer": f"{UNDECIDED} from which number the options are counted: {listed}"}


def _first_places(table: Table, column: str) -> list[str]:
    """Return the formats that turn a column's numbers into options' letters; none elsewhere."""
    options = options_of(table)
    answers = [text.strip() for text in table.texts(column)]
    if not options or not all(text.isdigit() for text in answers):
        return []
    pairs = list(zip(answers, options, strict=True))
    # It is an option's own text or label, and no place.
    if all(any(text in pair for pair in each) for text, each in pairs):
        return []
    return [
        way
        for way, first in PLACES.items()
        if all(first <= int(text) < len(each) + first for text, each in pairs)
    ]


def _near(rows: Sequence[RawRow], readings: Sequence[Reading]) -> list[str]:
    """Say of readings that fit how many rows they read nevertheless, where these are too few."""
    said = []
    for reading in readings:
        if reading.fit is not None and not reading.fit.good:
            continue
        loaded = read(rows, reading.fields)
        if num := _num_tagged(loaded):
            said.append(f"{reading} leaves tags in {num} of {len(rows)} rows; remove them there")
        if loaded.unsplit:
            reads = f"{reading} reads {len(loaded.examples)} of {len(rows)} rows"
            said.append(f"{reads}, in others: {loaded.unsplit[0].reason}")
    return said


def _asked(
    table: Table,
    readings: Sequence[Reading],
    listed: str,
    prompt: str,
    near_columns: Sequence[str] = (),
) -> dict[str, str]:
    """Say what must be decided of thinking and answer, with the ways that came near."""
    reason = "".join(f"{why}; " for why in [*why_not(table), *near_columns])
    answers = [name for name in table.called(ANSWER) if table.is_text(name)]
    fits = [(reading, reading.fit) for reading in readings if reading.fit and reading.fit.share]
    fits = [(reading, fit) for reading, fit in fits if not fit.good]
    if fits:
        near, fit = max(fits, key=lambda pair: pair[1].share)
        right, why = fit.num_texts - len(fit.odd), next(iter(fit.odd.values()), "")
        key = "empty_thinking" if why == EMPTY else "unsplit_rows"
        ask = (
            f"{UNDECIDED} {near} reads {right} of {fit.num_texts} rows, in others: {why}; "
            f"`{key}: drop` would leave such rows out; {listed}"
        )
    elif len(answers) == 1 and max(map(len, table.texts(answers[0]))) <= MOST_ANSWER:
        known = [*table.asked(prompt), *table.called(PROMPT), *answers]
        ways = [name for name in table.columns if name not in known and _long(table, name)]
        given = " or ".join(f'"{{{name}}}"' for name in ways)
        given = f"{given or 'none looks so'}; {listed}; {OWN_WAY}"
        return {
            "thinking": f"{UNDECIDED} {reason}the reasoning's column: {given}",
            **answer_fields(table, answers[0]),
        }
    else:
        ask = (
            f"{UNDECIDED} {reason}a template, or `response` and a split_rule for the column of "
            "both: think_tags, boxed, hash_marks, or a regular expression with the groups thinking "
            f"and answer; {listed}; {OWN_WAY}"
        )
    return {"thinking": ask, "answer": ask}


def why_not(table: Table) -> Iterator[str]:
    """Say what keeps columns, and keys of messages, that are called a reasoning from being one."""
    num_rows = len(table.rows)
    for name in table.called(THINKING):
        values = [value for value in table.values(name) if value not in SAYS_NOTHING]
        values = [value for value in values if str(value).strip().lower() not in SAYS_NONE]
        kinds = sorted({type(value).__name__ for value in values})
        if not values:
            yield f"{name}: empty in all rows"
        elif not table.is_text(name):
            yield f"{name}: holds a {' or '.join(kinds)}, not text"
        elif table.is_words(name):
            yield f"{name}: holds single words"
        elif len(values) < num_rows:
            yield f"{name}: empty in {num_rows - len(values)} of {num_rows} rows"
        else:
            others = [each for each in table.called((*ANSWER, *RESPONSE)) if each != name]
            for other in (each for each in others if inside(table, name, [each])):
                yield f"{name}: stands in {other}, too"
    for name in table.called(ANSWER):
        kinds = sorted({type(value).__name__ for value in table.values(name)} - {"NoneType"})
        if kinds and not table.is_text(name):
            yield f"{name}: holds a {' or '.join(kinds)}, not text"
        if marks := list(filter(None, map(TURN_MARK.search, table.texts(name)))):
            yield f"{name}: holds {marks[0][0]} of a chat template in {len(marks)} rows"
    for name in prompt_and_chats(table)[1]:
        last = [last_answer(chat) for chat in table.messages(name)]
        thought = sum(bool(turn.get("reasoning_content", "").strip()) for turn in last)
        if thought:
            yield f"{name}: reasoning beside the content in {thought} of {num_rows} rows"
        known = ("role", "content", "reasoning_content")
        pairs = [pair for turn in last for pair in turn.items() if pair[0] not in known]
        for key in sorted({key for key, value in pairs if isinstance(value, str) and " " in value}):
            yield f"{name}: nothing reads {key} of a message; a reasoning is reasoning_content"


def _long(table: Table, column: str) -> bool:
    """Tell whether a column's texts are sentences."""
    if not table.is_text(column) or not table.varies(column, column):
        return False
    return sum(" " in text.strip() for text in table.texts(column)) * 2 > len(table.rows)
