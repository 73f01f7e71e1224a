"""Runs the tests of faults and writes how many of them were held into docs/reliability.md.

    python tests/faults/report.py [--quick] [KIND …]

A test that carries `@pytest.mark.fault(kind)` tries a fault once for each of its parameters, or as
often as it says with `record_property("tries", …)`. With kinds, only these are run, and only their
lines of the table are written anew; `--quick` leaves out the tests that take minutes. A test that
doesn't pass has held none of its tries.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
TABLE = re.compile(r"(?<=<!-- faults -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "| fault | tries | held | commit |\n| --- | ---: | ---: | --- |\n"


class Tally:
    """A plugin of pytest that runs the tests of some kinds, all markers among them, and counts.

    Args:
        kinds: Which; none for all.
    """

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.kind_of: dict[str, str] = {}
        self.tries: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave the tests of these kinds."""
        for item in items:
            mark = item.get_closest_marker("fault")
            if mark and (not self.kinds or mark.args[0] in self.kinds):
                self.kind_of[item.nodeid] = mark.args[0]
        items[:] = [item for item in items if item.nodeid in self.kind_of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test when it has run, or when it could not begin."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            kind = self.kind_of[report.nodeid]
            tries = int(dict(report.user_properties).get("tries", 1))
            self.tries[kind] += tries
            self.held[kind] += tries * report.passed


def table_rows(text: str) -> dict[str, str]:
    """Read the lines of the page's table, by kind."""
    found = TABLE.search(text)
    lines = [line for line in found[0].splitlines() if line.startswith("| ")] if found else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


def written(text: str, tally: Tally, commit: str) -> str:
    """Return the page with the lines of what was run written anew."""
    rows = table_rows(text) if tally.kinds else {}
    for kind, tries in tally.tries.items():
        rows[kind] = f"| {kind} | {tries:,} | {tally.held[kind]:,} | {commit} |"
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    said = f"Last run on {platform.system()}, Python {platform.python_version()}, {machine}.\n"
    body = HEAD + "".join(f"{rows[kind]}\n" for kind in sorted(rows))
    return TABLE.sub(lambda _: f"\n{said}\n{body}\n", text)


def main() -> int:
    """Run the tests, write the table, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    tally = Tally(asked.kinds)
    os.chdir(ROOT)
    which = "fault and not slow and not kill and not fuzz" if asked.quick else "fault"
    status = pytest.main(
        ["-m", which, "-n", "0", "-q", "-p", "no:cacheprovider", "tests"], plugins=[tally]
    )
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    PAGE.write_text(written(PAGE.read_text(), tally, commit))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
