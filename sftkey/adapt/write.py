"""A recipe's text, each value with its reason."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.adapt.data import DataChoice, Lengths, choose_grader, plain_prompt
from sftkey.adapt.frame import FrameChoice
from sftkey.data.readers import is_data_file
from sftkey.data.sources import with_defaults
from sftkey.memory_plan.plan import largest_part
from sftkey.models.facts import ModelFacts
from sftkey.recipe.rules import UNDECIDED
from sftkey.recipe.schema import DataSection, Recipe, ResponseSection
from sftkey.recipe.stages import KEY_WEIGHT, trainer_setting
from sftkey.recipe.yaml_io import Line, WrittenSection


@dataclass(frozen=True)
class Choices:
    """All that was chosen."""

    facts: ModelFacts  # the model
    frame: FrameChoice  # how responses stand in its template, and why
    data: DataChoice  # how the data is read; empty without data of its own
    lengths: Lengths | None  # what the data needs; None where it can't be told
    other: Recipe | None  # the recipe that this one is like
    like: str  # how the user named that one
    source: str | None  # how the user named the data
    seed: int  # of the run
    path: Path  # where the recipe will lie
    gpu: str | None = None  # the size of the GPU's memory, as the user wrote it; None: unknown
    most_rows: int = 1  # how many rows fit it at once, by the plan
    cuda: bool = True  # the recipe is for a GPU that has CUDA: the user's, or this machine's
    one_stage: bool = False  # with weight on the key, in place of the paper's two

    @property
    def as_other(self) -> str:
        """The reason for what was taken over."""
        return f"as in {self.like}"

    @property
    def full(self) -> bool:
        """All weights are trained, as in the other recipe."""
        return self.other is not None and self.other.lora is None

    @property
    def stays_whole(self) -> bool:
        """The weights aren't quantized for want of CUDA: elsewhere NF4 is slow, or refused."""
        return not (self.full or self.facts.skeleton.quantized or self.cuda)

    @property
    def name(self) -> str:
        """A name for the runs: in a collection the path's, else model and data."""
        parts = self.path.with_suffix("").parts
        if "recipes" in parts[:-1]:
            return _slug("-".join(parts[parts.index("recipes") + 1 :]))
        named = [str(self.facts.section.name_or_path), self.source or ""]
        if not self.source and self.other:
            named[1] = self.other.data.task or self.other.data.source
        return "-".join(filter(None, (_slug(last_part(each)) for each in named)))

    @property
    def end_is_known(self) -> bool:
        """The model has learned to stop with the frame's end, by what is published of it."""
        renderer = self.frame.renderer
        if renderer is None or renderer.end_id in self.facts.published_stops:
            return True
        of_tokenizer = renderer.end_token == self.facts.tokenizer.eos_token
        return of_tokenizer and (renderer.kind == "plain" or not self.facts.stops_verified)

    @property
    def why_unknown(self) -> str:
        """Why it may not have."""
        stops = list(self.facts.published_stops)
        if not stops:
            return "nothing says that the model stops there"
        tokens = ", ".join(map(str, self.facts.tokenizer.convert_ids_to_tokens(stops)))
        return f"the model stops at {tokens}, and may never have learned this one"


def last_part(name: str) -> str:
    """Return what a model or data set is called, without its place, package sign and endings."""
    last = name.rstrip("/").rpartition("/")[2].removeprefix("pypi:")
    while is_data_file(last):
        last = last.rpartition(".")[0]
    return last


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-.")


ROWS_A_STEP = 16
ONE_ROW = "one row at a time, until you know what fits your GPU; more in place of accumulation"
OWN_TOKENS = 2048  # are left for the thinking that a model writes itself
EPOCHS, KEY_EPOCHS = 2, 1  # of the two stages
AS_LONG = "as many epochs as the paper's two stages; with five-fold weight on the key"
LARGE = 13  # billions of parameters, above which QLoRA halves its rate
HALF_OF_QLORA = "half of what QLoRA takes (arXiv 2305.14314); not tuned: choose on validation rows"


def head(choices: Choices) -> Iterator[str]:
    """Say what the recipe is, how it is run, and where it comes from."""
    facts, model = choices.facts, choices.facts.section.name_or_path
    data = f", {choices.as_other}" if choices.other else ""
    data = f" on {choices.source}" if choices.source else data
    count, unit = (facts.billions, "B") if facts.billions >= 1 else (1000 * facts.billions, "M")
    size = f"{count:.1f}{unit}" if count < 10 else f"{count:.0f}{unit}"
    yield f"{model} ({facts.model_type}, {size} parameters){data}: stage by stage."
    yield f"Run:  accelerate launch -m sftkey.train {choices.path}"
    yield "Written by `sftkey adapt` from the model's config and tokenizer; no weights were read."


