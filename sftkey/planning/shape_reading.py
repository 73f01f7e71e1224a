"""A model's shape from its config.json alone, without torch.

The fields that a config leaves out are read from the source of transformers' own class, with `ast`:
importing it takes seconds, and a plan is to stand there at once.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftkey.errors import ModelError
from sftkey.models.source import model_source
from sftkey.planning.model_shape import FAMILIES, Linear, ModelShape
from sftkey.recipe.schema import ModelSection


def read_shape(section: ModelSection) -> ModelShape:
    """Read the shape of a recipe's model from its config.

    Raises:
        ModelError: There is no such model or config, or its layers aren't of a kind known here.
    """
    file = model_source(section).folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(section.name_or_path, f"its config.json can't be read: {error}") from error
    return shape_of(config, section.name_or_path)


def shape_of(config: dict[str, Any], name: str) -> ModelShape:
    """Give the shape that a config describes.

    Raises:
        ModelError: Its layers aren't of a kind known here, or its weights come quantized.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(
            name,
            f"its memory can't be planned: the layers of {family} aren't known here",
            f"leave --gpu out; known are {', '.join(FAMILIES)}",
        )
    if "quantization_config" in config:
        raise ModelError(
            name,
            "its memory can't be planned: the weights come quantized",
            "leave --gpu out, or take the unquantized model",
        )
    whole = {**_defaults(family), **config}
    shape = ModelShape(family, whole, ())
    return ModelShape(family, whole, tuple(_linears(shape)))


def _linears(shape: ModelShape) -> Iterator[Linear]:
    """Give the linear modules of one layer."""
    hidden, wide, queries, keys = shape.hidden, shape.wide, shape.queries, shape.keys
    known = _defaults(shape.family)  # a field that the class doesn't know changes nothing
    bias = bool("attention_bias" in known and shape.config["attention_bias"])
    mlp_bias = bool("mlp_bias" in known and shape.config["mlp_bias"])
    of_qkv = bias or shape.traits.qkv_bias
    if shape.traits.fused:
        yield Linear("self_attn.qkv_proj", hidden, queries + 2 * keys)
        yield Linear("self_attn.o_proj", queries, hidden)
        yield Linear("mlp.gate_up_proj", hidden, 2 * wide)
        yield Linear("mlp.down_proj", wide, hidden)
        return
    yield Linear("self_attn.q_proj", hidden, queries, of_qkv)
    yield Linear("self_attn.k_proj", hidden, keys, of_qkv)
    yield Linear("self_attn.v_proj", hidden, keys, of_qkv)
    yield Linear("self_attn.o_proj", queries, hidden, bias)
    yield Linear("mlp.gate_proj", hidden, wide, mlp_bias)
    yield Linear("mlp.up_proj", hidden, wide, mlp_bias)
    yield Linear("mlp.down_proj", wide, hidden, mlp_bias)


@functools.cache
def _defaults(family: str) -> dict[str, Any]:
    """Read the defaults of the family's config class from the installed transformers."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    folder = family.removesuffix("_text")
    file = Path(spec.origin).parent / "models" / folder / f"configuration_{folder}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for body in (each.body for each in tree.body if isinstance(each, ast.ClassDef)):
        fields: dict[str, Any] = {}
        for statement in body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="model_type")], value=ast.Constant() as value):
                    fields["model_type"] = value.value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant() as value):
                    fields[name] = value.value
        if fields.pop("model_type", None) == family:
            return fields
    raise LookupError(f"{file.name} has no config of {family}")
