"""Comparisons: the table, the differences, and what the sentences claim."""

import io
import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import norm

from sftkey.data.response import Example, QuestionKey, Response
from sftkey.evaluation.comparison import as_json, compare, compare_runs, render, sentences
from sftkey.evaluation.results import StageResult, write_result
from sftkey.evaluation.statistics import paired_difference, paired_p, wilson
from sftkey.evaluation.thinking import PassedChange
from sftkey.generation.generate import Generation
from tests.support.scoring import scored

RESPONSE = Response("<T>", "</T>", "<A>", "</A>")
SEED = (
    "An interval counts the chance in the questions; another seed, or other data, may give "
    "another difference."
)


def result(
    stage: str, position: int, right: range, num_questions: int = 100, **settings: Any
) -> StageResult:
    """Make a stage that has the questions of a range right, always in the right format."""
    examples = [Example(f"question {n}", "", str(n), n) for n in range(num_questions)]
    generations = {
        QuestionKey(n): Generation(
            RESPONSE.render("so", str(n) if n in right else "-1"), 8, n % 10 > 0
        )
        for n in range(num_questions)
    }
    return scored(
        generations,
        examples,
        RESPONSE,
        stage=stage,
        position=position,
        settings=settings,
    )


BASE = result("base", 0, range(5))
COMPLETION = result("completion", 1, range(60))
KEY = result("key", 2, range(2, 64))


def printed(comparison: Any, width: int = 80) -> list[str]:
    """Print a comparison as a terminal of some width shows it."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(comparison))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_differences_are_to_the_stage_before() -> None:
    """Each stage but the first is paired with the one before it, question by question."""
    rows = compare({"demo": [BASE, COMPLETION, KEY]}).rows
    assert [row.difference and row.difference.before for row in rows] == [
        None,
        "base",
        "completion",
    ]
    last = rows[2].difference
    assert last is not None
    before = [question.correct for question in COMPLETION.questions]
    after = [question.correct for question in KEY.questions]
    assert (last.difference, *last.interval) == paired_difference(before, after)
    assert last.difference == pytest.approx(0.02)
    assert last.p == last.p_holm == paired_p(before, after)
    assert (last.after, last.num_questions) == ("key", 100)


def test_sentences_say_what_is_shown_and_what_is_not() -> None:
    """A difference whose interval includes 0 is not called a gain."""
    assert sentences(compare({"demo": [BASE, COMPLETION, KEY]})) == [
        "The difference between base and completion is +55.0 points [+45.2, +64.4] on 100 "
        "questions: the interval is clear of 0, so on questions like these completion answers "
        "better than base.",
        "The difference between completion and key is +2.0 points [-3.6, +8.2] on 100 questions: "
        "the interval includes 0, so this run doesn't show that key answers better or worse.",
        SEED,
    ]


def test_a_loss_is_called_a_loss() -> None:
    """An interval below 0 says that the later stage is worse."""
    assert sentences(compare({"demo": [COMPLETION, BASE]}))[0] == (
        "The difference between completion and base is -55.0 points [-64.4, -45.2] on 100 "
        "questions: the interval is clear of 0, so on questions like these base answers worse "
        "than completion."
    )


def test_one_row_alone_has_nothing_to_compare_with() -> None:
    """The base model's row alone makes no claim."""
    assert sentences(compare({"demo": [BASE]})) == [
        "base is the only one evaluated: there is nothing to compare it with."
    ]


def test_the_table_fits_a_terminal() -> None:
    """All figures stand in eighty columns, none broken."""
    assert printed(compare({"demo": [BASE, COMPLETION, KEY]}))[:9] == [
        "                          Acc                un-   never think. points more, p",
        "stage        n          [95%]   Fmt Score parsed stopped tokens          [95%]",
        "─" * 78,
        "base       100          0.050 1.000 0.335      0      10    2.0",
        "               [0.022, 0.112]",
        "completion 100          0.600 1.000 0.720      0      10    2.0 +55.0, p<0.001",
        "               [0.502, 0.691]                                   [+45.2, +64.4]",
        "key        100          0.620 1.000 0.734      0      10    2.0  +2.0, p 0.414",
        "               [0.522, 0.709]                                     [-3.6, +8.2]",
    ]


