"""Every recipe that ships is right: on rows of its data's schema, with its family's tokenizer."""

import re
from pathlib import Path

import pytest

from sftkey.checks.gate import _rows_report as check
from sftkey.checks.mask_proof import judge, prove
from sftkey.data.examples import make_rule
from sftkey.data.prepare import Prepared, prepare
from sftkey.data.tokenization import tokenize
from sftkey.recipe.load import RECIPES, describe, load_recipe, recipe_files
from tests.support.families import FAMILIES, Family
from tests.support.mask_table import num_refused_otherwise
from tests.support.recipe_rows import loaded

FILES = [str(file.relative_to(RECIPES)) for file in recipe_files(RECIPES)]
REAL = [file for file in FILES if FAMILIES[Path(file).parts[0]].real]
NUM_JUDGED, NUM_HARD_ROWS = 60, 300


@pytest.fixture
def family(file: str) -> Family:
    """Return the family of a recipe's model."""
    return FAMILIES[Path(file).parts[0]]


def dropped(prepared: Prepared) -> list[str]:
    """Name what was dropped, but for questions that the demo's task asks again."""
    return [why for why in prepared.counts["dropped"] if ": prompt also in" not in why]


@pytest.mark.parametrize("file", FILES)
def test_recipe_passes_the_gate(
    file: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its family's template and control tokens the gate finds nothing, and no row is lost."""
    family.save(family.standing_in(), tmp_path)
    report = check(loaded(file, tmp_path, monkeypatch), env={})
    # Repeated questions are dropped; TinyLlama's own template has no beginning of text.
    said = {"overlap", "no-begin"} if file.startswith("tinyllama") else {"overlap"}
    assert [str(each) for each in report.findings if each.code not in said] == []
    prepared = report.prepared
    assert prepared is not None
    assert dropped(prepared) == []
    assert prepared.renderer.end_token == family.end
    assert min(len(prepared.train), len(prepared.validation or ()), len(prepared.test)) > 20


@pytest.mark.network
@pytest.mark.parametrize("file", REAL)
def test_recipe_on_its_real_tokenizer(
    file: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the published vocabulary the masks are right, on its rows and on rows that are hard."""
    recipe = loaded(file, tmp_path, monkeypatch)
    prepared = prepare(recipe, family.real_one())
    assert dropped(prepared) == []
    assert prepared.renderer.end_token == family.end
    examples = prepared.train_examples[:NUM_JUDGED]
    proof = judge(prepared.renderer, examples, tokenize(examples, prepared.renderer))
    assert (proof.right, proof.wrong) == (len(examples), [])
    proof = prove(prepared.renderer, NUM_HARD_ROWS, seed=7)
    assert proof.wrong == []
    assert num_refused_otherwise(proof) <= NUM_HARD_ROWS / 100


def test_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """At least twenty recipes, over fifteen families, fourteen proven on a real tokenizer."""
    families = {FAMILIES[Path(file).parts[0]].name for file in FILES}
    with capsys.disabled():
        print(f"\n{len(FILES)} recipes, {len(families)} families,", end=" ")
        print(f"{len(REAL)} recipes with a tokenizer of their family in the tests", end=" ")
    assert len(FILES) >= 20
    assert len(families) >= 15
    assert len(REAL) >= 14
    assert {Path(file).parts[0] for file in FILES} == FAMILIES.keys()


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_says_how_it_is_run(file: str) -> None:
    """Its head has its own command, with a config that is there; its name is that of its path."""
    text = (RECIPES / file).read_text(encoding="utf-8")
    assert text.startswith("# ")
    command = re.search(r"^# Run:  accelerate launch (.*)-m sftkey.train recipes/(.*)$", text, re.M)
    assert command is not None
    assert command[2] == file
    config = re.match(r"--config_file (\S+) $", command[1])
    assert not command[1] or (config and (RECIPES.parent / config[1]).is_file())
    assert describe(RECIPES / file)["name"] == file.removesuffix(".yaml").replace("/", "-")


def test_traces_are_split_at_their_tags_and_last_box() -> None:
    """The rule for OpenR1's traces takes what the last box holds, braces in it or not."""
    recipe = load_recipe(RECIPES / "qwen2.5-1.5b" / "openr1-math-220k.yaml")
    rule = make_rule(str(recipe.data.split_rule))
    text = "<think>\nIs it \\boxed{7}?\n</think>\n\nIt is \\boxed{x^{2}}, so \\boxed{%s}."
    assert rule(text % "5") == ("Is it \\boxed{7}?", "5")
    nested = "\\frac{1}{\\sqrt{2}}"
    assert rule(text % nested) == ("Is it \\boxed{7}?", nested)
    assert rule("<think>\nIt is \\boxed{7}.\n</think>\n\nIt is 7.") == (
        "the regular expression doesn't match"
    )


def test_the_papers_setting() -> None:
    """What the paper says of its set-up stands in its recipe."""
    recipe = load_recipe(RECIPES / "qwen2.5-1.5b" / "paper.yaml")
    assert recipe.lora is None
    assert recipe.model.quantization == "none"
    settings = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size")
    assert [recipe.trainer[key] for key in settings] == [5e-6, 0.1, 3, 32]
    assert recipe.trainer["warmup_steps"] * recipe.trainer["num_train_epochs"] == pytest.approx(
        0.5, abs=1e-3
    )
    assert [stage.loss_on for stage in recipe.stages] == ["completion", "key"]


def test_a_recipe_with_a_wrong_frame_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What judges the recipes does find a fault: tags that the family's prompt has opened."""
    family = FAMILIES["deepseek-r1-distill-qwen-1.5b"]
    family.save(family.standing_in(), tmp_path)
    report = check(loaded("qwen3-4b/gsm8k.yaml", tmp_path, monkeypatch), env={})
    (refusal,) = report.refusals
    assert "opens the thinking already" in refusal.message
