"""The figures of one stage, from its answers: `evaluation/<stage>.json`, written and read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from sftkey.data.response import Example, QuestionKey, Response
from sftkey.errors import DataError, RunError
from sftkey.evaluation.answers import GradedText, OfQuestion, problems_of
from sftkey.evaluation.grading import Untagged, read_untagged
from sftkey.evaluation.judge import JudgeFigures, judge_figures
from sftkey.evaluation.statistics import num_conversations, score_of, share_interval
from sftkey.evaluation.thinking import (
    Form,
    Rate,
    follow_thinkings,
    form_rates,
    judge_thinkings,
    thinking_form,
    thinking_hash,
)
from sftkey.files import refuse_irregular, text_hash, write_text
from sftkey.recipe.stages import BASE, stage_names
from sftkey.training.run_folder import read_ledger, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftkey.data.renderer import Renderer
    from sftkey.recipe.schema import Recipe


T = TypeVar("T")
# What no rule and no judge said isn't written, so that results without are as they were.
Judged = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class Question(OfQuestion):
    """How one question was answered; it holds nothing of the question itself.

    `thinking_right` is None where no rule can say, and both of the thinking are in results that
    were written before there were such. `judged` is what the second grader says; None where it
    wasn't asked or said neither yes nor no. `untagged` is how an answer of the base model reads
    that it wrote without the tags; it isn't counted in `correct`.
    """

    turn: int = 0  # of a conversation whose turns are all asked
    correct: bool
    strict: bool  # thinking, answer and nothing else
    parsed: bool  # there was an answer, and the grader could read it
    stopped: bool | None = None
    thinking_right: bool | None = None
    # Equal where two stages wrote the same thinking; a study's cells have it under the other name.
    thinking_hash: Annotated[
        str | None, Field(validation_alias=AliasChoices("thinking_hash", "thinking_sha256"))
    ] = None
    follows: Judged[bool] = None  # the answer is what the thinking arrives at
    judged: Judged[bool] = None
    form: Judged[Form] = None  # None in results that were written before forms were told
    untagged: Judged[Untagged] = None

    @property
    def likely_right(self) -> bool:
        """It is right, in the tags or without them."""
        return self.correct or self.untagged == "right"


Q = TypeVar("Q", bound=Sequence[Any])


def each_once(questions: Q) -> Q:
    """Refuse questions of which two have one key, for pydantic.

    Before turns were told apart, each turn of a conversation was graded with the answers to
    another one.
    """
    if len({each.key for each in questions}) < len(questions):
        what = "an older version wrote this, which took the turns of a conversation for one another"
        raise ValueError(what)
    return questions


# Gives flags by key, of questions and their answers; None stands for an answer that wasn't found.
Flags = Callable[[Sequence[Example], Sequence[str | None]], Mapping[QuestionKey, bool | None]]


VALIDATION_LOSS = "validation loss"  # older results know no other


class StageResult(BaseModel):
    """The figures of one stage, as `evaluation/<stage>.json` holds them.

    `acc` and `fmt` are shares of all questions: an answer that wasn't found is wrong. Intervals
    are Wilson's at 95%, over conversations where some have several questions: `num_conversations`
    is None where none has. `num_never_stopped` is None where another engine didn't say;
    `mean_thinking_length` is over the generations with thinking, None if there was none.
    `num_thinking_right` is of the `num_thinking_judged` that a rule can judge, `num_following` of
    the `num_judged_following` answers of which a rule tells whether they are what their thinking
    arrives at; these two are None where there is no rule. `thinking_loss` is the thinking's loss
    before and after the stage in nats a token, None of the base model and where nobody measured
    it; `loss_name` says on which rows. `judge` compares the second grader with the rule on the
    questions that it judged; to `num_unclear` others it said neither yes nor no. `rates` are those
    of the thinking's forms, None of older results.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    position: int  # 0 is the base model, stages follow in their order
    num_questions: int
    num_conversations: Judged[int] = None
    acc: float
    acc_interval: tuple[float, float]
    fmt: float
    fmt_interval: tuple[float, float]
    alpha: float
    score: float
    num_unparsed: int
    num_never_stopped: int | None
    mean_thinking_length: float | None
    thinking_unit: Literal["tokens", "characters"]  # the latter in no new results
    num_thinking_judged: int | None = None
    num_thinking_right: int | None = None
    num_judged_following: Judged[int] = None
    num_following: Judged[int] = None
    thinking_loss: tuple[float, float] | None = None
    loss_name: str = VALIDATION_LOSS
    judge: Judged[JudgeFigures] = None
    num_unclear: Judged[int] = None
    rates: Judged[dict[str, Rate]] = None
    settings: dict[str, Any]
    questions_sha256: str  # of prompts and reference answers: equal where questions are the same
    questions: Annotated[tuple[Question, ...], AfterValidator(each_once)]

    @property
    def rows(self) -> list[int]:
        """The conversation of each question."""
        return [question.index for question in self.questions]