def thinking(stage: str, position: int, right: range, loss: tuple[float, float] | None) -> Any:
    """Make a stage that thinks right on the questions of a range."""
    examples = [Example(f"{n}?", f"{n} + 1 = {n + 1}\n1 + 1", "2", n) for n in range(100)]
    generations = {
        QuestionKey(n): Generation(
            RESPONSE.render(examples[n].thinking if n in right else "?", "2"), 8, True
        )
        for n in range(100)
    }
    return scored(
        generations,
        examples,
        RESPONSE,
        stage=stage,
        position=position,
        thinking_loss=loss,
    )


HARMED = (
    "key harmed the thinking: its validation loss rose by 0.1000 nats a token (more than 0.02); "
    "10 right ones turned wrong, 1 wrong right (one-sided p 0.006). In a key stage `loss_on: "
    "{thinking: 0.1, key: 1.0}` holds the thinking, and `context: frozen` can't change it."
)


def test_a_stage_that_harmed_the_thinking_is_told_with_the_remedy() -> None:
    """The second table shows what each stage did; the sentence comes last, and in the JSON."""
    stages = [
        thinking("base", 0, range(0), None),
        thinking("completion", 1, range(80), (2.5, 0.25)),
        thinking("key", 2, range(10, 81), (0.25, 0.35)),
    ]
    comparison = compare({"demo": stages})
    assert comparison.warnings == (HARMED,)
    assert sentences(comparison)[-1] == HARMED
    assert printed(comparison)[10:17] == [
        "thinking   identical        turned turned validation loss,",
        "after      to before  right  wrong  right     nats a token",
        "─" * 58,
        "base                  0/100",
        "completion    20/100 80/100      0     80 2.5000 -> 0.2500",
        "key           89/100 71/100     10      1 0.2500 -> 0.3500",
        "",
    ]
    change = json.loads(json.dumps(as_json(comparison)))["stages"][2]["thinking_change"]
    assert change == {
        "after": "key",
        "loss": [0.25, 0.35],
        "loss_name": "validation loss",
        "before": "completion",
        "num_questions": 100,
        "num_identical": 89,
        "mean_lengths": [stage.mean_thinking_length for stage in stages[1:]],
        "unit": "tokens",
        "turned": {
            "num_judged": 100,
            "num_right_before": 80,
            "num_right_after": 71,
            "num_made_wrong": 10,
            "num_made_right": 1,
            "p": pytest.approx(12 / 2048),
        },
        "harms": [
            "its validation loss rose by 0.1000 nats a token (more than 0.02)",
            "10 right ones turned wrong, 1 wrong right (one-sided p 0.006)",
        ],
        "valid": {"num_before": 100, "num_after": 100, "num_lost": 0, "num_gained": 0, "p": 1.0},
        "passed": {
            "difference": 0.0,
            "interval": list(paired_difference([True] * 100, [True] * 100)[1:]),
            "p": 1.0,
        },
    }


def test_losses_on_training_rows_are_never_called_validation_loss() -> None:
    """A run without validation rows says so wherever its losses stand."""
    named = {"loss_name": "loss on training rows"}
    stages = [
        thinking("completion", 1, range(80), None),
        thinking("key", 2, range(80), (0.25, 0.35)).model_copy(update=named),
    ]
    comparison = compare({"demo": stages})
    (warning,) = comparison.warnings
    assert warning.startswith("key harmed the thinking: its loss on training rows rose by 0.1000 ")
    assert comparison.rows[1].thinking.line().endswith(", loss on training rows 0.2500 -> 0.3500")
    assert any("loss on training rows," in line for line in printed(comparison))
    assert not any("validation" in line for line in printed(comparison))
    mixed = compare({"one": stages, "two": [stages[0], thinking("key", 2, range(80), (1.0, 0.5))]})
    assert any(line.endswith(" loss,") for line in printed(mixed))


