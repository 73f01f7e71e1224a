"""`sftkey diagnose` on a recipe, on a run's stages, on somebody's model; and inside a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftkey.diagnosis.ask
from sftkey.cli import main
from sftkey.commands.train import train
from sftkey.data.prepare import drawn
from tests.support.model_folders import write_rows
from tests.support.tiny import made_rows, train_tiny

MakeRecipe = Callable[..., Path]
KEYS = [
    "num_rows",
    "chance",
    "num_unclosed",
    "num_unanswered",
    "conditions",
    "differences",
    "own_thinking_is_empty",
    "recommendation",
]
SENTENCE = (
    "After key, by 4 validation rows: More stage 1 or data: 4 of 4 responses have no answer in "
    "their form (4 wrong ones never stopped), so that accuracies don't tell yet whether thinking "
    "or answer is at fault."
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Train one step of the first of two stages on the tiny model, as `train` does it."""
    folder = tmp_path_factory.mktemp("diagnosed")
    train_tiny(folder, tiny_folder, test=4)
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the run, and stand where its folder is `runs/tiny`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a command that ends with 2."""
    with pytest.raises(SystemExit) as end:
        main(["diagnose", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def found(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what a command prints as JSON."""
    with pytest.raises(SystemExit) as end:
        main(["diagnose", *arguments, "--json"])
    assert end.value.code == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_run_diagnoses_each_stage_once_and_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside `evaluation/` lies a diagnosis, its sentence closes the table; again asks nothing."""
    folder = home / "runs" / "tiny"
    assert [file.name for file in (folder / "diagnosis").iterdir()] == ["key.json"]
    written = json.loads((folder / "diagnosis" / "key.json").read_text())
    assert list(written) == ["stage", "seconds", *KEYS]
    assert (written["stage"], written["num_rows"]) == ("key", 4)
    monkeypatch.setattr("sftkey.training.run.load_stage", None)
    train(Path("tiny.yaml"))
    assert capsys.readouterr().out.splitlines()[-1] == SENTENCE


def test_a_diagnosis_that_a_kill_has_lost_is_made_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked anew of the stage's own model, with the same figures; the log has it."""
    file = home / "runs" / "tiny" / "diagnosis" / "key.json"
    before = json.loads(file.read_text())
    file.unlink()
    train(Path("tiny.yaml"))
    after = json.loads(file.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert SENTENCE in capsys.readouterr().err


@pytest.mark.parametrize("tagged", [True, False])
def test_a_run_without_validation_rows_or_tags_has_no_diagnosis(
    tagged: bool, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training rows would flatter the model, and without tags no thinking has an end."""
    monkeypatch.chdir(tmp_path)
    data = {"source": str(tmp_path / "rows.jsonl"), "test": 4, "max_length": 512}
    sections: dict[str, Any] = {"data": data}
    if not tagged:
        data["validation"] = 4
        sections["response"] = {"thinking": ["", ""], "answer": ["\n", ""]}
    recipe = tiny_recipe(**sections, trainer={"max_steps": 1}, eval={"max_new_tokens": 4})
    train(recipe, ["stages=[{name: key, loss_on: key}]"])
    assert not (tmp_path / "runs" / "tiny" / "diagnosis").exists()


def test_a_runs_last_stage_is_diagnosed_or_the_one_that_is_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage and the base model have figures of their own; the folder stays as it is."""
    files = {file: file.read_bytes() for file in (home / "runs").rglob("*") if file.is_file()}
    last = found("runs/tiny", capsys=capsys)
    base = found("runs/tiny", "--stage", "base", "--rows", "3", capsys=capsys)
    assert list(last) == ["name", "stage", "seconds", *KEYS]
    assert (last["stage"], last["num_rows"], base["stage"], base["num_rows"]) == (
        *("key", 4),
        *("base", 3),
    )
    inside = json.loads((home / "runs" / "tiny" / "diagnosis" / "key.json").read_text())
    assert {key: last[key] for key in KEYS} == {key: inside[key] for key in KEYS}
    other = found("runs/tiny", "--stage", "base", capsys=capsys)
    assert other["conditions"] != last["conditions"]
    now = {file: file.read_bytes() for file in (home / "runs").rglob("*") if file.is_file()}
    assert now == files


def test_json_has_all_conditions_and_differences(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the three has its errors and its loss, each difference both of its intervals."""
    plain = found("tiny.yaml", "--rows", "2", capsys=capsys)
    assert (plain["name"], plain["stage"], plain["num_rows"]) == ("tiny.yaml", "base", 2)
    assert list(plain["conditions"]) == ["own", "reference", "none"]
    assert list(plain["conditions"]["own"]) == [
        "acc",
        "acc_interval",
        "num_right",
        "num_never_stopped",
        "num_unparsed",
        "num_answered_wrong",
        "nats",
        "num_losses",
    ]
    assert list(plain["differences"]) == [
        "reference_over_own",
        "own_over_none",
        "reference_over_none",
    ]
    assert list(plain["differences"]["own_over_none"]) == [
        "acc",
        "acc_interval",
        "nats",
        "nats_interval",
    ]
    assert list(plain["recommendation"]) == ["kind", "regime", "sentence", "warnings"]
    assert plain["conditions"]["own"]["nats"] is None
    assert plain["num_unclosed"] == 2


def test_the_tables_are_for_people(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stdout has the conditions, the differences, and the paragraph; counts go to stderr."""
    with pytest.raises(SystemExit):
        main(["diagnose", "tiny.yaml"])
    out, err = capsys.readouterr()
    lines = [line.strip() for line in out.splitlines()]
    for start in ("its own", "the reference's", "none", "reference's - own", "own - none"):
        assert sum(line.startswith(start) for line in lines) == 1
    assert "4 of 4 own thinkings never ended: after them the key has no loss." in lines
    assert lines[-1].startswith("More stage 1 or data: 4 of 4 responses have no answer")
    assert err.splitlines()[-3:-1] == [
        "4 answers after own thinking",
        "8 answers after given thinking",
    ]
    assert err.splitlines()[-1].startswith("tiny.yaml, base: 4 rows, ")


def test_a_change_to_the_recipe_counts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe takes overrides: more validation rows, say."""
    assert found("tiny.yaml", "data.validation=6", capsys=capsys)["num_rows"] == 6


@pytest.mark.parametrize("tags", ["columns", "think_tags"])
def test_somebodys_model_needs_no_recipe(
    tags: str,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Frame, tags and columns are chosen and said, and no file is written."""
    monkeypatch.chdir(tmp_path)
    rows = made_rows(12)
    if tags == "think_tags":
        rows = [
            {
                "question": row["prompt"],
                "response": f"<think>\n{row['thinking']}\n</think>\n\n{row['answer']}",
            }
            for row in rows
        ]
    write_rows(tmp_path / "my.jsonl", rows)
    with pytest.raises(SystemExit) as end:
        main(["diagnose", str(tiny_folder), "--data", "my.jsonl", "--rows", "5", "--json"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    plain = json.loads(out)
    assert (plain["name"], plain["stage"], plain["num_rows"]) == (str(tiny_folder), "as it is", 5)
    written, columns = {
        "columns": (
            r"'<Thinking>\n' '\n</Thinking>' '\n<Answer>\n' '\n</Answer>'",
            "prompt '{prompt}', thinking '{thinking}', answer '{answer}'",
        ),
        "think_tags": (
            r"'<think>\n' '\n</think>' '\n\n' ''",
            "prompt '{question}', split_rule 'think_tags'",
        ),
    }[tags]
    assert err.splitlines()[:3] == [
        f"{tiny_folder}: frame chat; tags {written}",
        f"{tiny_folder}: {columns}",
        f"{tiny_folder}: grader number: all answers are numbers",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["my.jsonl"]


def test_columns_that_say_nothing_must_be_decided(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error has what is open, and the way to decide it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"a": "1", "b": "2"}\n')
    folder = str(tiny_folder)
    parts = (
        "to be decided: a template, or `response` and a split_rule for the column of both: "
        "think_tags, boxed, hash_marks, or a regular expression with the groups thinking and "
        "answer; the columns are a, b; if rows hold no reasoning: no data.thinking, and `thinking: "
        "own` in every stage"
    )
    assert refused(folder, "--data", "my.jsonl", capsys=capsys).endswith(
        f"error: {folder}: 3 problems\n"
        '  data.prompt: to be decided: a template, such as "{a}"; the columns are a, b\n'
        f"  data.thinking: {parts}\n"
        f"  data.answer: {parts}\n"
        f"hint: `sftkey adapt {folder} --data my.jsonl -o my.yaml` writes a recipe: decide there, "
        "then diagnose my.yaml\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere"],
            "nowhere: expected a recipe or a run's folder; it is neither\n"
            "hint: a model is diagnosed with rows: --data my.jsonl\n",
        ),
        (
            ["runs/tiny", "--stage", "kee"],
            "runs/tiny: --stage: expected one of base, key; got 'kee'\n",
        ),
        (
            ["tiny.yaml", "--stage", "key"],
            "tiny.yaml: --stage: expected a run's folder; got the stage 'key'\n",
        ),
        (
            ["runs/tiny", "data.validation=3"],
            "runs/tiny: expected changes to a recipe only; got data.validation=3\n"
            "hint: give the recipe's file, not a run or a model\n",
        ),
        (
            ["tiny.yaml", "data.validation=null"],
            "tiny.yaml: data.validation: expected rows to diagnose on; got none\n"
            "hint: data.validation=200 takes so many rows of train\n",
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(
    arguments: list[str],
    message: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mistake has an error of its own, before any weight is loaded."""
    monkeypatch.setattr("sftkey.training.stage_model.load_model", None)
    monkeypatch.setattr(sftkey.diagnosis.ask, "generate", None)
    assert refused(*arguments, capsys=capsys) == f"error: {message}"


def test_the_same_rows_are_drawn_every_time() -> None:
    """Rows follow from the seed; all are taken of fewer."""
    assert drawn(100, 5, 7) == drawn(100, 5, 7) == sorted(set(drawn(100, 5, 7)))
    assert drawn(100, 5, 7) != drawn(100, 5, 8)
    assert drawn(3, 5, 7) == [0, 1, 2]
