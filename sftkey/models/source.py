"""Where a model's files lie: on the hub, in a folder, or in a package; and which weights they are.

A source is found before anything is loaded from it, so that whatever is missing or refused is said
once and the same way; weights and tokenizer then come from one commit.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils.hub import cached_file

from sftkey.activity import activity
from sftkey.errors import ModelError, first_line, shown
from sftkey.files import refuse_irregular
from sftkey.models.packaged import converted_folder, gguf_folder
from sftkey.recipe.schema import ModelSection

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "*.safetensors"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
NOT_ITS_CONFIG = "put the config.json there that the weights were published with"
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
# What transformers raises of files that it can't make a config, a tokenizer or a model of.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError),
    *(IndexError, ArithmeticError, AssertionError, RecursionError),
    *(hub.StrictDataclassError, SafetensorError),
)


@dataclass(frozen=True)
class Source:
    """Where a model's or an adapter's files lie."""

    path: str  # what `from_pretrained` takes: a folder, or a hub id
    commit: str | None  # of a hub id; all files come from it
    # The folder on this machine: the one of `path`, or the snapshot in the hub's cache.
    folder: Path


def find_source(
    name_or_path: str, revision: str | None = None, config_file: str = "config.json"
) -> Source:
    """Find a folder or a hub id by the one file that it must have."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision:
            raise ModelError(name_or_path, f"a folder has no revision; got {revision!r}")
        if not (folder / config_file).is_file():
            raise _without_config(name_or_path, config_file, (folder / ADAPTER_CONFIG).is_file())
        refuse_irregular(folder.iterdir())
        return Source(str(folder), None, folder)
    if folder.suffix == ".gguf":
        what = "a GGUF file; expected the folder that it lies in"
        raise ModelError(
            name_or_path, what, f"model={{name_or_path: {folder.parent}, file: {folder.name}}}"
        )
    if folder.is_file():
        what = "a file; expected the folder that it lies in"
        raise ModelError(name_or_path, what, f"write {folder.parent}")
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(name_or_path, "no such folder")
    snapshot = _snapshot(name_or_path, revision, config_file)
    return Source(name_or_path, snapshot.name, snapshot)


def _without_config(name: str, config_file: str, is_adapter: bool) -> ModelError:
    if is_adapter:
        hint = f"write model.adapter={name}, and its base as model.name_or_path"
        return ModelError(name, "a LoRA adapter; expected a whole model", hint)
    return ModelError(name, f"no {config_file} there")


@lru_cache
@activity("asking the hub for the model")
def _snapshot(repo_id: str, revision: str | None, config_file: str) -> Path:
    """Return the cached folder of a hub id's commit; asked once, so a process sees one commit."""
    try:
        return Path(hf_hub_download(repo_id, config_file, revision=revision)).parent
    except hub.RemoteEntryNotFoundError as error:
        raise _without_config(repo_id, config_file, is_adapter=False) from error
    except Exception as error:
        raise hub_error(repo_id, revision, error) from error


def hub_error(repo_id: str, revision: str | None, error: BaseException) -> ModelError:
    """Say what the hub's error means and what to do; subclasses stand before their bases."""
    page, hint = f"https://huggingface.co/{repo_id}", None
    match error:
        case hub.GatedRepoError():
            what = "gated: the hub gives it only to accounts that accepted its licence"
            hint = f"accept it at {page}, then run `hf auth login`"
        case hub.RevisionNotFoundError():
            what = f"model.revision: the hub has no {revision!r} of it"
            hint = f"its commits stand at {page}/commits"
        case hub.RepositoryNotFoundError():
            what = "neither a folder here nor found on the hub"
            hint = "correct the name; if it is private, run `hf auth login`"
        case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
            what = "not in the hub's cache on this machine, and the hub can't be reached"
            fetch = f"run `hf download {repo_id} --local-dir FOLDER`"
            hint = f"where there is network, {fetch}; then write the folder in its place"
        case hub.HFValidationError():
            what = "neither a folder here nor a name that the hub could have"
        case _:
            what = f"the hub can't give it: {first_line(error)}"
    return ModelError(repo_id, what, hint)


def model_source(section: ModelSection) -> Source:
    """Find the recipe's model; a GGUF file is converted the first time."""
    if section.file is not None:
        folder = gguf_folder(section)
        return Source(str(folder), None, folder)
    return find_source(section.name_or_path, section.revision)


def at_hand(section: ModelSection) -> Path | None:
    """Return the folder of a recipe's model; None where it would have to be fetched.

    Nothing is asked of the network: of a hub id the cached commit counts.
    """
    name = section.name_or_path
    try:
        folder = converted_folder(section) if section.file else Path(name).expanduser()
    except ModelError:
        return None
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json", revision=section.revision)
        except hub.HFValidationError:
            return None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "config.json").is_file() else None


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """Read a file beside the weights; None where there is none, or none to be had."""
    file = cached_file(
        source.path,
        name,
        revision=source.commit,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if file is None:
        return None
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(file, f"expected JSON; got {error}") from error


def read_config(name: str, source: Source) -> Any:
    """Read a model's config.

    Raises:
        ModelError: It can't be read; names the key that it fails on, where there is one.
    """
    try:
        return AutoConfig.from_pretrained(
            source.path, revision=source.commit or "main", trust_remote_code=False
        )
    except UNREADABLE as error:
        told, reason = read_json(source, "config.json") or {}, first_line(error)
        if "auto_map" in told:
            raise needs_code(name, "config.json") from error
        found = unusable(name, told, lambda config: config, reason)
        what = f"its config.json can't be read: {reason}"
        raise found or ModelError(name, what) from error


def unusable(
    name: str, told: dict[str, Any], build: Callable[[Any], Any], reason: str
) -> ModelError | None:
    """Return the error that names the key of a config without which `build` takes it, if any."""
    kind = told.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    for key, value in told.items():
        if key == "model_type" or value is None:
            continue
        with suppress(*UNREADABLE, RuntimeError):
            build(CONFIG_MAPPING[kind].from_dict({k: v for k, v in told.items() if k != key}))
            what = f"config.json: {key}: {reason}; got {shown(value)}"
            return ModelError(name, what, NOT_ITS_CONFIG)
    return None


def needs_code(name_or_path: str, file: str) -> ModelError:
    """Say that a folder's own code would have to be run, which is never done."""
    what = f"{file} names Python code of its folder (auto_map), and sftkey runs none of it"
    hint = "take a model whose architecture and tokenizer transformers itself has"
    return ModelError(name_or_path, what, hint)


def base_identity(section: ModelSection) -> dict[str, str | None]:
    """Say which weights an adapter belongs to: name, commit, hash of a packaged file, fingerprint.

    The fingerprint is the same wherever the files lie and whatever they are called, and another
    one for fine-tuned weights of the same shapes.
    """
    source = model_source(section)
    return {
        "name_or_path": section.name_or_path,
        "revision": source.commit,
        "sha256": section.sha256,
        "fingerprint": fingerprint(source.folder),
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights; pickle, whose reading may run code, is none."""
    return sorted(folder.glob(WEIGHTS))


def fingerprint(folder: Path) -> str | None:
    """Hash the sizes of the weight files and samples from all over them; 8B weights in a second."""
    files = weight_files(folder)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for sample in range(NUM_SAMPLES):
                stream.seek(size * sample // NUM_SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None
