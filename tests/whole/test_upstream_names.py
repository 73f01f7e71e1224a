"""Every private name of upstream's that sftkey stands on, in one place: it is there, and called."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from sftkey.training.frozen import FrozenTrainer

# What sftkey reads or calls, and whose it is.
READ: dict[str, Any] = {
    "_prepare_inputs": Trainer,
    "_is_stateful": PreTrainedModel,
    "_active_adapter": BaseTunerLayer,
    "_use_triton": trl_utils,
    "_CHUNKED_LOGPROB_CHUNK_SIZE": trl_utils,
    "_attn_implementation": PretrainedConfig,
    "_local_scalar_dense": None,  # of torch.ops, which makes its names when they are asked for
    "_replace": None,  # of Python's own named tuples
}
# What sftkey's trainers do in upstream's place.
OVERRIDDEN = {
    *("_get_num_items_in_batch", "_get_train_sampler", "_get_eval_sampler", "_send_telemetry"),
    *("_get_grad_norm", "_clip_grad_norm", "_load_from_checkpoint", "_load_best_model"),
}
UPSTREAM = [each for each in SFTTrainer.__mro__ if each.__module__.split(".")[0] != "builtins"]


def private(name: str) -> bool:
    """Tell whether a name is one that its owner may change at any time."""
    return name.startswith("_") and not name.startswith("__")


def test_no_other_private_name_is_read() -> None:
    """A new one has to be written into the list, where it is looked for."""
    package = Path(__file__).parents[2] / "sftkey"
    nodes = [n for f in package.rglob("*.py") for n in ast.walk(ast.parse(f.read_text("utf-8")))]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and private(node.attr)]
    ours |= {node.attr for node in attributes if ast.unparse(node.value) == "self"}
    found = {node.attr for node in attributes} - ours
    assert found == READ.keys() - {"_prepare_inputs"}  # a trainer's own `self` has that one


@pytest.mark.parametrize("name", [name for name, owner in READ.items() if owner])
def test_what_is_read_is_there(name: str) -> None:
    """Another version that has renamed it is seen here first."""
    owner = READ[name]
    assert hasattr(owner, name) or f"self.{name}" in inspect.getsource(owner)


def test_what_is_overridden_is_what_upstream_calls() -> None:
    """A method whose name upstream no longer calls would do nothing, in silence."""
    ours = [each for each in FrozenTrainer.__mro__ if each.__module__.startswith("sftkey.")]
    names = {name for each in ours for name in vars(each) if private(name)}
    assert {name for name in names if hasattr(SFTTrainer, name)} == OVERRIDDEN
    sources = "".join(map(inspect.getsource, UPSTREAM))
    assert [name for name in OVERRIDDEN if f"self.{name}" not in sources] == []
