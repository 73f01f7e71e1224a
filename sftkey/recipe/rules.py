"""Rules that concern several settings of a recipe, or upstream's fields."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sftkey.errors import did_you_mean, shown
from sftkey.recipe.loss_on import SEGMENTS, annealed, loss_weights, trained_context
from sftkey.recipe.schema import KEY_BATCH_TOKENS
from sftkey.recipe.stages import lora_setting, trainer_setting
from sftkey.recipe.upstream import Field, as_number, lora_config_fields, sft_config_fields
from sftkey.recipe.yaml_io import Keys

Finding = tuple[Keys, str]

MADE_SOURCES = ("reasoning_gym", "made")
PUSHES = "it would push each stage over the other; after the run, `sftkey push RUN REPO`"
REFUSED_TRAINER_KEYS = {
    "packing": "write `data.packing`",
    "packing_strategy": "write `data.packing`",
    "eval_packing": "write `data.packing`",
    "padding_free": "sftkey's collator pads, and this would do nothing",
    "max_length": "write `data.max_length`",
    "truncation_mode": "it cuts off the answer; write `data.too_long`",
    "dataset_kwargs": "sftkey tokenizes the rows itself; describe them under `data`",
    "dataset_text_field": "sftkey tokenizes the rows itself; describe them under `data`",
    "dataset_num_proc": "sftkey tokenizes the rows itself, and this would do nothing",
    "shuffle_dataset": "the rows are shuffled in each epoch anyway, and this would do nothing",
    "length_column_name": "sftkey counts the tokens of its rows itself",
    "remove_unused_columns": "sftkey's collator needs all columns",
    "completion_only_loss": "write `loss_on: completion` in a stage",
    "assistant_only_loss": "write `loss_on: completion` in a stage",
    "loss_type": "the loss is sftkey's own; write `loss_on` in a stage",
    "output_dir": "a run lies in runs/<name>; write `name`",
    "seed": "write `seed` at the top of the recipe",
    "resume_from_checkpoint": "the same command again goes on where the run stopped",
    "eos_token": "the frame's end of turn ends an answer; with `frame: plain` write `response.end`",
    "pad_token": "padding is masked by length, and the token makes no difference",
    "chat_template_path": "write `model.chat_template`",
    "model_init_kwargs": "write the model's settings under `model`",
    "enable_jit_checkpoint": "it counts a stage that a signal has cut as trained",
    "trust_remote_code": "sftkey loads the model itself and runs no code of a model folder",
    "bf16": "the device decides, or `model.dtype` does",
    "fp16": "the device decides, or `model.dtype` does",
    "average_tokens_across_devices": "the loss is always averaged over all processes",
    "eval_on_start": "the validation rows are always read before a stage's first step",
    "disable_tqdm": "the run has one progress bar of its own",
    "label_smoothing_factor": "sftkey's loss doesn't smooth, and this would do nothing",
    "router_aux_loss_coef": "sftkey's loss has no load-balancing term, and this would do nothing",
    "auto_find_batch_size": "a batch that shrinks by itself can't be resumed; set the batch size",
    "use_liger_kernel": "its loss isn't proven equal to sftkey's yet",
    "liger_kernel_config": "its loss isn't proven equal to sftkey's yet",
    **dict.fromkeys(
        [
            *("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
            *("bf16_full_eval", "fp16_full_eval"),
        ],
        "sftkey validates by segment itself, and this would do nothing",
    ),
    **dict.fromkeys(
        ["do_train", "do_eval", "do_predict"],
        "a run trains, validates and evaluates by itself, and this would do nothing",
    ),
    **dict.fromkeys(
        ["hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"], PUSHES
    ),
}
METRICS = ("loss", *(f"loss_{segment}" for segment in SEGMENTS))
# What does nothing beside another key of such a value.
IDLE_BESIDE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "eval_delay": ("eval_strategy", ("no",)),
    "eval_steps": ("eval_strategy", ("no", "epoch")),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", (False,)),
    "dataloader_persistent_workers": ("dataloader_num_workers", (0,)),
    "layers_pattern": ("layers_to_transform", (None,)),
}
# Refused where they ask for something: false asks for nothing.
REFUSED_WHERE_TRUE = {
    "greater_is_better": "all that a stage can be chosen by are losses",
    "push_to_hub": PUSHES,
    "ignore_data_skip": "a stage that goes on would read other rows than one that ran through",
    "save_only_model": "a stage could not go on from a checkpoint without its optimizer",
}
REFUSED_LORA_KEYS = dict.fromkeys(
    [
        *("base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type"),
        *("inference_mode", "auto_mapping"),
    ],
    "sftkey sets it itself",
)
UNSERVED_LORA_KEYS = {
    "alora_invocation_tokens": "such an adapter acts from a token on that answers don't hold; a "
    "stage with `context: frozen` trains one that acts on the key",
    "megatron_config": "sftkey trains without Megatron",
    "megatron_core": "sftkey trains without Megatron",
    "use_qalora": "it acts on GPTQ's layers, which sftkey doesn't load",
    "qalora_group_size": "it acts on GPTQ's layers, which sftkey doesn't load",
}
REFUSED_KEY_LORA_KEYS = {
    **dict.fromkeys(
        ["trainable_token_indices", "modules_to_save"],
        "it acts on all tokens, and a frozen stage trains what acts on the key alone",
    ),
    "use_dora": "a frozen stage's adapter adds to the previous one's, and DoRA's norm would not",
}
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "a number above 0")
_COUNT: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "a whole number above 0")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "0 or a number above")
LIMITS = {
    "num_train_epochs": _POSITIVE,
    "max_steps": (
        lambda value: value == -1 or value >= 1,
        "a whole number above 0, or -1 for none",
    ),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "r": _COUNT,
    "lora_alpha": _COUNT,
    "lora_dropout": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
}


def check_upstream(data: dict[str, Any]) -> Iterator[Finding]:
    """Check `trainer` and `lora`, the stages' too; turn texts such as `5e-5` into numbers."""
    stages = data.get("stages")
    places: list[tuple[Keys, Any]] = [((), data)]
    places += [
        (("stages", number), stage)
        for number, stage in enumerate(stages if isinstance(stages, list) else ())
        if isinstance(stage, dict)
    ]
    for keys, section in places:
        lora = section.get("lora")
        for key, what in _idle(lora if isinstance(lora, dict) else {}, lora_setting):
            yield (*keys, "lora", key), what
        refused = REFUSED_LORA_KEYS | UNSERVED_LORA_KEYS
        refused |= REFUSED_KEY_LORA_KEYS if keys else {}
        yield from _check_settings(lora, (*keys, "lora"), refused, lora_config_fields())
        yield from _check_settings(
            section.get("trainer"), (*keys, "trainer"), REFUSED_TRAINER_KEYS, sft_config_fields()
        )


