"""The second grader, against a server on this machine: no real endpoint is asked."""

import doctest
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftkey.training.stage_model
from sftkey.checks.gate import check_recipe
from sftkey.commands.results import evaluate
from sftkey.commands.study import study
from sftkey.commands.train import train
from sftkey.data.response import Example, Response
from sftkey.errors import JudgeError, RecipeError
from sftkey.evaluation import judge as judge_module
from sftkey.evaluation.judge import Judge, cohens_kappa, judge_prompt, parse_verdict
from sftkey.recipe.load import changed_keys, load_recipe
from sftkey.recipe.schema import JudgeSection
from sftkey.training.run_folder import Ledger, open_run
from sftkey.training.trainer import KeyTrainer
from tests.study.test_run import write_study
from tests.support.judge_server import JudgeServer, served
from tests.support.model_folders import write_rows
from tests.support.tiny import made_rows, train_tiny

KEY = "sk-not-for-any-file"
SECRET = "a secret way of thinking"
RESPONSE = Response("<Thinking>\n", "\n</Thinking>", "\n<Answer>\n", "\n</Answer>")
HINT = (
    "hint: start the endpoint, or mend eval.judge; the same command again, or `sftkey evaluate` on "
    "the run, asks for what is left"
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return each test a cache of its own, and a key."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """Run a judge that says yes."""
    with served() as judge:
        yield judge


def section(server: JudgeServer, **more: Any) -> dict[str, Any]:
    """Return the recipe's `eval.judge` for a server."""
    return {"base_url": server.base_url, "model": "made-judge", **more}


def by_row(flags: Any) -> dict[int, bool | None]:
    """Return flags of rows that ask one question each by the row."""
    return {key.row: flag for key, flag in flags.items()}


def examples(*numbers: int) -> list[Example]:
    """Make questions whose answer is twice their number."""
    return [Example(f"Double {n}?", "", str(2 * n), n) for n in numbers]


def made_judge(server: JudgeServer, **more: Any) -> Judge:
    """Make what asks a server."""
    return Judge(JudgeSection(**section(server, **more)), lambda text: None)


def given(prompt: str) -> str:
    """Return the answer that a prompt asks about."""
    (found,) = re.findall(r"<given_answer>\n(.*?)\n</given_answer>", prompt, re.DOTALL)
    return str(found)


# The parts


def test_doctests_hold() -> None:
    """The docstrings' examples say what is so."""
    assert doctest.testmod(judge_module).failed == 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True),
        ("No", False),
        ("\n**Yes.**\n", True),
        ("NO!", None),
        ("yes no", None),
        ("Yes, it is.", None),
        ("<think>\nyes\n</think>no", None),
        ("true", None),
        ("", None),
        (None, None),
        ([{"type": "text", "text": "yes"}], None),
    ],
)
def test_only_yes_and_no_are_verdicts(text: object, verdict: bool | None) -> None:
    """One word, whatever its case and the marks around it; nothing is guessed from more."""
    assert parse_verdict(text) is verdict


def test_a_prompt_holds_question_reference_and_answer() -> None:
    """Braces are text; each part stands between its tags."""
    prompt = judge_prompt(Example("What is {x}?", "think {y}", "{z}", 0), "{answer}")
    assert "<question>\nWhat is {x}?\n</question>" in prompt
    assert "<reference_answer>\n{z}\n</reference_answer>" in prompt
    assert "<given_answer>\n{answer}\n</given_answer>" in prompt
    assert "think" not in prompt


def test_of_a_chat_the_question_is_what_was_said() -> None:
    """One message stands alone, several name who speaks; the system message is left out."""
    system = {"role": "system", "content": "You are curt."}
    turns = [{"role": "user", "content": "One?"}]
    assert "<question>\nOne?\n</question>" in judge_prompt(
        Example((system, *turns), "", "1", 0), "1"
    )
    turns += [{"role": "assistant", "content": "1."}, {"role": "user", "content": "Two?"}]
    prompt = judge_prompt(Example((system, *turns), "", "2", 0), "2")
    assert "<question>\nuser: One?\n\nassistant: 1.\n\nuser: Two?\n</question>" in prompt
    assert "curt" not in prompt


