"""Ask a model in three conditions: its own thinking, the reference's, none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from sftkey.activity import activity, tell
from sftkey.data.labels import IGNORED
from sftkey.data.renderer import Renderer, stop_ids
from sftkey.data.response import Example, Segment, decoded
from sftkey.data.tokenization import Row, tokenize
from sftkey.diagnosis.rule import CONDITIONS, Outcome
from sftkey.errors import FrameError
from sftkey.evaluation.grading import grade
from sftkey.generation.generate import Generation, generate, inferring
from sftkey.generation.key_switch import Switch, find_switch
from sftkey.models.adapters import without_adapters
from sftkey.models.key_pass import KEY, acting, cache_name
from sftkey.recipe.schema import EvalSection
from sftkey.training.detached import Aligned, align

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCH_TOKENS = 4096  # padding counted


@dataclass(frozen=True)
class KeyContext:
    """Token ids up to the last one of a thinking, and those of the key that is scored behind it."""

    before: list[int]
    key: list[int]


@activity("measuring the loss of the keys")
def key_losses(
    model: PreTrainedModel | PeftModel, contexts: Sequence[KeyContext], switch: Switch | None = None
) -> list[float]:
    """Return the loss of each key in nats, summed over its tokens; nothing before it counts.

    No context is empty before its key. With a switch, as `find_switch` gives it, the context is
    read with its adapters, and its last token and the key with the key adapter, too.
    """
    losses = [0.0] * len(contexts)
    with inferring(model), torch.no_grad():
        for batch in _batches(contexts):
            found = _batch_losses(model, [contexts[n] for n in batch], switch)
            for position, loss in zip(batch, found.tolist(), strict=True):
                losses[position] = loss
    return losses


def _batches(contexts: Sequence[KeyContext]) -> Iterator[list[int]]:
    """Put contexts of similar lengths together, so many as their tokens allow."""
    lengths = [len(context.before) + len(context.key) for context in contexts]
    batch: list[int] = []
    for position in sorted(range(len(contexts)), key=lambda n: lengths[n]):
        if batch and lengths[position] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _batch_losses(
    model: Any, contexts: Sequence[KeyContext], switch: Switch | None
) -> torch.Tensor:
    """Score one batch: `(B,)`; its keys begin in one column, as in training behind a context."""
    rows = [torch.tensor([*context.before, *context.key]) for context in contexts]
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows])
    starts = torch.tensor([len(context.before) - 1 for context in contexts])
    places = torch.arange(ids.shape[1])
    scored = (places >= starts[:, None]) & (places < lengths - 1)
    labels = pad(ids[:, 1:], (0, 1)).masked_fill(~scored, IGNORED)
    mask = (places < lengths).long()
    ids, mask, labels, starts = (each.to(model.device) for each in (ids, mask, labels, starts))
    batch = align(ids, mask, labels, starts=starts)
    length, width = batch.input_ids.shape[1], batch.labels.shape[1]
    if switch is None:
        logits = _logits(model, batch, slice(0, length), width)
    else:  # the context with the adapters that wrote it, then the key with the key's as well
        cache = DynamicCache(config=model.config)
        if batch.num_context:
            with acting(model, switch.context):
                _logits(model, batch, slice(0, batch.num_context), 1, cache)
        with acting(model, [*switch.context, KEY]):
            logits = _logits(model, batch, slice(batch.num_context, length), width, cache)
    losses = cross_entropy(
        logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1)


def _logits(
    model: Any, batch: Aligned, columns: slice, width: int, cache: DynamicCache | None = None
) -> torch.Tensor:
    """Run some columns of a batch; return the logits of the last ones: `(B, width, V)`."""
    base = without_adapters(model)
    taken = signature(base.forward).parameters
    given = {"position_ids": batch.position_ids[:, columns], "logits_to_keep": width}
    inputs = {name: value for name, value in given.items() if name in taken}
    if cache is not None:
        inputs[cache_name(base)] = cache
    output = model(
        input_ids=batch.input_ids[:, columns],
        attention_mask=batch.attention_mask[:, : columns.stop],
        use_cache=cache is not None,
        **inputs,
    )
    logits: torch.Tensor = output.logits[:, -width:]
    return logits


SPARE_TOKENS = 8  # that a key may have beyond the longest of the references
OnAnswered = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AskedRow:
    """A question with its reference answer, and the ids of what may stand before it.

    `reference` goes up to the end of the reference's thinking, `none` to that of empty tags.
    """

    answer: str
    prompt: list[int]
    reference: KeyContext
    none: KeyContext


def asked_rows(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], renderer: Renderer
) -> list[AskedRow]:
    """Cut rows where their thinking ends; a row that can't be built without thinking is left out.

    The rows have `input_ids` and `segment_ids`.
    """
    if not renderer.response.ends_thinking:
        raise FrameError(
            "response.thinking",
            "expected a closing tag, or an opening tag of the answer; both are empty, so that "
            "nothing tells where a thinking ends",
            "write one of them",
        )
    bare = tokenize([replace(example, thinking="") for example in examples], renderer)
    return [
        AskedRow(
            example.answer,
            renderer.prompt_ids(example.prompt),
            _cut(row["input_ids"], row["segment_ids"]),
            _cut(none.input_ids, none.segment_ids),
        )
        for example, row, none in zip(examples, rows, bare, strict=True)
        if isinstance(none, Row)
    ]


def _cut(input_ids: Sequence[int], segment_ids: Sequence[int]) -> KeyContext:
    start = next(n for n, segment in enumerate(segment_ids) if segment > Segment.THINKING)
    return KeyContext(list(input_ids[:start]), list(input_ids[start:]))


def ask(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    asked: Sequence[AskedRow],
    settings: EvalSection,
    report: OnAnswered | None = None,
) -> dict[str, list[Outcome]]:
    """Let the model answer in the three conditions; what is judged is always the whole response.

    Answers are greedy, whatever the settings say. A key adapter, if the model has one, acts from
    the end of a thinking on. `report` is called with `own` or `given`, the number of answers after
    such thinkings, and how many there will be.

    Returns:
        By condition, what came of each question.
    """
    reference, none = [each.reference for each in asked], [each.none for each in asked]
    prompts = [KeyContext(each.prompt, []) for each in asked]
    longest = max(len(context.key) for context in (*reference, *none)) + SPARE_TOKENS
    own = _answers("own", model, renderer, prompts, settings, settings.max_new_tokens, report)
    # One call: small batches leave a machine idle.
    given = _answers("given", model, renderer, [*reference, *none], settings, longest, report)
    written = {"own": own, "reference": given[: len(asked)], "none": given[len(asked) :]}
    read = {"own": prompts, "reference": reference, "none": none}
    scored: dict[str, Sequence[KeyContext | None]] = {**read}
    scored["own"] = [_own(*pair, renderer) for pair in zip(asked, own, strict=True)]
    contexts = [each for name in CONDITIONS for each in scored[name] if each is not None]
    losses = iter(key_losses(model, contexts, find_switch(model, renderer)))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in CONDITIONS}
    for name, found in outcomes.items():
        rows = zip(asked, read[name], written[name], scored[name], strict=True)
        for each, before, generation, context in rows:
            nats = None if context is None else next(losses)
            found.append(_outcome(renderer, settings.grader, each, before, generation, nats))
    return outcomes


@activity("asking the model")
def _answers(
    thinking: str,
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    contexts: Sequence[KeyContext],
    settings: EvalSection,
    max_new_tokens: int,
    report: OnAnswered | None,
) -> list[Generation]:
    """Generate greedily after contexts that hold no thinking (`own`), or a given one."""
    generations: dict[int, Generation] = {}
    for position, generation in generate(
        model,
        renderer.tokenizer,
        [context.before for context in contexts],
        stop_ids=stop_ids(renderer, model.generation_config.eos_token_id),
        max_new_tokens=max_new_tokens,
        batch_size=settings.batch_size,
        switch=find_switch(model, renderer, thinking_given=thinking == "given"),
    ):
        generations[position] = generation
        tell(f"{len(generations)} of {len(contexts)} answers after {thinking} thinking")
        if report:
            report(thinking, len(generations), len(contexts))
    return [generations[position] for position in range(len(contexts))]


def _own(asked: AskedRow, generation: Generation, renderer: Renderer) -> KeyContext | None:
    """Return the reference's key behind what the model thought; None if that never ended."""
    num_tokens = num_thinking_tokens(generation.ids, renderer)
    if num_tokens is None:
        return None
    return KeyContext([*asked.prompt, *generation.ids[:num_tokens]], asked.reference.key)


def num_thinking_tokens(ids: Sequence[int], renderer: Renderer) -> int | None:
    """Count the tokens of a response up to the one that completes the thinking's closing tag.

    None where the thinking never ended.
    """
    response = renderer.response
    switch = Switch((), response.thinking_close, response.answer_open, renderer.assistant_prefix)
    return switch.num_thinking_tokens(renderer.tokenizer, ids)


def _outcome(
    renderer: Renderer,
    grader: str,
    asked: AskedRow,
    before: KeyContext,
    generation: Generation,
    nats: float | None,
) -> Outcome:
    """Judge a whole response: what stood before the generation, and what was generated."""
    ids = [*before.before[len(asked.prompt) :], *generation.ids]
    written = decoded(renderer.tokenizer, ids)
    verdict = grade(renderer.parse(written).answer, asked.answer, grader)
    return Outcome(
        right=verdict.right,
        parsed=verdict.read is not None,
        stopped=bool(generation.stopped),
        nats=nats,
        num_tokens=len(before.key or asked.reference.key),
    )
