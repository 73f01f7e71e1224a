"""Is a written thinking valid, is it right, and is it the same one as before? No model is asked."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from sftkey.data.response import Example, Parsed, Response
from sftkey.evaluation.grading import grade, read_number
from sftkey.evaluation.numbers import MAX_DIGITS, first_number, last_number, same_number
from sftkey.evaluation.statement import normalize, plain
from sftkey.evaluation.statistics import (
    difference_with_interval,
    flipped,
    gain_text,
    p_text,
    share_interval,
    two_sided_p,
)
from sftkey.files import text_hash
from sftkey.tables import FittedTable

ARRIVING = 0.9  # from this share of references on, thinkings of a task end in its answers

_STEP_ENDS = re.compile(r"[\n;]|[.,]\s")
_BULLET = re.compile(r"^\s*[-*•]\s+")
_SIGNS = [
    (re.compile(r"\\times|\\cdot|[×·]|(?<=\d)\s*x\s*(?=\d)"), "*"),  # noqa: RUF001
    (re.compile(r"\\div|÷"), "/"),
]
_TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
    r"|[+*/=^<>]|(?<![^\W\d])-(?![^\W\d])"  # the hyphen of a word is no minus
)
_WORD = re.compile(rf"{_TOKEN.pattern}|[^\W\d_]+")

Step = tuple[str, ...]


def judge_thinkings(
    written: Sequence[str | None], examples: Sequence[Example], grader: str, made: bool = False
) -> list[bool | None]:
    r"""Tell which thinkings are right; None where no rule can say.

    Of numbers (`number`) there are two kinds of task, told apart by their references:

    - The thinking arrives at the answer (GSM8K: 99.5% of the references do, by their last number
      or the result of their last equation). Then a thinking is right that arrives there too, on
      whatever way.
    - It stops before the answer, as the demo's `4 + 3 = 7`, `7 - 2` does. Then a thinking is right
      if the reference's steps stand in it in their order and the last of them ends it. A step is
      what a line or clause says in numbers and signs: words, spaces and the way of writing a sign
      don't count, a result may follow where the reference leaves it out, and further steps may
      stand between. The same sum in another order counts as wrong.

    Made rows have one way of thinking: their steps count with other graders too, the words in them
    included. Any other thinking (choices, free texts, `math`) can be right in too many ways, and a
    reference without thinking says nothing.

    Args:
        written: As `Response.parse` found them; None, a thinking that was never closed, is wrong.
        examples: Their questions with the references.
        grader: That of the answers.
        made: Whether the rows come from a generator of tasks.

    >>> example = Example("4 + 3 - 2 =", "4 + 3 = 7\n7 - 2", "5", 0)
    >>> texts = ["4+3 = 7, 7 - 2 = 5", "4 + 3 = 8\n8 - 2"]
    >>> judge_thinkings(texts, [example] * 2, "number")
    [True, False]
    """
    by_answer = grader == "number" and references_keep(arrives, examples)

    def is_right(text: str | None, example: Example) -> bool | None:
        if not example.thinking.strip() or not (made or grader == "number"):
            return None
        if by_answer:
            return text is not None and arrives(text, example.answer)
        return _has_steps(text, example.thinking, words=grader != "number")

    return list(map(is_right, written, examples))


def references_keep(rule: Callable[[str, str], bool], examples: Sequence[Example]) -> bool:
    """Tell whether nine of ten references with a thinking keep a rule of it and the answer."""
    told = [example for example in examples if example.thinking.strip()]
    kept = sum(rule(example.thinking, example.answer) for example in told)
    return bool(told) and kept >= ARRIVING * len(told)


def arrives(thinking: str, answer: str) -> bool:
    """Tell whether a thinking ends in the answer: its last number, or its last result."""
    stated, (_, _, result) = read_number(answer), thinking.rpartition("=")
    found = [last_number(thinking), first_number(result) if "=" in thinking else None]
    return stated is not None and any(
        number and same_number(number, stated.numbers[-1]) for number in found
    )


def thinking_hash(text: str, response: Response) -> str:
    """Return 16 hex digits that are equal where two completions are, up to the thinking's end.

    The thinking ends at the first closing tag, where a key would begin; one that was never closed
    is all of its text.
    """
    tags = (response.thinking_close.strip(), response.answer_open.strip())
    end = next((tag for tag in tags if tag), None)
    thinking = text.partition(end)[0] if end else text
    return text_hash(thinking.strip())[:16]


def _has_steps(written: str | None, reference: str, words: bool) -> bool | None:
    """Look for the reference's steps in their order, the last one last."""
    steps, found = _steps(reference, words), _steps(written or "", words)
    if not steps:
        return None
    if not found or not _says(found[-1], steps[-1]):
        return False
    left = iter(found[:-1])
    return all(any(_says(step, wanted) for step in left) for wanted in steps[:-1])