def test_kappa_is_the_one_counted_by_hand() -> None:
    """Agreement 3/4 where chance gives 1/2 is 0.5; agreement by chance alone is 0."""
    assert cohens_kappa([True, True, False, False], [True, False, False, False]) == 0.5
    assert cohens_kappa([True, True, False, False], [True, False, True, False]) == 0
    assert cohens_kappa([True, False], [False, True]) == -1
    assert cohens_kappa([False, False], [False, False]) is None


def test_as_many_are_asked_at_once_as_the_recipe_says(server: JudgeServer) -> None:
    """Three of nine are on their way together, and no more."""
    three = threading.Barrier(3, timeout=60)

    def together(prompt: str) -> str:
        three.wait()
        time.sleep(0.3)  # for a fourth to come, if there were one
        return "yes"

    server.say = together
    flags = made_judge(server, max_concurrent=3).flags(examples(*range(9)), ["0"] * 9)
    assert by_row(flags) == dict.fromkeys(range(9), True)
    assert server.most_at_once == 3


def test_the_same_question_with_the_same_answer_is_asked_once(server: JudgeServer) -> None:
    """Flags go by question, requests by what is sent; another model or answer is another one."""
    same = [Example("How many?", "", "2", n) for n in range(4)]
    judge = made_judge(server)
    assert by_row(judge.flags(same, ["2", "2", "3", None])) == {0: True, 1: True, 2: True, 3: False}
    assert sorted(map(given, server.prompts)) == ["2", "3"]
    judge.flags(same, ["2", "2", "3", None])
    assert len(server.asked) == 2
    made_judge(server, model="another").flags(same[:1], ["2"])
    assert [body["model"] for body in server.asked] == ["made-judge", "made-judge", "another"]


def test_what_is_on_its_way_at_a_failure_comes_in_and_is_kept(server: JudgeServer) -> None:
    """The slow verdict isn't lost to the error of another; no further question is sent."""
    asked = examples(*range(6))
    judge = made_judge(server, max_concurrent=2)
    together = threading.Barrier(2, timeout=60)

    def say(prompt: str) -> str | tuple[int, str]:
        together.wait()
        if given(prompt) == "bad":
            return 401, "no"
        until = time.monotonic() + 60
        while judge.failure is None and time.monotonic() < until:
            time.sleep(0.01)
        return "yes"

    server.say = say
    assert by_row(judge.flags(asked, ["slow", "bad", "c", "d", "e", "f"])) == {0: True}
    assert isinstance(judge.failure, JudgeError)
    assert sorted(map(given, server.prompts)) == ["bad", "slow"]
    server.say = lambda prompt: "no"
    assert by_row(made_judge(server).flags(asked[:1], ["slow"])) == {0: True}


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_torn_line_of_the_cache_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    """A kill in the middle of a line costs this verdict and no other."""
    made_judge(server, max_concurrent=1).flags(examples(1, 2), ["2", "4"])
    (file,) = (tmp_path / "cache" / "verdicts").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    made_judge(server).flags(examples(1, 2), ["2", "4"])
    assert list(map(given, server.prompts)) == ["2", "4", "4"]


def test_a_cache_that_cannot_be_written_is_said(server: JudgeServer, tmp_path: Path) -> None:
    """The error names the folder and the way out."""
    (tmp_path / "cache").write_text("in the way")
    judge = made_judge(server)
    judge.flags(examples(1), ["2"])
    assert str(judge.failure) == (
        f"{tmp_path / 'cache'}: the judge's verdicts can't be written: Not a directory\n"
        "hint: set SFTKEY_CACHE to a folder of yours"
    )


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_a_slow_endpoint_is_given_up(server: JudgeServer) -> None:
    """After the recipe's seconds, and the library's own further tries."""

    def slow(prompt: str) -> str:
        time.sleep(0.4)
        return "yes"

    server.say = slow
    judge = made_judge(server, timeout_seconds=0.1)
    assert judge.flags(examples(1), ["2"]) == {}
    assert str(judge.failure) == (
        f"{server.base_url}: the judge made-judge can't be asked: Request timed out.\n{HINT}"
    )


