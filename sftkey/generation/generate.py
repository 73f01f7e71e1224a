"""What a model writes for a prompt: in batches, up to the end of turn, saved as it comes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sftkey.activity import activity, tell
from sftkey.data.response import QuestionKey, decoded, require_text
from sftkey.errors import DataError, Problem, RunError
from sftkey.files import refuse_irregular

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sftkey.generation.key_switch import Switch


Key = TypeVar("Key", int, QuestionKey)  # a plain number where no question of the data is meant


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Its text lacks the token that stopped it; other special tokens stand in it, since tags may be
    such. What another engine wrote may say nothing more.
    """

    text: str
    num_tokens: int | None = None
    stopped: bool | None = None  # whether the model ended it by itself, before `max_new_tokens`
    # Its tokens, where the model wrote it just now: no file has them.
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Generation:
        """Return what a row of a file holds, as `read_row` has read it."""
        return cls(row["text"], row.get("num_tokens"), row.get("stopped"))


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
    on_text: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Generate after every prompt, longest prompts first; yields each batch as it is finished.

    Where a model scales positions by the longest row of a batch (dynamic NTK, longrope), rows that
    may grow so long are generated alone.

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
        on_text: Of one prompt alone: gets all of its text so far, whenever some has come. With
            `switch` the thinking comes at once.

    Yields:
        Position of the prompt, and what was generated after it.
    """
    from sftkey.generation.key_switch import Streamer, write, write_switching
    from sftkey.models.facts import mixing_length

    if not stop_ids:
        raise ValueError("stop_ids: expected at least the trained end of turn; got none")
    if empty := [position for position, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompts: expected at least one token each; got none at {empty}")
    config = generation_config(tokenizer, stop_ids, max_new_tokens, temperature)
    streamer = Streamer(tokenizer, stop_ids, on_text) if on_text else None
    order = sorted(range(len(prompts)), key=lambda position: (-len(prompts[position]), position))
    lengths = [len(prompts[position]) + max_new_tokens for position in order]
    for start, stop in _bounds(lengths, batch_size, limit := mixing_length(model.config)):
        batch = order[start:stop]
        if set(batch) <= set(skip):
            continue
        if limit is not None and lengths[start] > limit:
            _forget_longer_rows(model)
        sampled = temperature > 0
        asked = [prompts[position] for position in batch]
        with inferring(model), _unpublished(model), _seeded(model, f"{seed} {start}", sampled):
            if switch:
                written = write_switching(model, tokenizer, asked, config, switch, streamer)
            else:
                written = write(model, asked, config, streamer)
        for position, ids in zip(batch, written, strict=True):
            if position not in skip:
                yield position, _until_stop(tokenizer, ids, stop_ids)


def _until_stop(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Collection[int]
) -> Generation:
    """Return what a row has written: what stands behind its first stop is padding."""
    end = next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))
    return Generation(decoded(tokenizer, ids[:end]), end, end < len(ids), tuple(ids[:end]))


def _bounds(
    lengths: Sequence[int], batch_size: int, limit: int | None
) -> Iterator[tuple[int, int]]:
    """Yield where each batch starts and stops: a row above the limit has one of its own.

    >>> list(_bounds([9, 8, 3, 2, 1], 2, 5))
    [(0, 1), (1, 2), (2, 4), (4, 5)]
    """
    start = 0
    while start < len(lengths):
        alone = limit is not None and lengths[start] > limit
        stop = min(start + (1 if alone else batch_size), len(lengths))
        yield start, stop
        start = stop


def _forget_longer_rows(model: PreTrainedModel | PeftModel) -> None:
    """Put dynamic NTK scaling back: it stays as the longest row had it until a short one."""
    import torch

    with inferring(model), torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))


@activity("generating")
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
    number), `text`, `num_tokens` and `stopped`, in any order. `report` is called with the number
    of finished generations and that of all; `settings` are those of `generate`.

    Raises:
        RunError: The file holds something else than generations after these prompts.
    """
    done = generated_in(file, prompts)
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
            tell(f"{len(done)} of {len(keys)} answers")
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
    """Find the key that a line of a file means, of those of its row; None where it isn't asked.

    Older files don't say the turn: they are read where the row has one question.
    """
    if turn is not None:
        return next((key for key in asked if isinstance(key, int) or key.turn == turn), None)
    if len(asked) > 1:
        raise ValueError(f"turn: expected which of the row's {len(asked)} questions; got none")
    return asked[0] if asked else None


