"""Weights of one's own, and weights that move from step to step, against sums by hand."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.data.response import Segment
from sftkey.errors import RecipeError
from sftkey.evaluation.grading import grade
from sftkey.files import text_hash
from sftkey.recipe.load import load_recipe
from sftkey.training import losses as losses_module
from sftkey.training.losses import find_weighting, own_losses
from sftkey.training.run import start
from sftkey.training.run_folder import read_ledger
from sftkey.training.trainer import KeyTrainer
from tests.support.models import EQUAL
from tests.support.tiny import made_model
from tests.training.test_trainer import config, direct_losses, made_rows, training_lines

HERE = "tests.training.test_weighting"
STEPS = 3
MakeRecipe = Callable[..., Path]


def probability(segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Weigh as `dft` does."""
    return torch.exp(-losses)


def hard_answers(segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Weigh the answer's tokens alone, by their loss."""
    return (segment_ids == Segment.ANSWER) * losses


def trained(
    tokenizer: Any, folder: Path, loss_on: Any, kind: Any = KeyTrainer, **settings: Any
) -> KeyTrainer:
    """Train three steps of four rows in two micro-batches."""
    rows = made_rows(len(tokenizer))
    own = {key: settings.pop(key) for key in ("loss", "anneal", "kl") if key in settings}
    args = config(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        **settings,
    )
    trainer: KeyTrainer = kind(made_model(tokenizer), args, loss_on, tokenizer, rows, rows, **own)
    trainer.train()
    return trainer


@pytest.mark.usefixtures("in_float64")
def test_a_function_of_ones_own_weighs_tokens(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """One that weighs as `dft` takes its very steps; another has the sum that is asked for."""
    ours = trained(tiny_tokenizer, tmp_path, "completion", loss=f"{HERE}:probability")
    theirs = trained(tiny_tokenizer, tmp_path, "completion", loss="dft")
    for a, b in zip(training_lines(ours), training_lines(theirs), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=EQUAL)
    found = trained(tiny_tokenizer, tmp_path, "key", loss=f"{HERE}:hard_answers")
    rows = made_rows(len(tiny_tokenizer)).select(range(4))
    above, below = 0.0, 0
    for row, losses in zip(rows, direct_losses(made_model(tiny_tokenizer), rows), strict=True):
        segments = torch.tensor(row["segment_ids"][1:])
        above += losses[segments == Segment.ANSWER].square().sum().item()
        below += int((segments >= Segment.ANSWER_TAG).sum())
    assert training_lines(found)[0]["loss"] == pytest.approx(above / below, rel=EQUAL)


def entropy(segment_ids: torch.Tensor, losses: torch.Tensor, entropies: Any) -> torch.Tensor:
    """Weigh as `eaft` does."""
    return entropies / 3


class Unsure(KeyTrainer):
    """Weighs as `eaft` does, by its own method."""

    wants_entropies = True

    def token_weights(self, segment_ids: Any, losses: Any, entropies: Any = None) -> Any:
        """Weigh by entropy."""
        return super().token_weights(segment_ids, losses) * entropies / 3


def eaft_loss(logits: torch.Tensor, row: dict[str, Any]) -> tuple[float, int]:
    """Return Σ H/3·NLL of a row's completion over all logits `(T, V)`, and its tokens."""
    found, trained = 0.0, 0
    for place, segment in enumerate(row["segment_ids"][1:]):
        if segment > 0:
            nll = -logits[place].log_softmax(-1)[row["input_ids"][place + 1]]
            likeliest = logits[place].sort(descending=True).values[:20].softmax(-1)
            found += float(-(likeliest * likeliest.log()).sum() / 3 * nll)
            trained += 1
    return found, trained


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("logits", [2**24, 2**12])  # one tile, and several
def test_eaft_weighs_by_the_entropy_of_the_likeliest_tokens(
    logits: int, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's loss is the sum by hand; a function and a method of one's own equal it."""
    monkeypatch.setattr(losses_module, "BESIDE_LOGITS", logits)
    model, rows = made_model(tiny_tokenizer), made_rows(len(tiny_tokenizer)).select(range(4))
    with torch.no_grad():
        whole = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    above, below = zip(*map(eaft_loss, whole, rows), strict=True)
    ours = training_lines(trained(tiny_tokenizer, tmp_path, "completion", loss="eaft"))
    assert ours[0]["loss"] == pytest.approx(sum(above) / sum(below), rel=EQUAL)
    by_function = trained(tiny_tokenizer, tmp_path, "completion", loss=f"{HERE}:entropy")
    by_method = trained(tiny_tokenizer, tmp_path, "completion", kind=Unsure)
    for theirs in (by_function, by_method):
        for a, b in zip(ours, training_lines(theirs), strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx(
                (b["loss"], b["grad_norm"]), rel=EQUAL
            )


@pytest.mark.usefixtures("in_float64")
def test_annealed_weights_move_from_step_to_step(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Without learning, step k of three has Σ w(k)·NLL / Σ w(k): key 1, then 3, then 5."""
    rows = made_rows(len(tiny_tokenizer))
    nlls = direct_losses(made_model(tiny_tokenizer), rows)
    trainer = trained(
        tiny_tokenizer,
        tmp_path,
        {"completion": 1.0, "key": 1.0},
        anneal={"key": 5.0},
        learning_rate=0.0,
    )
    lines = training_lines(trainer)
    assert len(lines) == STEPS
    for step, (line, key) in enumerate(zip(lines, (1.0, 3.0, 5.0), strict=True)):
        above, below = 0.0, 0.0
        for place in range(4 * (step % 2), 4 * (step % 2) + 4):
            segments = torch.tensor(rows[place]["segment_ids"][1:])
            weights = (segments == Segment.THINKING) + key * (segments >= Segment.ANSWER_TAG)
            above += (weights * nlls[place]).sum().item()
            below += weights.sum().item()
        assert line["loss"] == pytest.approx(above / below, rel=EQUAL)


def test_a_function_that_is_not_there_is_refused(tiny_recipe: MakeRecipe) -> None:
    """Neither a module nor a name is guessed; what is no function is none."""
    for loss, problem in [
        ("nowhere:f", "expected a function; No module named 'nowhere'"),
        (f"{HERE}:nothing", f"expected a function; module '{HERE}' has no attribute 'nothing'"),
        (f"{HERE}:STEPS", "expected a function; got int"),
    ]:
        with pytest.raises(RecipeError) as caught:
            find_weighting(loss)
        assert str(caught.value).startswith(f"loss: {loss}: {problem}")
    assert find_weighting("nll") is None


def test_a_run_records_which_functions_weighted_it(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """By the hash of their module, in the ledger from the start; our own losses have none."""
    stage = {"name": "one", "loss_on": "key", "loss": f"{HERE}:probability"}
    recipe = load_recipe(tiny_recipe(stages=[stage]))
    start(recipe, tmp_path / "run", grade=grade)
    source = Path(__file__).read_text()
    kept = read_ledger(tmp_path / "run") or {}
    assert kept["facts"]["own_losses"] == {stage["loss"]: text_hash(source)}
    assert own_losses(load_recipe(tiny_recipe())) == {}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"loss": "dtf"}, "stages[0].loss: expected nll, dft, eaft or module:function; got 'dtf'; "
         "did you mean `dft`?"),
        ({"anneal": {"prompt": 1.0}}, "stages[0].anneal: prompt: expected a weight above 0 at both "
         "ends, or at none"),
        ({"anneal": {"key": 0.0, "thinking": 1.0}}, "stages[0].anneal: answer_tag and answer and "
         "end: expected a weight above 0 at both ends, or at none"),
        ({"anneal": "key"}, "stages[0].anneal: expected weights by segment or group; got 'key'"),
        ({"anneal": {"kye": 2.0}}, "stages[0].anneal: no segment or group has the name `kye`; did "
         "you mean `key`?"),
    ],
)  # fmt: skip
def test_wrong_weightings_are_refused(
    fields: dict[str, Any], problem: str, tiny_recipe: MakeRecipe
) -> None:
    """A stage trains the same segments from its first step to its last."""
    stage = {"name": "one", "loss_on": "completion", **fields}
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(stages=[stage]))
    assert [f"{each.where}: {each.what}" for each in caught.value.problems] == [problem]


@pytest.mark.parametrize("name", ["likeliest_entropy", "find_weighting", "thinking_targets"])
def test_doctests_hold(name: str) -> None:
    """Those of the other functions are run with a model, as the library's names."""
    function = getattr(losses_module, name)
    (example,) = doctest.DocTestFinder().find(function, name, losses_module)
    assert doctest.DocTestRunner().run(example).failed == 0