def _check_settings(
    settings: Any, keys: Keys, refused: dict[str, str], fields: dict[str, Field]
) -> Iterator[Finding]:
    if not isinstance(settings, dict):
        return
    upstream = "peft.LoraConfig" if keys[-1] == "lora" else "trl.SFTConfig"
    for key, value in settings.items():
        if key in refused:
            yield (*keys, key), f"refused: {refused[key]}"
        elif key in REFUSED_WHERE_TRUE and value is True:
            yield (*keys, key), f"refused: {REFUSED_WHERE_TRUE[key]}"
        elif key not in fields:
            near = did_you_mean(key, sorted(fields.keys() - refused.keys()))
            yield (*keys, key), "unknown key" + (near or f"; it is no field of {upstream}")
        else:
            try:
                settings[key] = fields[key].convert(value)
                holds, expected = LIMITS.get(key, (None, ""))
                if holds and settings[key] is not None and not holds(settings[key]):
                    raise ValueError(f"expected {expected}; got {shown(value)}")
            except ValueError as error:
                yield (*keys, key), str(error)


def _idle(
    settings: dict[str, Any], setting: Callable[[dict[str, Any], str], Any]
) -> Iterator[tuple[str, str]]:
    """Find what does nothing beside another setting, which `setting` reads or knows the default of.

    The settings are those of a trainer or of an adapter.
    """
    for key, (other, idle) in IDLE_BESIDE.items():
        if settings.get(key) and (told := setting(settings, other)) in idle:
            yield key, f"does nothing where {other} is {shown(told)}: change that, or leave it out"


def check_together(data: dict[str, Any]) -> Iterator[Finding]:
    """Check what no field can tell alone, of a recipe with the defaults of its sections."""
    full = data.get("lora", {}) is None
    yield from _check_model(data["model"], full)
    yield from _check_data(data["data"])
    if data["response"]["end"] is not None and data["response"]["frame"] == "chat":
        yield ("response", "end"), "only with `frame: plain`; the chat template ends a turn itself"
    yield from _check_stages(data["stages"], full)
    found: dict[Finding, None] = {}  # of the shared trainer each once
    for number, stage in enumerate(data["stages"]):
        own, shared = stage.get("trainer") or {}, data.get("trainer") or {}
        if isinstance(own, dict) and isinstance(shared, dict):
            keys: Keys = ("stages", number, "trainer")
            packing = data["data"]["packing"] is True
            early = stage.get("early_stop") is not None
            found |= dict.fromkeys(_check_trainer(shared, own, keys, packing, early))
    yield from found