def test_results_without_thinkings_have_one_table() -> None:
    """What was written before thinkings were judged is shown as it was."""
    old = BASE.model_copy(update={"num_thinking_judged": None})
    assert "identical" not in "\n".join(printed(compare({"demo": [old]})))


def test_what_is_not_known_is_shown_so() -> None:
    """Another engine's generations may not say what stopped, and may hold no thinking."""
    examples = [Example("2?", "", "2", 0)]
    other = scored(
        {QuestionKey(0): Generation("2")},
        examples,
        RESPONSE,
        stage="key",
        position=1,
        changes={"alpha": 1},
    )
    line = printed(compare({"demo": [other]}))[3]
    assert line.split() == ["key", "1", "0.000", "0.000", "0.000", "1", "?", "-"]


def test_names_with_brackets_are_shown_as_they_are() -> None:
    """A run's name is no markup."""
    lines = printed(compare({"runs/[bold]a": [BASE], "runs/b[/]": [COMPLETION]}), width=120)
    assert lines[3].startswith("runs/[bold]a base")
    assert lines[5].startswith("runs/b[/] completion")


def test_runs_are_paired_by_their_last_stages() -> None:
    """Every further run is compared with the first one, on the same questions."""
    comparison = compare({"a": [BASE, KEY], "b": [BASE, COMPLETION], "c": [BASE]})
    pairs = [(difference.before, difference.after) for difference in comparison.between_runs]
    assert pairs == [("a key", "b completion"), ("a key", "c base")]
    assert sentences(comparison)[2] == (
        "The difference between a key and b completion is -2.0 points [-8.2, +3.6] on 100 "
        "questions: the interval includes 0, so these runs don't show that b completion answers "
        "better or worse."
    )
    assert comparison.warnings == ()


def test_the_more_runs_the_more_a_difference_must_be() -> None:
    """Nine gains and two losses: alone they are shown, beside four other runs they aren't."""
    first, better = result("key", 1, range(50)), result("key", 1, range(2, 59))
    others = {f"c{number}": [first] for number in range(4)}
    alone = compare({"a": [first], "b": [better]})
    assert "is clear of 0, so on questions like these b key answers better" in sentences(alone)[0]
    several = compare({"a": [first], "b": [better], **others})
    found = several.between_runs[0]
    assert found.p == alone.between_runs[0].p == pytest.approx(0.0348, abs=1e-4)
    assert found.p_holm == pytest.approx(5 * found.p)
    assert sentences(several)[0] == (
        "The difference between a key and b key is +7.0 points [+0.6, +14.6] on 100 questions: the "
        "interval is clear of 0, but among so many differences chance alone gives such a one "
        "(corrected p 0.174), so these runs don't show that b key answers better or worse."
    )


def test_other_questions_are_not_paired() -> None:
    """Runs on other questions stand in one table, without a difference, and it is said."""
    other = result("key", 1, range(30), num_questions=50)
    comparison = compare({"a": [BASE, KEY], "b": [BASE, other]})
    assert comparison.rows[3].difference is None
    assert comparison.between_runs == ()
    assert comparison.warnings == (
        "b key answered other questions than b base, so they can't be paired: compare their "
        "intervals alone.",
        "b key answered other questions than a key, so they can't be paired: compare their "
        "intervals alone.",
    )
    assert sentences(comparison)[-2:] == list(comparison.warnings)


def test_other_settings_are_told() -> None:
    """A longer generation or another temperature may be what makes the difference."""
    short = result("key", 2, range(62), max_new_tokens=64, temperature=0.0)
    long = result("key", 2, range(62), max_new_tokens=512, temperature=0.0)
    assert compare({"a": [short], "b": [long]}).warnings == (
        "The rows differ in max_new_tokens too: 64, 512.",
    )


@pytest.mark.parametrize(("alpha", "expected"), [(None, 0.734), (1.0, 0.62), (0.0, 1.0)])
def test_alpha_weighs_the_score(alpha: float | None, expected: float) -> None:
    """Score can be had for any alpha without evaluating again."""
    (row,) = compare({"demo": [KEY]}, alpha).rows
    assert row.score == pytest.approx(expected)


