"""Rows that a template writes another generation prompt for are left out, or asked about."""

from pathlib import Path
from typing import Any

import pytest

from sftkey.adapt import adapt as adapting
from sftkey.adapt.data import choose_data
from sftkey.checks.gate import check_recipe
from sftkey.commands.adapt import adapt
from sftkey.data.examples import RowOptions
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from tests.support.model_folders import model_folder, sums, write_rows
from tests.support.tokenizers import made

ROLES = (
    "{% if tools %}{{ tools }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | replace('/no_think', '') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
)
CLOSED = " %}<think></think>{% endif %}{% endif %}"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
OTHER = (
    ("messages[0].role == 'system'", {"system": "Be brief."}),
    ("tools", {"tools": [TOOL]}),
    ("'/no_think' in messages[-1].content", {"question": "What is 2 + 2? /no_think"}),
)
WHY = "the generation prompt isn't '<|im_start|>assistant\\n' here, as for a question alone"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, and prove on fewer rows than users get."""
    monkeypatch.setattr(adapting, "NUM_PROOF_ROWS", 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(other: dict[str, Any], every: int, count: int = 40) -> list[dict[str, Any]]:
    """Make rows, some of which say something more."""
    return [row | (other if n % every == 1 else {}) for n, row in enumerate(sums(count))]


def adapted(condition: str, *options: str) -> Recipe:
    """Adapt a model whose header depends on the row."""
    model_folder(Path("model"), made("look_ahead", ROLES + condition + CLOSED), ["<|im_end|>"])
    adapt("model", data="rows.jsonl", output=Path("q.yaml"))
    return load_recipe("q.yaml", options)


def refusals(recipe: Recipe) -> list[str]:
    """Return what the gate refuses."""
    return [str(finding) for finding in check_recipe(recipe).refusals]


@pytest.mark.parametrize(("condition", "other"), OTHER)
def test_few_rows_of_another_header_are_left_out(
    capsys: pytest.CaptureFixture[str], condition: str, other: dict[str, Any]
) -> None:
    """The recipe passes the gate, and says with the terminal which rows are gone, and why."""
    write_rows(Path("rows.jsonl"), rows(other, every=20))
    recipe = adapted(condition)
    assert refusals(recipe) == []
    assert recipe.data.unsplit_rows == "drop"
    assert f"2 of 40 rows, at first: {WHY}" in Path("q.yaml").read_text()
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("2 of 40 rows are left out:") + 2] == f"  row 21: {WHY}"


@pytest.mark.parametrize(("condition", "other"), OTHER)
def test_many_rows_of_another_header_are_asked_about(condition: str, other: dict[str, Any]) -> None:
    """The question names the rows; what it proposes passes the gate."""
    write_rows(Path("rows.jsonl"), rows(other, every=2))
    recipe = adapted(condition)
    assert recipe.data.source == (
        f"DECIDE: rows.jsonl, of which rows can't be used; train: {WHY}: 20 rows, "
        f"{', '.join(map(str, range(1, 41, 2)))}; mend these messages, or choose another "
        "model.chat_template; data.unsplit_rows: drop leaves them out"
    )
    assert refusals(recipe)[0].startswith("data.source is still to be decided: rows.jsonl, of ")
    decided = load_recipe("q.yaml", ["data.source=rows.jsonl", "data.unsplit_rows=drop"])
    assert refusals(decided) == []


def test_rows_of_the_sources_own_splits_count_too(here: Path) -> None:
    """The gate reads validation and test as it reads train."""
    condition, other = OTHER[2]
    (here / "rows.jsonl").mkdir()
    write_rows(here / "rows.jsonl" / "train.jsonl", rows({}, every=2))
    write_rows(here / "rows.jsonl" / "test.jsonl", [row | other for row in sums(99)[-9:]])
    recipe = adapted(condition)
    assert "; test: the generation prompt isn't" in recipe.data.source
    assert "here, as for a question alone: 9 rows, 0, 1, " in recipe.data.source


def test_splits_that_are_not_like_train_are_not_taken(here: Path) -> None:
    """A test split without a reasoning can't be read as train is, so rows of train are held out."""
    write_rows(here / "train.jsonl", rows({}, every=2))
    write_rows(here / "test.jsonl", [{"question": "Q", "answer": "7"}])
    assert choose_data(str(here), seed=0, plain=False).fields["test"] == 4


def test_rows_that_a_rule_splits_no_longer_are_asked_about(here: Path) -> None:
    """Readings are found on the first thousand rows; the question loads where a rule stands."""
    good = [{"question": "Q", "answer": "c\n#### 7"}] * 1000
    write_rows(here / "rows.jsonl", [*good, *[{"question": "Q", "answer": "7"}] * 200])
    recipe = adapted("false")
    assert recipe.data.source.startswith(
        "DECIDE: rows.jsonl, of which rows can't be used; train: no line that begins with `####`: "
        "200 rows, 1000, 1001, "
    )
    assert recipe.data.split_rule == "hash_marks"


def test_turns_of_another_recipe_are_read_as_it_trains_them(here: Path) -> None:
    """Of `turns: all` earlier answers are rows, too, and nothing says that they aren't trained."""
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>c</think>7"}]
    source = write_rows(here / "rows.jsonl", [{"messages": turn * 2}] * 9)
    every = choose_data(source, seed=0, plain=False, options=RowOptions("all"))
    assert (len(every.examples), every.notes) == (18, ["data.split_rule splits 9 of 9 rows"])
    last = choose_data(source, seed=0, plain=False)
    said = "9 earlier assistant turns aren't trained; `response.turns: all` trains them"
    assert (len(last.examples), last.notes[1:]) == (9, [said])
