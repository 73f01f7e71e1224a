import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub

from sftkey.activity import current
from sftkey.errors import ModelError
from sftkey.models import source
from sftkey.models.source import base_identity, find_source, model_source
from sftkey.recipe.schema import ModelSection

RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Return a hub that answers with an error or a file; its calls are listed."""
    source._snapshot.cache_clear()

    def answer(result: Any) -> list[tuple[Any, ...]]:
        calls = []

        def download(repo_id: str, file: str, revision: str | None) -> str:
            calls.append((repo_id, file, revision))
            assert str(current()) == "asking the hub for the model"  # it may retry for minutes
            if isinstance(result, Exception):
                raise result
            return str(result / file)

        monkeypatch.setattr(source, "hf_hub_download", download)
        return calls

    return answer


def message(name: str, **settings: Any) -> str:
    """Return the error of a source that isn't found."""
    with pytest.raises(ModelError) as error:
        find_source(name, **settings)
    return str(error.value)


def test_folder_is_found(tiny_folder: Path) -> None:
    """A folder with a config is a source of its own, at no commit."""
    found = model_source(ModelSection(name_or_path=str(tiny_folder)))
    assert (found.path, found.commit, found.folder) == (str(tiny_folder), None, tiny_folder)


def test_hub_id_is_asked_once(hub_answers: Callable[..., Any], tmp_path: Path) -> None:
    """All loads of a process come from the commit that was found first."""
    calls = hub_answers(tmp_path / "0123abc")
    for _ in range(2):
        found = find_source("some/model", "v1")
        assert (found.path, found.commit) == ("some/model", "0123abc")
    assert calls == [("some/model", "config.json", "v1")]


def test_missing_folder(tmp_path: Path) -> None:
    """What is written as a path is never looked up on the hub."""
    assert message(str(tmp_path / "gone")) == f"{tmp_path}/gone: no such folder"
    assert message("./gone") == "./gone: no such folder"
    assert message("runs/a/gone") == "runs/a/gone: no such folder"


def test_folder_of_something_else(tmp_path: Path) -> None:
    """A folder without a config is no model; an adapter's folder says where it belongs."""
    assert message(str(tmp_path)) == f"{tmp_path}: no config.json there"
    (tmp_path / "adapter_config.json").touch()
    assert message(str(tmp_path)) == (
        f"{tmp_path}: a LoRA adapter; expected a whole model\n"
        f"hint: write model.adapter={tmp_path}, and its base as model.name_or_path"
    )


def test_folder_has_no_revision(tiny_folder: Path) -> None:
    """A revision that would do nothing is refused."""
    assert message(str(tiny_folder), revision="v1") == (
        f"{tiny_folder}: a folder has no revision; got 'v1'"
    )


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_hub_without_network() -> None:
    """Offline and not in the cache: what to fetch, and what to write then."""
    assert message("some/model-that-nobody-cached") == (
        "some/model-that-nobody-cached: not in the hub's cache on this machine, and the hub can't "
        "be reached\n"
        "hint: where there is network, run `hf download some/model-that-nobody-cached --local-dir "
        "FOLDER`; then write the folder in its place"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            hub.GatedRepoError("403", response=RESPONSE),
            "meta/llama: gated: the hub gives it only to accounts that accepted its licence\n"
            "hint: accept it at https://huggingface.co/meta/llama, then run `hf auth login`",
        ),
        (
            hub.RevisionNotFoundError("404", response=RESPONSE),
            "meta/llama: model.revision: the hub has no 'v9' of it\n"
            "hint: its commits stand at https://huggingface.co/meta/llama/commits",
        ),
        (
            hub.RepositoryNotFoundError("401", response=RESPONSE),
            "meta/llama: neither a folder here nor found on the hub\n"
            "hint: correct the name; if it is private, run `hf auth login`",
        ),
        (
            hub.RemoteEntryNotFoundError("404", response=RESPONSE),
            "meta/llama: no config.json there",
        ),
        (
            hub.HFValidationError("Repo id must be …"),
            "meta/llama: neither a folder here nor a name that the hub could have",
        ),
        (
            hub.HfHubHTTPError("503 Service Unavailable\nmore", response=RESPONSE),
            "meta/llama: the hub can't give it: 503 Service Unavailable",
        ),
    ],
)
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_hub_refuses(hub_answers: Callable[..., Any], error: Exception, expected: str) -> None:
    """Each refusal of the hub is one error that says what to do."""
    hub_answers(error)
    assert message("meta/llama", revision="v9") == expected


def test_fingerprint_tells_weights_apart(
    tiny_folder: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """A copy elsewhere is the same base; fine-tuned weights of the same shapes are another."""
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    tiny_model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    tiny_model.save_pretrained(tmp_path / "tuned")
    original, copied, tuned = (
        base_identity(ModelSection(name_or_path=str(folder)))
        for folder in (tiny_folder, copy, tmp_path / "tuned")
    )
    assert original | {"name_or_path": str(copy)} == copied
    assert original["fingerprint"] != tuned["fingerprint"]
    assert (original["revision"], original["sha256"]) == (None, None)