@pytest.mark.parametrize("raw", [b"<html>", b"{}", b'{"choices": []}', b'"yes"', b"[]"])
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_what_is_no_completion_is_an_error(server: JudgeServer, raw: bytes) -> None:
    """A page behind a wrong address is no verdict, and isn't counted as an unclear one."""
    server.raw = raw
    judge = made_judge(server)
    assert judge.flags(examples(1), ["2"]) == {}
    assert str(judge.failure) == (
        f"{server.base_url}: the judge made-judge can't be asked: a reply that is no chat "
        f"completion\n{HINT}"
    )


def test_a_server_that_needs_no_key_gets_none(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `api_key_env: null` the environment isn't read."""
    assert by_row(made_judge(server, api_key_env=None).flags(examples(1), ["2"])) == {1: True}
    assert KEY not in json.dumps(server.headers)
    monkeypatch.setenv("ANOTHER_KEY", "of another")
    made_judge(server, api_key_env="ANOTHER_KEY").flags(examples(2), ["4"])
    assert server.headers[-1]["authorization"] == "Bearer of another"


# In a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Train one step of the key on the tiny model, without a judge; it asks four questions."""
    folder = tmp_path_factory.mktemp("trained")
    train_tiny(folder, tiny_folder, grader="number")
    return folder


@dataclass
class Judged:
    """A run whose key stage gave these answers: right, right, wrong, none."""

    folder: Path
    recipe: Path
    indices: list[int]
    answers: list[str | None]

    def ask(self, judge: dict[str, Any]) -> None:
        """Write a judge into the run's recipe and into its own."""
        for file in (self.folder / "recipe.yaml", self.recipe):
            plain = yaml.safe_load(file.read_text())
            plain["eval"]["judge"] = judge
            file.write_text(yaml.safe_dump(plain))

    def result(self, stage: str = "key") -> dict[str, Any]:
        """Read a stage's results."""
        result: dict[str, Any] = json.loads(
            (self.folder / "evaluation" / f"{stage}.json").read_text()
        )
        return result

    def flags(self) -> list[tuple[bool, bool | None]]:
        """Return the rule's flags and the judge's."""
        return [(each["correct"], each.get("judged")) for each in self.result()["questions"]]


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Copy the run, and write the answers of its stage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copy(trained / "tiny.yaml", tmp_path)
    file = tmp_path / "runs" / "tiny" / "evaluation" / "key.jsonl"
    indices = sorted(json.loads(line)["index"] for line in file.read_text().splitlines())
    right = [made_rows(20)[index]["answer"] for index in indices]
    answers = [right[0], f"{right[1]}.0", f"{right[2]} or 999", None]
    texts = ["no answer" if a is None else RESPONSE.render(SECRET, a) for a in answers]
    rows = [{"index": index, "text": text} for index, text in zip(indices, texts, strict=True)]
    write_rows(file, rows)
    Ledger(tmp_path / "runs" / "tiny", load_recipe(Path("tiny.yaml"))).finish(file)  # as if it had
    return Judged(Path("runs", "tiny"), Path("tiny.yaml"), indices, answers)


def said(out: str) -> list[str]:
    """Return the sentences about the judge from what was printed."""
    return re.findall(
        r"(\w+: the judge .*?\.)(?= base: | key: | After | What |$)", " ".join(out.split())
    )


def test_the_judges_flags_stand_beside_the_rules(
    run: Judged, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flag by flag and figure by figure; Acc stays the rule's."""
    evaluate(run.folder)
    before = run.result()
    run.ask(section(server))
    server.say = lambda prompt: "no" if given(prompt) == run.answers[1] else "Yes."
    capsys.readouterr()
    evaluate(run.folder)
    assert run.flags() == [(True, True), (True, False), (False, True), (False, False)]
    result = run.result()
    assert (result["judge"], result["num_unclear"]) == (
        {"num_judged": 4, "num_questions": 4, "num_agreeing": 2, "kappa": 0.0, "acc": 0.5},
        0,
    )
    assert result["settings"]["judge"] == "made-judge"
    assert {key: result[key] for key in before if key not in ("settings", "questions")} == {
        key: before[key] for key in before if key not in ("settings", "questions")
    }
    assert said(capsys.readouterr().out) == [
        "base: the judge made-judge judged 4 of 4 answers, Acc 0.000; the rule agrees on 4.",
        "key: the judge made-judge judged 4 of 4 answers, Acc 0.500; the rule agrees on 2, "
        "kappa 0.00.",
    ]


def test_what_travels_is_question_reference_and_answer(
    run: Judged, server: JudgeServer, tmp_path: Path
) -> None:
    """The thinking stays here; an answer that wasn't found isn't sent; the key is in no file."""
    run.ask(section(server))
    evaluate(run.folder)
    assert sorted(map(given, server.prompts)) == sorted(a for a in run.answers if a)
    assert set(server.paths) == {"/v1/chat/completions"}
    for body, headers in zip(server.asked, server.headers, strict=True):
        assert body.keys() == {"model", "messages", "temperature"}
        assert (body["model"], body["temperature"]) == ("made-judge", 0)
        assert len(body["messages"]) == 1
        assert SECRET not in json.dumps(body)
        assert KEY not in json.dumps(body)
        assert headers["authorization"] == f"Bearer {KEY}"
    row = made_rows(20)[run.indices[0]]
    (first,) = (prompt for prompt in server.prompts if given(prompt) == row["answer"])
    assert row["prompt"] in first
    assert f"<reference_answer>\n{row['answer']}\n</reference_answer>" in first
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_the_second_time_nothing_is_asked(run: Judged, server: JudgeServer) -> None:
    """The verdicts lie in the cache, by what was sent; the results are the same."""
    run.ask(section(server))
    evaluate(run.folder)
    first = run.result()
    assert len(server.asked) == 3
    server.say = lambda prompt: "no"
    evaluate(run.folder)
    assert len(server.asked) == 3
    assert run.result() == first


def test_a_reply_that_says_neither_is_counted_and_not_guessed(
    run: Judged, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts as no verdict; a server that has been mended is asked once more."""
    run.ask(section(server))
    server.say = lambda prompt: "yes" if given(prompt) == run.answers[0] else "I'd say yes"
    evaluate(run.folder)
    assert run.flags() == [(True, True), (True, None), (False, None), (False, False)]
    result = run.result()
    assert (result["judge"]["num_judged"], result["num_unclear"]) == (2, 2)
    assert result["judge"]["kappa"] == 1.0
    assert said(capsys.readouterr().out)[1] == (
        "key: the judge made-judge judged 2 of 4 answers, Acc 0.500; the rule agrees on 2, "
        "kappa 1.00; neither yes nor no: 2."
    )
    server.say = lambda prompt: "no"
    evaluate(run.folder)
    assert run.flags() == [(True, True), (True, False), (False, False), (False, False)]
    assert len(server.asked) == 5


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_an_endpoint_that_refuses_is_one_error_and_loses_nothing(
    run: Judged, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is graded by the rule, what was judged is kept, and only the rest is asked again."""
    run.ask(section(server, max_concurrent=1))

    def say(prompt: str) -> str | tuple[int, str]:
        return "yes" if len(server.asked) == 1 else (401, f"Incorrect API key: {KEY}")

    server.say = say
    with pytest.raises(JudgeError) as caught:
        evaluate(run.folder)
    assert str(caught.value) == (
        f"{server.base_url}: the judge made-judge can't be asked: Error code: 401 - "
        "Incorrect API key: …\n" + HINT
    )
    assert run.flags() == [(True, True), (True, None), (False, None), (False, False)]
    out = capsys.readouterr().out
    assert said(out)[1].endswith("the rule agrees on 2, kappa 1.00; not asked yet: 2.")
    assert len(server.asked) == 2
    server.say = lambda prompt: "no"
    evaluate(run.folder)
    assert run.flags() == [(True, True), (True, False), (False, False), (False, False)]
    assert len(server.asked) == 4


def test_a_judge_of_another_engines_answers_fails_alike(run: Judged) -> None:
    """With `--generations` too the rule's grades are written before the error."""
    with served() as gone:
        run.ask(section(gone))
    file = run.folder / "evaluation" / "key.jsonl"
    with pytest.raises(JudgeError, match="can't be asked: Connection error"):
        evaluate(run.folder, generations=file, stage="key")
    assert run.flags() == [(True, None), (True, None), (False, None), (False, False)]


@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_training_goes_on_without_its_judge(
    run: Judged,
    server: JudgeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead endpoint is a line in the log; the same command again asks, and trains nothing."""
    with served() as gone:
        dead = gone.base_url
    run.ask(section(server) | {"base_url": dead})
    train(run.recipe)
    assert run.flags() == [(True, None), (True, None), (False, None), (False, False)]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert "key: asking the judge made-judge about 3 answers" in lines
    what = f"{dead}: the judge made-judge can't be asked: Connection error."
    assert lines.count(f"key: graded by the rule; {what}") == 1
    assert captured.err.count("can't be asked") == 1  # base wrote nothing to be asked about
    run.ask(section(server))
    monkeypatch.setattr(sftkey.training.stage_model, "load_model", None)
    train(run.recipe)
    assert run.flags() == [(True, True), (True, True), (False, True), (False, False)]


def test_without_a_judge_nothing_changes(run: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither our part nor the library is imported, and no file has a word of judges."""
    for name in ("openai", "sftkey.evaluation.judge", "sftkey.evaluation.judge"):
        monkeypatch.setitem(sys.modules, name, None)
    train(run.recipe)
    evaluate(run.folder)
    for file in (run.folder / "evaluation").glob("*.json"):
        result = json.loads(file.read_text())
        assert not {"judge", "num_unclear"} & (result.keys() | result["settings"].keys())
        assert all("judged" not in question for question in result["questions"])
    assert "judge" not in (run.folder / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("lacks", "what"),
    [
        (
            "package",
            "eval.judge: a judge needs the package openai, which isn't installed\n"
            'hint: python -m pip install "sftkey[judge]"',
        ),
        (
            "key",
            "eval.judge.api_key_env: the environment variable OPENAI_API_KEY holds no key\n"
            "hint: set it; eval.judge.api_key_env=null for a server that needs none",
        ),
    ],
)
def test_what_a_judge_lacks_here_is_said_before_anything_is_done(
    run: Judged, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, lacks: str, what: str
) -> None:
    """`evaluate` refuses, and so does the gate before training."""
    run.ask(section(server))
    if lacks == "package":
        monkeypatch.setitem(sys.modules, "openai", None)
    else:
        monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RecipeError) as caught:
        evaluate(run.folder)
    assert str(caught.value) == what
    (finding,) = check_recipe(load_recipe(run.recipe)).refusals
    assert (finding.code, f"{finding.message}\nhint: {finding.hint}") == ("recipe", what)
    assert server.asked == []


# In a recipe


def test_a_resolved_recipe_is_as_before_where_there_is_no_judge(run: Judged) -> None:
    """So hashes of recipes stay, and runs that began before there were judges go on."""
    recipe = load_recipe(run.recipe)
    assert recipe.eval.judge is None
    assert "judge" not in recipe.to_yaml()
    open_run(recipe, run.folder)


def test_a_judge_has_defaults_and_is_written_whole(run: Judged, tmp_path: Path) -> None:
    """A resolved recipe with a judge gives the same recipe; a run without one is another one."""
    judge = "eval.judge={base_url: https://example.org/v1, model: m}"
    recipe = load_recipe(run.recipe, [judge])
    assert recipe.eval.judge == JudgeSection(
        base_url="https://example.org/v1",
        model="m",
        api_key_env="OPENAI_API_KEY",
        max_concurrent=4,
        timeout_seconds=60.0,
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert changed_keys(load_recipe(run.recipe), recipe) == ["eval.judge"]
    other = load_recipe(run.recipe, [judge, "eval.judge.model=n"])
    assert changed_keys(recipe, other) == ["eval.judge.model"]


URL = "base_url: expected http://… or https://…, without a user, a password or a query; got "


@pytest.mark.parametrize(
    ("judge", "what"),
    [
        ({"base_url": "localhost:8000"}, f"{URL}'localhost:8000'"),
        ({"base_url": "http://me:secret@host/v1"}, f"{URL}one with them"),
        ({"base_url": "http://host/v1?key=secret"}, f"{URL}one with them"),
        ({"model": ""}, "model: expected text that isn't empty; got ''"),
        (
            {"api_key_env": "sk-secret"},
            "api_key_env: expected the name of an environment variable in capitals, "
            "OPENAI_API_KEY say: the key itself never stands in a recipe",
        ),
        ({"max_concurrent": 0}, "max_concurrent: expected 1 or more; got 0"),
        ({"timeout_seconds": 0}, "timeout_seconds: expected a number above 0; got 0"),
        ({"modle": "m"}, "modle: unknown key; did you mean `model`?"),
        (
            {"api_key": "sk-secret"},
            "api_key: unknown key; did you mean `api_key_env`?",
        ),
    ],
)
def test_a_judge_that_cannot_be_is_refused(
    run: Judged, server: JudgeServer, judge: dict[str, Any], what: str
) -> None:
    """Each with its place; what may be a key or a password isn't shown."""
    run.ask(section(server) | judge)
    with pytest.raises(RecipeError) as caught:
        load_recipe(run.recipe)
    text = str(caught.value)
    assert f"eval.judge.{what}" in text
    assert "secret" not in text


# In a study


def answer_all(model: Any, tokenizer: Any, prompts: Any, file: Path, **settings: Any) -> None:
    """Write the right answer to every second question, and a wrong one to the others."""
    rows = made_rows(24)
    texts = [
        RESPONSE.render(SECRET, rows[key.row]["answer"] if place % 2 == 0 else "-7")
        for place, key in enumerate(sorted(prompts))
    ]
    lines = [
        json.dumps({"index": key.row, "text": text, "stopped": True}) + "\n"
        for key, text in zip(sorted(prompts), texts, strict=True)
    ]
    file.write_text("".join(lines))


def test_a_study_asks_goes_on_and_reports(
    server: JudgeServer,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A judge that fails stops it before a cell is whole; then nothing is trained twice.

    Of three questions the answers to the first and the last are right by the rule, and the judge
    says yes to the wrong one too: it agrees on 2 of 3, and chance gives 2/3, so kappa is 0.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sftkey.training.answers.generate_to_file", answer_all)
    file = write_study(tmp_path, tiny_folder, seeds=[1])
    plain = yaml.safe_load((tmp_path / "task.yaml").read_text())
    plain["eval"]["judge"] = section(server)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(plain))
    server.say = lambda prompt: (401, "who are you?")
    with pytest.raises(JudgeError, match="401"):
        study(file)
    cells = tmp_path / "runs" / "small" / "cells"
    assert list(cells.glob("*/*/*.json")) == []
    server.say = lambda prompt: "yes"
    study(file)
    report = (tmp_path / "runs" / "small" / "report.md").read_text()
    first, _, _ = report.partition("\n\n|")[2].partition("\n\n")
    head, _, *rows = f"|{first}".splitlines()
    assert head.split(" | ")[-1] == "judge: Acc, agreement, kappa |"
    figures = {row.split(" | ")[0]: row.split(" | ")[-1] for row in rows}
    assert figures == dict.fromkeys(["| base", "| sft_twice", "| sftkey"], "1.000, 2/3, 0.00 |")
    cell = json.loads((cells / "task" / "sftkey" / "seed-1.json").read_text())
    for answered in (cell, cell["base"]):
        assert [each["judged"] for each in answered["questions"]] == [True] * 3
    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text())
    assert [arm["judge"]["num_agreeing"] for arm in results["arms"]] == [2, 2, 2]
    monkeypatch.setattr(KeyTrainer, "train", None)
    for record in cells.glob("*/*/*.json"):
        record.unlink()
    asked = len(server.asked)
    study(file)
    assert len(server.asked) == asked
    capsys.readouterr()