def score(
    recipe: Recipe,
    renderer: Renderer,
    stage: str,
    texts: Sequence[GradedText],
    *,
    settings: Mapping[str, Any] | None = None,
    thinking_loss: tuple[float, float] | None = None,
    loss_name: str = VALIDATION_LOSS,
    judge: Flags | None = None,
) -> StageResult:
    """Return the figures of a stage of a run, or of `base`, from what `grade_texts` returns.

    `settings` are kept with the result beside the recipe's, so that a comparison can tell.
    `thinking_loss` is the thinking's before and after the stage; not every run has validation rows,
    so it has a name. `judge` is the second grader, if there is one.
    """
    if not texts:
        raise DataError("test rows", "expected at least one question; got none")
    section, examples = recipe.eval, [each.example for each in texts]
    position = stage_names(recipe).index(stage)
    flags = judge(examples, [each.parsed.answer for each in texts]) if judge else None
    questions = _questions(recipe, renderer.response, texts, flags or {}, untagged=position == 0)
    figures = answer_figures(questions)
    return StageResult(
        stage=stage,
        position=position,
        **figures,
        alpha=section.alpha,
        score=score_of(figures["acc"], figures["fmt"], section.alpha),
        mean_thinking_length=_mean_length(texts, renderer.tokenizer),
        thinking_unit="tokens",
        thinking_loss=thinking_loss,
        loss_name=loss_name,
        judge=judge_figures(questions),
        num_unclear=None if flags is None else list(flags.values()).count(None),
        rates=form_rates(questions),
        settings={
            "grader": section.grader,
            "response": asdict(renderer.response),
            "max_new_tokens": section.max_new_tokens,
            "temperature": section.temperature,
            **(settings or {}),
        },
        questions_sha256=text_hash(
            json.dumps([(each.index, each.prompt, each.answer) for each in examples])
        ),
        questions=questions,
    )


def _questions(
    recipe: Recipe,
    response: Response,
    texts: Sequence[GradedText],
    second: Mapping[QuestionKey, bool | None],
    untagged: bool,
) -> tuple[Question, ...]:
    """Return the flags of all questions; `second` is what the second grader says of them.

    With `untagged` an answer that has no tags is read without them, beside its grade.
    """
    from sftkey.data.sources import MADE

    grader, made = recipe.eval.grader, recipe.data.source in MADE
    examples, parsed = [each.example for each in texts], [each.parsed for each in texts]
    right = judge_thinkings([found.thinking for found in parsed], examples, grader, made)
    follows = follow_thinkings(parsed, examples, grader)
    return tuple(
        Question(
            index=each.example.index,
            turn=each.example.turn,
            correct=each.grade.right,
            strict=each.parsed.strict,
            parsed=each.grade.read is not None,
            stopped=each.generation.stopped,
            thinking_right=right[place],
            thinking_hash=thinking_hash(each.text, response),
            follows=follows[place],
            judged=second.get(each.example.key),
            form=thinking_form(each.text, each.parsed, response),
            untagged=read_untagged(each.text, each.example.answer, response, grader)
            if untagged and each.parsed.answer is None
            else None,
        )
        for place, each in enumerate(texts)
    )


def answer_figures(questions: Sequence[Question]) -> dict[str, Any]:
    """Return what the flags of a stage's answers add up to, or of one seed's in a study."""
    rows, num = [question.index for question in questions], len(questions)
    correct, strict = (
        [getattr(each, name) for each in questions] for name in ("correct", "strict")
    )
    unstopped = [not each.stopped for each in questions if each.stopped is not None]
    right = [each.thinking_right for each in questions if each.thinking_right is not None]
    follows = [each.follows for each in questions if each.follows is not None]
    return {
        "num_questions": num,
        "num_conversations": num_conversations(rows),
        "acc": sum(correct) / num,
        "acc_interval": share_interval(correct, rows),
        "fmt": sum(strict) / num,
        "fmt_interval": share_interval(strict, rows),
        "num_unparsed": sum(not each.parsed for each in questions),
        "num_never_stopped": sum(unstopped) if len(unstopped) == num else None,
        "num_thinking_judged": len(right),
        "num_thinking_right": sum(right),
        "num_judged_following": len(follows) or None,
        "num_following": sum(follows) if follows else None,
    }


def _mean_length(texts: Sequence[GradedText], tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return the mean number of a thinking's tokens; None where there is no thinking."""
    thinkings = [each.parsed.thinking for each in texts if each.parsed.thinking is not None]
    if not thinkings:
        return None
    return fmean(map(len, tokenizer(thinkings, add_special_tokens=False)["input_ids"]))


def result_file(run_folder: Path, stage: str) -> Path:
    """Return the file of a stage's figures, or of the base model's; it is there when graded."""
    return run_folder / "evaluation" / f"{stage}.json"


def result_files(run_folder: Path) -> list[Path]:
    """Return the files of a run's figures; a file of the user's own beside them is none."""
    files, ledger = (run_folder / "evaluation").glob("[!.]*.json"), read_ledger(run_folder)
    names = {BASE, *(record.name for record in ledger["stages"])} if ledger else None
    return [file for file in files if names is None or file.stem in names]


def write_result(folder: Path, result: StageResult) -> Path:
    """Write `<stage>.json`; under that name it is always whole."""
    file = folder / f"{result.stage}.json"
    write_text(file, result.model_dump_json(indent=1) + "\n")
    return file


def read_result(file: Path) -> StageResult:
    """Read what `write_result` wrote."""
    hint = "move the file aside; `sftkey evaluate` on its run writes it anew"
    return read_model(StageResult, file, hint)


M = TypeVar("M", bound=BaseModel)


def read_model(kind: type[M], file: Path, hint: str) -> M:
    """Read a JSON file of ours; one that holds something else is an error with this hint."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(str(file), problems_of(error), hint) from None


def read_results(run_folder: Path) -> list[StageResult]:
    """Read all results of a run in the order of its stages, the base model first."""
    refuse_irregular(run_folder.rglob("*"))
    results = read_graded(run_folder)
    if not results:
        hint = "`sftkey train` on its recipe evaluates a run; `sftkey evaluate` does so again"
        raise RunError(str(run_folder), "expected evaluation/<stage>.json; got none", hint)
    return results


def read_graded(run_folder: Path) -> list[StageResult]:
    """Read the same of a run that may have none."""
    require_whole(run_folder, "evaluation/*.json")
    results = map(read_result, result_files(run_folder))
    return sorted(results, key=lambda result: (result.position, result.stage))