def _check_trainer(
    shared: dict[str, Any], own: dict[str, Any], keys: Keys, packing: bool, early: bool
) -> Iterator[Finding]:
    """Check what a stage's trainer is told, in the place where it is told it."""
    trainer = {**shared, **own}

    def place(key: str) -> Keys:
        return (*keys, key) if key in own else ("trainer", key)

    sampling = trainer.get("train_sampling_strategy")
    grouped = sampling == "group_by_length" or (sampling is None and not packing)
    if trainer.get("data_seed") is not None and grouped:
        what = "rows that are grouped by length are shuffled by `seed`, and this would do nothing"
        yield place("data_seed"), f"{what}; write train_sampling_strategy: random beside it"
    for key, what in _idle(trainer, trainer_setting):
        yield place(key), what
    evaluates = trainer_setting(trainer, "eval_strategy") != "no"
    if trainer.get("save_strategy") == "best" and not evaluates:
        what = "without evaluations none is the best, and no checkpoint is saved"
        yield place("save_strategy"), f"{what}; write eval_strategy: steps or epoch"
    if trainer.get("load_best_model_at_end") is True and early:
        what = "`early_stop` keeps the epoch with the most right answers; leave this out"
        yield place("load_best_model_at_end"), what
    elif trainer.get("load_best_model_at_end") is True:
        for key in ("eval_strategy", "save_strategy"):
            if trainer_setting(trainer, key) == "no":
                what = "the best checkpoint is one of those saved, by the losses of evaluations"
                yield place("load_best_model_at_end"), f"{what}; write {key}: steps or epoch"
    metric = trainer.get("metric_for_best_model")
    if isinstance(metric, str) and metric.removeprefix("eval_") not in METRICS:
        near = did_you_mean(metric, METRICS)
        what = f"expected a validation loss, one of {', '.join(METRICS)}; got {shown(metric)}"
        yield place("metric_for_best_model"), what + near


def _check_model(model: dict[str, Any], full: bool) -> Iterator[Finding]:
    name = model.get("name_or_path")
    packaged = isinstance(name, str) and name.startswith("pypi:")
    for key in ("file", "sha256"):
        if packaged and model[key] is None:
            yield ("model", key), "missing; a model inside a package needs `file` and `sha256`"
    if model["sha256"] is not None and model["file"] is None and not packaged:
        yield ("model", "sha256"), "is that of `file`, a GGUF file; got no `file`"
    if packaged and model["revision"] is not None:
        yield ("model", "revision"), "a model inside a package has its version in `name_or_path`"
    elif model["file"] is not None and model["revision"] is not None:
        yield ("model", "revision"), "a GGUF file of a folder has none"
    if full and model["quantization"] == "nf4":
        what = "expected none, since full fine-tuning (`lora: null`) can't train nf4; got nf4"
        yield ("model", "quantization"), what
    if full and model["adapter"] is not None:
        yield ("model", "adapter"), "not with `lora: null`, which trains the model's own weights"


def _check_data(data: dict[str, Any]) -> Iterator[Finding]:
    source = data.get("source")
    for key in ("task", "num_rows"):
        if source in MADE_SOURCES and data[key] is None:
            yield ("data", key), f"missing; `source: {source}` needs `task` and `num_rows`"
    for key in ("task", "task_options"):
        if isinstance(source, str) and source not in MADE_SOURCES and data[key]:
            wanted = " or ".join(MADE_SOURCES)
            yield ("data", key), f"only with `source: {wanted}`; got {shown(source)}"
    for key in ("thinking", "answer"):
        for rule in ("response", "split_rule"):
            if data[key] is not None and data[rule] is not None:
                yield ("data", key), f"not beside `{rule}`: the rule finds thinking and answer"
                break
    validation, test = data["validation"], data["test"]
    if isinstance(validation, float) and isinstance(test, float) and validation + test >= 1:
        yield ("data", "test"), "validation and test together leave no rows to train on"
    for key, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if isinstance(data[key], str) and data[key] == data[other]:
            yield ("data", key), f"expected other rows than {other}'s; got {shown(data[key])}"


