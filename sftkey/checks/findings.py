"""What the gate says: one finding for each thing that is wrong, or worth knowing, in a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sftkey.data.refused import NUM_SHOWN, numbered
from sftkey.errors import SFTKeyError

if TYPE_CHECKING:
    from sftkey.data.prepare import Prepared


@dataclass(frozen=True)
class Finding:
    """One thing that the gate found."""

    code: str  # names the kind of finding, for programs
    # Numbers of the first rows concerned, from 0; of the split that the message names.
    rows: tuple[int, ...]
    message: str  # what was found where
    hint: str | None  # what to do about it
    refuses: bool = True  # whether the recipe can't be trained as it stands

    def __str__(self) -> str:
        """Return the finding for people: the hint stands in a line of its own."""
        return self.message if self.hint is None else f"{self.message}\n    hint: {self.hint}"


@dataclass(frozen=True)
class Report:
    """All that the gate found."""

    findings: tuple[Finding, ...]  # in the order of the recipe's sections
    statistics: dict[str, Any] = field(default_factory=dict)  # JSON; empty where there are no rows
    # The rows, so that training needn't read them again; they are what the recipe asks for if
    # nothing refuses, and None where they can't be made.
    prepared: Prepared | None = None

    @property
    def refusals(self) -> list[Finding]:
        """The findings that keep the recipe from being trained."""
        return [finding for finding in self.findings if finding.refuses]

    def as_json(self) -> dict[str, Any]:
        """Return findings and statistics for `--json`."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "statistics": self.statistics,
        }


def of_error(error: SFTKeyError) -> Iterator[Finding]:
    """Make a finding of each problem of an error: `DataError` has the code `data`."""
    code = type(error).__name__.removesuffix("Error").lower()
    for problem in error.problems:
        yield Finding(code, (), f"{error.where}: {problem}", error.hint)


def of_rows(
    code: str, what: str, rows: Sequence[int], hint: str, *, refuses: bool = True
) -> Finding:
    """Make a finding on rows; the message counts them all and names the first."""
    return Finding(code, tuple(rows[:NUM_SHOWN]), f"{what}: {numbered(rows)}", hint, refuses)
