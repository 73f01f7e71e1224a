"""What columns are for, by their names and by what they hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from typing import Any

from sftkey.data.examples import RawRow, Template, columns_of, make_rule
from sftkey.data.messages import ROLE_KEYS, SAYS_NOTHING, read_messages
from sftkey.data.values import RowError, parsed_json

PROMPT = ("prompt", "question", "problem", "instruction", "query", "input")
THINKING = (
    *("thinking", "reasoning", "rationale", "cot", "thought", "thoughts", "explanation"),
    *("chain_of_thought", "reasoning_content", "trace"),
)
ANSWER = (
    *("answer", "final_answer", "label", "target", "correct", "answer_key", "expected_answer"),
    *("ground_truth", "gold", "correct_answer"),
)
RESPONSE = (
    *("response", "completion", "output", "solution", "answer", "text", "generation"),
    *("assistant", "gpt", "content", "targets"),
)
CONTEXT = (
    *("context", "passage", "article", "document", "paragraph", "background", "story", "hint"),
    *("body", "scenario", "situation", "excerpt", "theory", "premises"),
    *("contexts", "passages", "articles", "documents", "paragraphs", "premise", "table", "history"),
)
OPTIONS = ("options", "choices", "candidates", "endings")
# A column's name with one of these is about a row, and no part of it.
ABOUT = {"type", "source", "id", "idx", "index", "uuid", "grade", "config", "configs", "count"}
ABOUT |= {"model", "mode", "length", "score", "reward", "task", "topic", "is", "original", "tokens"}
ABOUT |= {"correctness", "finish", "license", "version", "difficulty", "level", "rate", "category"}
# In front of what a column holds these say whose it is: `model_reasoning` is one.
WHOSE = {"model", "original"}
WRITTEN = (str, int, float, Decimal, date, time)  # what a template writes
UNNAMED = re.compile(r"[{}!:]|\A\s*\Z")  # no template can name such a column
# No blank, and no script that writes without blanks.
WORD = re.compile(r"[!-~]*\Z")


@dataclass(frozen=True)
class Table:
    """Rows with their columns, looked at through some of them."""

    rows: Sequence[RawRow]  # those that are looked at
    # All columns; inside a column of objects they are called `data[question]`.
    columns: Sequence[str]
    seen: dict[str, list[Any]] = field(default_factory=dict)

    def values(self, column: str) -> list[Any]:
        """Return a column's values, JSON text read."""
        if column not in self.seen:
            self.seen[column] = [parsed_json(row.get(column)) for row in self.rows]
        return self.seen[column]

    def is_text(self, column: str) -> bool:
        """Tell whether it holds texts or numbers, and not only empty ones."""
        return _are_texts(self.values(column))

    def is_written(self, column: str) -> bool:
        """Tell whether its values are texts or numbers as they stand, be it JSON: `[1, 2]`.

        A list of texts in each row, `["7"]`, is no answer that a model would write.
        """
        lists = [value for value in self.values(column) if value not in SAYS_NOTHING]
        if lists and all(isinstance(value, list) and _are_words(value) for value in lists):
            return False
        return _are_texts([row.get(column) for row in self.rows])

    def is_messages(self, column: str) -> bool:
        """Tell whether it holds lists of messages."""
        values = [value for value in self.values(column) if value not in SAYS_NOTHING]
        return bool(values) and all(
            isinstance(value, list)
            and all(isinstance(each, dict) and each.keys() & {*ROLE_KEYS} for each in value)
            for value in values[:20]
        )

    def messages(self, column: str) -> list[tuple[dict[str, str], ...]]:
        """Return the conversations of a column; an unreadable one is empty."""
        read = []
        for value in self.values(column):
            try:
                read.append(read_messages(value))
            except RowError:
                read.append(())
        return read

    def unreadable(self, column: str) -> str:
        """Say why a column's lists of messages can't be read; nothing where some can be."""
        values, reason = self.values(column), ""
        if not any(
            isinstance(each, list) and each and isinstance(each[0], dict) for each in values
        ):
            return ""
        for value in values:
            try:
                read_messages(value)
            except RowError as error:
                reason = reason or str(error)
            else:
                return ""
        return reason

    def texts(self, column: str) -> list[str]:
        """Return a column's texts as they stand; what is null is empty."""
        values = (row.get(column) for row in self.rows)
        return ["" if value is None else str(value) for value in values]

    def wholes(self, columns: Sequence[str]) -> list[str]:
        """Return what each row's texts of some columns are together, a line each."""
        return list(map("\n".join, zip(*map(self.texts, columns), strict=True)))

    def asked(self, template: str) -> list[str]:
        """Return the columns of a template."""
        return Template(template, self.columns).columns

    def is_words(self, column: str) -> bool:
        """Tell whether each text is one word at most: a number, name, date, link or hash."""
        return all(WORD.match(text) for text in self.texts(column))

    def num_kinds(self, column: str) -> int:
        """Count the different values."""
        return len({str(value) for value in self.values(column)})

    def varies(self, column: str, beside: str) -> bool:
        """Tell whether it says something of its own in each row, as a text of a row does."""
        return self.num_kinds(column) * 20 >= self.num_kinds(beside)

    def called(self, names: Sequence[str]) -> list[str]:
        """Find columns of these names, in the names' order; else those with a name inside.

        `Complex_CoT` and `model_reasoning` are found, `problem_type` and `reasoning_model` aren't.
        """
        plains = {column: plain(column) for column in self.columns}
        exact = [column for name in names for column in self.columns if plains[column] == name]
        if exact:
            return list(dict.fromkeys(exact))
        return [
            column
            for column in self.columns
            if not is_about(plains[column], names)
            and any(re.search(rf"(^|_){name}(_|$)", plains[column]) for name in names)
        ]

    def flattened(self) -> Table:
        """Look into columns of objects: `data[question]` is a column then."""
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            flat: dict[str, Any] = {}
            for column, value in row.items():
                inner = parsed_json(value)
                pairs = inner.items() if isinstance(inner, dict) else ()
                flat |= {f"{column}[{key}]": item for key, item in pairs} or {column: value}
            rows.append(flat)
        return table_of(rows)


