"""Whether two formulas are equal, by the package math-verify."""

from __future__ import annotations

import math
import re
import threading
from fractions import Fraction
from typing import Any

from sftkey.errors import RecipeError
from sftkey.evaluation.numbers import stated_numbers
from sftkey.evaluation.statement import normalize, stated

MAX_CHARACTERS = 500  # of an answer: math-verify's patterns take more than linear time
MAX_DIGITS = 100  # in a row
MAX_DEPTH = 20  # of braces in braces
TIMEOUT_SECONDS = 5

# What sympy would evaluate for minutes: towers of powers, and what has thousands of digits.
_ENDLESS = re.compile(
    rf"\d\s*\^\s*\{{?\s*\d+\s*\^|\d{{5,}}\s*[)}}]?\s*!|!\s*[)}}]?\s*!|\d{{{MAX_DIGITS},}}"
    r"|binom\s*\{?\s*\d{4,}"
)
MAX_POWER = 10**5  # of all exponents of a formula together
_WORDS = re.compile(r"(?<![\\\w{])[A-Za-z]{3,}(?!\w)")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "pi", "theta"}
_FUNCTIONS |= {"infty", "inf", "max", "min", "gcd", "lcm", "mod", "and"}


def same_formula(answer: str, reference: str) -> tuple[bool, str | None]:
    """Compare as expressions, of which math-verify tells equal forms; and say what was read.

    Raises:
        RecipeError: math-verify isn't installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RecipeError(
            "eval.grader",
            "`math` needs the package math-verify, which isn't installed",
            'python -m pip install "sftkey[math]"',
        ) from None
    if answer.strip() == reference.strip() != "":
        return True, answer.strip()
    written, wanted = _formula(answer), _formula(reference)
    if written is None or wanted is None:
        return False, written
    # The timeout is a signal, which Python allows in the main thread alone.
    seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        gold, found = (parse(text, parsing_timeout=seconds) for text in (wanted, written))
        right = verify(gold, found, allow_set_relation_comp=True, timeout_seconds=seconds)
        return right and not _differ_in_size(gold, found), written if found else None
    except Exception:  # sympy and its parser raise anything on texts that are no formulas
        return False, None


def _formula(text: str) -> str | None:
    """Write an answer as math-verify reads it; None where evaluating it could take for ever."""
    part = re.split(r"[,.]?\s(?:since|because)\b", stated(text))[0].strip(" \n*`")
    depth = deepest = 0
    for brace in re.findall(r"[{(\[]|[})\]]", part):
        depth += 1 if brace in "{([" else -1
        deepest = max(deepest, depth)
    if not part or len(part) > MAX_CHARACTERS or deepest > MAX_DEPTH or _ENDLESS.search(part):
        return None
    if math.prod(map(int, re.findall(r"\^\s*[{(]?\s*-?0*([1-9]\d*)", part))) > MAX_POWER:
        return None
    part = part.replace("\\$", "")
    if part.count("$") == 2 and part.startswith("$") and part.endswith("$"):
        part = part.strip("$ ")
    if re.search(r"\$|\\\(|\\\[", part):
        return _latex(part)
    if set(map(str.lower, _WORDS.findall(part))) - _FUNCTIONS:
        said = stated_numbers(part)
        if said:
            return "$" + ", ".join(str(number.value) for number in said.numbers) + "$"
    return f"${_latex(part.rstrip('.'))}$"


def _latex(text: str) -> str:
    """Write in LaTeX what is often written without: `2*pi`, `sqrt(2)`, `3 1/2`, `x²`."""
    text = re.sub(r"√\s?(\d+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{{{normalize(found[0])[1:]}}}", text)
    text = re.sub(r"(?<=\d) (?:[cdkm]?m|ft|in)\^\{?[23]\}?$", "", text)  # 10 cm^2
    text = re.sub(r"\\mathbb ([A-Z])", r"\\mathbb{\1}", text)
    text = re.sub(r"\\?\bsqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\?\bexp\s?\(([^()]*)\)", r"e^{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|theta|infty)\b", r"\\\1", text)
    text = re.sub(r"(?<!\*)\*(?!\*)", r" \\cdot ", text)
    text = re.sub(r"\+\s?-", "-", text)
    text = re.sub(r"(?<![\w.^])1(?:\.0+)?(?=[A-Za-z]\b)", "", text)  # 1.0i
    text = re.sub(r"\b(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(\d+)\.(\d*)\\overline\s?\{(\d+)\}", _periodic, text)


def _periodic(match: re.Match[str]) -> str:
    whole, first, period = match.groups()
    value = Fraction(f"{whole}.{first or 0}")
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(first))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _differ_in_size(gold: list[Any], found: list[Any]) -> bool:
    """Tell 10^-30 from 10^-31, whose difference math-verify rounds to nothing."""
    if not all(getattr(side[0], "is_number", False) for side in (gold, found) if side):
        return False
    first, second = gold[0].doit().evalf(), found[0].doit().evalf()
    if not (first.is_Float and second.is_Float):
        return False
    largest = max(abs(first), abs(second))
    return bool(largest < 1e-6 and abs(first - second) > 1e-6 * largest)
