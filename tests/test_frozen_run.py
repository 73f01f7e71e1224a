"""A run whose last stage is frozen: what it writes, how it goes on, and what its grid chooses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import Killed, adapter_of, done, kill_at_step

from sftkey.errors import ModelError
from sftkey.recipe import load_recipe
from sftkey.training.stages import start

MakeRecipe = Callable[..., Path]


def stages(**fields: Any) -> list[dict[str, Any]]:
    """Give a first stage and a frozen one."""
    frozen = {"name": "key", "loss_on": "key", "context": "frozen"} | fields
    return [{"name": "completion", "loss_on": "completion"}, frozen]


def thinkings(folder: Path, name: str) -> list[str]:
    """Give what a stage wrote before the key."""
    lines = (folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["index"])
    return [row["text"].partition("</Thinking>")[0] for row in rows]


def test_a_frozen_stage_changes_the_key_and_nothing_else(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The thinking's loss is the same to the last bit, its text, too; the key's loss falls."""
    recipe = tiny_recipe(stages=stages(trainer={"learning_rate": 1e-2}))
    run = done(recipe, tmp_path / "runs")
    first, second = (record.validation for record in run.ledger.stages)
    for name in ("prompt", "thinking"):
        assert second["start"][name] == second["end"][name]
        assert second["end"][name] == pytest.approx(first["end"][name], abs=1e-6)
    assert second["start"]["answer_tag"] == pytest.approx(first["end"]["answer_tag"], abs=1e-5)
    assert second["end"]["answer_tag"] < second["start"]["answer_tag"] - 1e-2
    folder = run.ledger.folder
    assert thinkings(folder, "key") == thinkings(folder, "completion")


def test_the_stage_says_what_it_stands_on(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The key's adapter lies alone in its folder, with its context; the ledger's end names both."""
    run = done(tiny_recipe(stages=stages()), tmp_path / "runs")
    key = run.ledger.adapter(1)
    assert not any("key" in name.split(".") for name in adapter_of(run, 1))
    base = json.loads((key / "base.json").read_text())
    assert base["context"] == "stages/1-completion/adapter"
    assert len(base["context_fingerprint"]) == 64
    facts = json.loads(run.ledger.path.read_text())["facts"]
    assert facts["end"] == {
        "adapter": "stages/2-key/adapter",
        "context": "stages/1-completion/adapter",
    }


def test_another_context_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A key adapter isn't put beside other weights than those that it was trained on."""
    recipe = tiny_recipe(stages=stages())
    run = done(recipe, tmp_path / "runs")
    was = json.loads((run.ledger.adapter(1) / "base.json").read_text())["context_fingerprint"]
    file = run.ledger.adapter(0) / "adapter_model.safetensors"
    save_file({name: each + 1 for name, each in load_file(file).items()}, file)
    (run.ledger.folder / "evaluation" / "key.jsonl").unlink()
    with pytest.raises(ModelError) as error:
        list(start(run.recipe, run.ledger.folder).stages())
    now = str(error.value).split("they are ")[1].split(" ")[0]
    assert str(error.value) == (
        f"{run.ledger.adapter(1)}: trained on the context of stages/1-completion/adapter with "
        f"weights {was}; they are {now} now\n"
        "hint: was that folder changed? `--fresh` begins anew"
    )


@pytest.mark.parametrize("grid", [None, {"learning_rate": [1e-3, 1e-2]}], ids=["one", "grid"])
def test_a_killed_frozen_stage_goes_on_as_if_nothing_had_been(
    grid: Any, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its third step and begun again, the stage writes the same adapter, bit for bit."""
    recipe = tiny_recipe(stages=stages(grid=grid))
    whole = done(recipe, tmp_path / "whole")
    with monkeypatch.context() as context:
        kill_at_step(context, "key", 3)
        with pytest.raises(Killed):
            done(recipe, tmp_path / "killed")
    resumed = done(recipe, tmp_path / "killed")
    expected = adapter_of(whole, 1)
    assert all(torch.equal(each, expected[name]) for name, each in adapter_of(resumed, 1).items())


def test_a_grid_keeps_the_best_of_what_each_would_be_alone(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Each learning rate ends at its own loss, a diverged one is left out, the lowest is kept."""
    rates = [1e-3, 2e-2, 1e30]
    recipe = tiny_recipe(stages=stages(grid={"learning_rate": rates}))
    run = done(recipe, tmp_path / "runs")
    choice = run.ledger.stages[1].grid
    assert choice is not None
    assert [tried["learning_rate"] for tried in choice["tried"]] == rates
    assert choice["tried"][2]["loss"] is None
    assert choice["kept"] == {"learning_rate": 2e-2}
    for number, rate in enumerate(rates[:2]):
        shutil.copytree(tmp_path / "runs" / "tiny", tmp_path / f"alone{number}" / "tiny")
        alone_recipe = tiny_recipe(stages=stages(trainer={"learning_rate": rate}))
        alone = done(alone_recipe, tmp_path / f"alone{number}", fresh=True)
        loss = alone.ledger.stages[1].validation["end"]
        weights = {"answer_tag": 1, "answer": 1, "end": 1}
        assert set(weights) < set(loss)
        if rate == 2e-2:
            expected = adapter_of(alone, 1)
            for name, each in adapter_of(run, 1).items():
                assert torch.allclose(each, expected[name], atol=1e-5), name
            assert run.ledger.stages[1].validation["end"] == pytest.approx(loss, abs=1e-5)


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
