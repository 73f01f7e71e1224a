"""A study's `report.html` has all of `report.md`, its pictures, and each question's verdicts."""

import re
import shutil
from base64 import b64decode
from collections import Counter
from pathlib import Path

import pytest

from sftkey.commands.study import study
from sftkey.evaluation.answers import GradedAnswer, write_answers
from sftkey.study.page import write_page
from sftkey.study.report import report
from sftkey.study.results import read_cells
from sftkey.study.summary import summarize
from tests.support.cells import cell, write_cells
from tests.support.pages import Page

ROOT = Path(__file__).parents[2]
CREAK = ROOT / "recipes" / "smollm2-135m"
SCRIPT = "<script>alert('no')</script>"


def written(folder: Path, cells: list[dict[str, object]], title: str = "made") -> Page:
    """Return the page of some cells, without pictures."""
    write_cells(folder, cells)
    found = read_cells(folder)
    page = write_page(folder, summarize(found, "sft_tag"), found, [], title)
    return Page(page.read_text())


def table_rows(page: Page) -> list[list[str]]:
    """Return the cells of each row of the page."""
    text = re.sub(r"<(script|style)>.*?</\1>", "", page.text, flags=re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub("<[^>]*>", "", each).strip() for each in row] for row in cells]


def test_the_command_writes_all_of_the_report_into_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a published study: each table row, sentence and picture of `report.md`, all questions."""
    shutil.copytree(CREAK / "results" / "creak" / "cells", tmp_path / "cells")
    study(CREAK / "study-creak.yaml", report_folder=tmp_path)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    page = Page((tmp_path / "report.html").read_text())
    page.check_whole()
    rows = table_rows(page)
    words = " ".join(" ".join(data for _, data in page.texts).split())
    for line in captured.out.splitlines():
        if line.startswith("| ") and "---" not in line:
            row = [each.strip() for each in line[1:-1].split("|")]
            assert [each.replace("<", "&lt;") for each in row] in rows
        elif line.startswith(("- ", "#")):
            assert line.lstrip("-# ") in words
    embedded = [b64decode((found["src"] or "").partition(",")[2]) for found in page.all("img")]
    assert embedded == [
        (tmp_path / f"{name}.png").read_bytes() for name in ("accuracy", "cost", "gain", "shares")
    ]
    asked = page.all("tr", class_="asked")
    assert len(asked) == 3000
    assert len({tuple(row) for row in rows if row[0].startswith("seed 6, row ")}) == 500
    differs = ["differs" in (each["data-is"] or "").split() for each in asked]
    assert differs == sorted(differs, reverse=True)
    assert 0 < sum(differs) < 3000


def test_a_question_is_found_by_the_arm_that_is_better(tmp_path: Path) -> None:
    """Seeds that answered the same questions stand in one row, with how many were right."""
    page = written(
        tmp_path,
        [
            cell([True, True, False], "sft_tag", 1),
            cell([True, False, False], "sft_tag", 2),
            cell([False, True, False], "sftkey", 1),
            cell([True, True, False], "sftkey", 2),
        ],
    )
    rows = table_rows(page)[-4:]
    assert rows == [
        ["question", "base", "sft_tag", "sftkey"],
        ["row 0", "right", "2 of 2", "1 of 2"],
        ["row 1", "wrong", "1 of 2", "2 of 2"],
        ["row 2", "wrong", "0 of 2", "0 of 2"],
    ]
    assert [each["data-is"] for each in page.all("tr", class_="asked")] == [
        *("differs worse-sftkey", "differs better-sftkey", "")
    ]
    options = [each["value"] for each in page.all("option")]
    assert options == ["", "differs", "better-sftkey", "worse-sftkey"]
    assert "weren't there when this page was written" in page.text


def test_texts_come_from_runs_that_still_lie_there(tmp_path: Path) -> None:
    """They are escaped; an answer in which nothing was read is unparsed, not wrong."""
    made = cell([True, False], "sft_tag", 7)
    made["questions"][1]["parsed"] = False
    folder = tmp_path / "orders" / "sft_tag-seed7" / "evaluation"
    folder.mkdir(parents=True)
    answer = GradedAnswer(
        index=1, turn=0, question=SCRIPT, expected="7", got="7", read="7", thinking="", text=None,
        right=False, kinds=("unparsed",),
    )  # fmt: skip
    write_answers(folder, "completion", [answer])
    page = written(tmp_path, [made])
    page.check_whole()
    assert ("th", f" {SCRIPT}") in page.texts
    unparsed = next(row for row in table_rows(page) if row[0].startswith("row 1"))
    assert unparsed[-1] == "unparsed"
    assert "weren't there" not in page.text


def test_other_questions_of_other_seeds_and_cut_ones_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one number aren't one question then; what is cut are those on which arms agree."""
    monkeypatch.setattr("sftkey.study.page.MOST_QUESTIONS", 2)
    flags = {"sft_tag": [True, True], "sftkey": [True, False]}
    cells = [
        cell(right, arm, seed, questions_sha256=f"of {seed}")
        for seed in (1, 2)
        for arm, right in flags.items()
    ]
    page = written(tmp_path, cells)
    rows = [row for row in table_rows(page) if row[0].startswith("seed")]
    assert [row[0] for row in rows] == ["seed 1, row 1", "seed 2, row 1"]
    assert "2 of 4 are on this page" in page.text


def test_each_task_has_its_arms(tmp_path: Path) -> None:
    """A study of two tasks has a section and a table of questions for each."""
    cells = [cell([True] * 3, "sft_tag", 1, task=task) for task in ("orders", "sums")]
    page = written(tmp_path, [*cells, cell([True] * 3, "sftkey", 1, task="sums")])
    words = Counter(row[-1] for row in table_rows(page) if row[0] == "question")
    assert words == {"sft_tag": 1, "sftkey": 1}
    assert report(summarize(read_cells(tmp_path), "sft_tag")).count("## orders") == 1
    assert [each["aria-labelledby"] for each in page.all("section")] == [
        *("task-1", "task-2", "answers", "measured")
    ]