def _check_stages(stages: list[dict[str, Any]], full: bool) -> Iterator[Finding]:
    seen: dict[str, int] = {}  # in small letters, since some file systems see no other
    for number, stage in enumerate(stages):
        if isinstance(name := stage.get("name"), str):
            first = seen.setdefault(name.lower(), number)
            if first != number:
                what = f"stages[{first}] has this name, too; write another"
                yield ("stages", number, "name"), what
        yield from _check_context(stage, ("stages", number), number + 1 == len(stages))
        yield from _check_early_stop(stage, ("stages", number), [*seen][:-1])
        if full and stage["context"] == "frozen" and stage["lora"] is None:
            what = "missing; full fine-tuning would change what writes the thinking"
            yield ("stages", number, "lora"), f"{what}: a frozen stage trains an adapter"


def _check_context(stage: dict[str, Any], keys: Keys, last: bool) -> Iterator[Finding]:
    context = stage["context"]
    yield from _check_anneal(stage, keys)
    if context in ("detached", "frozen") and (trained := _trained_context(stage.get("loss_on"))):
        what = f"{context} gives no gradient to what `loss_on` trains here: {trained}"
        yield (*keys, "context"), f"{what}; write exact, or loss_on: key"
    if context != "exact" and as_number(stage.get("kl")):
        what = f"{context} gives no gradient to the thinking, where this acts"
        yield (*keys, "kl"), f"{what}; write context: exact"
    if context == "frozen" and not last:
        what = "frozen, whose adapter acts on the key alone, leaves nothing for a stage after it"
        yield (*keys, "context"), f"{what}; make it the last one"
    own, how = stage["thinking"] == "own", stage["own"]
    keeps_right = isinstance(how, dict) and how["keep"] == "right"
    if own and not keeps_right and (trained := _trained_context(stage.get("loss_on"))):
        what = "own thinking is no reference, and loss_on trains it here"
        yield (
            (*keys, "thinking"),
            f"{what} ({trained}); write loss_on: key, or own: {{keep: right}}",
        )
    if not own and how is not None:
        yield (*keys, "own"), "only with `thinking: own`"
    if isinstance(how, dict) and how["keep"] == "mixed" and how["samples"] == 1:
        what = "mixed keeps questions that were answered right once and wrong once"
        yield (*keys, "own", "keep"), f"{what}: it needs own.samples of 2 or more"
    for key in ("lora", "grid"):
        if context != "frozen" and stage[key] is not None:
            yield (*keys, key), "only with `context: frozen`, which trains an adapter of its own"
    if context != "frozen" and stage["context_cache"] not in ("auto", "off", False):
        yield (*keys, "context_cache"), "only with `context: frozen`: elsewhere the context changes"
    if context == "exact" and stage.get("key_batch_tokens", KEY_BATCH_TOKENS) != KEY_BATCH_TOKENS:
        what = "only with `context: detached` or `frozen`: exact reads context and key in one pass"
        yield (*keys, "key_batch_tokens"), what


def _check_early_stop(
    stage: dict[str, Any], keys: Keys, earlier: Sequence[str]
) -> Iterator[Finding]:
    stop = stage.get("early_stop")
    if not isinstance(stop, dict):
        return
    if stage["grid"] is not None:
        what = "not with `grid`, which chooses by losses; write one value of each"
        yield (*keys, "early_stop"), what
    name = stop.get("as_long_as")
    if isinstance(name, str) and name.lower() not in earlier:
        yield (*keys, "early_stop", "as_long_as"), f"expected an earlier stage; got {shown(name)}"


def _check_anneal(stage: dict[str, Any], keys: Keys) -> Iterator[Finding]:
    """Check that a stage trains the same segments from its first step to its last."""
    loss_on, anneal = (_numbers(stage.get(key)) for key in ("loss_on", "anneal"))
    if not anneal or isinstance(anneal, str):
        return
    first, last = (loss_weights(each) for each in (loss_on, annealed(loss_on, anneal)))
    changed = [name for name in first if (first[name] > 0) != (last[name] > 0)]
    if changed:
        what = f"{' and '.join(changed)}: expected a weight above 0 at both ends, or at none"
        yield (*keys, "anneal"), what


def _numbers(loss_on: Any) -> Any:
    """Return weights as far as they are numbers; a word stays as it is, anything else is none."""
    if not isinstance(loss_on, dict):
        return loss_on if isinstance(loss_on, str) else {}
    numbers = {name: as_number(weight) for name, weight in loss_on.items()}
    return {name: each for name, each in numbers.items() if isinstance(each, int | float)}


def _trained_context(loss_on: Any) -> str:
    """Name the parts before the key that a loss trains, as far as it holds weights."""
    return " and ".join(trained_context(_numbers(loss_on)))
