"""What a data set's columns mean: which hold prompt, thinking and answer, how long the rows are."""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from sftkey.activity import activity
from sftkey.adapt.columns import ANSWER, ENOUGH, UNNAMED, Table, table_of
from sftkey.adapt.own import read_answers_only
from sftkey.adapt.readings import Reading, decide, read, why_not
from sftkey.data.examples import USUAL, Loaded, RawRow, RowOptions, columns_of
from sftkey.data.refused import count_row, left_out
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.sources import BUILT_IN, has_splits, load_examples, load_rows, with_defaults
from sftkey.data.splits import MOST_EMPTY
from sftkey.data.tokenization import Row, tokenize, tokenize_batches
from sftkey.data.values import Refusal
from sftkey.errors import DataError
from sftkey.evaluation.grading import grade, unreadable
from sftkey.recipe.rules import UNDECIDED
from sftkey.recipe.schema import DataSection

NUM_ODD = 3  # rows that are printed
SHOWN = 40  # characters of each of their ends
MOST_ROWS = 10_000  # are tokenized for their lengths
MOST_HELD_OUT = 200  # rows for validation, and for the test
# 1,5 may be three halves or a list, so it is no number here.
NUMBER = re.compile(
    r"(?:[-+\u2212$€£¥₹]|\\\$)*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*|(?<=\d)/\d+)?(?<=[\d.])"
    r"(?:[eE][-+]?\d+)?\s*(?:\\?%)?"
)
FORMULA = re.compile(r"\\[a-zA-Z]|\^|\$(?!\s)[^$]*[^$\s]\$(?!\d)")  # but not $5 and $10
LETTERS = re.compile(r"[(\[]?(?:[A-Z]|[a-h])[)\]]?[.:]?|[A-H](?:(?:, ?| ?& ?| and )[A-H])+")


@dataclass(frozen=True)
class DataChoice:
    """The recipe's `data`, and why."""

    fields: dict[str, Any]  # of the section, without the lengths
    why: dict[str, str] = field(default_factory=dict)  # reasons by key
    # What the rows become; none where something is undecided.
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know of it, a line each
    own: bool = False  # no column holds a reasoning, so the model writes its own

    @property
    def undecided(self) -> list[str]:
        """The keys that the user must decide."""
        return [key for key, value in self.fields.items() if str(value).startswith(UNDECIDED)]


@activity("reading the rows")
def choose_data(
    source: str,
    seed: int,
    plain: bool,
    renderer: Renderer | None = None,
    options: RowOptions = USUAL,
) -> DataChoice:
    """Guess how the rows of a source are read, and which of them are held out.

    Args:
        source: A built-in name, a hub id, a file or a folder.
        seed: Of the recipe.
        plain: The frame is plain: prompts are texts, and end with a line.
        renderer: Rows that it can't tokenize are left out, or asked about where they are many.
        options: What the recipe says of its rows elsewhere.
    """
    rows = load_rows(DataSection(source=source), seed, "train")
    choice = DataChoice({"source": source}, {"source": "built in: sftkey knows its columns"})
    if source not in BUILT_IN:
        reading, table, own = _decide(rows)
        why, notes = _told(reading, table)
        notes = [*why_not(table), *notes] if own else notes
        choice = DataChoice({"source": source, **reading.fields}, why, notes=notes, own=own)
    if plain:
        _make_plain(choice)
    if choice.undecided:
        return choice
    options = replace(options, reasoning=not choice.own)
    loaded = {"train": read(rows, choice.fields, options)}
    loaded |= _own_splits(choice, seed, options)
    usable = {split: _in_frame(each, renderer) for split, each in loaded.items()}
    _leave_out(choice, usable)
    if choice.undecided:
        return choice
    drops_empty = not choice.own and _leave_out_empty(choice, loaded.values())
    if options.turns == "last":
        choice.notes.extend(_untrained_turns(loaded["train"].examples))
    examples = usable["train"].examples
    choice.examples.extend(each for each in examples if each.has_thinking or not drops_empty)
    if source not in BUILT_IN:
        choice.notes.extend(_contrary(table, choice))
    _hold_out(choice, loaded, len(choice.examples))
    return choice


