"""The table of faults: it names every kind that a test tries, and counts what was held."""

import re
from types import SimpleNamespace
from typing import Any

from tests.faults.report import PAGE, ROOT, Tally, table_rows, written

EMPTY = "before\n<!-- faults -->\n<!-- end -->\nafter\n"


def marked() -> set[str]:
    """Return the kinds that stand in the tests."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    return {kind for text in texts for kind in re.findall(r'mark\.fault\(\s*"([^"]+)"', text)}


def test_the_page_names_every_kind_and_no_other() -> None:
    """All of its tries were held."""
    rows = table_rows(PAGE.read_text(encoding="utf-8"))
    assert rows.keys() == marked()
    for kind, row in rows.items():
        _, tries, held, _ = row.strip("| ").split(" | ")
        assert tries == held, kind


def ran(tally: Tally, name: str, passed: bool = True, **properties: Any) -> None:
    """Let a plugin count a test."""
    tally.kind_of[name] = name.partition("[")[0]
    report: Any = SimpleNamespace(nodeid=name, when="call", passed=passed)
    report.user_properties = list(properties.items())
    tally.pytest_runtest_logreport(report)


def test_tries_are_counted_by_kind_and_others_lines_stay() -> None:
    """A test that says how often it has tried counts as often; one that fails has held nothing."""
    first = Tally([])
    ran(first, "b[1]")
    ran(first, "b[2]", passed=False)
    ran(first, "a", tries=4000)
    page = written(EMPTY, first, "c1")
    assert list(table_rows(page).values()) == ["| a | 4,000 | 4,000 | c1 |", "| b | 2 | 1 | c1 |"]
    again = Tally(["b"])
    ran(again, "b[1]")
    rows = table_rows(written(page, again, "c2"))
    assert list(rows.values()) == ["| a | 4,000 | 4,000 | c1 |", "| b | 1 | 1 | c2 |"]
    assert page.startswith("before\n")
    assert page.endswith("<!-- end -->\nafter\n")
