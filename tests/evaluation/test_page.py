"""`report.html` is well-formed, whole in itself, and shows texts as they are."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftkey.commands.results import report
from sftkey.data.response import Example, Response
from sftkey.evaluation.answers import graded_answers, write_answers
from sftkey.evaluation.page import StageLosses, charts, render_page, write_page
from sftkey.evaluation.results import write_result
from sftkey.generation.generate import Generation
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.training.run import read_rows
from tests.support.pages import Page
from tests.support.scoring import graded, scored

SCRIPT = "<script>alert('no')</script>"
RESPONSE_TAGS = {"response": {"thinking": ["<t>", "</t>"], "answer": ["<a>", "</a>"]}}
LOSSES = [
    StageLosses(
        "completion",
        {"thinking": [(1, 2.0), (4, 0.02)], "answer": [(1, 1.0)]},
        {"thinking": [(0, 2.0), (4, 0.1)]},
    )
]

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What a reader does: press /, type, and look at what is left.
READER = """<script>
document.dispatchEvent(new KeyboardEvent("keydown", {key: "/"}));
const box = document.activeElement;
box.value = "question 1";
box.dispatchEvent(new Event("input"));
const seen = [...document.querySelectorAll(".asked")].filter((each) => each.offsetHeight);
document.title = [
  box.id, count.textContent, seen.length, performance.getEntriesByType("resource").length,
  document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).color
].join("; ");
</script>"""


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path]) -> Recipe:
    """Load a recipe over forty rows, which is also that of a run in its folder."""
    file = tiny_recipe(**RESPONSE_TAGS)
    file.rename(file.with_name("recipe.yaml"))
    return load_recipe(file.with_name("recipe.yaml"))


def grade(folder: Path, recipe: Recipe, position: int, texts: list[str]) -> None:
    """Write what grading would of a stage's answers to questions whose reference is 7."""
    name = ["base", "completion", "key"][position]
    examples = [Example(f"Question {n} {SCRIPT}?", "", "7", n) for n in range(len(texts))]
    written: Any = {
        example.key: Generation(text, 5, True)
        for example, text in zip(examples, texts, strict=True)
    }
    response = Response.from_section(recipe.response)
    result = scored(written, examples, response, name, position)
    (folder / "evaluation").mkdir(exist_ok=True)
    write_result(folder / "evaluation", result)
    answers = graded_answers(graded(written, examples, response))
    write_answers(folder / "evaluation", name, answers)


def test_a_page_holds_tokens_losses_results_and_answers(recipe: Recipe, tmp_path: Path) -> None:
    """One well-formed file without network; texts are escaped, tokens marked as `show` has them."""
    grade(tmp_path, recipe, 1, [f"<t>so</t><a>{SCRIPT} 8</a>", "<t>so</t><a>7</a>", "7"])
    grade(tmp_path, recipe, 2, ["<t>so</t><a>7</a>", "<t>so</t><a>7</a>", "<t>no"])
    text = render_page(tmp_path, recipe, read_rows(recipe), LOSSES)
    page = Page(text)
    page.check_whole()
    assert SCRIPT + " 8" in {data for tag, data in page.texts if tag == "div"}
    assert "0.333 [0.061, 0.792]" in [data for tag, data in page.texts if tag == "td"]
    marked = [found["title"] or "" for found in page.all("span", class_="on")]
    assert any(title.startswith("thinking, id ") for title in marked)
    assert all(title.endswith("weight 1.0") for title in marked)
    assert [each["data-is"] for each in page.all("article")] == ["differs", "", "wrong"]
    assert len(page.all("polyline")) == 3
    assert [each["aria-labelledby"] for each in page.all("section")] == [
        *("results", "map", "losses", "answers", "recipe")
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("scheme", "colour"), [(0, "rgb(230, 234, 238)"), (1, "rgb(27, 31, 36)")], ids=["dark", "light"]
)
def test_a_browser_shows_and_searches_a_page(
    scheme: int, colour: str, recipe: Recipe, tmp_path: Path
) -> None:
    """Without network, by keys alone, within a narrow window, in light and dark."""
    grade(tmp_path, recipe, 1, ["<t>so</t><a>8</a>", "<t>so</t><a>7</a>", "7"])
    text = render_page(tmp_path, recipe, read_rows(recipe), LOSSES)
    file = tmp_path / "read.html"
    file.write_text(text.replace("</body>", f"{READER}</body>"))
    settings = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,600"]
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/c"]
    command = [str(CHROMIUM), *quiet, *settings, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (title,) = re.findall("<title>(.*)</title>", done.stdout)
    assert title == f"search; 1 of 3 questions; 1; 0; true; {colour}"


def test_a_run_without_results_rows_or_losses_has_a_page(recipe: Recipe, tmp_path: Path) -> None:
    """Each part says what is missing, in place of what it would show."""
    page = Page(render_page(tmp_path, recipe, f"rows.jsonl: gone {SCRIPT}", []))
    words = " ".join(" ".join(data for _, data in page.texts).split())
    for part in (
        "Nothing is graded yet",
        f"couldn't be read when this page was written: rows.jsonl: gone {SCRIPT}",
        "No stage has logged a loss yet.",
        "No answers are kept with their questions",
    ):
        assert part in words


def test_many_questions_are_cut_and_old_results_have_no_answers(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says how many are left out, and where they are found."""
    monkeypatch.setattr("sftkey.evaluation.page.MOST_QUESTIONS", 2)
    grade(tmp_path, recipe, 0, ["7"] * 3)
    text = render_page(tmp_path, recipe, "", [])
    assert len(Page(text).all("article", class_="asked")) == 2
    assert "The first 2 of 3 are on this page" in text
    (tmp_path / "evaluation" / "base.graded.jsonl").unlink()
    assert "No answers are kept" in render_page(tmp_path, recipe, "", [])


def test_the_command_writes_the_page_where_rows_are_gone(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder that was copied to another machine has its report nevertheless."""
    (tmp_path / "rows.jsonl").unlink()
    report(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "couldn't be read" in (tmp_path / "report.html").read_text()
    assert write_page(tmp_path, recipe, "") == [tmp_path / "report.html"]


def test_losses_lie_where_their_scale_has_them() -> None:
    """Ten times less is as far on a logarithmic scale; near losses have a linear one."""
    (wide,) = charts(LOSSES)
    ys = dict(wide.y_ticks)
    assert [text for _, text in wide.y_ticks] == ["0.1", "1"]
    by_text = {text: y for y, text in ys.items()}
    (first, last) = wide.lines[0][2]
    assert last[1] - first[1] == pytest.approx(2 * (by_text["0.1"] - by_text["1"]), abs=0.3)
    assert [text for _, text in wide.x_ticks] == ["0", "2", "4"]
    (near,) = charts([StageLosses("key", {"answer": [(1, 5.6), (2, 5.8)]}, {})])
    assert [text for _, text in near.y_ticks] == ["5.6", "5.65", "5.7", "5.75", "5.8"]
    (flat,) = charts([StageLosses("key", {"answer": [(1, 2.0)]}, {})])
    assert "2" in [text for _, text in flat.y_ticks]
