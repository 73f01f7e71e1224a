"""Load what the `model` section names: tokenizer, chat template, and the model on its device."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftkey.activity import activity
from sftkey.bounds import SECONDS, Late, bounded
from sftkey.data.renderer import Renderer
from sftkey.errors import ModelError, first_line, shown
from sftkey.files import GIB, read_text
from sftkey.models.device import (
    DTYPES,
    Device,
    free_bytes,
    is_out_of_memory,
    launched_with,
    sharded,
)
from sftkey.models.source import (
    PICKLED,
    UNREADABLE,
    Source,
    find_source,
    hub_error,
    model_source,
    needs_code,
    read_config,
    read_json,
    weight_files,
)
from sftkey.recipe.schema import ModelSection, Recipe

MOST_BYTES = 1 << 20  # of a template, and of what one makes of four short messages
CONVERSATION = [
    {"role": "user", "content": "How many are 2 and 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "5"},
]


def read_template(path: Path) -> str:
    """Read a template file."""
    try:
        return read_text(path, MOST_BYTES)
    except ValueError as error:
        raise ModelError(str(path), f"model.chat_template: {error}") from None


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a template that doesn't end, or fills the memory, on a short conversation.

    What else is wrong with it is said where the frame is read.
    """
    if not tokenizer.chat_template:
        return
    for messages, generation in ((CONVERSATION, False), (CONVERSATION[:1], True)):
        try:
            with bounded():
                text: Any = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation
                )
            if len(text) <= MOST_BYTES:
                continue
            what = f"makes {len(text):,} characters"
        except Late:
            what = f"takes more than {SECONDS:g} seconds"
        except (MemoryError, OverflowError):
            what = "takes memory without end"
        except Exception:  # an error of the template's own
            continue
        raise ModelError(
            where,
            f"its chat template {what} of a conversation of {len(messages)} short messages",
            "write a template of your own: model.chat_template",
        )


LOGGER = logging.getLogger("sftkey")
INDEX = "model.safetensors.index.json"
# What transformers makes a tokenizer of where there is no tokenizer.json.
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
UNPACKED_SHARE = 0.5  # of the free memory; the other half is for the steps


class PublishedGenerationConfig(GenerationConfig):
    """A generation config that is saved as it was published, with the ends that a run adds.

    transformers refuses to save a changed one whose settings contradict each other, such as a
    temperature without sampling: at the first checkpoint, after hours.
    """

    def validate(self, strict: Any = False, user_set_attributes: set[str] | None = None) -> None:
        """Refuse nothing: it was published so, and generation here takes none of its settings."""


@activity("loading the tokenizer")
def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the recipe's chat template if it has one, and with a pad token.

    Which token pads makes no difference, since padding is masked by length; the end of text stays
    as it was published.
    """
    source = model_source(section)
    if source.commit is None and not any(source.folder.glob("*token*")):
        raise ModelError(source.path, "no tokenizer there; expected tokenizer.json")
    _refuse_code(section, source)
    try:
        # Whether mistral-common is installed must not choose another tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(
            source.path,
            revision=source.commit or "main",
            trust_remote_code=False,
            mistral_format=False,
        )
    except UNREADABLE as error:
        raise _load_error(section, source, "tokenizer", error) from error
    kind = type(tokenizer).__name__
    if not tokenizer.is_fast:
        what = f"{kind} gives no character offsets, which the masks are made from"
        hint = "take a model that has a tokenizer.json"
        raise ModelError(section.name_or_path, what, hint)
    ids = tokenizer("Answer: 4", add_special_tokens=False)["input_ids"]
    if not str(tokenizer.decode(ids, skip_special_tokens=True)).strip():
        what = f"{kind} knows no letters and digits: it found no vocabulary of its own there"
        hint = "put the model's tokenizer.json there"
        raise ModelError(section.name_or_path, f"{what}, and took an empty one", hint)
    if section.chat_template:
        tokenizer.chat_template = read_template(Path(section.chat_template))
    check_template(tokenizer, section.chat_template or section.name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_renderer(recipe: Recipe) -> Renderer:
    """Load a recipe's tokenizer, and probe what stands around its responses."""
    kwargs = recipe.model.chat_template_kwargs
    return Renderer.read(load_tokenizer(recipe.model), recipe.response, kwargs)


