"""A stage's answers: as any engine wrote them, and graded, with question and reference."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sftkey.activity import activity, tell
from sftkey.data.response import Example, Parsed, QuestionKey
from sftkey.errors import DataError, Problem, RunError, shortened
from sftkey.evaluation.grading import Grade, grade
from sftkey.files import write_text
from sftkey.generation.generate import Generation, by_row, key_of, lines_of, read_row
from sftkey.training.run_folder import require_whole

if TYPE_CHECKING:
    from sftkey.data.renderer import Renderer
    from sftkey.recipe.schema import Recipe


def read_generations(
    file: Path, expected: Collection[QuestionKey]
) -> dict[QuestionKey, Generation]:
    """Read one generation for each question from JSONL, in any order.

    A row is an object with `index` and `text`; `num_tokens` and `stopped` may stand in it, and
    `turn` must where several turns of one conversation are asked.

    Raises:
        DataError: With all rows that are no generations, stand twice or belong to no question,
            and with the questions that have none.
    """
    hint = 'a row is {"index": 7, "text": "…"}, one for each question; `stopped` is optional'
    generations: dict[QuestionKey, Generation] = {}
    first_lines: dict[QuestionKey, int] = {}
    problems, asked = [], by_row(expected)
    for number, line in lines_of(file, hint):
        where = ""
        try:
            row = read_row(line)
            index, turn = row["index"], row.get("turn")
            where, keys = f"index {index}", asked.get(index, [])
            if turn is None and len(keys) > 1:
                hint = _OF_ONE_TURN
            key = key_of(keys, turn)
            where = _named(key or QuestionKey(index, turn or 0), asked)
            if key is None:
                raise ValueError(f"expected the index of one of the {len(expected)} questions")
            if key in first_lines:
                raise ValueError(f"expected once; it stands in line {first_lines[key]} already")
        except ValueError as error:
            problems.append(Problem(where, str(error), number))
        else:
            generations[key], first_lines[key] = Generation.of(row), number
    what = "expected a generation; got none"
    missing = (key for key in expected if key not in generations)
    problems += [Problem(_named(key, asked), what) for key in missing]
    if problems:
        raise DataError(str(file), shortened(problems), hint)
    return generations


_OF_ONE_TURN = (
    'with `turns: all` a row is {"index": 7, "turn": 0, "text": "…"}; a file that an older '
    "version wrote lacks answers: move it aside, and `sftkey evaluate` asks again"
)


def _named(key: QuestionKey, asked: Mapping[int, Sequence[QuestionKey]]) -> str:
    turn = f", turn {key.turn}" if key.turn or len(asked.get(key.row, ())) > 1 else ""
    return f"index {key.row}{turn}"


@dataclass(frozen=True)
class GradedText:
    """What a model wrote to a question, and the rule's grade of its answer.

    `text` is the generation without what the chat template and an engine put around it, `parsed`
    its thinking and answer.
    """

    example: Example
    generation: Generation
    text: str
    parsed: Parsed
    grade: Grade


@activity("grading the answers")
def grade_texts(
    recipe: Recipe,
    renderer: Renderer,
    generations: Mapping[QuestionKey, Generation],
    examples: Iterable[Example],
) -> list[GradedText]:
    """Grade what was written to each question, as a run's recipe says, in the order of the rows."""
    found: list[GradedText] = []
    examples = list(examples)
    for example in sorted(examples, key=lambda each: each.key):
        tell(f"{len(found)} of {len(examples)}")
        written = generations[example.key]
        text = renderer.bare(written.text)
        parsed = renderer.response.parse(text)
        verdict = grade(parsed.answer, example.answer, recipe.eval.grader)
        found.append(GradedText(example, written, text, parsed, verdict))
    return found


