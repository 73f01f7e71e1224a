"""The errors that a user can cause, in one form: where, what was expected and came, what to do."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands and what was expected and got there."""

    where: str
    what: str
    line: int | None = None

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.line and f"line {self.line}", self.where) if part)
        return f"{place}: {self.what}" if place else self.what


MOST_PROBLEMS = 20  # an error names so many rows, and counts the others


def shortened(problems: list[Problem]) -> list[Problem]:
    """Keep the first problems and count the others."""
    left = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], *([Problem("", f"and {left} more")] if left > 0 else [])]


class Told(BaseException):
    """What ends a command in the one form, whether it is an error or a signal's wish."""

    exit_code = 2  # what the command line ends with

    def __init__(self, where: str, what: str | Iterable[Problem], hint: str | None = None) -> None:
        self.where = where
        self.problems = (Problem("", what),) if isinstance(what, str) else tuple(what)
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """Return the text that the user reads: one line, or a head with a line for each problem."""
        if len(self.problems) == 1 and not self.problems[0].where:
            lines = [f"{self.where}: {self.problems[0]}"]
        else:
            noun = "problem" if len(self.problems) == 1 else "problems"
            lines = [f"{self.where}: {len(self.problems)} {noun}"]
            lines += [f"  {problem}" for problem in self.problems]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class SFTKeyError(Told, Exception):
    """Base of all errors that end a command with exit code 2 and no traceback.

    It says where, what was expected and came, and what to do.

    Args:
        where: The file, folder, model or data set that is at fault.
        what: What was expected and what came, in one line; or every problem found there.
        hint: What to do about it.

    >>> error = RecipeError("gsm8k.yaml", [Problem("lora.r", "expected a number; got many", 9)])
    >>> print(error)
    gsm8k.yaml: 1 problem
      line 9, lora.r: expected a number; got many
    >>> error.where, error.problems[0].line, error.hint
    ('gsm8k.yaml', 9, None)
    """


class RecipeError(SFTKeyError, ValueError):
    """A recipe, or an override of it, says something that can't be."""


class DataError(SFTKeyError, ValueError):
    """A data set can't be read, split or tokenized as the recipe wants it."""


class FrameError(SFTKeyError, ValueError):
    """A tokenizer with its chat template can't carry the response that the recipe wants."""


class ModelError(SFTKeyError, OSError):
    """A model, tokenizer or adapter can't be found, read or used."""


class DeviceError(SFTKeyError, RuntimeError):
    """This machine's device can't do what the recipe asks of it, or ran out of memory."""


class ProcessLost(DeviceError):
    """Another process of the run is gone, or answers no more."""


class CheckError(SFTKeyError, ValueError):
    """The gate refuses to train a recipe as it stands."""


class JudgeError(SFTKeyError, RuntimeError):
    """The second grader's endpoint can't be asked, or answers with an error."""


class RunError(SFTKeyError, RuntimeError):
    """A run folder can't be used as the command asks."""


# What mends losses, gradients or weights that aren't finite.
SMALLER_STEPS = (
    "lower trainer.learning_rate, or train in bfloat16 or float32 (model.dtype); the checkpoints "
    "before it are kept"
)


class DivergedError(RunError):
    """A loss became infinite or no number, which ends the training."""


class RunLocked(RunError):
    """Another process works on the run folder."""


class RunStopped(Told):
    """A signal has stopped a run, which has kept what it had reached.

    It is no `Exception`, as KeyboardInterrupt is none: it is raised wherever the signal comes, and
    a library that goes on after any error of its own would go on after this. `number` is the
    signal's.
    """

    def __init__(self, where: str, what: str, hint: str, number: int) -> None:
        super().__init__(where, what, hint)
        self.exit_code = 128 + number  # as a shell reports a process that the signal has ended


class DiskError(SFTKeyError, RuntimeError):
    """A disk is full, or can't hold what is going to be written."""


def as_told(error: Told | OSError) -> Told:
    """Return an error in the one form: the system's own as one that names the file.

    Raises:
        OSError: A library's, which has no number of the system's.
    """
    if isinstance(error, Told):
        return error
    if error.errno is None:
        raise error
    where = str(error.filename or "the system")
    what = f"can't be read or written: {error.strerror}"
    return RunError(where, what, "mend that, and run the same command again")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none.

    Where it ends with a colon, the reason stands in the next line.
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def shown(value: Any) -> str:
    """Write a value into an error, in YAML's words and not at length."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return `; did you mean …?` for the nearest known word, if it is near."""
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean `{near[0]}`?" if near else ""