def _says(step: Step, wanted: Step) -> bool:
    return step == wanted or step[: len(wanted) + 1] == (*wanted, "=")


def _steps(text: str, words: bool) -> list[Step]:
    """Return the numbers and signs of each clause that has a number, or all that each says."""
    steps = []
    for clause in filter(str.strip, _STEP_ENDS.split(text)):
        clause = plain(_BULLET.sub("", clause)).casefold()
        for sign, ascii_sign in _SIGNS:
            clause = sign.sub(ascii_sign, clause)
        tokens = (_WORD if words else _TOKEN).findall(clause)
        if words or any(token[-1].isdecimal() for token in tokens):
            steps.append(tuple(map(_form, tokens)))
    return [step for step in steps if step]


def _form(token: str) -> str:
    """Write a number in one form, as 1,200 and 1200.0 are one; anything else stays as it is."""
    is_number = token[-1].isdecimal() and len(token) <= MAX_DIGITS
    return str(Fraction(token.replace(",", ""))) if is_number else token


MOST_CHOICES = 26


def follow_thinkings(
    written: Sequence[Parsed], examples: Sequence[Example], grader: str
) -> list[bool | None]:
    """Tell which answers are what their thinking arrives at, right or wrong; None: no rule can say.

    There is a rule where at least nine of ten references keep it themselves: with `number` the
    answer is the thinking's last number, or the result of its last equation; with `choice` the last
    of the task's choices that the thinking names. Where the answer takes a step more than the
    thinking holds, or the thinking isn't closed, or there is no answer, nothing is said.

    >>> examples = [Example("2 + 3 =", "2 + 3 = 5", "5", 0)]
    >>> follow_thinkings([Parsed("2 + 3 = 6", "6", strict=True)], examples, "number")
    [True]
    """
    told = [example for example in examples if example.thinking.strip()]
    follows: Callable[[str, str], bool] | None = None
    if grader == "number":
        follows = arrives
    elif grader == "choice" and len({normalize(each.answer) for each in told}) <= MOST_CHOICES:
        choices = list(dict.fromkeys(example.answer.strip() for example in told))

        def follows(thinking: str, answer: str) -> bool:
            named = last_named(thinking, choices)
            return named is not None and grade(answer, named, grader).right

    if follows is None or not references_keep(follows, examples):
        return [None] * len(examples)
    return [
        None
        if each.thinking is None or each.answer is None
        else follows(each.thinking, each.answer)
        for each in written
    ]