def test_json_holds_what_the_table_shows() -> None:
    """Plain data: figures, differences as shares, sentences; no flags of single questions."""
    comparison = compare({"demo": [BASE, COMPLETION]}, alpha=0.5)
    data = json.loads(json.dumps(as_json(comparison)))
    assert list(data) == ["stages", "between_runs", "warnings", "conclusions"]
    assert data["conclusions"] == sentences(comparison)
    first, second = data["stages"]
    assert first["difference"] is None
    assert second["difference"] == {
        "before": "base",
        "after": "completion",
        "num_questions": 100,
        "difference": pytest.approx(0.55),
        "interval": pytest.approx([0.4524, 0.6439], abs=1e-4),
        "p": pytest.approx(2 * norm.sf(sqrt(55))),
        "p_holm": pytest.approx(2 * norm.sf(sqrt(55))),
        "num_conversations": None,
    }
    assert (second["run"], second["stage"], second["acc"]) == ("demo", "completion", 0.6)
    assert (second["alpha"], second["score"]) == (0.5, pytest.approx(0.8))
    assert "questions" not in second


def test_run_folders_are_compared(tmp_path: Path) -> None:
    """What evaluation wrote is enough; neither model nor data is needed."""
    for run, last in [("a", KEY), ("b", COMPLETION)]:
        (tmp_path / run / "evaluation").mkdir(parents=True)
        for stage in (last, BASE):
            write_result(tmp_path / run / "evaluation", stage)
    comparison = compare_runs([tmp_path / "a", tmp_path / "b"], alpha=1.0)
    assert [row.name for row in comparison.rows] == [
        f"{tmp_path / run} {stage}"
        for run, stage in [("a", "base"), ("a", "key"), ("b", "base"), ("b", "completion")]
    ]
    expected = compare({str(tmp_path / "a"): [BASE, KEY], str(tmp_path / "b"): [BASE, COMPLETION]})
    assert sentences(comparison) == sentences(expected)


def formed(stage: str, position: int, broken: dict[int, str]) -> StageResult:
    """Make a stage that has all 40 questions right, some behind no valid thinking."""
    examples = [Example(f"{n}?", "", "2", n) for n in range(40)]
    texts = [broken.get(n, "<T>so</T><A>2</A>") for n in range(40)]
    return scored(
        {QuestionKey(n): Generation(text) for n, text in enumerate(texts)},
        examples,
        RESPONSE,
        stage=stage,
        position=position,
    )


def test_a_stage_that_loses_valid_thinkings_harmed_it() -> None:
    """Six lost and one gained are beyond chance; the table has all four rates and Rpass@1."""
    one, two = "<T> </T><A>2</A>", "<T>so<A>2</A>"
    before = formed("completion", 1, {0: one})
    broken = {**dict.fromkeys(range(1, 4), one), 4: two, 5: two, 6: "<A>2</A>", 7: "<A>2</A>"}
    after = formed("key", 2, broken)
    comparison = compare({"demo": [before, after]})
    fell = "valid thinkings went from 39 to 33 (7 lost, 1 gained, one-sided p 0.035)"
    assert comparison.warnings[0].startswith(f"key harmed the thinking: {fell}. In a key stage")
    assert fell in comparison.rows[1].thinking.line()
    assert after.rates is not None
    rates = {name: rate.rate for name, rate in after.rates.items()}
    forms = {"valid": 33 / 40, "empty": 3 / 40, "truncated": 2 / 40, "missing": 2 / 40}
    assert rates == {**forms, "right and valid": 33 / 40}
    assert after.rates["valid"].interval == wilson(33, 40)
    assert after.acc == 1.0
    shown = printed(comparison)
    start = next(place for place, line in enumerate(shown) if "Rpass@1" in line)
    assert shown[start : start + 7] == [
        "thinking         valid VR empty truncated missing        Rpass@1 lost, gained",
        "after               [95%]    ER        TR      MR          [95%]     valid, p",
        "─" * 77,
        "completion          0.975 0.025     0.000   0.000          0.975",
        "           [0.871, 0.996]                         [0.871, 0.996]",
        "key                 0.825 0.075     0.050   0.050          0.825         7, 1",
        "           [0.681, 0.913]                         [0.681, 0.913]      p 0.035",
    ]
    flags = [n != 0 for n in range(40)], [n not in range(1, 8) for n in range(40)]
    difference, low, high = paired_difference(*flags)
    passed = comparison.rows[1].thinking.passed
    assert passed == PassedChange(difference, (low, high), paired_p(*flags))
    assert (difference, passed.p < 0.1) == (-0.15, True)
    told = "Right behind a valid thinking (Rpass@1) is key against completion: -15.0 points ["
    assert [each for each in sentences(comparison) if each.startswith(told)]
    few = formed("key", 2, {0: one, 1: one, 2: one})
    assert compare({"demo": [before, few]}).warnings == ()


