"""`sftkey merge` writes a model that is base and adapter, or says why there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sftkey.sharing.merging
from sftkey.commands.sharing import merge
from sftkey.data.renderer import Renderer
from sftkey.errors import RunError
from sftkey.models.device import Device
from sftkey.models.loading import load_renderer
from sftkey.sharing.merging import Merged
from sftkey.training.stage_model import load_stage
from tests.support.models import ROUNDED
from tests.support.runs import STAGES, ledger_of, made_run
from tests.support.tiny import made_model

PLAIN = STAGES[:1]
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> tuple[Path, Any]:
    """Return a run with a frozen key stage behind a plain one."""
    return made_run(tmp_path, tiny_folder)


def logits(model: Any) -> torch.Tensor:
    """Score some ids."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def refusal(*arguments: Any, **named: Any) -> str:
    """Return the text of the error that a merge ends with."""
    with pytest.raises(RunError) as raised:
        merge(*arguments, **named)
    return str(raised.value)


def test_the_merged_model_is_base_and_adapter(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain load of the folder has the adapter's logits, the tokenizer and the trained stops."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, recipe = run
    output = tmp_path / "merged"
    merge(folder, output, stage="completion")
    merged = AutoModelForCausalLM.from_pretrained(output)
    renderer = Renderer.read(AutoTokenizer.from_pretrained(output), recipe.response)
    cpu = Device("cpu", 0, torch.float32)
    trained = load_stage(recipe, ledger_of(folder, recipe), cpu, renderer, 1)
    base = trained.get_base_model().from_pretrained(recipe.model.name_or_path)
    torch.testing.assert_close(logits(merged), logits(trained), atol=ROUNDED, rtol=ROUNDED)
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    assert merged.generation_config.eos_token_id == [renderer.end_id]
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert captured.err.startswith(
        f"{output}: {folder}/stages/1-completion/adapter merged into "
        f"{recipe.model.name_or_path} in float32; on a probe the adapter changes logits by up to "
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantized_run_is_merged_into_what_it_was_trained_on(
    dtype: torch.dtype, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The values that NF4 gave the weights, as plain ones of the published type."""
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    made_model(tiny_tokenizer).to(dtype).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    folder, recipe = made_run(tmp_path, model, num_trained=1, stages=PLAIN, quantization="nf4")
    assert recipe.model.quantization == "nf4"
    merge(folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype
    assert not hasattr(merged.config, "quantization_config")
    renderer, cpu = load_renderer(recipe), Device("cpu", 0, torch.float32)
    trained = logits(load_stage(recipe, ledger_of(folder, recipe), cpu, renderer, 1))
    published = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"quantization": "none"})}
    )
    other = logits(load_stage(published, ledger_of(folder, published), cpu, renderer, 1))
    far = (other - trained).abs().max()
    rounded = ROUNDED if dtype == torch.float32 else far / 3
    assert (logits(merged.float()) - trained).abs().max() < rounded < far


def test_a_frozen_stage_is_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    """Its adapter acts on the key alone; the way is the stage before, and the adapter beside it."""
    folder, _ = run
    what = (
        f"{folder}: key was trained with `context: frozen`: its adapter acts from the thinking's "
        "last token on, merged weights would act on every token and change the thinking\nhint: "
    )
    way = (
        f", and serve {folder}/stages/{{}}-key/adapter beside it as activated LoRA, where a server "
        "has that; `sftkey generate` and the lines in docs/library.md switch by themselves"
    )
    expected = f"{what}merge what it stands on with --stage completion{way.format(2)}"
    assert refusal(folder, tmp_path / "merged") == expected
    assert not (tmp_path / "merged").exists()


def test_a_frozen_stage_on_the_base_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """Where no stage stands before it, the base is what it stands on."""
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1, stages=STAGES[1:])
    assert refusal(folder, tmp_path / "merged") == (
        f"{folder}: key was trained with `context: frozen`: its adapter acts from the thinking's "
        "last token on, merged weights would act on every token and change the thinking\n"
        f"hint: take the base, and serve {folder}/stages/1-key/adapter beside it as activated "
        "LoRA, where a server has that; `sftkey generate` and the lines in docs/library.md switch "
        "by themselves"
    )


def test_a_model_that_was_trained_whole_is_copied(tmp_path: Path, tiny_folder: Path) -> None:
    """There is no adapter to merge; template and generation config are written all the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, recipe = made_run(tmp_path, tiny_folder, num_trained=1, stages=PLAIN, lora=None)
    merge(folder, tmp_path / "merged")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = AutoModelForCausalLM.from_pretrained(folder / "stages/1-completion/adapter")
    torch.testing.assert_close(logits(copied), logits(trained), atol=0, rtol=0)
    assert copied.generation_config.max_new_tokens == recipe.eval.max_new_tokens
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert "You calculate." in template


def test_the_base_and_an_existing_folder_are_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    """The base has no adapter; what lies in a folder is never overwritten."""
    folder, _ = run
    output = tmp_path / "merged"
    output.mkdir()
    assert refusal(folder, output, stage="base") == (
        f"{folder}: --stage: the base has no adapter to merge"
    )
    assert refusal(folder, output, stage="completion") == (
        f"{output}: exists already, and nothing is overwritten\n"
        "hint: give another name, or move it aside"
    )


def test_an_adapter_that_does_nothing_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """An untrained adapter merges into the base itself: nothing is written."""
    lora = {"r": 4, "target_modules": "all-linear"}
    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1, stages=PLAIN, lora=lora)
    assert refusal(folder, tmp_path / "merged") == (
        f"{folder}/stages/1-completion/adapter: this adapter changes no logit of its base, so a "
        "merge would do nothing\nhint: was it trained? its stage's log.jsonl has the losses"
    )
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_did_nothing_is_refused(
    run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the weights stay the base's, the logits tell."""
    folder, _ = run
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None, raising=True)
    error = refusal(folder, tmp_path / "merged", stage="completion")
    assert error.startswith(
        f"{folder}/stages/1-completion/adapter: merged into float32 weights the model isn't base "
        "and adapter: its logits are off by up to "
    )
    assert not (tmp_path / "merged").exists()


def test_sixteen_bits_are_compared_without_the_rounding_of_what_they_compute(
    tiny_tokenizer: Any,
) -> None:
    """It would move the logits as far as a light adapter does; the weights stay as they were."""
    model = made_model(tiny_tokenizer, initializer_range=0.3).to(torch.bfloat16).eval()
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    found = sftkey.sharing.merging._logits(model, IDS)
    for name, each in model.state_dict().items():
        assert each.dtype == torch.bfloat16
        assert each.equal(weights[name])
    rounded = logits(model)
    exact = logits(model.float())
    torch.testing.assert_close(found, exact, atol=0, rtol=0)
    assert (rounded.float() - exact).abs().max() > 0.01


def test_how_far_a_merge_may_be_off() -> None:
    """A twentieth of what the adapter changes, half of it in 16 bits; else the figures are said."""
    check = sftkey.sharing.merging._check
    good = Merged(effect=1.0, distance=0.04, dtype="float32")
    for found in (good, replace(good, distance=0.4, dtype="bfloat16")):
        check(found, Path("a"))
    with pytest.raises(RunError) as raised:
        check(replace(good, distance=0.06), Path("a"))
    assert str(raised.value) == (
        "a: merged into float32 weights the model isn't base and adapter: its logits are off by up "
        "to 0.06, where the adapter changes up to 1\n"
        "hint: serve the adapter beside its base; nothing was written"
    )
    with pytest.raises(RunError):
        check(replace(good, distance=float("nan")), Path("a"))
