r"""Fine-tune a language model so that its final answer is right (SFTKey, arXiv 2512.21017).

The names below are imported when they are first used, so that `import sftkey` stays fast.

>>> import sftkey
>>> response = sftkey.Response.from_section(sftkey.ResponseSection())
>>> response.parse("<Thinking>\n2 and 2 make 4.\n</Thinking>\n<Answer>\n4\n</Answer>").answer
'4'
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FACE: dict[str, tuple[str, ...]] = {
    "errors": (
        *("CheckError", "DataError", "DeviceError", "FrameError", "JudgeError", "ModelError"),
        *("RecipeError", "RunError", "SFTKeyError"),
    ),
    "recipe.load": ("load_recipe",),
    "recipe.schema": ("Recipe", "ResponseSection"),
    "data.response": ("Example", "Response", "Segment"),
    "data.labels": ("labels_for",),
    "data.renderer": ("Renderer",),
    "data.prepare": ("tokenize",),
    "data.collator": ("KeyCollator",),
    "training.losses": ("add_token_losses", "token_losses"),
    "training.trainer": ("KeyTrainer",),
    "evaluation.grading": ("grade",),
    "checks.gate": ("check_recipe",),
    "diagnosis.run": ("diagnose_model",),
    "pipeline": ("TrainedRun", "evaluate_run", "open_run", "train_recipe"),
}
# A name that its module uses for something of its own is another there.
_THERE = {"tokenize": "dataset_of"}
_MODULES = {name: module for module, names in _FACE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a name of the library's face where it stands."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sftkey' has no attribute {name!r}")
    return getattr(import_module(f"sftkey.{_MODULES[name]}"), _THERE.get(name, name))


def __dir__() -> list[str]:
    """List the lazy names beside those that are there."""
    return sorted({*globals(), *__all__})
