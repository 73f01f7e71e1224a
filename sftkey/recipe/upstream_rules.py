"""What a recipe may say to `trl.SFTConfig` and `peft.LoraConfig`: each key is used, or refused."""

from collections.abc import Callable, Iterator
from typing import Any

from sftkey.errors import did_you_mean, shown
from sftkey.recipe.loss_on import SEGMENTS
from sftkey.recipe.stages import lora_setting
from sftkey.recipe.upstream import Field, lora_config_fields, sft_config_fields
from sftkey.recipe.yaml_io import Keys

Finding = tuple[Keys, str]
PUSHES = "it would push each stage over the other; after the run, `sftkey push RUN REPO`"
LAUNCHES = "the launcher decides: `accelerate launch --config_file accelerate_configs/…`"
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
    "label_names": "sftkey's loss reads labels of its own, and this would do nothing",
    "logging_nan_inf_filter": "a loss that isn't finite ends the stage, and has to be seen",
    **dict.fromkeys(["local_rank", "deepspeed", "fsdp", "fsdp_config"], LAUNCHES),
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
        [
            *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
            *("hub_always_push", "hub_revision"),
        ],
        PUSHES,
    ),
}
# Fields of earlier releases that stand in published settings, and what has taken their place.
FORMER_KEYS = {
    "warmup_ratio": "write `warmup_steps`, of which a number below 1 is a share",
    "max_seq_length": "write `data.max_length`",
    "group_by_length": "rows are grouped by length, unless `train_sampling_strategy` is random",
    "no_cuda": "write `use_cpu`",
    "overwrite_output_dir": "a run lies in runs/<name>, and the same command goes on with it",
    "save_safetensors": "weights are always saved so",
}
REFUSED_STAGE_TRAINER_KEYS = {"use_cpu": "a run has one device; write it in the shared `trainer`"}
METRICS = ("loss", *(f"loss_{segment}" for segment in SEGMENTS))
METRIC_READERS = {  # one of them must stand beside metric_for_best_model
    "load_best_model_at_end": True,
    "save_strategy": "best",
    "lr_scheduler_type": "reduce_lr_on_plateau",
}
# What does nothing beside another key of such a value.
IDLE_BESIDE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "warmup_steps": ("lr_scheduler_type", ("constant", "reduce_lr_on_plateau", "greedy")),
    "lr_scheduler_kwargs": ("lr_scheduler_type", ("constant", "constant_with_warmup")),
    "eval_delay": ("eval_strategy", ("no",)),
    "eval_steps": ("eval_strategy", ("no", "epoch")),
    "save_steps": ("save_strategy", ("epoch", "best")),
    "logging_steps": ("logging_strategy", ("epoch",)),
    "gradient_checkpointing": ("activation_checkpointing", (True, False)),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", (False,)),
    "activation_checkpointing_kwargs": ("gradient_checkpointing", (False,)),
    **dict.fromkeys(
        [
            *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
            "dataloader_multiprocessing_context",
        ],
        ("dataloader_num_workers", (0,)),
    ),
    **dict.fromkeys(
        ["run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"],
        ("report_to", ("none", "None", ["none"], [], None)),
    ),
    "layers_pattern": ("layers_to_transform", (None,)),
}
# Inside a setting, where they ask for something.
REFUSED_INSIDE = {
    "accelerator_config": {
        "split_batches": "a batch is counted for each process; set per_device_train_batch_size",
        "gradient_accumulation_kwargs": "write gradient_accumulation_steps",
    },
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
    "fan_in_fan_out": "peft reads from each layer how its weights lie",
    **dict.fromkeys(
        ["loftq_config", "eva_config", "corda_config", "lora_ga_config"],
        "it goes with an init_lora_weights that changes the base, which a stage could not go on "
        "from",
    ),
    **dict.fromkeys(
        ["velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"],
        "sftkey trains plain LoRA, rsLoRA and DoRA, which it is tested with",
    ),
}
REFUSED_KEY_LORA_KEYS = {
    **dict.fromkeys(
        ["trainable_token_indices", "modules_to_save"],
        "it acts on all tokens, and a frozen stage trains what acts on the key alone",
    ),
    "use_dora": "a frozen stage's adapter adds to the previous one's, and DoRA's norm would not",
}
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "a number above 0")
_COUNT: tuple[Callable[[Any], bool], str] = (
    lambda value: 1 <= value < 2**31,  # more can't be counted by a sampler
    "a whole number above 0",
)
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "0 or a number above")
_SHARE: tuple[Callable[[Any], bool], str] = (
    lambda value: 0 <= value < 1,
    "a number from 0 to below 1",
)
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_LOG_LEVEL: tuple[Callable[[Any], bool], str] = (
    lambda value: value in _LOG_LEVELS,
    f"one of {', '.join(_LOG_LEVELS)}",
)


def _numbers_by_name(kinds: Any) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return all(
            isinstance(each, kinds) and not isinstance(each, bool) and each > 0
            for each in value.values()
        )

    return holds


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
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "neftune_noise_alpha": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "ddp_timeout": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "pad_to_multiple_of": (
        lambda value: value == "auto" or (str(value).isdecimal() and int(value) > 0),
        "a whole number above 0, or auto",
    ),
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "max_grad_norm": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "r": _COUNT,
    "lora_alpha": _COUNT,
    "lora_dropout": _SHARE,
    "trainable_token_indices": (bool, "ids of the vocabulary, or null"),
    "rank_pattern": (_numbers_by_name(int), "a whole number above 0 for each name"),
    "alpha_pattern": (_numbers_by_name((int, float)), "a number above 0 for each name"),
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
        for key, what in idle(lora if isinstance(lora, dict) else {}, lora_setting):
            yield (*keys, "lora", key), what
        refused = REFUSED_LORA_KEYS | UNSERVED_LORA_KEYS
        refused |= REFUSED_KEY_LORA_KEYS if keys else {}
        yield from _check_settings(lora, (*keys, "lora"), refused, lora_config_fields())
        refused = REFUSED_TRAINER_KEYS | (REFUSED_STAGE_TRAINER_KEYS if keys else {})
        yield from _check_settings(
            section.get("trainer"), (*keys, "trainer"), refused, sft_config_fields()
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
        elif key not in fields and key in FORMER_KEYS and keys[-1] == "trainer":
            yield (*keys, key), f"no field any more: {FORMER_KEYS[key]}"
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
            for inner, why in REFUSED_INSIDE.get(key, {}).items():
                if isinstance(value, dict) and value.get(inner):
                    yield (*keys, key, inner), f"refused: {why}"


def idle(
    settings: dict[str, Any], setting: Callable[[dict[str, Any], str], Any]
) -> Iterator[tuple[str, str]]:
    """Find what does nothing beside another setting, which `setting` reads or knows the default of.

    The settings are those of a trainer or of an adapter.
    """
    for key, (other, idle) in IDLE_BESIDE.items():
        if settings.get(key) and (told := setting(settings, other)) in idle:
            yield key, f"does nothing where {other} is {shown(told)}: change that, or leave it out"
