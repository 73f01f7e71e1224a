"""Rules that concern several settings of a recipe."""

from collections.abc import Iterator, Sequence
from typing import Any

from sftkey.errors import Problem, RecipeError, did_you_mean, shown
from sftkey.recipe.loss_on import annealed, checked_weights, loss_weights, trained_context
from sftkey.recipe.schema import KEY_BATCH_TOKENS, Recipe
from sftkey.recipe.stages import trainer_setting
from sftkey.recipe.upstream import as_number
from sftkey.recipe.upstream_rules import IDLE_BESIDE, METRIC_READERS, METRICS, Finding, idle
from sftkey.recipe.yaml_io import Keys, dotted

UNDECIDED = "DECIDE:"  # what `sftkey adapt` writes in the place of a value that it can't choose
DECIDE = f"write a value in the place of `{UNDECIDED} …`"
MADE_SOURCES = ("reasoning_gym", "made")


def check_together(data: dict[str, Any]) -> Iterator[Finding]:
    """Check what no field can tell alone, of a recipe with the defaults of its sections."""
    full = data.get("lora", {}) is None
    yield from _check_model(data["model"], full)
    yield from _check_data(data["data"])
    yield from _check_response(data["response"])
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
    for key, what in idle(trainer, trainer_setting):
        if key in own or IDLE_BESIDE[key][0] not in own:  # else it is for the other stages
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
    elif metric and not any(trainer.get(key) == value for key, value in METRIC_READERS.items()):
        words = (f"{key}: {shown(value)}" for key, value in METRIC_READERS.items())
        yield place("metric_for_best_model"), f"does nothing without one of {', '.join(words)}"


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


def _check_response(response: dict[str, Any]) -> Iterator[Finding]:
    if response["end"] is not None and response["frame"] == "chat":
        yield ("response", "end"), "only with `frame: plain`; the chat template ends a turn itself"
    tags = [response[key] for key in ("thinking", "answer")]
    pairs = all(isinstance(each, list | tuple) and len(each) == 2 for each in tags)
    if pairs and tags[0][1] == tags[1][0] == "":
        what = "expected a text before the answer, since the one behind the thinking is empty"
        yield ("response", "answer"), f'{what}: ["\\n\\n", ""], or tags; got none'


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
    sampled = isinstance(how, dict) and how["file"] is None and as_number(how["samples"]) != 1
    if isinstance(how, dict) and sampled and as_number(how["temperature"]) == 0:
        what = "0 is greedy, and all samples of a question would be the same"
        yield (*keys, "own", "temperature"), f"{what}; write 0.7, or own.samples of 1"
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
    if name is None and as_number(stop.get("times", 1)) != 1:
        what = "does nothing without as_long_as, an earlier stage's name"
        yield (*keys, "early_stop", "times"), what


def _check_anneal(stage: dict[str, Any], keys: Keys) -> Iterator[Finding]:
    """Check that a stage trains the same segments from its first step to its last."""
    loss_on, anneal = _numbers(stage.get("loss_on")), stage.get("anneal")
    try:
        anneal = checked_weights(anneal)
    except ValueError:
        return  # there is none, or its own check says what is wrong with it
    first, last = (loss_weights(each) for each in (loss_on, annealed(loss_on, anneal)))
    changed = [name for name in first if (first[name] > 0) != (last[name] > 0)]
    if first == last:
        yield (*keys, "anneal"), "does nothing: these are the weights that `loss_on` begins with"
    elif changed:
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


def refuse_undecided(recipe: Recipe) -> None:
    """Refuse a recipe with marked values: read as they stand, they would be text in each row.

    Raises:
        RecipeError: Names each of them, with what is to be chosen from.
    """
    found = [Problem(dotted(keys), f"to be decided: {value}") for keys, value in undecided(recipe)]
    if found:
        raise RecipeError(recipe.name, found, DECIDE)


def undecided(recipe: Recipe, *sections: str) -> list[tuple[Keys, str]]:
    """List the marked values, of all sections or of these, each without its mark."""
    values = recipe.model_dump(mode="json", include=set(sections) or None)
    return list(_marked(values, ()))


def _marked(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    if isinstance(value, str) and value.startswith(UNDECIDED):
        yield keys, value.removeprefix(UNDECIDED).strip()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _marked(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _marked(inner, (*keys, number))
