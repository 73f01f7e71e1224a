"""The plan: how much memory each stage of a recipe needs on a GPU, part by part, and what fits.

It is made from the model's config alone. What is held is counted to the byte (`held`), and a step
of the model is run on torch's meta device to see what a batch needs (`trace`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from sftkey.errors import RecipeError, SFTKeyError, shown
from sftkey.files import GIB
from sftkey.memory_plan import held
from sftkey.memory_plan.held import (
    KEY_TOKENS,
    Batch,
    Setting,
    read_skeleton,
    setting_of,
    stage_batch,
)
from sftkey.memory_plan.trace import head_bytes, traced
from sftkey.models.facts import Skeleton
from sftkey.models.source import at_hand
from sftkey.recipe.load import load_recipe
from sftkey.recipe.loss_on import trained_context
from sftkey.recipe.schema import ModelSection, Recipe, StageSection
from sftkey.recipe.stages import NEWER_NAMES, trainer_setting
from sftkey.recipe.upstream import size_bytes

# Not planned but set aside: CUDA's own context, and what its allocator loses to fragments.
RESERVED_BYTES = GIB
MOST_ROWS = 1024
LENGTH_STEP = 64
UNBOUNDED = 2**20  # tokens, where the config names no longest row
SHORTEST = 256  # tokens; shorter rows hold hardly any reasoning
NONE_FITS = "no change that is known here makes it fit: take a smaller model or a larger GPU"
EIGHT_BITS = {
    "adamw_torch": "adamw_8bit",
    "adamw_torch_fused": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}

Load = Callable[[Sequence[str]], Recipe]
Overrides = list[str]


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs on a GPU, in bytes, with the largest batch that the recipe allows.

    A search for what would fit traces some ten batches, so it is made where it is asked for.
    """

    recipe: Recipe  # the stage's
    stage: StageSection  # the stage
    skeleton: Skeleton  # the model's
    room: int  # bytes that the stage may take

    def __post_init__(self) -> None:
        self.setting  # noqa: B018  # what isn't planned is refused before anything is traced

    @cached_property
    def setting(self) -> Setting:
        """What decides over the stage's memory beside the size of its batches."""
        return setting_of(self.recipe, self.stage, self.skeleton, "cuda")

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        trainer = self.recipe.stage_trainer(self.stage)
        return int(trainer_setting(trainer, "per_device_train_batch_size"))

    @property
    def length(self) -> int:
        """Tokens of each row."""
        return self.recipe.data.max_length

    @cached_property
    def parts(self) -> dict[str, int]:
        """What each part needs at the peak."""
        return self._parts_with(self.rows, self.length)

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest rows that fit, at so many a batch; 0: none."""
        return LENGTH_STEP * most(
            lambda n: sum(self._parts_with(self.rows, n * LENGTH_STEP).values()),
            self.room,
            (self.skeleton.most_tokens or UNBOUNDED) // LENGTH_STEP,
            self.length // LENGTH_STEP,
        )

    @cached_property
    def most_rows(self) -> int:
        """How many rows of so many tokens fit; 0: none."""
        return most(
            lambda rows: sum(self._parts_with(rows, self.length).values()),
            self.room,
            MOST_ROWS,
            self.rows,
        )

    def _parts_with(self, rows: int, length: int) -> dict[str, int]:
        """Return the bytes of each part at the peak of a batch of some size."""
        copies = max(len(self.setting.ranks), 1)
        batch = stage_batch(self.recipe, self.stage, copies, rows, length)
        return parts_of(self.skeleton, self.setting, batch)


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a GPU."""

    name: str  # the recipe's
    gpu_bytes: int  # what the GPU has
    stages: tuple[StagePlan, ...]  # in their order
    # Overrides that make it fit; none where it fits, None where no change suffices.
    changes: Overrides | None = None

    @property
    def fits(self) -> bool:
        """Whether every stage fits, beside what is set aside."""
        return all(each.peak_bytes + RESERVED_BYTES <= self.gpu_bytes for each in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        return {
            "gpu_bytes": self.gpu_bytes,
            "reserved_bytes": RESERVED_BYTES,
            "fits": self.fits,
            "stages": {
                each.name: {
                    "context": each.stage.context,
                    "batch_rows": each.rows,
                    "max_length": each.length,
                    "parts": each.parts,
                    "peak_bytes": each.peak_bytes,
                    "longest_tokens": each.longest,
                    "most_rows": each.most_rows,
                }
                for each in self.stages
            },
            "changes": self.changes,
        }

    @property
    def message(self) -> str:
        """Say of a recipe that doesn't fit what it needs."""
        worst = max(self.stages, key=lambda stage: stage.peak_bytes)
        return (
            f"stage {worst.name} needs {gib(worst.peak_bytes)} GiB at its peak, and "
            f"{gib(RESERVED_BYTES)} GiB are set aside; the GPU has {gib(self.gpu_bytes)} GiB"
        )

    @property
    def hint(self) -> str:
        """Say what to do about it."""
        return f"write {' '.join(self.changes)}" if self.changes else NONE_FITS


def gpu_size(text: str) -> int:
    """Read the size of a GPU's memory: `24GB` is what a card is sold as, and that is 24 GiB.

    >>> gpu_size("24GB") == gpu_size("24GiB") == 24 * 2**30
    True
    """
    size = size_bytes(text) or 0
    if size <= RESERVED_BYTES:
        raise RecipeError(
            "--gpu",
            f"expected a size of memory above 1 GiB; got {shown(text)}",
            "write --gpu 24GB, for one; a GB is 2^30 bytes here, as on a card's label",
        )
    return size


def make_plan(recipe: Recipe, skeleton: Skeleton, gpu_bytes: int) -> Plan:
    """Plan all stages of a recipe on one GPU, for rows as long as the recipe allows."""
    room = gpu_bytes - RESERVED_BYTES
    stages = tuple(StagePlan(recipe, each, skeleton, room) for each in recipe.stages)
    return Plan(recipe.name, gpu_bytes, stages)


def peak_bytes(recipe: Recipe) -> int | None:
    """Return what the recipe's largest stage needs on CUDA, beside what is set aside.

    None where the model's config would have to be fetched, or the recipe asks for what isn't
    planned; `sftkey check RECIPE --gpu SIZE --plan-only` says which.
    """
    folder = at_hand(recipe.model)
    if folder is None:
        return None
    attention = recipe.model.attn_implementation
    try:
        here = ModelSection(name_or_path=str(folder), attn_implementation=attention)
        return max(each.peak_bytes for each in make_plan(recipe, read_skeleton(here), 0).stages)
    except SFTKeyError:
        return None


def parts_of(skeleton: Skeleton, setting: Setting, batch: Batch) -> dict[str, int]:
    """Return the bytes of each part at the peak."""
    needs, logits = traced(skeleton, setting, batch), head_bytes(skeleton, setting, batch)
    peak = max(needs.kept + logits, needs.peak, needs.reading)
    return {
        "weights": held.weight_bytes(skeleton, setting),
        "quantization constants": held.constant_bytes(skeleton, setting),
        "adapters": held.adapter_bytes(skeleton, setting),
        "gradients": held.gradient_bytes(skeleton, setting),
        "optimizer": held.optimizer_bytes(skeleton, setting),
        "activations": peak - logits - needs.cache,
        "logits": logits,
        "cache": needs.cache,
    }


def most(needed: Callable[[int], int], room: int, limit: int, start: int) -> int:
    """Return the largest number from 1 to the limit that needs no more than the room; 0: none.

    What is needed grows, mostly along a line: a line through two numbers says which to try next,
    and halving makes sure that the search ends.

    >>> most(lambda number: number**2, 50, 100, 20)
    7
    """
    low, high = 0, limit + 1
    tried: dict[int, int] = {}
    numbers = [1, max(min(start, limit), 2)]
    while True:
        for number in numbers:
            if low < number < high:
                tried[number] = needed(number)
                low, high = (number, high) if tried[number] <= room else (low, number)
        if high - low <= 1:
            return low
        (one, least), (two, greatest) = list(tried.items())[-2:]
        guess = one + (room - least) * (two - one) // ((greatest - least) or 1)
        guess = max(low + 1, min(guess, high - 1))
        numbers = [guess, guess + 1, (low + high) // 2]


def changes_that_fit(load: Load, skeleton: Skeleton, gpu_bytes: int) -> Overrides | None:
    """Find the simplest change that makes a recipe fit: one kind alone, or as few as it takes.

    The kinds are tried in the order of how little they change what is trained: activations computed
    anew and smaller batches give the same gradients, 8 bits and NF4 nearly the same, a detached
    context optimizes something else, and shorter rows leave some out.

    Returns:
        Overrides; none where it fits as it is, and None where all of them don't suffice.
    """

    def planned(*taken: Overrides) -> tuple[Recipe, Plan]:
        recipe = load(list(chain(*taken)))
        return recipe, make_plan(recipe, skeleton, gpu_bytes)

    def fits(*taken: Overrides) -> bool:
        return planned(*taken)[1].fits

    if fits():
        return []
    for kind in KINDS:
        for overrides in kind(*planned()):
            if fits(overrides):
                return overrides
    taken: list[Overrides] = []
    for kind in KINDS:
        strongest: Overrides = []
        for overrides in kind(*planned(*taken)):
            if fits(*taken, overrides):
                return _without_idle([*taken, overrides], fits)
            strongest = overrides
        taken.append(strongest)
    return None


def _without_idle(taken: list[Overrides], fits: Callable[..., bool]) -> Overrides:
    """Leave out what isn't needed beside the rest; what changes training most goes first."""
    for overrides in reversed(taken):
        fewer = [each for each in taken if each is not overrides]
        if fits(*fewer):
            taken = fewer
    return list(chain(*taken))


def _checkpointing(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Compute activations anew in the backward pass."""
    key = "gradient_checkpointing"
    kept = {name: "true" for name, anew in _by_stage(recipe, key).items() if not anew}
    if any(NEWER_NAMES[key] in recipe.stage_trainer(stage) for stage in recipe.stages):
        key = NEWER_NAMES[key]
    if kept:
        yield _written(recipe, key, kept)


def _keys(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Let fewer keys go through the model at once."""
    behind = [stage for stage in recipe.stages if stage.context != "exact"]
    tokens = max((stage.key_batch_tokens for stage in behind), default=0) // 2
    while behind and tokens >= KEY_TOKENS:
        yield [
            f"stages.{stage.name}.key_batch_tokens={min(tokens, stage.key_batch_tokens)}"
            for stage in behind
        ]
        tokens //= 2


def _batches(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Take fewer rows at a time, as many in a step."""
    size, accumulated = "per_device_train_batch_size", "gradient_accumulation_steps"
    before = rows = _by_stage(recipe, size)
    total = {name: n * rows[name] for name, n in _by_stage(recipe, accumulated).items()}
    for most in range(max(rows.values()) - 1, 0, -1):
        fewer = {name: min(rows[name], largest_part(total[name], most)) for name in rows}
        if fewer != before:
            steps = {name: total[name] // fewer[name] for name in rows}
            yield [*_written(recipe, size, fewer), *_written(recipe, accumulated, steps)]
        before = fewer


def largest_part(total: int, most: int) -> int:
    """Return the largest number up to a limit that a step's rows can be divided by."""
    return next(count for count in range(min(most, total), 0, -1) if total % count == 0)


def _optimizer(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Hold the optimizer's state in 8 bits."""
    names = _by_stage(recipe, "optim")
    if any(name in EIGHT_BITS for name in names.values()):
        smaller = {stage: EIGHT_BITS.get(name, name) for stage, name in names.items()}
        yield _written(recipe, "optim", smaller)


def _quantization(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Hold the weights in 4 bits, where they aren't trained."""
    if recipe.model.quantization == "none" and recipe.lora is not None:
        yield ["model.quantization=nf4"]


def _context(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Let no gradient through the context of the stages that train the key alone."""
    exact = [
        stage
        for stage in recipe.stages
        if stage.context == "exact" and not trained_context(stage.loss_on)
    ]
    if exact:
        yield (detached := [f"stages.{stage.name}.context=detached" for stage in exact])
        yield detached + [f"stages.{stage.name}.key_batch_tokens={KEY_TOKENS}" for stage in exact]


def _length(recipe: Recipe, plan: Plan) -> Iterator[Overrides]:
    """Take the longest rows that fit."""
    tokens = min(stage.longest for stage in plan.stages)
    if tokens < recipe.data.max_length:
        yield [f"data.max_length={max(tokens, SHORTEST)}"]


KINDS = (_checkpointing, _keys, _batches, _optimizer, _quantization, _context, _length)


def _by_stage(recipe: Recipe, key: str) -> dict[str, Any]:
    """Return a trainer's setting of each stage, by the stages' names."""
    return {each.name: trainer_setting(recipe.stage_trainer(each), key) for each in recipe.stages}


def _written(recipe: Recipe, key: str, values: dict[str, Any]) -> Overrides:
    """Write a trainer's setting: once for all stages, or for each where they have their own."""
    own = any(key in stage.trainer for stage in recipe.stages)
    if not own and len(set(values.values())) == 1:
        return [f"trainer.{key}={next(iter(values.values()))}"]
    return [f"stages.{name}.trainer.{key}={value}" for name, value in values.items()]


def fit(recipe: Path, overrides: Sequence[str], gpu: str) -> Plan:
    """Plan a recipe on a GPU, and look for what makes it fit."""
    size = gpu_size(gpu)

    def load(more: Sequence[str]) -> Recipe:
        return load_recipe(recipe, [*overrides, *more])

    loaded = load([])
    skeleton = read_skeleton(loaded.model)
    plan = make_plan(loaded, skeleton, size)
    return replace(plan, changes=changes_that_fit(load, skeleton, size))


def gib(size: int) -> str:
    """Write a size."""
    return f"{size / GIB:.2f}"
