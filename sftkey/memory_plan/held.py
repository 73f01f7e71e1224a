"""What a stage holds from its first step to its last, and how large its batches are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from sftkey.errors import CheckError, ModelError, Problem
from sftkey.models.facts import Skeleton, skeleton_of
from sftkey.models.lora_names import target_names
from sftkey.recipe.loss_on import trained_context
from sftkey.recipe.schema import CONTEXT_OF_KEY, ModelSection, Recipe, StageSection
from sftkey.recipe.stages import key_adapter_specs, lora_setting, trainer_setting

KEY_TOKENS = 128  # of a row's key, where no data were read
# How training cuts up what goes through a model, or its head, at once.
CHUNK_TOKENS = 4096  # of a batch's context in one pass; what a pass computes is freed after it
TILE_LOGITS = 2**20  # on a CPU: so many logits at once stay in its cache (4 MiB in float32)
TILE_ROWS = 4096  # TRL's tiles hold so many tokens at most
NARROWEST_TILE, WIDEST_TILE = 256, 32768  # entries of the vocabulary
BESIDE_LOGITS = 2**24  # at once of what is computed beside the losses (64 MiB in float32)


@dataclass(frozen=True)
class Joint:
    """A pass over the keys of several micro-batches, whose contexts are held meanwhile."""

    rows: int  # how many
    context: int  # tokens before the key of each
    keys: int  # tokens of each key


@dataclass(frozen=True)
class Batch:
    """The largest batch of a stage."""

    rows: int  # how many
    length: int  # tokens of each
    labelled: int  # tokens of each that the loss is on
    padded: bool = False  # rows are of unequal lengths, so that attention needs a mask
    # Behind a context, what goes through the model at once; by default the batch alone.
    joint: Joint | None = None

    @property
    def alone(self) -> Joint:
        """The pass over the batch's own keys, and the token before each."""
        keys = self.labelled + 1
        return Joint(self.rows, max(self.length - keys, 1), keys)


def joint_pass(batch: Batch, micro_batches: int, copies: int, most_tokens: int) -> Joint:
    """Return the largest pass over keys that a step has with rows of a length, or shorter ones.

    Shorter rows have as long keys, so that more of these go together. A step has so many
    `micro_batches`, and each row `copies` for the adapters of a grid.

    >>> joint_pass(Batch(1, 401, 9), micro_batches=8, copies=1, most_tokens=50)
    Joint(rows=3, context=267, keys=17)
    """
    alone = batch.alone
    rows = alone.rows * copies
    contexts, keys = rows * alone.context, rows * alone.keys
    held = min(contexts * micro_batches, max(contexts, most_tokens * CONTEXT_OF_KEY))
    tokens = min(keys * micro_batches, max(keys, most_tokens))
    together = -(-held // contexts)
    return Joint(
        alone.rows * together, -(-held // (rows * together)), -(-tokens // (rows * together))
    )


def stage_batch(recipe: Recipe, stage: StageSection, copies: int, rows: int, length: int) -> Batch:
    """Return a micro-batch of so many rows of so many tokens, with the keys that go with its own.

    `copies` is how often a row is there, for the adapters of a grid.
    """
    short = min(KEY_TOKENS, max(length - 2, 1))
    labelled = length if trained_context(stage.loss_on) else short
    packed = recipe.data.packing and stage.context == "exact"
    batch = Batch(rows, length, labelled, rows > 1 or packed)
    if stage.context == "exact":
        return batch
    accumulated = trainer_setting(recipe.stage_trainer(stage), "gradient_accumulation_steps")
    joint = joint_pass(batch, accumulated, copies, stage.key_batch_tokens)
    return replace(batch, padded=joint.rows > 1, joint=joint)


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of state for each trained number; and in how many states of 8 bits a large tensor has it.
OPTIMIZERS: dict[str, tuple[int, int]] = {
    "adamw_torch": (8, 0),
    "adamw_torch_fused": (8, 0),
    "paged_adamw_32bit": (8, 0),
    "adamw_8bit": (8, 2),
    "adamw_bnb_8bit": (8, 2),
    "paged_adamw_8bit": (8, 2),
    "lion_32bit": (4, 0),
    "lion_8bit": (4, 1),
    "paged_lion_32bit": (4, 0),
    "paged_lion_8bit": (4, 1),
    "sgd": (0, 0),
}
# Fields of LoraConfig that are counted here, or change nothing in memory.
COUNTED = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "trainable_token_indices"),
    *("alpha_pattern", "use_rslora", "init_lora_weights", "ensure_weight_tying"),
}
NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers with one absmax; absmaxes with one of their own
NF4_TABLES = 4 * (16 + 256 + 1)  # of a module: NF4's values, those of the absmaxes, their mean
SMALL_TENSOR = 4096  # numbers; smaller ones have their state in 32 bits
STATE_BLOCK = 256  # numbers of an 8-bit state with one float32 absmax
ADAPTER_BYTES = 4  # whatever is computed in, adapters are float32

