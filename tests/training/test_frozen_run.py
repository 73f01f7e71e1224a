"""A run whose last stage is frozen: what it writes, how it goes on, and what its grid chooses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from sftkey.data.response import Segment
from sftkey.errors import ModelError
from sftkey.evaluation.grading import grade
from sftkey.models.key_pass import KEY, acting, context_adapters
from sftkey.recipe.load import load_recipe
from sftkey.training.run import Run, start
from sftkey.training.stage_model import load_stage
from sftkey.training.validating import row_sums, segment_means
from tests.support.models import EQUAL, float64
from tests.support.tiny import made_model, made_rows, write_recipe
from tests.training.test_run import Killed, adapter_of, done, kill_at_step

MakeRecipe = Callable[..., Path]


@pytest.fixture(scope="module")
def double(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny model in float64."""
    folder = tmp_path_factory.mktemp("double")
    made_model(tiny_tokenizer).double().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(double: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a stage and a frozen one in float64, for tests that read what came."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, double, stages=stages(trainer={"learning_rate": 1e-2}))
    with float64():
        return done(recipe, folder / "runs")


def stages(**fields: Any) -> list[dict[str, Any]]:
    """Return a first stage and a frozen one."""
    frozen = {"name": "key", "loss_on": "key", "context": "frozen"} | fields
    return [{"name": "completion", "loss_on": "completion"}, frozen]


def thinkings(folder: Path, name: str) -> list[str]:
    """Return what a stage wrote before the key."""
    lines = (folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["index"])
    return [row["text"].partition("</Thinking>")[0] for row in rows]


def test_a_frozen_stage_changes_the_key_and_nothing_else(trained: Run) -> None:
    """The thinking's loss is the same to the last bit, its text, too; the key's loss falls."""
    first, second = (record.validation for record in trained.ledger.stages)
    for name in ("prompt", "thinking"):
        assert second["start"][name] == second["end"][name]
        assert second["end"][name] == pytest.approx(first["end"][name], rel=EQUAL)
    assert second["start"]["answer_tag"] == pytest.approx(first["end"]["answer_tag"], rel=EQUAL)
    assert second["end"]["answer_tag"] < second["start"]["answer_tag"] - 1e-2
    folder = trained.ledger.folder
    assert thinkings(folder, "key") == thinkings(folder, "completion")


def test_the_stage_says_what_it_stands_on(trained: Run) -> None:
    """The key's adapter lies alone in its folder, with its context; the ledger's end names both."""
    key = trained.ledger.adapter(1)
    assert not any("key" in name.split(".") for name in adapter_of(trained, 1))
    base = json.loads((key / "base.json").read_text())
    assert base["context"] == "stages/1-completion/adapter"
    assert len(base["context_fingerprint"]) == 64
    facts = json.loads((trained.ledger.folder / "ledger.json").read_text())["facts"]
    assert facts["end"] == {
        "adapter": "stages/2-key/adapter",
        "context": "stages/1-completion/adapter",
    }


def generated_losses(run: Run) -> dict[str, float]:
    """Return the validation rows' losses of the key as it is generated: on a cache, switching."""
    model: Any = load_stage(run.recipe, run.ledger, run.device, run.prepared.renderer, 2).eval()
    sums = torch.zeros(2, len(Segment))
    for row in run.validation:
        ids, segments = torch.tensor([row["input_ids"]]), torch.tensor([row["segment_ids"]])
        key = int((segments <= Segment.THINKING).sum())
        with torch.no_grad(), acting(model, context := context_adapters(model)):
            cache = model(input_ids=ids[:, : key - 1], use_cache=True).cache
            with acting(model, [*context, KEY]):
                logits = model(input_ids=ids[:, key - 1 : -1], cache=cache).logits
        losses = cross_entropy(logits.mT, ids[:, key:], reduction="none")
        sums += row_sums(losses, segments[:, key:]).sum(0)
    return segment_means(sums)


@pytest.mark.usefixtures("in_float64")
def test_a_stage_trains_the_key_as_it_is_generated(trained: Run) -> None:
    """Its validation losses are those of a model that switches at the thinking's last token."""
    reported = trained.ledger.stages[1].validation["end"]
    found = generated_losses(trained)
    assert list(found) == ["answer_tag", "answer", "end"]
    assert found == pytest.approx({name: reported[name] for name in found}, rel=EQUAL)


def test_another_context_is_refused(trained: Run, tmp_path: Path) -> None:
    """A key adapter isn't put beside other weights than those that it was trained on."""
    folder = shutil.copytree(trained.ledger.folder, tmp_path / "tiny")
    run = start(trained.recipe, folder, grade=grade)
    was = json.loads((run.ledger.adapter(1) / "base.json").read_text())["context_fingerprint"]
    file = run.ledger.adapter(0) / "adapter_model.safetensors"
    save_file({name: each + 1 for name, each in load_file(file).items()}, file)
    run.ledger.finish(run.ledger.adapter(0))  # as if the run had written it
    (run.ledger.folder / "evaluation" / "key.jsonl").unlink()
    with pytest.raises(ModelError) as error:
        list(start(run.recipe, run.ledger.folder, grade=grade).stages())
    now = str(error.value).split("they are ")[1].split(" ")[0]
    assert str(error.value) == (
        f"{run.ledger.adapter(1)}: trained on the context of stages/1-completion/adapter with "
        f"weights {was}; they are {now} now\n"
        "hint: was that folder changed? `--fresh` begins anew"
    )


GRID = stages(grid={"learning_rate": [1e-3, 1e-2]})


@pytest.mark.parametrize("given", [stages(), GRID[1:]], ids=["one", "grid, on the base"])
@pytest.mark.fault("a kill")
def test_a_killed_frozen_stage_goes_on_as_if_nothing_had_been(
    given: Any, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its third step and begun again, the stage writes the same adapter, bit for bit."""
    recipe = tiny_recipe(stages=given, eval={"num_questions": 1, "max_new_tokens": 1})
    whole = done(recipe, tmp_path / "whole")
    with monkeypatch.context() as context:
        kill_at_step(context, "key", 3)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "killed")
    resumed = done(recipe, tmp_path / "killed")
    expected, got = (adapter_of(run, len(given) - 1) for run in (whole, resumed))
    assert all(torch.equal(each, expected[name]) for name, each in got.items())


@pytest.mark.usefixtures("in_float64")
def test_a_grid_keeps_the_best_of_what_each_would_be_alone(
    double: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Each learning rate ends at its own loss, a diverged one is left out, the lowest is kept."""
    rates = [1e-3, 2e-2, 1e30]
    model = {"name_or_path": str(double), "quantization": "none"}
    recipe = tiny_recipe(model=model, stages=stages(grid={"learning_rate": rates}))
    run = done(recipe, tmp_path / "runs")
    choice = run.ledger.stages[1].grid
    assert choice is not None
    assert [tried["learning_rate"] for tried in choice["tried"]] == rates
    losses = [tried["loss"] for tried in choice["tried"]]
    assert losses[2] is None
    assert losses[0] > losses[1]
    assert choice["kept"] == {"learning_rate": 2e-2}
    recipe = tiny_recipe(model=model, stages=stages(trainer={"learning_rate": 2e-2}))
    alone = done(recipe, tmp_path / "alone")
    expected = adapter_of(alone, 1)
    for name, each in adapter_of(run, 1).items():
        assert torch.allclose(each, expected[name], rtol=EQUAL, atol=EQUAL), name
    loss = alone.ledger.stages[1].validation["end"]
    assert {"answer_tag", "answer", "end"} < set(loss)
    assert run.ledger.stages[1].validation["end"] == pytest.approx(loss, rel=EQUAL)


def test_a_grid_is_judged_by_its_validation_rows(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Where training rows mislead, the adapter that learns least from them is kept."""
    for name, answer in (("train", "7"), ("other", "#")):
        rows = [{**row, "prompt": f"{name} {row['prompt']}"} for row in made_rows(24)]
        lines = [json.dumps({**row, "answer": answer}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = {"source": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "other.jsonl")}
    grid = {"learning_rate": [5e-2, 1e-5]}
    key = {"loss_on": "answer", "grid": grid, "trainer": {"max_steps": 12}}
    sections = {"data": {**data, "test": 4}, "stages": stages(**key)[1:]}
    choice = done(tiny_recipe(**sections), tmp_path / "runs").ledger.stages[0].grid
    assert choice is not None
    assert choice["kept"] == {"learning_rate": 1e-5}
    assert choice["tried"][0]["loss"] > choice["tried"][1]["loss"] + 1e-2


def test_a_frozen_stage_stands_on_a_whole_model(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """After full fine-tuning, the key's adapter has the shape that its stage says."""
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}
    run = done(tiny_recipe(lora=None, stages=stages(lora=lora)), tmp_path / "runs")
    config = json.loads((run.ledger.adapter(1) / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (2, ["q_proj", "v_proj"])
    assert (run.ledger.adapter(0) / "model.safetensors").is_file()


def test_a_frozen_stage_alone_stands_on_the_base(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """From somebody's model, without a first stage of ours."""
    recipe = tiny_recipe(stages=stages()[1:])
    run = done(recipe, tmp_path / "runs")
    assert thinkings(run.ledger.folder, "key") == thinkings(run.ledger.folder, "base")
    assert load_recipe(run.ledger.folder / "recipe.yaml") == run.recipe
