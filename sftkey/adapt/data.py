"""What a data set's columns mean: which hold prompt, thinking and answer, how long the rows are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftkey.checks.recipe import UNDECIDED
from sftkey.data.examples import RULES, make_examples
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.sources import BUILT_IN, has_splits, load_rows, with_defaults
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection

NAMES = {
    "prompt": ("prompt", "question", "problem", "instruction", "query", "input"),
    "thinking": ("thinking", "reasoning", "rationale", "cot", "thought", "explanation"),
    "answer": ("answer", "final_answer", "label", "target"),
    "response": ("response", "completion", "output", "solution", "answer", "text"),
}
MOST_ROWS = 10_000  # are tokenized for their lengths
MOST_HELD_OUT = 200  # rows for validation, and for the test
NUMBER = re.compile(r"[-+$€£]*\d[\d,]*\.?\d*\s*%?")


@dataclass(frozen=True)
class DataChoice:
    """The recipe's `data`, and why.

    Args:
        fields: Of the section, without the lengths.
        why: Reasons by key.
        examples: What the rows become; none where something is undecided.
    """

    fields: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

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
    columns = list(dict.fromkeys(column for row in rows for column in row))
    found = {
        part: next((name for name in names if name in columns), None)
        for part, names in NAMES.items()
    }
    chats = "messages" in columns and not (found["prompt"] and found["answer"])
    fields: dict[str, Any] = {}
    why = {"source": "built in: sftkey knows its columns"}
    if source not in BUILT_IN:
        fields, why = _conversation(rows) if chats else _columns(found, columns, rows)
    choice = DataChoice({"source": source, **fields}, why)
    if plain and chats:
        choice.fields["prompt"] = f"{UNDECIDED} one text; the plain frame takes no messages"
    if choice.undecided:
        return choice
    if plain:
        choice.fields["prompt"], why["prompt"] = plain_prompt(DataSection(**choice.fields))
    loaded = make_examples(rows, with_defaults(DataSection(**choice.fields)), columns, "last")
    if not loaded.examples:
        reason = loaded.unsplit[0].reason
        ask = f"{UNDECIDED} a template over {', '.join(columns)}; no row could be read: {reason}"
        return DataChoice({"source": source, "prompt": ask}, why)
    if loaded.unsplit:
        choice.fields["unsplit_rows"] = "drop"
        reason = loaded.unsplit[0].reason
        why["unsplit_rows"] = f"{len(loaded.unsplit)} of {len(rows)} rows, at first: {reason}"
    _hold_out(choice, seed, len(loaded.examples))
    return DataChoice(choice.fields, why, loaded.examples)


def plain_prompt(data: DataSection) -> tuple[str, str]:
    """Let a plain prompt end with its line: tokens at a blank's end would be others in training."""
    prompt = with_defaults(data).prompt or "{prompt}"
    prompt = prompt if prompt.endswith("\n") else f"{prompt}\n"
    return prompt, "a plain text, in which the answer begins on a line of its own"


def _columns(
    found: Mapping[str, str | None], columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read columns that were found by their names; a rule is found by what it splits."""
    listed = f"the columns are {', '.join(columns)}"
    if found["prompt"] is None:
        return {"prompt": f"{UNDECIDED} a template, such as {{question}}; {listed}"}, {}
    both = {"instruction", "input"} <= set(columns)
    fields = {"prompt": "{instruction}\n\n{input}" if both else f"{{{found['prompt']}}}"}
    if found["thinking"] and found["answer"]:
        fields |= {part: f"{{{found[part]}}}" for part in ("thinking", "answer")}
        return fields, {"prompt": listed}
    response = found["response"]
    rule, share = _rule([str(row.get(response) or "") for row in rows]) if response else (None, 0.0)
    if response is None or rule is None:
        ask = f"{UNDECIDED} a template, or a split_rule for the column of both; {listed}"
        return {**fields, "thinking": ask, "answer": ask}, {}
    why = {"prompt": listed, "split_rule": f"splits {share:.1%} of the rows"}
    return {**fields, "response": response, "split_rule": rule}, why


def _conversation(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read `messages`: thinking stands beside the content, or a rule finds it there."""
    why = {"source": "its column messages holds conversations"}
    turns = [
        message
        for row in rows
        for message in list(row.get("messages") or ())[-1:]
        if isinstance(message, dict)
    ]
    if any(turn.get("reasoning_content") for turn in turns):
        return {}, why
    rule, share = _rule([str(turn.get("content") or "") for turn in turns])
    if rule is None:
        return {"thinking": f"{UNDECIDED} no rule of ours splits the messages' last turns"}, why
    return {"split_rule": rule}, {**why, "split_rule": f"splits {share:.1%} of the last turns"}


def _rule(texts: Sequence[str]) -> tuple[str | None, float]:
    """Find the rule that splits most texts, if it splits nine in ten."""
    some = texts[:1000]
    shares = {
        name: sum(isinstance(rule(text), tuple) for text in some) / max(len(some), 1)
        for name, rule in RULES.items()
    }
    best = max(shares, key=shares.__getitem__)
    return (best, shares[best]) if shares[best] >= 0.9 else (None, 0.0)


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


def measure(examples: Sequence[Example], renderer: Renderer, most: int | None) -> Lengths:
    """Choose the sequence length: what 99.5 of 100 rows need, or all of them where that is close.

    Args:
        examples: The data.
        renderer: The run's renderer.
        most: The longest row that the model can read, if it says so.
    """
    some = examples[:: math.ceil(len(examples) / MOST_ROWS)]
    rows = [row for row in tokenize(some, renderer) if isinstance(row, Row)]
    if not rows:
        raise DataError("--data", "no row can be tokenized in this model's frame")
    whole = sorted(len(row.input_ids) for row in rows)
    written = sorted(sum(s != Segment.PROMPT for s in row.segment_ids) for row in rows)
    nearly, longest = _rounded(_percentile(whole)), _rounded(whole[-1])
    length, why = nearly, f"holds 99.5% of the rows; the longest has {whole[-1]} tokens"
    if longest <= 1.25 * nearly:
        length, why = longest, f"the longest row has {whole[-1]} tokens"
    if most is not None and length > most:
        length, why = most, f"the model's positions end there; {why}"
    return Lengths(length, _rounded(_percentile(written)), why)


def _percentile(lengths: Sequence[int]) -> int:
    return lengths[math.ceil(0.995 * len(lengths)) - 1]


def _rounded(length: int) -> int:
    return math.ceil(length / 64) * 64


def choose_grader(examples: Sequence[Example]) -> tuple[str, str]:
    """Choose the grader that fits the answers, and say why."""
    answers = [example.answer.strip() for example in examples[:1000]]
    if all(NUMBER.fullmatch(answer) for answer in answers):
        return "number", "all answers are numbers"
    if all(re.fullmatch(r"\(?[A-J]\)?\.?", answer) for answer in answers):
        return "choice", "all answers are letters"
    if sum(bool(re.search(r"[\\^$]", answer)) for answer in answers) > len(answers) / 5:
        return "math", 'many answers are formulas; needs: python -m pip install "sftkey[math]"'
    return "exact", "the answers are texts, compared as such"