Kind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Setting:
    """What decides over the memory of one stage, beside the model and the size of its batches."""

    kind: Kind  # the device's
    quantized: bool = False  # the linear modules are NF4, and stay packed
    weights: str = "float32"  # the type of the other weights
    compute: str = "float32"  # the type that goes from module to module
    attention: str = "sdpa"  # the implementation
    context: str = "exact"  # the stage's
    checkpointing: bool = False  # layers compute their activations anew in the backward pass
    full: bool = False  # all weights are trained
    targets: str | tuple[str, ...] = "all-linear"  # `target_modules` of the adapters
    # Of the trained adapters; a frozen stage trains those of a grid side by side.
    ranks: tuple[int, ...] = (8,)
    dropout: bool = False  # the adapters drop some of their inputs
    trained_rows: int = 0  # rows of the embeddings, or of the head, that are trained beside
    context_rank: int = 0  # of the adapter that a frozen stage holds for the context; 0: none
    optimizer: str = "adamw_torch_fused"  # its name, as the trainer has it
    keeps_start: bool = False  # a copy of what is trained is kept, as it was at the start

    @property
    def mixed(self) -> bool:
        """The trainer computes in 16 bits, under autocast."""
        return DTYPE_BYTES[self.compute] == 2


@cache
def linears(
    skeleton: Skeleton, targets: str | tuple[str, ...] = "all-linear"
) -> list[tuple[int, int]]:
    """Return inputs and outputs of the modules that `target_modules` names."""
    return [features(module) for module in named(skeleton.model, targets)]


def named(model: Any, targets: str | tuple[str, ...]) -> list[Any]:
    """Return the modules that `target_modules` names; `all-linear` are those that NF4 packs."""
    names = target_names(model, targets if isinstance(targets, str) else list(targets))
    return [module for name, module in model.named_modules() if name in names]