def lines_of(file: Path, hint: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file of generations that aren't empty, and their numbers from 1."""
    refuse_irregular([file])
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(str(file), f"can't be read: {error.strerror}", hint) from None
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


_FIELDS = {
    "index": ((int,), "an integer"),
    "turn": ((int, type(None)), "an integer"),
    "text": ((str,), "a text"),
    "num_tokens": ((int, type(None)), "an integer"),
    "stopped": ((bool, type(None)), "true or false"),
}


def read_row(line: bytes) -> dict[str, Any]:
    """Read a line of a file of generations, a run's own or what another engine wrote."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also of bytes that are no UTF-8
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object; got {line[:60].decode(errors='replace')!r}")
    for key, (types, name) in _FIELDS.items():
        if type(row.get(key)) not in types:  # JSON's true is no integer, though Python's is
            raise ValueError(f"{key}: expected {name}; got {row.get(key)!r}")
    try:
        require_text(row["text"])
    except ValueError as error:
        raise ValueError(f"text: {error}") from None
    return row


def generated_in(file: Path, prompts: Mapping[Key, Sequence[int]]) -> dict[Key, Generation]:
    """Read the generations of these prompts, after cutting off an unfinished last line."""
    if not file.exists():
        return {}
    with file.open("r+b") as rows:
        written = rows.read()
        rows.truncate(written.rfind(b"\n") + 1)
    done, asked = {}, by_row(prompts)
    for number, line in enumerate(written.split(b"\n")[:-1], start=1):
        where = ""
        try:
            row = read_row(line)
            where, num_tokens = f"row {row['index']}: ", row.get("prompt_tokens")
            key = key_of(asked.get(row["index"], []), row.get("turn"))
            if key is not None and num_tokens != (asks := len(prompts[key])):
                what = f"expected a generation after a prompt of {asks} tokens; got {num_tokens}"
                raise ValueError(what)
        except ValueError as error:
            hint = "move the file aside; then all of it is generated again"
            raise RunError(str(file), [Problem("", f"{where}{error}", number)], hint) from None
        if key is not None:  # else of a longer evaluation: nothing to do with it
            done[key] = Generation.of(row)
    return done


def generation_config(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
) -> GenerationConfig:
    """Say what sftkey means and nothing else: ends, padding, length, and how a token is chosen."""
    from transformers import GenerationConfig

    ways: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        ways = {"do_sample": True, "temperature": temperature, "top_k": 0}  # 50 is the default
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(
        **ways,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=next(iter(stop_ids)) if pad_id is None else pad_id,
        use_cache=True,  # the trainer switches the model's own off
    )


@contextmanager
def _unpublished(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Hide the model's own generation config: transformers fills in whatever ours leaves unset.

    Published ones sample, penalize repetition, suppress tokens, or stop by the clock. Switching
    off what is known would miss the next setting. The loss of a mixture's router, which a config
    may ask for, fails on padded rows behind a cache, and nobody reads it here.
    """
    from transformers import GenerationConfig

    from sftkey.models.adapters import without_adapters

    base = without_adapters(model)  # a PeftModel looks its config up there
    published, base.generation_config = base.generation_config, GenerationConfig()
    text_config: Any = base.config.get_text_config()
    router_loss = getattr(text_config, "output_router_logits", None)
    if router_loss:
        text_config.output_router_logits = False
    try:
        yield
    finally:
        base.generation_config = published
        if router_loss:
            text_config.output_router_logits = router_loss


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