def test_results_without_forms_are_compared_without_them() -> None:
    """An older version's have none: no table, no claim."""
    content = formed("key", 1, {}).model_dump(mode="json")
    del content["rates"]
    for question in content["questions"]:
        del question["form"]
    old = StageResult.model_validate(content)
    comparison = compare({"demo": [old, formed("again", 2, {0: "2"})]})
    assert old.rates is None
    assert comparison.rows[1].thinking.valid is None
    assert comparison.rows[1].thinking.passed is None
    assert comparison.warnings == ()
    assert not any("Rpass@1" in line for line in printed(compare({"demo": [old]})))


def untrained(right: range, unread: range, grader: str = "number") -> StageResult:
    """Make a base that answers a hundred questions in prose."""
    examples = [Example(f"question {n}", "", str(n), n) for n in range(100)]
    texts = [
        "I cannot tell." if n in unread else f"The answer is {n if n in right else -1}."
        for n in range(100)
    ]
    return scored(
        {QuestionKey(n): Generation(text) for n, text in enumerate(texts)},
        examples,
        RESPONSE,
        stage="base",
        position=0,
        grader=grader,
    )


def test_a_base_that_never_saw_the_tags_is_read_without_them() -> None:
    """Its Acc stays what it is by the tags; the difference counts what it has right in prose."""
    base = untrained(range(40), range(98, 100))
    assert (base.acc, base.num_unparsed) == (0.0, 100)
    comparison = compare({"demo": [base, COMPLETION]})
    difference = comparison.rows[1].difference
    assert difference is not None
    assert difference.difference == pytest.approx(0.2)
    assert sentences(comparison)[2] == (
        "base wrote 100 of 100 answers without the tags: read without them, 40 are right and 2 "
        "can't be read; differences count these."
    )


@pytest.mark.parametrize("grader", ["number", "exact"])
def test_a_base_that_cant_be_read_gets_no_p(grader: str) -> None:
    """More than one in twenty can't be read: then more right answers may be those of the tags."""
    unread = range(90, 100) if grader == "number" else range(0)
    comparison = compare({"demo": [untrained(range(40), unread, grader), COMPLETION]})
    assert comparison.rows[1].difference is None
    assert comparison.warnings[0] == (
        "What completion has more right than base may be its tags alone, so there is no "
        "difference and no p."
    )
    assert "p" not in printed(comparison)[5].split()
    assert "are right and" in sentences(comparison)[0]
    assert "differences count" not in sentences(comparison)[0]


def test_a_trained_stage_is_read_in_its_tags_alone() -> None:
    """It has learned them: an answer without is wrong, and nothing else is written down."""
    stage = untrained(range(40), range(0))
    again = scored(
        {QuestionKey(n): Generation(f"The answer is {n}.") for n in range(100)},
        [Example(f"question {n}", "", str(n), n) for n in range(100)],
        RESPONSE,
        stage="key",
        position=1,
    )
    assert all(question.untagged is None for question in again.questions)
    assert "untagged" not in again.model_dump_json()
    assert [question.untagged for question in stage.questions][39:41] == ["right", "wrong"]