def last_named(thinking: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a thinking names last; a single letter counts in upper case alone.

    >>> last_named("It is no fish, so the claim is False.", ["true", "false"])
    'false'
    """
    found = [
        (match.end(), len(choice), choice)
        for choice in choices
        for match in re.finditer(
            rf"(?<!\w){re.escape(choice)}(?!\w)",
            thinking,
            0 if len(choice) == 1 else re.IGNORECASE,
        )
    ]
    return max(found)[2] if found else None


Form = Literal["valid", "empty", "truncated", "missing"]
PASSED = "right and valid"


def thinking_form(text: str, found: Parsed, response: Response) -> Form:
    """Tell which of four forms the thinking of a generated text has; each text has one.

    They are those of ThinkPack (arXiv 2605.21127), whose rates are VR, ER, TR and MR:

    - `valid`: it was closed, and holds more than white space.
    - `empty`: it was closed, and holds nothing else.
    - `truncated`: it was opened and never closed, whether the model ran out of tokens or ended.
      With a format whose opening tag the prompt holds, every thinking that isn't closed is.
    - `missing`: neither tag stands in the text. In a format without tags: no end was found.

    Rpass@1 is the share of answers that are right and stand behind a valid thinking.

    >>> response = Response("<think>", "</think>", "", "")
    >>> texts = ["<think>so</think>4", "<think> </think>4", "<think>so 4", "4"]
    >>> [thinking_form(text, response.parse(text), response) for text in texts]
    ['valid', 'empty', 'truncated', 'missing']
    """
    if found.thinking is not None:
        return "valid" if found.thinking.strip() else "empty"
    opening, closing = response.thinking_open.strip(), response.thinking_close.strip()
    opened = opening in text if opening else bool(closing)
    return "truncated" if opened else "missing"


class Formed(Protocol):
    """A question's row and flags; the form is None in results that were written without."""

    index: int
    correct: bool
    form: Form | None


class Rate(BaseModel):
    """A share of questions with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    rate: float
    interval: tuple[float, float]

    def text(self, line_end: str = " ") -> str:
        """Return both, as tables show them."""
        return f"{self.rate:.3f}{line_end}[{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


def form_flags(questions: Sequence[Formed]) -> dict[str, list[bool]]:
    """Return a flag a question for each rate; nothing where a form isn't known."""
    if any(question.form is None for question in questions):
        return {}
    flags = {name: [each.form == name for each in questions] for name in get_args(Form)}
    return flags | {PASSED: [each.correct and each.form == "valid" for each in questions]}


def form_rates(questions: Sequence[Formed]) -> dict[str, Rate] | None:
    """Return the rates of forms and of right answers behind a valid thinking, by name."""
    rows = [question.index for question in questions]
    return {
        name: Rate(rate=sum(flags) / len(flags), interval=share_interval(flags, rows))
        for name, flags in form_flags(questions).items()
    } or None


@dataclass(frozen=True)
class ValidChange:
    """How many thinkings were valid in two stages, question by question.

    `p` is McNemar's, one-sided: how likely chance alone loses so many more than it gains.
    """

    num_before: int
    num_after: int
    num_lost: int
    num_gained: int
    p: float

    def text(self) -> str:
        """Say it in words."""
        turned = f"{self.num_lost} lost, {self.num_gained} gained, one-sided {p_text(self.p)}"
        return f"valid thinkings went from {self.num_before} to {self.num_after} ({turned})"


def valid_change(pairs: Sequence[tuple[Formed, Formed]]) -> ValidChange | None:
    """Pair the forms of two stages on the same questions; None where one isn't known."""
    if not pairs or any(old.form is None or new.form is None for old, new in pairs):
        return None
    before, after = ([each[side].form == "valid" for each in pairs] for side in (0, 1))
    return ValidChange(*flipped(before, after, [old.index for old, _ in pairs]))


@dataclass(frozen=True)
class PassedChange:
    """How much more of the same questions a stage answers right behind a valid thinking.

    `difference` and its 95% interval are shares of the questions; `p` is two-sided, like that of
    the right answers.
    """

    difference: float
    interval: tuple[float, float]
    p: float

    def text(self) -> str:
        """Say it in points."""
        return f"{gain_text(self.difference, self.interval)}, {p_text(self.p)}"


def passed_change(pairs: Sequence[tuple[Formed, Formed]]) -> PassedChange | None:
    """Pair the answers that are right behind a valid thinking; None where a form isn't known."""
    before, after = (form_flags([each[side] for each in pairs]) for side in (0, 1))
    if not (pairs and before and after):
        return None
    rows = [old.index for old, _ in pairs]
    difference, *ends = difference_with_interval(before[PASSED], after[PASSED], rows)
    p = two_sided_p(before[PASSED], after[PASSED], rows)
    return PassedChange(difference, (ends[0], ends[1]), p)


def form_table(
    rows: Iterable[tuple[str, Mapping[str, Rate] | None, ValidChange | None]],
) -> FittedTable | None:
    """Return the table of the forms, a row for each stage that has them; None without any."""
    known = [(name, rates, change) for name, rates, change in rows if rates]
    if not known:
        return None
    headers = ["valid VR\n[95%]", "empty\nER", "truncated\nTR", "missing\nMR"]
    headers += ["Rpass@1\n[95%]", "lost, gained\nvalid, p"]
    grid = FittedTable("thinking\nafter", headers)
    for name, rates, change in known:
        cells = [rates["valid"].text("\n")]
        cells += [f"{rates[form].rate:.3f}" for form in ("empty", "truncated", "missing")]
        lost = f"{change.num_lost}, {change.num_gained}\n{p_text(change.p)}" if change else ""
        grid.add([name, *cells, rates[PASSED].text("\n"), lost])
    return grid