def sections(choices: Choices) -> Iterator[WrittenSection]:
    """Return all sections in order."""
    yield "", [Line("name", choices.name), Line("seed", choices.seed)]
    yield "model", list(_model(choices))
    if choices.full:
        yield "", [Line("lora", None, f"all weights are trained, {choices.as_other}")]
    else:
        yield "lora", list(_lora(choices))
    yield "data", list(_data(choices))
    yield "response", list(_response(choices))
    yield "trainer", list(_trainer(choices))
    yield "stages", list(_stages(choices))
    yield "eval", list(_eval(choices))


def _model(choices: Choices) -> Iterator[Line]:
    skeleton, frame = choices.facts.skeleton, choices.frame
    for key in ("name_or_path", "file", "sha256"):
        if value := getattr(choices.facts.section, key):
            yield Line(key, value)
    if choices.full:
        yield Line("quantization", "none", "all weights are trained")
    elif skeleton.quantized:
        yield Line(
            "quantization", "none", f"the weights come quantized already: {skeleton.quantized}"
        )
    elif choices.stays_whole:
        yield Line(
            "quantization", "none", "no CUDA where this was written; nf4 where memory is short"
        )
    else:
        size = choices.gpu or "a GPU of unknown size"
        yield Line("quantization", "nf4", f"for {size}; none where there is room")
    why = "" if skeleton.attention == "sdpa" else "this architecture has no sdpa"
    yield Line("attn_implementation", skeleton.attention, why)
    if template := frame.undecided.get("model.chat_template"):
        yield Line("chat_template", template)
    if frame.kwargs:
        yield Line("chat_template_kwargs", frame.kwargs, frame.why["chat_template_kwargs"])


def _lora(choices: Choices) -> Iterator[Line]:
    facts, other = choices.facts, choices.other
    own = {"target_modules", "trainable_token_indices"}
    if other is not None and other.lora is not None:
        kept = {key: value for key, value in other.lora.items() if key not in own}
        yield from _taken_over(kept, choices)
    else:
        yield Line("r", 16)
        yield Line("lora_alpha", 32)
        yield Line("lora_dropout", 0.05)
    targets, why = facts.targets
    if facts.stacked:
        why += "; the experts' weights are no modules, and stay as they are"
    yield Line("target_modules", targets, why)
    renderer = choices.frame.renderer
    if renderer is not None and not choices.end_is_known:
        yield Line(
            "trainable_token_indices",
            facts.row_of(renderer.end_id),
            f"the row of {renderer.end_token}: {choices.why_unknown}",
        )


def _taken_over(values: dict[str, Any], choices: Choices) -> Iterator[Line]:
    """Return values of the other recipe; the first line says so for all."""
    why = f"{choices.as_other}, like what follows" if len(values) > 1 else choices.as_other
    for key, value in values.items():
        yield Line(key, value, why)
        why = ""


def _data(choices: Choices) -> Iterator[Line]:
    other, data = choices.other, choices.data
    why: dict[str, str] = {}
    if data.fields:
        fields, why = data.fields, data.why
    elif other is not None:
        fields, why = _others_data(other, choices)
    else:
        fields = {
            "source": f"{UNDECIDED} a data set: a built-in name, a hub id, a file or a folder"
        }
        why = {"source": "no --data was given"}
    for key in DataSection.model_fields:  # in the order of the recipe's reference
        if key in fields:
            yield Line(key, fields[key], why.get(key, ""))
    yield Line("max_length", *_max_length(choices))
    too_long = other.data.too_long if other else "drop"
    yield Line("too_long", too_long, "no key is ever cut" if too_long == "drop" else "")


def _others_data(other: Recipe, choices: Choices) -> tuple[dict[str, Any], dict[str, str]]:
    """Take the other recipe's data over; how its prompts end depends on the frame."""
    given = other.data
    fields = given.model_dump(mode="json", exclude_defaults=True)
    fields = {key: value for key, value in fields.items() if key not in ("max_length", "too_long")}
    why = {"source": choices.as_other}
    if choices.frame.section.frame == "plain":
        if given.response and with_defaults(given).prompt is None:
            fields["prompt"] = f"{UNDECIDED} one text; the plain frame takes no messages"
        else:
            fields["prompt"], why["prompt"] = plain_prompt(given)
        if given.system is not None:
            fields["system"] = f"{UNDECIDED} null, or in the prompt; a plain text has no system"
    elif other.response.frame == "plain" and given.prompt:
        fields["prompt"] = given.prompt.rstrip("\n")
    return fields, why