Kind = Literal["wrong", "unparsed", "truncated", "invalid"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class OfQuestion(BaseModel):
    """What is known of one question, by its row and turn."""

    model_config = ConfigDict(frozen=True)

    index: int
    turn: int

    @property
    def key(self) -> QuestionKey:
        """Row and turn."""
        return QuestionKey(self.index, self.turn)


class GradedAnswer(OfQuestion):
    """One answer, for people to read.

    `question` is without the system message, `expected` the reference's answer, `got` the text of
    the model's, and `read` what the grader read in it; these two and `thinking` are None where none
    was found. `text` is all that the model wrote, where thinking and answer are not all of it. The
    kinds: `wrong`: an answer was read, and it isn't right. `unparsed`: none was found, or the
    grader read nothing in it. `truncated`: it reached `max_new_tokens`. `invalid`: it is more or
    less than thinking and answer in their tags. The last two may be right.
    """

    question: str
    expected: str
    got: str | None
    read: str | None
    thinking: str | None
    text: str | None
    right: bool
    kinds: tuple[Kind, ...]


def graded_answers(texts: Iterable[GradedText]) -> list[GradedAnswer]:
    """Put what was written, and what was read in it, beside question and reference."""
    return [
        GradedAnswer(
            index=each.example.index,
            turn=each.example.turn,
            question=each.example.question,
            expected=each.example.answer,
            got=each.parsed.answer,
            read=each.grade.read,
            thinking=each.parsed.thinking,
            text=None if each.parsed.strict else each.generation.text,
            right=each.grade.right,
            kinds=tuple(_kinds(each)),
        )
        for each in texts
    ]


def _kinds(graded: GradedText) -> Iterator[Kind]:
    if not graded.grade.right:
        yield "unparsed" if graded.grade.read is None else "wrong"
    if graded.generation.stopped is False:
        yield "truncated"
    if not graded.parsed.strict:
        yield "invalid"


def write_answers(folder: Path, stage: str, answers: Sequence[GradedAnswer]) -> Path:
    """Write `<stage>.graded.jsonl`; under that name it is always whole."""
    file = folder / f"{stage}.graded.jsonl"
    write_text(file, "".join(answer.model_dump_json() + "\n" for answer in answers))
    return file


def read_answers(run: Path, stage: str) -> list[GradedAnswer]:
    """Read a stage's graded answers."""
    file = run / "evaluation" / f"{stage}.graded.jsonl"
    hint = f"write them from its generations, without any weights: sftkey evaluate {run}"
    require_whole(run, f"evaluation/{file.name}")
    if not file.exists():
        raise RunError(str(run), f"expected graded answers of {stage}; got none", hint)
    try:
        lines = file.read_bytes().splitlines()
        return [GradedAnswer.model_validate_json(line) for line in lines]
    except ValidationError as error:
        hint = f"move the file aside; sftkey evaluate {run} writes it anew"
        raise RunError(str(file), problems_of(error), hint) from None


def problems_of(error: ValidationError) -> list[Problem]:
    """Return what pydantic finds wrong, and where in what was read."""
    found = error.errors()
    return shortened([Problem(".".join(map(str, each["loc"])), each["msg"]) for each in found])


def chosen(
    answers: Sequence[GradedAnswer], kind: str | None = None, pattern: str | None = None
) -> list[GradedAnswer]:
    """Return the answers that aren't right, or all of a kind; of these, those with a pattern.

    Of `truncated` and `invalid` also those that are right are taken. The pattern is a regular
    expression, without regard to case, that stands in the question, the reference, the thinking or
    whatever the model wrote.
    """
    if kind is not None and kind not in KINDS:
        raise RunError("--kind", f"expected one of {', '.join(KINDS)}; got {kind!r}")
    try:
        wanted = re.compile(pattern or "", re.IGNORECASE)
    except re.error as error:
        hint = "write a backslash before a sign that is meant as it stands: 2 \\+ 2"
        raise RunError("--grep", f"expected a regular expression; {error}", hint) from None
    kept = [each for each in answers if (kind in each.kinds if kind else not each.right)]
    return [
        each
        for each in kept
        if any(
            wanted.search(text)
            for text in (each.question, each.expected, each.got, each.thinking, each.text)
            if text is not None
        )
    ]
