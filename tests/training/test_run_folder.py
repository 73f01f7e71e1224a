"""What a run folder notices: other rows, broken files, changed later stages."""

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase

from sftkey.data.prepare import Prepared
from sftkey.diagnosis.run import choose_subject
from sftkey.errors import RunError
from sftkey.evaluation.answers import read_answers
from sftkey.evaluation.grading import grade
from sftkey.evaluation.results import read_results
from sftkey.evaluation.stage import grade_stage
from sftkey.pipeline import evaluate_run, open_run, report_run
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.sharing.stage import shared_stage
from sftkey.training.made_from import ALL, ASKS, changed_facts
from sftkey.training.run import Run, read_rows, start
from sftkey.training.run_folder import read_ledger
from sftkey.training.stage_model import require_same_base
from tests.support.tiny import CHATML, made_rows, write_recipe
from tests.training.test_run import Killed, adapter_of, kill_at_step


def go_on(folder: Path, *overrides: str, **settings: Any) -> Run:
    """Start the run of a folder with `tiny.yaml`; the same again goes on."""
    recipe = load_recipe(folder / "tiny.yaml", overrides)
    return start(recipe, folder / "runs" / "tiny", grade=grade, **settings)


def finish(run: Run) -> Run:
    """Do and grade all that is left of a run."""
    for name in run.stages():
        grade_stage(run, name)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Finish a run, for tests that copy its folder."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder, tiny_folder, data=data(folder))
    finish(go_on(folder))
    return folder


