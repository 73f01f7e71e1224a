"""How a stage holds its model and computes: what the recipe says that changes its memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sftkey.errors import CheckError, Problem
from sftkey.memory_plan.shape import Linear, ModelShape
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import key_adapter_specs

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
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' choice; plain adamw_torch holds the same
# Fields of LoraConfig that are counted here, or change nothing in memory.
COUNTED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "trainable_token_indices",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "ensure_weight_tying",
}

DEFAULT_RANK = 8  # peft's

Kind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Setting:
    """What decides over the memory of one stage, beside the size of its batches.

    Args:
        kind: The device's.
        quantized: The linear modules are NF4.
        weight_bytes: Of each number of the other weights.
        compute_bytes: Of each number that goes from module to module.
        mixed: The trainer computes in 16 bits, under autocast.
        attention: The implementation.
        context: The stage's.
        checkpointing: Layers compute their activations anew in the backward pass.
        full: All weights are trained.
        adapted: The linear modules of one layer with an adapter.
        rank: The trained adapters', all together.
        dropout: The adapters drop some of their inputs.
        trained_rows: Rows of the embeddings, or of the head, that are trained beside.
        members: How many adapters a frozen stage trains side by side; 1 in the others.
        context_rank: Of the adapter that a frozen stage holds for the context; 0: none.
        optimizer: Its name, as the trainer has it.
        accumulated: Gradients of earlier batches are held while a batch is computed.
    """

    kind: Kind
    quantized: bool
    weight_bytes: int
    compute_bytes: int
    mixed: bool
    attention: str
    context: str
    checkpointing: bool
    full: bool
    adapted: tuple[Linear, ...]
    rank: int
    dropout: bool
    trained_rows: int
    members: int
    context_rank: int
    optimizer: str
    accumulated: bool


def setting_of(recipe: Recipe, stage: StageSection, shape: ModelShape, kind: Kind) -> Setting:
    """Read the setting of a stage.

    Raises:
        CheckError: The recipe asks for something that isn't counted here.
    """
    trainer = recipe.stage_trainer(stage)
    lora: dict[str, Any] = recipe.lora or {}
    problems = list(_uncounted(recipe, stage))
    if problems:
        raise CheckError(f"{recipe.name}, stage {stage.name}", problems, "leave --gpu out")
    compute, weights = _dtypes(recipe, shape, kind)
    rows = lora.get("trainable_token_indices") or ()
    lists = rows.values() if isinstance(rows, dict) else [rows]
    trained = [lora]
    frozen = stage.context == "frozen"
    if frozen:
        trained = [each.lora for each in key_adapter_specs(recipe, stage)]
    before = frozen and (recipe.stages.index(stage) > 0 or recipe.model.adapter is not None)
    return Setting(
        kind=kind,
        quantized=recipe.model.quantization == "nf4",
        weight_bytes=DTYPE_BYTES[weights],
        compute_bytes=DTYPE_BYTES[compute],
        mixed=DTYPE_BYTES[compute] == 2,
        attention=recipe.model.attn_implementation,
        context=stage.context,
        checkpointing=bool(trainer.get("gradient_checkpointing", True)),
        full=recipe.lora is None and not frozen,
        adapted=tuple(_targets(shape, trained[0].get("target_modules"))),
        rank=sum(int(each.get("r", DEFAULT_RANK)) for each in trained),
        dropout=any(bool(each.get("lora_dropout")) for each in trained),
        trained_rows=0 if frozen else sum(map(len, lists)),
        members=len(trained),
        context_rank=int(lora.get("r", DEFAULT_RANK)) if before and lora else 0,
        optimizer=str(trainer.get("optim", DEFAULT_OPTIMIZER)),
        accumulated=int(trainer.get("gradient_accumulation_steps", 1)) > 1,
    )


def _uncounted(recipe: Recipe, stage: StageSection) -> Iterator[Problem]:
    for name, value in {**(recipe.lora or {}), **(stage.lora or {})}.items():
        if name not in COUNTED and value and value != "none":  # `bias: none` is the default
            yield Problem(f"lora.{name}", "what it adds to memory isn't planned")
    optimizer = recipe.stage_trainer(stage).get("optim", DEFAULT_OPTIMIZER)
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        yield Problem("trainer.optim", f"{optimizer}: its state isn't planned; known are {known}")
    attention = recipe.model.attn_implementation
    if attention not in ("sdpa", "eager") and not attention.startswith("flash_attention"):
        yield Problem("model.attn_implementation", f"{attention}: what it keeps isn't planned")


def _dtypes(recipe: Recipe, shape: ModelShape, kind: Kind) -> tuple[str, str]:
    """Give the type that is computed in, and that of the weights."""
    given = recipe.model.dtype
    compute = "bfloat16" if kind == "cuda" else "float32"
    if given in DTYPE_BYTES:
        return given, given
    if given == "auto":
        published = shape.config.get("dtype") or shape.config.get("torch_dtype") or "float32"
        return compute, published if published in DTYPE_BYTES else "float32"
    return compute, "float32" if recipe.lora is None else compute


def _targets(shape: ModelShape, targets: Any) -> Iterator[Linear]:
    """Give the modules of a layer that carry an adapter.

    Raises:
        CheckError: Not all layers have the same.
    """
    for each in shape.linears:
        names = [f"model.layers.{layer}.{each.name}" for layer in range(shape.layers)]
        carry = sum(_is_target(name, targets) for name in names)
        if 0 < carry < len(names):
            raise CheckError(
                "lora.target_modules",
                f"{each.name} carries an adapter in {carry} of {len(names)} layers; "
                "the plan counts layers that are alike",
                "leave --gpu out",
            )
        if carry:
            yield each


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name.endswith(f".{target}") for target in targets or ())


NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers with one absmax; absmaxes with one of their own
NF4_TABLES = 4 * (16 + 256 + 1)  # of a module: NF4's values, those of the absmaxes, their mean
SMALL_TENSOR = 4096  # numbers; smaller ones have their state in 32 bits
STATE_BLOCK = 256  # numbers of an 8-bit state with one float32 absmax
ADAPTER_BYTES = 4  # whatever is computed in, adapters are float32


def weight_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the base's weights: packed two in a byte where they are quantized."""
    others = (shape.numel_embeddings + shape.numel_small) * setting.weight_bytes
    if not setting.quantized:
        return others + shape.numel_linear * setting.weight_bytes
    return others + shape.layers * sum(-(-each.numel // 2) for each in shape.linears)


def constant_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count what NF4 with double quantization keeps beside the packed weights."""
    if not setting.quantized:
        return 0
    blocks = [-(-each.numel // NF4_BLOCK) for each in shape.linears]
    nested = [4 * -(-count // NESTED_BLOCK) for count in blocks]
    return shape.layers * (sum(blocks) + sum(nested) + NF4_TABLES * len(blocks))


def adapter_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the adapters: what is trained, and what acts on a frozen context."""
    if setting.full:
        return 0
    pairs = sum(each.inputs + each.outputs for each in setting.adapted)
    context = setting.context_rank * pairs * shape.layers
    return ADAPTER_BYTES * (context + sum(trained(shape, setting)))


def gradient_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the gradients of all that is trained."""
    each = setting.weight_bytes if setting.full else ADAPTER_BYTES
    return each * sum(trained(shape, setting))


def optimizer_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the optimizer's state."""
    whole, states = OPTIMIZERS[setting.optimizer]
    sizes = list(trained(shape, setting))
    if not states:
        return whole * sum(sizes)
    small = sum(size for size in sizes if size < SMALL_TENSOR)
    blocks = sum(-(-size // STATE_BLOCK) for size in sizes if size >= SMALL_TENSOR)
    return whole * small + states * (sum(sizes) - small + 4 * blocks)


def trained(shape: ModelShape, setting: Setting) -> Iterator[int]:
    """Give the number of numbers in each tensor that is trained."""
    if setting.full:
        for _ in range(1 if shape.tied else 2):
            yield shape.vocabulary * shape.hidden
        yield shape.hidden
        for _ in range(shape.layers):
            yield from (each.numel for each in shape.linears)
            yield from (each.outputs for each in shape.linears if each.bias)
            yield from shape.norms
            yield from shape.head_norms
        return
    for _ in range(shape.layers):
        for each in setting.adapted:
            yield setting.rank * each.inputs
            yield setting.rank * each.outputs
    if setting.trained_rows:
        yield setting.trained_rows * shape.hidden