def _own_splits(choice: DataChoice, seed: int, options: RowOptions) -> dict[str, Loaded]:
    """Read the splits `validation` and `test`, where there are such and they are like train."""
    data, found = DataSection(**choice.fields), {}
    for name in ("validation", "test") if has_splits(data) else ():
        with suppress(DataError):
            loaded = load_examples(data, seed, name, options)
            if choice.own or any(each.has_thinking for each in loaded.examples):
                found[name] = loaded
    return found


@activity("tokenizing the rows")
def _in_frame(loaded: Loaded, renderer: Renderer | None) -> Loaded:
    """Count the examples that the frame can't carry among the rows that can't be used."""
    if renderer is None:
        return loaded
    usable = Loaded([], list(loaded.unsplit))
    rows = chain.from_iterable(tokenize_batches(loaded.examples, renderer))
    for example, row in zip(loaded.examples, rows, strict=True):
        if isinstance(row, Row):
            usable.examples.append(example)
        else:
            usable.unsplit.append(row)
    usable.unsplit.sort(key=lambda each: each.index)
    return usable


def _leave_out(choice: DataChoice, usable: Mapping[str, Loaded]) -> None:
    """Let the rows drop that can't be used; where they are many, ask for the source again."""
    unused = [(split, each) for split, loaded in usable.items() for each in loaded.unsplit]
    num_rows = {split: len(each.examples) + len(each.unsplit) for split, each in usable.items()}
    many = (len(each.unsplit) > (1 - ENOUGH) * num_rows[split] for split, each in usable.items())
    if any(many) or not usable["train"].examples:
        choice.fields["source"] = _ask_for_rows(choice.fields["source"], unused)
    elif unused:
        said = f"{len(unused)} of {sum(num_rows.values())} rows"
        choice.fields["unsplit_rows"] = "drop"
        choice.why["unsplit_rows"] = f"{said}, at first: {unused[0][1].reason}"
        choice.notes.append(f"{said} are left out:")
        for split, each in unused[:NUM_ODD]:
            place = f"row {each.index}" + ("" if split == "train" else f" of {split}")
            choice.notes.append(f"  {place}: {each.reason}")


def _ask_for_rows(source: str, unused: Sequence[tuple[str, Refusal]]) -> str:
    """Name the rows that can't be used, why, and what can be done, as the gate would."""
    counted: dict[str, Any] = {}
    for split, each in unused:
        count_row(counted, f"{split}: {each.reason}", each.index, each.code)
    found = list(left_out(DataSection(source=source), counted))
    asks = [f"{each.split}: {each.what}" for each in found]
    asks += dict.fromkeys(each.hint for each in found if each.hint)
    return f"{UNDECIDED} {source}, of which rows can't be used; {'; '.join(asks)}"


def _leave_out_empty(choice: DataChoice, loaded: Iterable[Loaded]) -> bool:
    """Count the empty thinkings; where the gate wouldn't let them through, let them drop."""
    counts = [
        (sum(not row.has_thinking for row in each.examples), len(each.examples)) for each in loaded
    ]
    num_empty, num_examples = map(sum, zip(*counts, strict=True))
    many = any(num > MOST_EMPTY * of for num, of in counts)
    if num_empty:
        choice.notes.append(f"{num_empty} of {num_examples} thinkings are empty")
    if many:
        choice.fields["empty_thinking"] = "drop"
        choice.why["empty_thinking"] = f"{num_empty} of {num_examples} rows; keep trains them, too"
    return many


def _decide(rows: Sequence[RawRow]) -> tuple[Reading, Table, bool]:
    """Find the reading of rows, and whether it reads answers alone: nothing else is left to ask."""
    reading, table = decide(rows)
    if str(reading.fields.get("thinking", "")).startswith(UNDECIDED):
        whole = table_of(rows)
        for each in (whole, whole.flattened()):
            fields = read_answers_only(each)
            if fields is not None:
                return Reading(fields), each, True
    return reading, table, False


def _make_plain(choice: DataChoice) -> None:
    """Fit the fields to a plain frame, which takes texts alone."""
    data = DataSection(**choice.fields)
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
    why: dict[str, str] = {}
    notes = []
    if reading.fields.get("prompt"):
        why["prompt"] = f"the columns are {', '.join(table.columns)}"
    elif reading.fields.get("response", "messages"):
        why["source"] = "it holds conversations"
    asked = any(str(value).startswith(UNDECIDED) for value in reading.fields.values())
    used = [] if asked else _used(table, reading.fields)
    rest = [name for name in table.columns if name not in used]
    if rest and not asked:
        notes.append(f"columns that aren't used: {', '.join(rest)}")
        notes += _judged(table, rest)
    unnamed = [name for name in columns_of(table.rows) if UNNAMED.search(name)]
    if unnamed:
        listed = ", ".join(name.strip() or "one without a name" for name in unnamed)
        notes.append(f"columns that no template can name: {listed}; rename them")
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