def data(folder: Path) -> dict[str, Any]:
    """Return a data section with a file for each split, relative to nothing."""
    rows = made_rows(40)
    parts = {"train": rows[:24], "validation": rows[24:32], "test": rows[32:]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    train, *others = (str(folder / f"{name}.jsonl") for name in parts)
    return {"source": train, "validation": others[0], "test": others[1], "max_length": 512}


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, which reads the same rows' files."""
    return shutil.copytree(whole, tmp_path / "copied")


@pytest.fixture
def changed(whole: Path) -> Any:
    """Return what changes the answer of some rows of a split, until the test's end."""
    before = {file: file.read_text() for file in whole.glob("*.jsonl")}

    def change(split: str, num_rows: int) -> None:
        file = whole / f"{split}.jsonl"
        lines = [json.loads(line) for line in before[file].splitlines()]
        for line in lines[:num_rows]:
            line["answer"] = f"{line['answer']}1"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    yield change
    for file, text in before.items():
        file.write_text(text)


@pytest.mark.parametrize(("split", "num_rows"), [("train", 3), ("validation", 1), ("test", 8)])
@pytest.mark.fault("rows, template or weights changed between two commands")
def test_rows_that_changed_are_refused_with_their_number(
    split: str, num_rows: int, copied: Path, changed: Callable[[str, int], None]
) -> None:
    """Each split is told alone, and both ways on."""
    changed(split, num_rows)
    num_asked = 4 if split == "test" else num_rows  # eval.num_questions
    with pytest.raises(RunError) as caught:
        go_on(copied)
    (problem,) = caught.value.problems
    rows = "1 row differs" if num_asked == 1 else f"{num_asked} rows differ"
    assert problem.where == split
    assert problem.what.startswith(f"{rows} from those that this run began with")
    assert "put them back; or" in str(caught.value)


@pytest.mark.fault("rows, template or weights changed between two commands")
def test_evaluating_looks_at_the_questions_alone(
    copied: Path, changed: Callable[[str, int], None]
) -> None:
    """Rows that were trained may be gone when a run is graded anew; its questions may not."""
    changed("train", 24)
    go_on(copied, uses=("test",))
    changed("test", 8)
    with pytest.raises(RunError, match="test: 4 rows differ"):
        go_on(copied, uses=("test",))


def test_rows_may_change_as_long_as_no_step_was_taken(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed before its first step goes on with the rows of now."""
    write_recipe(tmp_path, tiny_folder, data=data(tmp_path))
    with monkeypatch.context() as patch:
        kill_at_step(patch, "completion", 0)
        with pytest.raises(Killed):
            list(go_on(tmp_path).stages())
    train = tmp_path / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:20]))
    assert len(go_on(tmp_path).prepared.train) == 20


BREAK: dict[str, Callable[[Path], Any]] = {
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "deleted": lambda file: file.unlink(),
}
REFUSED = (
    *("stages/2-key/adapter/adapter_config.json", "stages/2-key/adapter/base.json"),
    *("stages/2-key/adapter/adapter_model.safetensors", "stages/1-completion/log.jsonl"),
)
MENDED = (  # those of a line are broken at once
    ("ledger.json", "evaluation/key.jsonl"),
    ("recipe.yaml", "evaluation/key.json", "rows.json"),
)


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_broken_file_is_named_or_mended(how: str, copied: Path) -> None:
    """One error names the file and the ways on; or all ends as if nothing had been broken."""
    folder = copied / "runs" / "tiny"
    kept = {name: (folder / name).read_bytes() for name in (*REFUSED, *chain(*MENDED))}
    (folder / "evaluation" / "key.jsonl").unlink()  # so that the last stage's model is loaded
    for name in REFUSED:
        BREAK[how](folder / name)
        with pytest.raises(RunError, match=re.escape(f"{folder / name}: expected what the run")):
            finish(go_on(copied))
        (folder / name).write_bytes(kept[name])
    for names in MENDED:
        finish(go_on(copied))
        for name in names:
            BREAK[how](folder / name)
    finish(go_on(copied))
    for name in ("recipe.yaml", "evaluation/key.jsonl", "evaluation/key.json"):
        assert (folder / name).read_bytes() == kept[name]
    assert open_run(folder).results.keys() == {"base", "completion", "key"}


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
@pytest.mark.parametrize(
    "content",
    [
        [],
        {"facts": {}, "stages": 3},
        {"facts": [], "stages": []},
        {"facts": {}, "stages": [{"name": "key", "validation": {"end": 3}}]},
        {"facts": {}, "stages": [], "rows": ["train"]},
        {"facts": {}, "stages": [{"name": "key", "status": "half"}]},
        {"facts": {}, "stages": [{"name": "key", "num_steps": 10**400}]},
    ],
)
def test_a_ledger_of_another_form_is_named(content: Any, tmp_path: Path) -> None:
    """One of before there were hashes has nothing else to be told by."""
    (tmp_path / "ledger.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"ledger\.json: expected what the run wrote; it holds some"):
        read_ledger(tmp_path)


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_recipe_of_other_stages_than_the_ledgers_is_named(copied: Path) -> None:
    """Whichever command reads the run; what is left of a recipe says who writes it anew."""
    file = copied / "runs" / "tiny" / "recipe.yaml"
    file.write_text(file.read_text().replace("name: completion", "name: other"))
    for look in (lambda: open_run(file.parent).stages, lambda: evaluate_run(file.parent)):
        with pytest.raises(RunError) as error:
            look()
        assert str(error.value) == (
            f"{file}: expected the stages of ledger.json, completion, key; got other, key\n"
            "hint: `sftkey train` on the recipe that began this run writes it anew"
        )
    for content in ("", "stages: ["):
        file.write_text(content)
        for look in (open_run, lambda folder: choose_subject(str(folder), (), None, None, 9)):
            with pytest.raises(RunError, match="on the recipe that began this run writes it anew"):
                look(file.parent)
    file.unlink()
    with pytest.raises(RunError, match="on the recipe that began this run writes it anew"):
        open_run(file.parent)
    finish(go_on(copied))
    assert open_run(file.parent).stages.keys() == {"completion", "key"}


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_broken_results_are_named_where_they_are_read(copied: Path) -> None:
    """Emptied answers are no answers without a mistake, and a table doesn't lack a line."""
    folder = copied / "runs" / "tiny"
    file = folder / "evaluation" / "key.graded.jsonl"
    file.write_text("")
    looks = [lambda: read_answers(folder, "key"), lambda: report_run(folder)]
    for look in looks:
        with pytest.raises(RunError) as error:
            look()
        assert str(error.value) == (
            f"{file}: expected what the run wrote; it has changed since it was written\n"
            f"hint: `sftkey evaluate {folder}` writes it anew"
        )
    weights = folder / "stages" / "1-completion" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))  # safetensors reads that
    with pytest.raises(RunError, match=r"safetensors: expected what the run wrote; it has changed"):
        shared_stage(folder, "completion")
    weights.write_bytes(kept)
    (folder / "evaluation" / "base.json").unlink()
    with pytest.raises(RunError, match=r"base\.json: expected what the run wrote; it is gone"):
        read_results(folder)
    evaluate_run(folder)
    assert len(read_answers(folder, "key")) == len(read_results(folder)[0].questions) == 4
    report_run(folder)


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_recipe_that_was_edited_in_the_run_is_said(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ledger doesn't take it for the one that the run began with; that one comes back."""
    file = copied / "runs" / "tiny" / "recipe.yaml"
    written = file.read_text()
    file.write_text(written.replace("learning_rate: 0.001", "learning_rate: 0.002"))
    assert file.read_text() != written
    said = f"{file}: it has changed since the run wrote it; `sftkey train` on the recipe that began"
    for _ in range(2):
        evaluate_run(file.parent)
        assert said in capsys.readouterr().err
    finish(go_on(copied))
    assert file.read_text() == written
    assert said not in capsys.readouterr().err


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_ledger_that_is_gone_with_its_copy_is_no_new_run(copied: Path) -> None:
    """Otherwise trained stages would be trained over."""
    folder = copied / "runs" / "tiny"
    for name in ("ledger.json", "ledger.copy.json"):
        (folder / name).unlink()
    with pytest.raises(RunError, match=r"ledger\.json: expected what the run wrote; it is gone"):
        go_on(copied)


def test_what_is_no_run_is_told_before_its_files_are_looked_at(tmp_path: Path) -> None:
    """A mistyped name has no recipe; a home folder may hold a program's pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path, "it holds no recipe.yaml"), (tmp_path / "x", "there is none")):
        with pytest.raises(RunError, match=f"^{path}: expected a run folder; {what}\n"):
            open_run(path)


def test_a_run_of_before_is_read(copied: Path) -> None:
    """Ledgers had neither hashes nor a copy; they get both."""
    folder = copied / "runs" / "tiny"
    ledger = json.loads((folder / "ledger.json").read_text())
    old = {key: ledger[key] for key in ("facts", "stages")}
    (folder / "ledger.json").write_text(json.dumps(old))
    for name in ("ledger.copy.json", "rows.json"):
        (folder / name).unlink()
    finish(go_on(copied))
    assert json.loads((folder / "ledger.json").read_text())["rows"] == ledger["rows"]


@pytest.mark.fault("settings changed, a stage added")
def test_changed_later_stages_leave_the_first_as_it_is(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lower learning rate of the second stage trains this one anew; what it was is kept."""
    before = adapter_of(go_on(copied), 0)
    capsys.readouterr()
    run = go_on(copied, "stages.key.trainer.learning_rate=1e-4")
    assert [each.status for each in run.ledger.stages] == ["trained", "open"]
    said = capsys.readouterr().err
    assert "kept: completion; trained anew: key" in said
    finish(run)
    assert all((before[name] == value).all() for name, value in adapter_of(run, 0).items())
    (aside,) = (copied / "runs" / "tiny" / "replaced").iterdir()
    assert (aside / "stages/2-key/adapter/adapter_model.safetensors").is_file()
    assert (aside / "evaluation/key.jsonl").is_file()
    assert load_recipe(run.ledger.folder / "recipe.yaml") == run.recipe


@pytest.mark.fault("settings changed, a stage added")
def test_a_stage_can_be_added(copied: Path) -> None:
    """The two before it stay."""
    stages = "stages=[{name: completion, loss_on: completion}, {name: key, loss_on: key, "
    stages += "trainer: {learning_rate: 5.0e-4}}, {name: more, loss_on: key}]"
    run = go_on(copied, stages)
    assert [each.status for each in run.ledger.stages] == ["trained", "trained", "open"]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("chat template", lambda tokenizer: setattr(tokenizer, "chat_template", CHATML + " ")),
        ("tokenizer", lambda tokenizer: tokenizer.add_tokens(["zebra"])),
        (
            "tokenizer",
            lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
        ),
    ],
)
@pytest.mark.parametrize("uses", [ALL, ASKS])
@pytest.mark.fault("rows, template or weights changed between two commands")
def test_another_template_or_tokenizer_is_refused(
    uses: tuple[str, ...], what: str, change: Callable[[Any], None], copied: Path
) -> None:
    """By training as by evaluating: the answers of two of them are no comparison."""

    def read(recipe: Recipe) -> Prepared:
        prepared = read_rows(recipe)
        change(prepared.renderer.tokenizer)
        return prepared

    with pytest.raises(RunError, match=f": the {what} isn't the one that this run began with"):
        go_on(copied, read=read, uses=uses)
    go_on(copied, uses=uses)