def _max_length(choices: Choices) -> tuple[int, str]:
    if choices.lengths is not None:
        return choices.lengths.max_length, choices.lengths.why
    length = choices.other.data.max_length if choices.other else 1024
    most = choices.facts.skeleton.most_tokens
    if most is not None and length > most:
        return most, "the model's positions end there"
    return length, choices.as_other if choices.other else "the default; no row was measured"


def _response(choices: Choices) -> Iterator[Line]:
    frame = choices.frame
    section, why = frame.section, frame.why
    yield Line("frame", section.frame, why.get("frame", ""))
    if end := frame.undecided.get("response.end") or section.end:
        yield Line("end", end, why.get("end", ""))
    # Native and default tags alike: who reads the recipe sees what is trained.
    for key in ("thinking", "answer"):
        yield Line(key, getattr(section, key), why.get(key, ""))
    turns = choices.other.response.turns if choices.other else ResponseSection().turns
    if turns != ResponseSection().turns:
        yield Line("turns", turns, choices.as_other)


def _trainer(choices: Choices) -> Iterator[Line]:
    given = dict(choices.other.trainer) if choices.other else {}
    rows, why = ROWS_A_STEP, "rows a step, on one GPU"
    if choices.other:
        rows, why = 1, f"{why}, {choices.as_other}"
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            rows *= trainer_setting(choices.other.trainer, name)
            given.pop(name, None)
    at_once = largest_part(rows, max(choices.most_rows, 1))
    yield Line("per_device_train_batch_size", at_once, _why_at_once(choices))
    yield Line("gradient_accumulation_steps", rows // at_once, why)
    if choices.other:
        yield from _taken_over(given, choices)
        return
    large = choices.facts.billions > LARGE
    yield Line("learning_rate", 5e-5 if large else 1e-4, HALF_OF_QLORA)
    yield Line("num_train_epochs", EPOCHS)
    yield Line("warmup_steps", 0.05, "below 1: a share of all steps")
    yield Line("logging_steps", 10)


def _why_at_once(choices: Choices) -> str:
    if choices.gpu is None:
        return ONE_ROW
    most = choices.most_rows
    fits = "not even one fits" if not most else "one fits" if most == 1 else f"{most} fit"
    return f"rows at once; {fits} {choices.gpu} by `sftkey check --gpu`"


def _stages(choices: Choices) -> Iterator[Line]:
    others = choices.other.stages if choices.other else ()
    if choices.data.own and not (others and all(stage.thinking == "own" for stage in others)):
        written = {"name": "key", "loss_on": "key", "thinking": "own"}
        if choices.end_is_known and not choices.full:
            written["context"] = "frozen"  # whose adapter leaves the thinking as it is
        yield Line("", written, "no column holds a reasoning: the model writes its own")
        return
    if choices.other:
        for stage in choices.other.stages:
            yield Line("", stage.model_dump(mode="json", exclude_defaults=True))
        return
    if choices.one_stage:
        trainer = {"num_train_epochs": EPOCHS + KEY_EPOCHS}
        weights = {"completion": 1.0, "key": KEY_WEIGHT}
        yield Line("", {"name": "weighted", "loss_on": weights, "trainer": trainer}, AS_LONG)
        return
    yield Line("", {"name": "completion", "loss_on": "completion"})
    settings = {"learning_rate": 2e-5, "num_train_epochs": KEY_EPOCHS}
    yield Line("", {"name": "key", "loss_on": "key", "trainer": settings}, "the key is short")


def _eval(choices: Choices) -> Iterator[Line]:
    if choices.other:
        given = choices.other.eval.model_dump(exclude_defaults=True)
        if choices.data.own:
            least = choices.lengths.max_new_tokens if choices.lengths else OWN_TOKENS
            given["max_new_tokens"] = max(choices.other.eval.max_new_tokens, least)
        yield from _taken_over(given, choices)
        return
    examples, held_out = choices.data.examples, choices.data.fields.get("test")
    yield Line("num_questions", held_out if isinstance(held_out, int) else 200)
    if choices.lengths is not None:
        why = "99.5% of the data's completions are no longer"
        if choices.data.own:
            why = "the model's own thinking and the answer; a thinking that is cut is dropped"
        yield Line("max_new_tokens", choices.lengths.max_new_tokens, why)
    else:
        yield Line("max_new_tokens", OWN_TOKENS if choices.data.own else 512)
    grader, why = choose_grader(examples) if examples else ("exact", "no answer was seen")
    yield Line("grader", grader, why)
