"""Cards say what was measured, and a push puts a stage that others can load on the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import sftkey.sharing.card
import sftkey.sharing.export
from sftkey.cli import main
from sftkey.commands.sharing import card, push
from sftkey.data.response import Example, Response
from sftkey.errors import RunError
from sftkey.evaluation.results import write_result
from sftkey.generation.generate import Generation
from sftkey.sharing.card import public_recipe
from tests.support.hub_server import FakeHub, fake_hub
from tests.support.runs import STAGES, made_run
from tests.support.scoring import scored


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    """Return a run with a frozen key stage, whose answers are graded: three of four right."""
    folder, recipe = made_run(tmp_path, tiny_folder, eval={"grader": "number"})
    response = Response.from_section(recipe.response)
    examples = [Example("q", "", str(n), n) for n in range(4)]
    for position, (name, texts) in enumerate({"completion": "0120", "key": "0123"}.items(), 1):
        written = {
            each.key: Generation(response.render("so", text), 9, True)
            for each, text in zip(examples, texts, strict=True)
        }
        result = scored(written, examples, response, name, position)
        write_result(folder / "evaluation", result)
    dropped = {"train: too long": {"count": 2, "rows": [1, 2], "code": "too-long"}}
    counts = {"train": 30, "validation": 4, "test": 4, "dropped": dropped}
    (folder / "data.json").write_text(json.dumps(counts))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Put a stand-in into the hub's place, and the tiny model on it."""
    with fake_hub() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
        for module in (sftkey.sharing.card, sftkey.sharing.export):
            monkeypatch.setattr(module, "hub_id", lambda name: f"tiny/{Path(name).name}")
        yield served


def test_the_card_has_results_with_intervals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub's own reader finds the index; the table, counts and recipe stand in the text."""
    with pytest.raises(SystemExit) as end:
        main(["card", str(run), "--stage", "completion"])
    assert not end.value.code
    text = capsys.readouterr().out
    data = ModelCard(text).data
    accuracy, form = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.75)
    assert accuracy.metric_args == {"num_questions": 4, "interval_95": [0.3006, 0.9544]}
    assert (form.metric_type, form.metric_value) == ("format", 1.0)
    assert (data.model_name, data.library_name, data.base_model) == ("tiny", "peft", None)
    assert "| after `completion` | 4 | 0.750 [0.301, 0.954] | 1.000 [0.510, 1.000] |" in text
    assert (
        "rows.jsonl: train 30, validation 4, test 4 rows.\n- left out, train: too long: 2" in text
    )
    assert "This is stage `completion`." in text
    assert str(run.parent.parent) not in text  # no folder of this machine
    assert "name: tiny" in text


def test_an_ungraded_run_says_so(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without grades there is no index; full fine-tuning is said."""
    folder, recipe = made_run(tmp_path, tiny_folder, num_trained=0, lora=None, stages=STAGES[:1])
    with pytest.raises(RunError, match="--stage: the base has no adapter to describe"):
        card(folder, "base")
    judge = {"base_url": "http://inside/v1", "model": "m"}
    assert "inside" not in public_recipe(
        recipe.model_validate(recipe.model_dump() | {"eval": {"judge": judge}})
    )
    folder, _ = made_run(tmp_path / "other", tiny_folder, num_trained=1)
    card(folder)
    text = capsys.readouterr().out
    assert "Its answers weren't graded." in text
    assert ModelCard(text).data.eval_results is None


def test_a_push_is_one_commit_of_adapter_tokenizer_and_card(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frozen stage brings the adapter that it stands on; the card is the one of `card`."""
    push(run, "me/tiny", private=True)
    assert capsys.readouterr().out == f"{hub.url}/o/n/commit/1\n"
    (repo,) = hub.repos
    assert (repo["name"], repo["organization"]) == ("tiny", "me")
    assert hub.summaries == ["tiny, key"]
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "context/adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= hub.files.keys()
    weights = run / "stages/2-key/adapter/adapter_model.safetensors"
    assert hub.files["adapter_model.safetensors"] == weights.read_bytes()
    assert b"You calculate." in hub.files["chat_template.jinja"]
    card(run)
    assert hub.files["README.md"].decode() == capsys.readouterr().out


def test_a_refusal_of_the_hub_is_one_error(run: Path, hub: FakeHub) -> None:
    """Who may not write is told what to do."""
    hub.refuses = True
    with pytest.raises(RunError) as raised:
        push(run, "me/tiny", stage="completion")
    where, _, hint = str(raised.value).partition("\nhint: ")
    assert where.startswith("me/tiny: the hub doesn't take it: ")
    assert hint == "`hf auth login` with a token that may write; a repository is `owner/name`"
    assert hub.files == {}


def test_an_adapter_whose_base_nobody_has_is_refused(run: Path, tiny_folder: Path) -> None:
    """The way is the merged model; a frozen stage can't be merged."""
    with pytest.raises(RunError) as raised:
        push(run, "me/tiny", stage="completion")
    assert str(raised.value) == (
        f"{run}: the adapter's base, {tiny_folder}, isn't on the hub: nobody else could load it\n"
        "hint: `--merged` pushes the merged model"
    )
    with pytest.raises(RunError, match="key was trained with `context: frozen`"):
        push(run, "me/tiny", merged=True)


def test_a_merged_model_is_pushed_whole(run: Path, hub: FakeHub) -> None:
    """Weights, configs, tokenizer, card; no adapter."""
    push(run, "me/tiny", stage="completion", merged=True)
    assert {"model.safetensors", "config.json", "generation_config.json"} <= hub.files.keys()
    assert not any("adapter" in name for name in hub.files)