def _refuse_code(section: ModelSection, source: Source) -> None:
    """Refuse a tokenizer that needs its folder's code, or a package that isn't installed."""
    name = section.name_or_path
    if "auto_map" in (read_json(source, "tokenizer_config.json") or {}):
        raise needs_code(name, "tokenizer_config.json")
    if source.commit is not None or (source.folder / "tokenizer.json").is_file():
        return
    for file in (source.folder / each for each in VOCABULARIES):
        if not file.is_file():
            continue
        # SentencePiece's first field is the list of its pieces; tiktoken's are lines of base64.
        with file.open("rb") as stream:
            package = "sentencepiece" if stream.read(1) == b"\n" else "tiktoken"
        if not find_spec(package):
            install = "sentencepiece protobuf" if package == "sentencepiece" else package
            what = f"{file.name} without tokenizer.json is read with the package {package}"
            hint = f"pip install {install}, or put a tokenizer.json beside it"
            raise ModelError(name, f"{what}, which isn't installed", hint)


@activity("loading the model")
def load_model(
    section: ModelSection, device: Device, *, full: bool = False, folder: Path | None = None
) -> PreTrainedModel:
    """Load the model onto the device, quantized if the recipe says so.

    Args:
        section: `dtype` is the type of the weights: by default the device's compute type; the
            published one with `auto`. Weights that are to be trained are float32 whatever it says,
            since the small steps of fine-tuning round to nothing in 16 bits.
        device: From `choose_device`.
        full: The weights themselves are to be trained, not an adapter on them.
        folder: Take the weights that an earlier stage wrote there.
    """
    source = find_source(str(folder)) if folder else model_source(section)
    if source.commit is None and not weight_files(source.folder):
        raise _without_safetensors(source)
    _refuse_other_files(source)
    dtype = device.compute_dtype if section.dtype is None else DTYPES.get(section.dtype, "auto")
    settings: dict[str, Any] = {
        "revision": source.commit or "main",
        "attn_implementation": section.attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": False,
        "dtype": torch.float32 if full else dtype,
    }
    if section.quantization == "nf4":
        settings["quantization_config"] = _nf4(device.compute_dtype)
        settings["device_map"] = {"": device.torch_device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, output_loading_info=True, **settings
        )
    except (*UNREADABLE, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _load_error(section, source, "model", error) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        what = f"{len(missing)} of the model's weights are not there, such as {missing[0]}"
        raise ModelError(source.path, what)
    if model.generation_config is not None:
        model.generation_config.__class__ = PublishedGenerationConfig
    if section.quantization == "nf4":
        _ready_packed(model, section, device)
    else:
        model.to(device.torch_device)
    if not sharded():  # of several processes one may hold the weights
        refuse_not_finite(dict(model.named_parameters()), source.path)
    return model


GET_ANEW = "get them anew from where they came; what was trained, train with a lower learning_rate"


def refuse_not_finite(
    tensors: Mapping[str, torch.Tensor], where: str, hint: str = GET_ANEW
) -> None:
    """Refuse weights that hold NaN or infinity: what they answer is noise.

    Packed ones aren't looked into.

    Raises:
        ModelError: Names how many, and one of them.
    """
    floats = {name: each for name, each in tensors.items() if each.is_floating_point()}
    broken = [
        name
        for name, each in floats.items()
        if each.itemsize > 1 and not torch.isfinite(each).all()
    ]
    if broken:
        what = f"{len(broken)} of {len(tensors)} hold NaN or infinity, such as {broken[0]}"
        raise ModelError(where, f"expected finite weights; {what}", hint)


def _ready_packed(model: PreTrainedModel, section: ModelSection, device: Device) -> None:
    """Keep a CPU from repacking NF4 weights, and unpack them there where the recipe lets it."""
    for _, module in _packed_modules(model):
        # On a CPU with AVX512-BF16 the first evaluation without gradient would repack weights for
        # good, for a product that has no gradient: later training would go on with None below.
        module.support_avx512bf16_for_cpu = False
    if section.unpack == "auto" and device.kind == "cpu":
        _unpack(model, device.compute_dtype)


def _without_safetensors(source: Source) -> ModelError:
    """Say that there are no weights that can be read without running code."""
    found = (file.name for pattern in PICKLED for file in source.folder.glob(pattern))
    if pickled := ", ".join(sorted(found)):
        return ModelError(
            source.path,
            f"expected weights as *.safetensors; got {pickled}, whose reading may run code",
            "if you trust who wrote them, convert them: "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`",
        )
    return ModelError(source.path, "no weights there; expected *.safetensors beside config.json")


def _refuse_other_files(source: Source) -> None:
    """Refuse an index that sends the weights' reader to files that aren't safetensors beside it."""
    shards = (read_json(source, INDEX) or {}).get("weight_map")
    for name in sorted({str(each) for each in shards.values()} if isinstance(shards, dict) else ()):
        if Path(name).suffix != ".safetensors" or Path(name).is_absolute() or ".." in name:
            what = f"{INDEX}: expected names of *.safetensors beside it; got {shown(name)}"
            raise ModelError(source.path, what, "take the model from who made it")


def _nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Quantize to NF4, twice, as QLoRA does.

    FSDP shards floating tensors alone, all of one type: there the packed bytes are held as numbers
    of the compute type.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype if launched_with("FSDP") else torch.uint8,
    )


def _unpack(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Unpack NF4 weights once: on a CPU bitsandbytes would unpack each of them at every product.

    The products stay the same. The weights stay packed where they would take more than half of the
    free memory, where a launcher shards them, and where the model hands on another type than it
    multiplies in, since bitsandbytes converts at each module.
    """
    if sharded() or model.dtype != compute_dtype:
        return
    sizes = (each.in_features * each.out_features for _, each in _packed_modules(model))
    size = sum(sizes) * compute_dtype.itemsize
    needed = f"{size / GIB:.1f} GiB"
    if size > UNPACKED_SHARE * free_bytes():
        LOGGER.info("NF4 weights stay packed: unpacked they would need %s", needed)
        return
    unpack(model)
    LOGGER.info("NF4 weights are unpacked once, to %s", needed)


def unpack(model: PreTrainedModel) -> None:
    """Hold NF4 weights as plain ones of the model's type, with the values that NF4 gave them."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in _packed_modules(model):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        with torch.device("meta"):  # the weight takes the place of one that is never made
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight = torch.nn.Parameter(weight.to(model.dtype), requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear.train(module.training))
    loaded: Any = model  # upstream sets these on it while loading
    loaded.hf_quantizer.remove_quantization_config(model)
    loaded.is_loaded_in_4bit = False


def _packed_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the NF4 modules with their names."""
    from bitsandbytes.nn import Linear4bit

    return [(name, each) for name, each in model.named_modules() if isinstance(each, Linear4bit)]


def _load_error(
    section: ModelSection, source: Source, what: str, error: BaseException
) -> ModelError:
    of_the_hub = (hub.HfHubHTTPError, hub.LocalEntryNotFoundError)
    if source.commit and isinstance(error.__cause__, of_the_hub):
        return hub_error(section.name_or_path, section.revision, error.__cause__)
    read_config(section.name_or_path, source)  # else its fault is said to be the tokenizer's
    said = first_line(error)
    if "ignore_mismatched_sizes" in said:  # transformers sends its reader to a log
        said = "its weights have other shapes than its config.json says"
    return ModelError(section.name_or_path, f"its {what} can't be loaded: {said}")
