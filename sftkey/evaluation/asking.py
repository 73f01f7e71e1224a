"""Asks a model the same questions after its own thinking, after the reference's, and after none.

What stands before an answer are the token ids of a training row, up to and with the last one of its
thinking, so that the model reads the very seam that it was trained on. Of its own thinking it reads
the ids that it wrote, which are not decoded and tokenized anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sftkey.data.renderer import Frame
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.evaluation.conditions import CONDITIONS, Outcome
from sftkey.evaluation.grading import grade
from sftkey.evaluation.key_losses import Context, key_losses
from sftkey.generation.generate import Generation, generate
from sftkey.generation.key_switch import Switch, find_switch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_TOKENS = 8  # that a key may have beyond the longest of the references
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """A question with what may stand before its answer.

    Args:
        answer: The reference's.
        prompt: Its ids, as inference feeds them.
        reference: Up to the end of the reference's thinking.
        none: Up to the end of empty tags.
    """

    answer: str
    prompt: list[int]
    reference: Context
    none: Context


@dataclass(frozen=True)
class Settings:
    """How answers are generated, greedily, and judged."""

    grader: str
    max_new_tokens: int
    batch_size: int
    stop_ids: Sequence[int]


def asked_rows(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], frame: Frame
) -> list[Asked]:
    """Cut rows where their thinking ends; a row that can't be built without thinking is left out.

    Args:
        examples: Of the rows, in their order.
        rows: With `input_ids` and `segment_ids`.
        frame: The run's frame.

    Raises:
        FrameError: No tag tells thinking from answer.
    """
    response = frame.response
    if not (response.thinking_close.strip() or response.answer_open.strip()):
        raise FrameError(
            "response.thinking",
            "expected a closing tag, or an opening tag of the answer; both are empty, so that "
            "nothing tells where a thinking ends",
            "write one of them",
        )
    bare = tokenize([replace(example, thinking="") for example in examples], frame)
    return [
        Asked(
            example.answer,
            frame.prompt_ids(example.prompt),
            _cut(row["input_ids"], row["segment_ids"]),
            _cut(none.input_ids, none.segment_ids),
        )
        for example, row, none in zip(examples, rows, bare, strict=True)
        if isinstance(none, Row)
    ]


def _cut(input_ids: Sequence[int], segment_ids: Sequence[int]) -> Context:
    start = next(n for n, segment in enumerate(segment_ids) if segment > Segment.THINKING)
    return Context(list(input_ids[:start]), list(input_ids[start:]))


def ask(
    model: PreTrainedModel | PeftModel,
    frame: Frame,
    asked: Sequence[Asked],
    settings: Settings,
    report: Report | None = None,
) -> dict[str, list[Outcome]]:
    """Let the model answer in the three conditions; what is judged is always the whole response.

    Args:
        model: On its device; a key adapter, if it has one, acts from the end of a thinking on.
        frame: The run's.
        asked: The questions.
        settings: As above.
        report: Called with `own` or `given`, the number of answers after such thinkings, and how
            many there will be.

    Returns:
        By condition, what came of each question.
    """
    reference, none = [each.reference for each in asked], [each.none for each in asked]
    prompts = [Context(each.prompt, []) for each in asked]
    longest = max(len(context.key) for context in (*reference, *none)) + SPARE_TOKENS
    own = _answers("own", model, frame, prompts, settings, settings.max_new_tokens, report)
    # One call: small batches leave a machine idle.
    given = _answers("given", model, frame, [*reference, *none], settings, longest, report)
    written = {"own": own, "reference": given[: len(asked)], "none": given[len(asked) :]}
    read = {"own": prompts, "reference": reference, "none": none}
    scored: dict[str, Sequence[Context | None]] = {**read}
    scored["own"] = [_own(*pair, frame) for pair in zip(asked, own, strict=True)]
    contexts = [each for name in CONDITIONS for each in scored[name] if each is not None]
    losses = iter(key_losses(model, contexts, find_switch(model, frame)))
    return {
        name: [
            _outcome(
                frame, settings, each, before, generation, None if context is None else next(losses)
            )
            for each, before, generation, context in zip(
                asked, read[name], written[name], scored[name], strict=True
            )
        ]
        for name in CONDITIONS
    }


def _answers(
    thinking: str,
    model: PreTrainedModel | PeftModel,
    frame: Frame,
    contexts: Sequence[Context],
    settings: Settings,
    max_new_tokens: int,
    report: Report | None,
) -> list[Generation]:
    """Generate greedily after contexts that hold no thinking (`own`), or a given one."""
    generations: dict[int, Generation] = {}
    for position, generation in generate(
        model,
        frame.tokenizer,
        [context.before for context in contexts],
        stop_ids=settings.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=settings.batch_size,
        switch=find_switch(model, frame, thinking_given=thinking == "given"),
    ):
        generations[position] = generation
        if report:
            report(thinking, len(generations), len(contexts))
    return [generations[position] for position in range(len(contexts))]


def _own(asked: Asked, generation: Generation, frame: Frame) -> Context | None:
    """Give the reference's key behind what the model thought; None if that never ended."""
    num_tokens = num_thinking_tokens(generation.ids, frame)
    if num_tokens is None:
        return None
    return Context([*asked.prompt, *generation.ids[:num_tokens]], asked.reference.key)


def num_thinking_tokens(ids: Sequence[int], frame: Frame) -> int | None:
    """Count the tokens of a response up to the one that completes the thinking's closing tag.

    Args:
        ids: What a model wrote after a prompt.
        frame: The run's.

    Returns:
        None where the thinking never ended.
    """
    response = frame.response
    switch = Switch((), response.thinking_close, response.answer_open, frame.bridge)
    text = _text(frame.tokenizer, ids)
    end = switch.thinking_end(text)
    if end is None:
        return None
    num_tokens = len(ids)
    while num_tokens and _text(frame.tokenizer, ids[: num_tokens - 1]).startswith(text[:end]):
        num_tokens -= 1
    return num_tokens


def _outcome(
    frame: Frame,
    settings: Settings,
    asked: Asked,
    before: Context,
    generation: Generation,
    nats: float | None,
) -> Outcome:
    """Judge a whole response: what stood before the generation, and what was generated."""
    ids = [*before.before[len(asked.prompt) :], *generation.ids]
    text = _text(frame.tokenizer, ids).removeprefix(frame.bridge)
    answer = frame.response.parse(text).answer
    return Outcome(
        right=grade(answer, asked.answer, settings.grader),
        parsed=answer is not None,
        stopped=bool(generation.stopped),
        nats=nats,
        num_tokens=len(before.key or asked.reference.key),
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