@pytest.mark.fault("rows, template or weights changed between two commands")
def test_another_base_than_the_run_began_with_is_refused(copied: Path) -> None:
    """An older run didn't record it, and a model in memory has no files."""
    ledger = go_on(copied).ledger
    base = ledger.facts["base"]
    require_same_base(ledger, base)
    require_same_base(ledger, {**base, "fingerprint": None})
    with pytest.raises(
        RunError, match=r"that this run began with, fingerprint .*; got fingerprint"
    ):
        require_same_base(ledger, {**base, "fingerprint": "0" * 64})
    del ledger.facts["base"]
    require_same_base(ledger, base)


@pytest.mark.fault("other versions, device or number of processes")
def test_other_surroundings_are_said_in_one_line() -> None:
    """Versions, device and processes; what an older run didn't record is passed over."""
    before = {"device": "cuda", "world_size": 2, "versions": {"torch": "2.12.0", "trl": "1.16.0"}}
    now = {"device": "cpu", "world_size": 2, "versions": {"torch": "2.13.0", "trl": "1.16.0"}}
    line = "goes on in other surroundings: device cuda -> cpu, torch 2.12.0 -> 2.13.0"
    assert changed_facts(before, now) == [line]
    assert changed_facts({}, now) == changed_facts(now, now) == []