def table_of(rows: Sequence[RawRow], of: Sequence[RawRow] | None = None) -> Table:
    """Return a table of rows, with the columns of all that can stand in a template's braces."""
    return Table(rows, [name for name in columns_of(of or rows) if not UNNAMED.search(name)])


def _are_words(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_texts(values: Sequence[Any]) -> bool:
    values = [value for value in values if value not in (None, "")]
    return bool(values) and all(isinstance(value, WRITTEN) for value in values)


def plain(column: str) -> str:
    """Write a name in small letters and underscores, the last of its keys: `answerKey`."""
    name = column.removesuffix("]").rpartition("[")[2]
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_about(name: str, names: Sequence[str]) -> bool:
    """Tell whether a plain name says something about a row, and isn't one of `names` in it.

    >>> [is_about(name, ["reasoning"]) for name in ("model_reasoning", "reasoning_model")]
    [False, True]
    """
    about = ABOUT & set(name.split("_"))
    return bool(about) and not (about <= WHOSE and any(name.endswith(f"_{each}") for each in names))


ENOUGH = 0.9  # of the rows must be read well
EMPTY = "the thinking is empty"
NUM_SEEN = 1000
# A tag that opens a text: <think>, <|begin_of_thought|>, ◁think▷, [THINK].
OPENING = re.compile(r"\s*(<\|?[A-Za-z][\w:-]*\|?>|◁\w+▷|\[[A-Z_]+\])")
HAS_TAG = re.compile(r"</?(?:answer|output|solution|response|think\w*|thought|reasoning)\b", re.I)
# What a chat template writes around turns: <|im_end|>, [INST], <end_of_turn>, </s>.
TURN_MARK = re.compile(
    r"<\|(?:im_(?:start|end)|(?:start|end)_header_id|e[on]t_id|begin_of_text|endoftext|end)\|>"
    r"|<\|(?:system|user|assistant)\|>|\[/?INST\]|<(?:start|end)_of_turn>|</s>|<\uff5c\S+?\uff5c>"
)
BOX = re.compile(r"\\(?:boxed|fbox)\b")
# What may stand behind the last box: the end of its formula and of its sentence.
BEHIND_BOX = re.compile(r"[\s.$\\\])}*!]*\Z")
# The last line, without the marks that make it bold and without its dot.
LAST_LINE = r"\**\s*(?P<answer>[^\n]+?)[.\s*]*\Z"
PHRASES = (
    # MetaMathQA says the answer twice.
    rf"\A(?P<thinking>.*\S)\s*\n####[^\n]*\n\s*The answer is:?\s*{LAST_LINE}",
    rf"\A(?P<thinking>.*\S)\s+\**[Tt]he (?:final )?answer is:?\s*{LAST_LINE}",
    rf"\A(?P<thinking>.*\S)\s*\n\**(?:Final )?[Aa]nswer\**:\s*{LAST_LINE}",
)


@dataclass(frozen=True)
class Fit:
    """How well a rule reads texts."""

    rule: str  # as `data.split_rule` has it
    num_texts: int  # how many were seen
    odd: dict[int, str]  # places of texts that it doesn't split, or not well, with the reason
    explicit: bool = False  # tags mark the thinking, so it is no guess where it ends

    @property
    def share(self) -> float:
        """The share of texts that are split well."""
        return 1 - len(self.odd) / max(self.num_texts, 1)

    @property
    def good(self) -> bool:
        """It may be taken."""
        return self.num_texts > 0 and self.share >= ENOUGH


def find_rule(texts: Sequence[str]) -> Fit:
    """Find the rule that reads texts; where none does well enough, the best of them.

    Rules whose signs are clearer come first: tags, then a sentence that says the answer, then the
    last line with hash marks, then a box.
    """
    some = texts[:NUM_SEEN]
    tagged = _tags(some)
    names = [*([tagged] if tagged else []), "think_tags", *PHRASES, "hash_marks", "boxed"]
    explicit = {"think_tags", tagged}
    fits = [_fit(name, some, name in explicit) for name in names]
    return next((fit for fit in fits if fit.good), max(fits, key=lambda fit: fit.share))


def closing_of(opening: str) -> str:
    """Return the tag that closes what another opens."""
    if opening.startswith("<|"):
        return opening.replace("begin_of", "end_of").replace("start", "end")
    return f"{opening[0]}/{opening[1:]}"


def _tags(texts: Sequence[str]) -> str | None:
    """Make a rule of the tags that most texts are written in, if `think_tags` doesn't know them."""
    found: Counter[tuple[str, str | None]] = Counter()
    for text in texts:
        match = OPENING.match(text)
        if match is None:
            continue
        _, closed, rest = text[match.end() :].partition(closing_of(match[1]))
        second = OPENING.match(rest)
        if second is not None and not rest.rstrip().endswith(closing_of(second[1])):
            second = None
        if closed and closing_of(match[1]) != match[1]:
            found[match[1], second[1] if second else None] += 1
    if not found:
        return None
    (opening, inner), _ = found.most_common(1)[0]
    if (opening, inner) == ("<think>", None):
        return None
    ends = (opening, closing_of(opening), inner or "", closing_of(inner) if inner else "")
    first, last, answer_first, answer_last = map(re.escape, ends)
    before, after = (rf"{answer_first}\s*", rf"{answer_last}\s*") if inner else ("", "")
    return (
        rf"\A\s*{first}\s*(?P<thinking>.*?)\s*{last}\s*{before}"
        rf"(?P<answer>.*?)\s*{after}\Z"
    )


def _fit(name: str, texts: Sequence[str], explicit: bool) -> Fit:
    rule = make_rule(name)
    odd = {}
    for place, text in enumerate(texts):
        parts = rule(text)
        reason = parts if isinstance(parts, str) else _oddity(name, text, *parts)
        if reason:
            odd[place] = reason
    return Fit(name, len(texts), odd, explicit)


def _oddity(name: str, text: str, thinking: str, answer: str) -> str | None:
    """Say what speaks against a split, if anything does."""
    if not answer.strip():
        return "no answer is left"
    if not thinking.strip():
        return EMPTY
    if HAS_TAG.search(answer) or HAS_TAG.search(thinking):
        return "tags stand inside a part"
    if name == "hash_marks" and "\n" in answer:
        return "the last `####` is a heading"
    if name in PHRASES and BOX.search(answer):
        return "the answer is a box"
    if name in PHRASES and re.search(r"[.!?]\$?\s+[A-Z]", answer):
        return "a sentence stands behind the answer"
    if name in PHRASES and "**" in answer:
        return "a part of the answer is bold"
    if name == "boxed":
        last = text.rindex(r"\boxed{")
        if text[max(text.rfind("\n", 0, last), 0) : last].count(r"\boxed{"):
            return "its last line has several boxes"
        if not BEHIND_BOX.match(text[last:].partition(answer)[2]):
            return "text stands behind the box"
    return None
