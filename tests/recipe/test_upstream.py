"""What is read from upstream's sources is what upstream's classes have, and its types are kept."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.recipe import upstream
from sftkey.recipe.upstream import Field, as_number, lora_config_fields, sft_config_fields
from sftkey.recipe.upstream_rules import (
    FORMER_KEYS,
    LIMITS,
    REFUSED_LORA_KEYS,
    REFUSED_TRAINER_KEYS,
    REFUSED_WHERE_TRUE,
)


def field_of(annotation: str) -> Field:
    """Make a field of a class in transformers' file of training arguments."""
    ((_, file, _), *_) = upstream.SFT_CONFIG
    owner = ast.parse(f"class A:\n    a: {annotation}").body[0]
    assert isinstance(owner, ast.ClassDef)
    assert isinstance(owner.body[0], ast.AnnAssign)
    return Field(owner.body[0], owner, upstream._folder("transformers") / file)


def names(config: Any) -> set[str]:
    """Return the fields that a config class takes."""
    return {field.name for field in dataclasses.fields(config) if field.init}


def test_the_trainers_fields_are_sft_configs() -> None:
    """The sources, read alone, give the fields that the imported class has."""
    from trl import SFTConfig

    assert sft_config_fields().keys() == names(SFTConfig)


def test_the_adapters_fields_are_lora_configs() -> None:
    """What isn't read is what peft's base class records about an adapter, and that is refused."""
    from peft import LoraConfig

    assert lora_config_fields().keys() | REFUSED_LORA_KEYS.keys() == names(LoraConfig)
    assert not lora_config_fields().keys() & REFUSED_LORA_KEYS.keys()


def test_what_we_say_about_fields_is_about_fields_that_exist() -> None:
    """A key that upstream drops or renames must not stay in our tables."""
    known = sft_config_fields().keys() | lora_config_fields().keys()
    assert sft_config_fields().keys() >= REFUSED_TRAINER_KEYS.keys()
    assert known >= LIMITS.keys()
    assert sft_config_fields().keys().isdisjoint(FORMER_KEYS)


def test_names_that_a_setting_is_limited_to_are_upstreams() -> None:
    """The values of the enum, and the listed choices, come out as upstream has them."""
    from transformers import SchedulerType
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
    from transformers.training_args import OptimizerNames

    fields = sft_config_fields()
    enums: dict[str, Any] = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
    }
    for name, enum in enums.items():
        assert fields[name].choices == tuple(member.value for member in enum)
    assert fields["dataloader_multiprocessing_context"].choices == ("fork", "spawn", "forkserver")
    assert fields["run_name"].choices == ()


def test_each_default_is_upstreams_and_of_the_type_that_we_read() -> None:
    """Upstream's own defaults pass our check of types, but for objects that YAML can't hold."""
    from peft import LoraConfig
    from trl import SFTConfig

    pairs = [(SFTConfig, sft_config_fields()), (LoraConfig, lora_config_fields())]
    for config, fields in pairs:
        for field in dataclasses.fields(config):
            given = field.default
            if field.name in fields and isinstance(given, str | int | float) and given != "passive":
                value = given.value if hasattr(given, "value") else given
                assert fields[field.name].convert(value) == value, field.name
                assert fields[field.name].default in (value, None), field.name