def _judged(table: Table, columns: Sequence[str]) -> Iterator[str]:
    """Say of columns of true and false that they leave no row out: some may call rows bad."""
    for name in columns:
        values = table.values(name)
        if {*map(type, values)} <= {bool, int, float} and set(values) == {0, 1}:
            no = "false" if isinstance(values[0], bool) else "0"
            said = f"{name} is {no} in {values.count(0)} of {len(values)} rows"
            yield f"{said}; they are trained, too: where it calls them bad, remove them"


def _contrary(table: Table, choice: DataChoice) -> Iterator[str]:
    """Say in how many rows a column that isn't used holds another answer than the one read."""
    used = _used(table, choice.fields)
    for name in table.called(ANSWER) if choice.examples else ():
        texts = table.texts(name)
        given = [
            (example.answer, replace(example, answer=texts[example.index]))
            for example in choice.examples
            if name not in used and example.index < len(texts) and texts[example.index].strip()
        ]
        grader, _ = choose_grader([example for _, example in given])
        if grader in ("number", "choice"):
            others = sum(not grade(answer, example.answer, grader) for answer, example in given)
            if 0 < others <= len(given) / 2:  # else it holds something else
                said = f"{name} holds another answer than the one read"
                yield f"{said} in {others} of {len(given)} rows"


def _used(table: Table, fields: Mapping[str, str]) -> list[str]:
    """List the columns that a reading names, or reads by itself."""
    templates = [fields[key] for key in ("prompt", "thinking", "answer") if key in fields]
    named = [fields[key] for key in ("response", "system_column") if key in fields]
    chat = [] if {"prompt", "response"} & fields.keys() else ["messages"]
    if any(isinstance(value, list | Mapping) and value for value in table.values("tools")):
        named.append("tools")  # written before the prompts
    return [*chain.from_iterable(map(table.asked, templates)), *named, *chat]


def _excerpt(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"


def _untrained_turns(examples: Sequence[Example]) -> list[str]:
    """Say how many answers stand in prompts, and aren't trained."""
    turns = sum(
        message["role"] == "assistant"
        for example in examples
        if not isinstance(example.prompt, str)
        for message in example.prompt
    )
    what = f"{turns} earlier assistant turns aren't trained; `response.turns: all` trains them"
    return [what] if turns else []


def plain_prompt(data: DataSection) -> tuple[str, str]:
    """Let a plain prompt end with its line: tokens at a blank's end would be others in training."""
    prompt = with_defaults(data).prompt or "{prompt}"
    prompt = prompt if prompt.endswith("\n") else f"{prompt}\n"
    return prompt, "a plain text, in which the answer begins on a line of its own"


def _hold_out(choice: DataChoice, own_splits: Container[str], num_examples: int) -> None:
    """Hold rows out for validation and test: splits of these names, else a tenth of train each."""
    count = min(MOST_HELD_OUT, num_examples // 10)
    for name in ("validation", "test"):
        if name in own_splits:
            choice.fields[name] = name
        elif count:
            choice.fields[name] = count
            choice.why[name] = "rows of train, seeded"
    if count:
        choice.fields["overlap"] = "drop"
        choice.why["overlap"] = "a training row whose question is asked later is left out"


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

    Rows have `most` tokens at most, if the model says so; `thinking` so many of them are left for
    the thinking that it writes itself.
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
    if all(LETTERS.fullmatch(answer) for answer in answers):
        return "choice", "all answers are letters"
    if all(re.fullmatch(r"[A-H]|\d|[(\[]?[A-H][)\]:.] .+", answer) for answer in answers):
        return "choice", "all answers are labels of options"
    formulas = sum(FORMULA.search(answer) is not None for answer in answers)
    short = all(len(answer) <= SHOWN for answer in answers)
    if formulas > len(answers) / 5 or (formulas and short):
        which = "many" if formulas > len(answers) / 5 else "some"
        return "math", f'{which} answers are formulas; needs: python -m pip install "sftkey[math]"'
    return "exact", "the answers are texts, compared as such"
