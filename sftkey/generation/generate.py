"""What a model writes for a prompt: in batches, up to the end of turn, saved as it comes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sftkey.data.response import QuestionKey
from sftkey.errors import Problem, RunError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sftkey.generation.key_switch import Switch


Key = TypeVar("Key", int, QuestionKey)  # a plain number where no question of the data is meant


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Args:
        text: Without the token that stopped it; other special tokens stand in it, since tags may
            be special tokens.
        num_tokens: Tokens of the text; None where another engine wrote it and doesn't say.
        stopped: Whether the model ended it by itself, before `max_new_tokens`; None as above.
        ids: Its tokens, where the model wrote it just now: no file has them.
    """

    text: str
    num_tokens: int | None = None
    stopped: bool | None = None
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    skip: Collection[int] = (),
    switch: Switch | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Generate after every prompt, longest prompts first; yields each batch as it is finished.

    Batches follow from the prompts alone, and each has its own seed: what is left out with `skip`
    changes no other generation, in any precision. The model's training mode, its `use_cache`
    and the random state are after each batch what they were before.

    Args:
        model: With or without adapter, quantized or not, on its device.
        tokenizer: Turns ids back into text.
        prompts: Token ids, up to where the model begins to write.
        stop_ids: Ids that end a generation: the trained end of turn must be among them.
        max_new_tokens: So many tokens and no more, the one that stops counted.
        batch_size: Prompts that are generated at a time.
        temperature: 0 is greedy; above it, all tokens are sampled by their probabilities.
        seed: Of the sampling.
        skip: Positions of prompts that are left out.
        switch: From `find_switch`: where the key adapter of a frozen key stage begins to act. None:
            the adapters that are active write all of it.

    Yields:
        Position of the prompt, and what was generated after it.

    Raises:
        ValueError: There is nothing to stop at, or an empty prompt.
    """
    from sftkey.generation.key_switch import write, write_switching

    if not stop_ids:
        raise ValueError("stop_ids: expected at least the trained end of turn; got none")
    if empty := [position for position, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompts: expected at least one token each; got none at {empty}")
    config = _generation_config(tokenizer, stop_ids, max_new_tokens, temperature)
    order = sorted(range(len(prompts)), key=lambda position: (-len(prompts[position]), position))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if set(batch) <= set(skip):
            continue
        with inferring(model), _seeded(model, f"{seed} {start}", temperature > 0):
            asked = [prompts[position] for position in batch]
            written = (
                write_switching(model, tokenizer, asked, config, switch)
                if switch
                else write(model, asked, config)
            )
        for position, ids in zip(batch, written, strict=True):
            if position not in skip:
                yield position, _generation(tokenizer, ids, stop_ids)


def generate_to_file(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[Key, Sequence[int]],
    file: Path,
    *,
    report: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[Key, Generation]:
    """Generate into a JSONL file, each batch appended as it is finished.

    What stands in the file already is not generated again; a last line that a kill left unfinished
    is dropped. Rows are objects with `index`, of questions also `turn`, `prompt_tokens` (their
    number), `text`, `num_tokens` and `stopped`, in any order.

    Args:
        model: As in `generate`.
        tokenizer: As in `generate`.
        prompts: Token ids by their question, or by a number.
        file: Its folder is there.
        report: Called with the number of finished generations and that of all.
        settings: As in `generate`.

    Raises:
        RunError: The file holds something else than generations after these prompts.
    """
    done = _resume(file, prompts)
    keys = list(prompts)
    skip = {position for position, key in enumerate(keys) if key in done}
    if report:
        report(len(done), len(keys))
    batches = generate(model, tokenizer, list(prompts.values()), skip=skip, **settings)
    with file.open("a", encoding="utf-8") as lines:
        for position, generation in batches:
            key = keys[position]
            name = {"index": key} if isinstance(key, int) else {"index": key.row, "turn": key.turn}
            row = {**name, "prompt_tokens": len(prompts[key]), **vars(generation)}
            del row["ids"]
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            done[key] = generation
            if report:
                report(len(done), len(keys))
    return {key: done[key] for key in keys}


def by_row(keys: Iterable[Key]) -> dict[int, list[Key]]:
    """Gather keys by their row."""
    rows: dict[int, list[Key]] = {}
    for key in keys:
        rows.setdefault(key if isinstance(key, int) else key.row, []).append(key)
    return rows


def key_of(asked: Sequence[Key], turn: int | None) -> Key | None:
    """Find the key that a line of a file means; None where it isn't asked.

    Args:
        asked: The keys of the line's row.
        turn: As the line says. Older files don't: they are read where the row has one question.

    Raises:
        ValueError: The row has several questions, and the line doesn't say which one it answers.
    """
    if turn is not None:
        return next((key for key in asked if isinstance(key, int) or key.turn == turn), None)
    if len(asked) > 1:
        raise ValueError(f"turn: expected which of the row's {len(asked)} questions; got none")
    return asked[0] if asked else None


def _resume(file: Path, prompts: Mapping[Key, Sequence[int]]) -> dict[Key, Generation]:
    """Read the generations of these prompts, after cutting off an unfinished last line."""
    if not file.exists():
        return {}
    with file.open("r+b") as rows:
        written = rows.read()
        rows.truncate(written.rfind(b"\n") + 1)
    done, asked = {}, by_row(prompts)
    for number, line in enumerate(written.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            index, num_tokens = row["index"], row["prompt_tokens"]
            generation = Generation(row["text"], row["num_tokens"], row["stopped"])
            turn = row.get("turn")
        except (ValueError, KeyError, TypeError):
            what = f"expected a generation; got {line[:60].decode(errors='replace')!r}"
            raise _not_ours(file, number, what) from None
        try:
            key = key_of(asked.get(index, []), turn)
        except ValueError as error:
            raise _not_ours(file, number, f"row {index}: {error}") from None
        if key is None:  # of a longer evaluation: nothing to do with it
            continue
        num_prompt = len(prompts[key])
        if num_tokens != num_prompt:
            what = f"expected a generation after a prompt of {num_prompt} tokens; got {num_tokens}"
            raise _not_ours(file, number, f"row {index}: {what}")
        done[key] = generation
    return done


def _not_ours(file: Path, line: int, what: str) -> RunError:
    hint = "move the file aside; then all of it is generated again"
    return RunError(str(file), [Problem("", what, line)], hint)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
) -> GenerationConfig:
    """Say all that changes the tokens; what is unset, transformers takes from the published config.

    Published configs sample and penalize repetition (Qwen2.5-Instruct's do): an evaluation that
    says greedy must not.
    """
    from transformers import GenerationConfig

    ways: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50}
    if temperature > 0:
        ways = {"do_sample": True, "temperature": temperature, "top_k": 0, "min_p": 0.0}
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(
        **ways,
        top_p=1.0,
        typical_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=next(iter(stop_ids)) if pad_id is None else pad_id,
        use_cache=True,  # the trainer switches the model's own off
    )


def _generation(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: Collection[int]
) -> Generation:
    """Cut a row at its first stop; what stands after it is padding."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
    return Generation(text, end, end < len(ids), tuple(ids[:end]))


@contextmanager
def inferring(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards each module is in the mode that it was in.

    That switches gradient checkpointing off too, which would drop the cache.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _seeded(model: PreTrainedModel | PeftModel, seed: str, sampled: bool) -> Iterator[None]:
    """Seed the sampling of one batch, and put the random state back that training goes on from."""
    import torch

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices) if sampled else nullcontext():
        if sampled:
            torch.manual_seed(random.Random(seed).getrandbits(63))  # the same on every machine
        yield