def features(module: Any) -> tuple[int, int]:
    """Return the widths of a linear module's inputs and outputs."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape  # transformers' Conv1D
    return inputs, outputs


def read_skeleton(section: ModelSection) -> Skeleton:
    """Return a recipe's model without weights, with the recipe's attention."""
    skeleton = skeleton_of(section, section.attn_implementation)
    if skeleton.quantized is not None:
        raise ModelError(
            section.name_or_path,
            "its memory can't be planned: the weights come quantized",
            "leave --gpu out, or take the unquantized model",
        )
    return skeleton


def setting_of(recipe: Recipe, stage: StageSection, skeleton: Skeleton, kind: Kind) -> Setting:
    """Read the setting of a stage."""
    trainer = recipe.stage_trainer(stage)
    lora: dict[str, Any] = recipe.lora or {}
    problems = list(_uncounted(recipe, stage))
    if problems:
        raise CheckError(f"{recipe.name}, stage {stage.name}", problems, "leave --gpu out")
    compute, weights = _dtypes(recipe, skeleton, kind)
    unpacked = kind == "cpu" and recipe.model.unpack == "auto" and compute == weights
    rows = lora.get("trainable_token_indices") or ()
    lists = rows.values() if isinstance(rows, dict) else [rows]
    frozen = stage.context == "frozen"
    trained = [each.lora for each in key_adapter_specs(recipe, stage)] if frozen else [lora]
    before = frozen and (recipe.stages.index(stage) > 0 or recipe.model.adapter is not None)
    full = recipe.lora is None and not frozen
    targets = trained[0].get("target_modules") or ()
    return Setting(
        kind=kind,
        quantized=recipe.model.quantization == "nf4" and not unpacked,
        weights=weights,
        compute=compute,
        attention=recipe.model.attn_implementation,
        context=stage.context,
        checkpointing=bool(trainer_setting(trainer, "gradient_checkpointing")),
        full=full,
        targets=targets if isinstance(targets, str) else tuple(targets),
        ranks=() if full else tuple(int(lora_setting(each, "r")) for each in trained),
        dropout=any(bool(each.get("lora_dropout")) for each in trained),
        trained_rows=0 if frozen else sum(map(len, lists)),
        context_rank=int(lora_setting(lora, "r")) if before and lora else 0,
        optimizer=str(trainer_setting(trainer, "optim")),
        keeps_start=stage.kl > 0,
    )


def _uncounted(recipe: Recipe, stage: StageSection) -> Iterator[Problem]:
    for name, value in {**(recipe.lora or {}), **(stage.lora or {})}.items():
        if name not in COUNTED and value and value != "none":  # `bias: none` is the default
            yield Problem(f"lora.{name}", "what it adds to memory isn't planned")
    optimizer = trainer_setting(recipe.stage_trainer(stage), "optim")
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        yield Problem("trainer.optim", f"{optimizer}: its state isn't planned; known are {known}")
    attention = recipe.model.attn_implementation
    if attention not in ("sdpa", "eager") and not attention.startswith("flash_attention"):
        yield Problem("model.attn_implementation", f"{attention}: what it keeps isn't planned")


def _dtypes(recipe: Recipe, skeleton: Skeleton, kind: Kind) -> tuple[str, str]:
    """Return the type that is computed in, and that of the weights."""
    given = recipe.model.dtype
    compute = "bfloat16" if kind == "cuda" else "float32"
    if given in DTYPE_BYTES:
        return given, given
    if given == "auto":
        published = str(skeleton.config.dtype or "float32").removeprefix("torch.")
        return compute, published if published in DTYPE_BYTES else "float32"
    return compute, "float32" if recipe.lora is None else compute


def weight_bytes(skeleton: Skeleton, setting: Setting) -> int:
    """Count the base's weights: packed two in a byte where they are quantized."""
    size = DTYPE_BYTES[setting.weights]
    whole = size * sum(each.numel() for each in skeleton.model.parameters())
    if not setting.quantized:
        return whole
    packed = [inputs * outputs for inputs, outputs in linears(skeleton)]
    return whole - size * sum(packed) + sum(-(-each // 2) for each in packed)


def constant_bytes(skeleton: Skeleton, setting: Setting) -> int:
    """Count what NF4 with double quantization keeps beside the packed weights."""
    if not setting.quantized:
        return 0
    blocks = [-(-inputs * outputs // NF4_BLOCK) for inputs, outputs in linears(skeleton)]
    nested = [4 * -(-count // NESTED_BLOCK) for count in blocks]
    return sum(blocks) + sum(nested) + NF4_TABLES * len(blocks)


def adapter_bytes(skeleton: Skeleton, setting: Setting) -> int:
    """Count the adapters: what is trained, what acts on a frozen context, a copy of the start."""
    start = gradient_bytes(skeleton, setting) if setting.keeps_start else 0  # as large as that
    if setting.full:
        return start
    pairs = sum(map(sum, linears(skeleton, setting.targets)))
    return start + ADAPTER_BYTES * (setting.context_rank * pairs + sum(trained(skeleton, setting)))


def gradient_bytes(skeleton: Skeleton, setting: Setting) -> int:
    """Count the gradients of all that is trained."""
    each = DTYPE_BYTES[setting.weights] if setting.full else ADAPTER_BYTES
    return each * sum(trained(skeleton, setting))


def optimizer_bytes(skeleton: Skeleton, setting: Setting) -> int:
    """Count the optimizer's state."""
    whole, states = OPTIMIZERS[setting.optimizer]
    sizes = list(trained(skeleton, setting))
    if not states:
        return whole * sum(sizes)
    small = sum(size for size in sizes if size < SMALL_TENSOR)
    blocks = sum(-(-size // STATE_BLOCK) for size in sizes if size >= SMALL_TENSOR)
    return whole * small + states * (sum(sizes) - small + 4 * blocks)


def trained(skeleton: Skeleton, setting: Setting) -> Iterator[int]:
    """Yield the number of numbers in each tensor that is trained."""
    if setting.full:
        yield from (each.numel() for each in skeleton.model.parameters())
        return
    for sizes in linears(skeleton, setting.targets):
        for rank in setting.ranks:
            yield from (rank * size for size in sizes)
    if setting.trained_rows:
        yield setting.trained_rows * skeleton.text.hidden_size