@pytest.mark.parametrize(
    ("annotation", "value", "converted"),
    [
        ("float", "5e-5", 5e-5),
        ("float", 3, 3),
        ("Optional[float]", None, None),
        ("Optional[Union[list[str], str]]", ["a"], ["a"]),
        ("None | str | list[str]", "a", "a"),
        ("dict | str | None", {"a": {"b": "1e-3"}}, {"a": {"b": 1e-3}}),
        ("dict[str, float]", {"a": "1e-3"}, {"a": 1e-3}),
        ("list", ["a", {"b": "1e-3"}], ["a", {"b": 1e-3}]),
        ("tuple[int, str]", [1, "a"], [1, "a"]),
        ("typing.Optional[int]", None, None),
        ("'int | None'", 3, 3),
        ("Literal[False] | None", False, False),
        ("Literal['a', 'b_[number]']", "b_12", "b_12"),
        ("SchedulerType | str", "linear", "linear"),
        ("Optional[Union[SchedulerType, str]]", "linear", "linear"),
        ("str | list[DebugOption]", "as upstream splits it", "as upstream splits it"),
        ("list[tuple[int, float]] | None", [[1, "1e-3"]], [[1, 1e-3]]),
        ("Union[EvaConfig, dict]", {"a": "1e-3"}, {"a": 1e-3}),
        ("dict[str, bool | str]", {"a": True, "b": "1e-3"}, {"a": True, "b": "1e-3"}),
        ("Any", "a", "a"),
    ],
)
def test_values_of_a_type_are_converted(annotation: str, value: Any, converted: Any) -> None:
    """Each way in which upstream writes a type is understood."""
    found = field_of(annotation).convert(value)
    assert (found, type(found)) == (converted, type(converted))


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        ("int", True, "expected a whole number; got true"),
        ("int", 1.0, "expected a whole number; got 1.0"),
        ("float", "fast", "expected a number; got 'fast'"),
        ("bool", 1, "expected true or false; got 1"),
        ("str", 1, "expected text; got 1"),
        ("Optional[int]", "a", "expected a whole number or null; got 'a'"),
        ("dict[str, int] | None", {"a": "b"}, "expected a mapping or null; got {'a': 'b'}"),
        ("list[int]", ["a"], "expected a list (each: a whole number); got ['a']"),
        ("tuple[int, int]", [1], "expected a list of a whole number and a whole number; got [1]"),
        ("Literal[True, 'a']", 1, "expected true or a; got 1"),
        ("Literal['b_[number]']", "b_", "expected b_[number]; got 'b_'"),
        ("Literal[False] | None", 0, "expected false or null; got 0"),
        ("Literal['a', 'b'] | int", "c", "expected a, b or a whole number; got 'c'"),
        (
            "bool | Literal['gaussian']",
            "gausian",
            "expected true or false or gaussian; got 'gausian'; did you mean `gaussian`?",
        ),
        (
            "list[list[int]]",
            [[1, "a"]],
            "expected a list (each: a list (each: a whole number)); got [[1, 'a']]",
        ),
        (
            "IntervalStrategy | str",
            "step",
            "expected no, steps or epoch; got 'step'; did you mean `steps`?",
        ),
        (
            "str | list[DebugOption]",
            ["overflow"],
            "expected text or a list (each: underflow_overflow or tpu_metrics_debug); "
            "got ['overflow']",
        ),
        ("Callable[[int], int] | None", "a", "expected null; got 'a'"),
        ("EvaConfig", {}, "expected nothing that YAML can hold; got {}"),
    ],
)
def test_values_of_another_type_are_refused(annotation: str, value: Any, message: str) -> None:
    """The message says the type in words, and what came."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is compared
        field_of(annotation).convert(value)
    assert str(caught.value) == message


def test_text_is_a_number_only_in_the_form_that_yaml_misses() -> None:
    """`5e-5` is meant as a number; `007`, and what no float can hold, is left alone."""
    assert [as_number(text) for text in ("5e-5", "1E3", "-.5e+2")] == [5e-5, 1000.0, -50.0]
    for text in ("007", "1.5", "e5", "1e400", "1e-5x", ""):
        assert as_number(text) == text


def test_a_package_or_class_that_is_missing_is_named() -> None:
    """An installation that isn't what we know fails loudly."""
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_package'$"):
        upstream._fields((("no_such_package", "a.py", "A"),))
    with pytest.raises(LookupError, match=r"^training_args\.py has no class Nothing$"):
        upstream._fields((("transformers", "training_args.py", "Nothing"),))


def test_what_a_recipe_may_switch_reaches_the_trainer(tmp_path: Path) -> None:
    """No switch that passes is set back by sftkey's own arguments, which would say nothing."""
    from sftkey.models.device import Device
    from sftkey.recipe.schema import Recipe
    from sftkey.training.stage import stage_arguments

    device = Device("cpu", 0, torch.float32)
    kept = REFUSED_TRAINER_KEYS.keys() | REFUSED_WHERE_TRUE.keys()
    kept |= {"use_cpu", "tf32", "torch_compile", "load_best_model_at_end"}  # need more than this
    for key, field in sft_config_fields().items():
        if not isinstance(field.default, bool) or key in kept:
            continue
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "model": {"name_or_path": "x"},
                "lora": None,
                "data": {"source": "x.jsonl"},
                "trainer": {key: not field.default, "dataloader_num_workers": 1},
                "stages": [{"name": "key", "loss_on": "key"}],
            }
        )
        made = stage_arguments(recipe, recipe.stages[0], device, tmp_path, on_start=True)
        assert getattr(made, key) is not field.default, key
