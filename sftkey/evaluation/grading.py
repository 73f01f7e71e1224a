"""Whether an answer is right: numbers, choices, mathematics, or the same text."""

# ruff: noqa: RUF001  (quotes and dashes as models write them)
import math
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from sftkey.data.response import Response
from sftkey.errors import RecipeError
from sftkey.evaluation.numbers import Stated, same_numbers, stated_numbers
from sftkey.evaluation.statement import cleaned, concluded, normalize, spaced, stated, unwrapped

Untagged = Literal["right", "wrong", "unread"]


@dataclass(frozen=True)
class Grade:
    """A verdict, and what it stands on; true where the answer is right."""

    right: bool  # the answer says what the reference says
    # What the grader read in the answer; None where it read nothing, or found two things and
    # nothing that says which of them is meant. Such an answer is wrong.
    read: str | None

    def __bool__(self) -> bool:
        return self.right


def grade(answer: str | None, reference: str, grader: str) -> Grade:
    """Tell whether an answer is right; None, the answer of a text without one, is wrong.

    Args:
        answer: The answer's text, as `Response.parse` found it.
        reference: The data set's answer.
        grader: `number`, `choice`, `exact` or `math`.

    Raises:
        RecipeError: `math` without the package that does it.

    >>> grade("The answer is 1,200, since 3 * 400 = 1,200.", "1200", "number")
    Grade(right=True, read='1,200')
    >>> grade("3 or 4", "3", "number").right
    False
    """
    graders: dict[str, Callable[[str, str], tuple[bool, str | None]]] = {
        "number": _same_number,
        "choice": same_choice,
        "exact": _same_text,
        "math": same_formula,
    }
    if grader not in graders:
        raise ValueError(f"grader: expected number, choice, exact or math; got {grader!r}")
    if answer is None:
        return Grade(False, None)
    return Grade(*graders[grader](cleaned(answer), cleaned(reference)))


def read_untagged(text: str, reference: str, response: Response, grader: str) -> Untagged:
    """Grade a text that holds no answer's tag: all of it, or what stands behind the thinking.

    `exact` reads no more than a whole text that is the answer, so prose isn't read.

    >>> response = Response("<T>", "</T>", "<A>", "</A>")
    >>> read_untagged("3 and 4. The answer is 7.", "7", response, "number")
    'right'
    >>> read_untagged("I cannot tell.", "3", response, "number")
    'unread'
    """
    close = response.thinking_close.strip()
    found = grade(text.rpartition(close)[2] if close else text, reference, grader)
    if found.right:
        return "right"
    return "unread" if found.read is None or grader == "exact" else "wrong"


def unreadable(references: Mapping[int, str], grader: str) -> list[int]:
    """List the rows whose reference a grader can't read: every answer to them would be wrong."""
    return [row for row, text in references.items() if not grade(text, text, grader)]


def read_number(text: str) -> Stated | None:
    """Read the number, or the numbers, that an answer states; None where that isn't clear."""
    part = stated(cleaned(text))
    if part != text:  # behind "the answer is", the rest of its line
        part = next((line for line in part.splitlines() if re.search(r"\w", line)), "")
    conclusion = concluded(part)
    return (conclusion and stated_numbers(conclusion)) or stated_numbers(part)


def _same_number(answer: str, reference: str) -> tuple[bool, str | None]:
    written = read_number(answer)
    wanted = written if answer == reference else read_number(reference)
    right = written is not None and wanted is not None and same_numbers(written, wanted)
    return right, written and written.text


def _same_text(answer: str, reference: str) -> tuple[bool, str | None]:
    wanted = [normalize(reference), normalize(unwrapped(reference))]
    forms = [normalize(answer), normalize(unwrapped(answer))]
    same = next((form for form in forms if form in wanted), "")
    return same != "", (same or forms[1]) or None


_FORMATS = re.compile(
    r"\\(?:text\w*|math\w*|boxed|fbox|left|right)|\\[()\[\] ,;!]|[*_`$\"“”«»{}\\]"
    r"|(?<![^\W_])'|'(?![^\W_])"
)
# "A because …" names A; "A dog" and "I think" name nothing.
_FOLLOWS = (
    r"(?= (?:is|because|since|as|and|or|but|not|seems|looks|for|due|given|if|fails|rather"
    r"|instead|only)\b)"
)
_ALONE = r"(?![\w'’+#]|-(?:\w|$)|\.[A-Z]\b)"  # no D-Day, B- or B.C.
_LETTER = re.compile(
    rf"[(\[<] ?([A-Za-z]) ?[)\]>]|\b(?:[Oo]ption|[Cc]hoice) ([A-Za-z])\b"
    rf"|(?<![\w'’°-])(?:([B-HJ-Z]){_ALONE}|([AI]){_ALONE}(?:(?! [a-z])|{_FOLLOWS})"
    r"|(A)(?= (?:would|must|has|will|can|cannot)\b))"
    r"|\A([a-z])(?=[).:\],;]|\Z|\n| (?:[-–—]|is|because) )"
)
_DIGITS = re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice) |(?<![\w.,−-]))(\d{1,2})(?!\w|[.,]\d)")
_LEAD = re.compile(r"\W{0,4}(?:(?:so|it is|it's|i choose|i pick)\b)?\W{0,3}", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b(?:not|never|than|over|after|before|instead of|except|cannot be|can't be|neither|nor"
    r"|eliminate|rule out|while|although|though|even if"
    # a name's letter is none of the options'
    r"|vitamin|hepatitis|influenza|protein|factor|type|group|class|grade|plan|stage"
    r"|(?:every|any)thing but|(?:all|any) but)"
    r"|n['’]t)(?: be| option| choice)? ?$",
    re.IGNORECASE,
)
_WRONG = re.compile(
    # a letter that is asked for, too, isn't stated
    r"[)\].:]* ?(?:\?|too\b|\(?(?:in|not )correct\b|\(?wrong\b"
    r"|(?:is|are|was|seems|looks|must be|has to be) (?:(?:all|both) )?(?:not|wrong|incorrect"
    r"|false|tempting|too|ruled|out|eliminated|impossible)\b|isn\b|cannot\b|can['’]t\b"
    r"|fails\b|doesn\b|would be wrong)",
    re.IGNORECASE,
)
_AND = re.compile(r" ?(?:[,&;+、]|as well as|,? ?\band)? ?", re.IGNORECASE)
_OR = re.compile(r" ?(?:(?:and ?)?[/|<>=](?: ?or\b)?|[,.;]? ?\(?\bn?or) ?", re.IGNORECASE)
_CONTRARY = re.compile(
    r"\b(?:but|however|although|though|no|maybe|perhaps|possibly|actually|alternatively"
    r"|otherwise)\b|→|\bor ?$",
    re.IGNORECASE,
)
_STATEMENT = re.compile(
    r"(?:it|this|that|(?:the|this|that) [^.,;:]{1,60}?)(?: ?'s| s| is| was| must be| would be) "
    r"|(?:\b[a-z]+ )?(?:sentiment|classification|category|relation|prediction|stance|emotion"
    r"|statement|claim) ?: ?"
)
_PREFACE = re.compile(  # ✅ yes
    r"^(?:[^\w\s(\[$#.+-]+|i (?:think|believe|would say)(?: that)?|i'd say|well,|overall,) (?=\w)"
)
_STOP = re.compile(
    r" ?(?:[,;:(—](?! ?(?:and|or|but)\b)|\. | ?- "
    r"|(?: (?:because|since|as|it|that(?= is)|this|they|there|s?he|we|you)\b))"
)
_LABELLED = re.compile(
    r"(?:[Oo]ption |[Cc]hoice )?[(\[<]?(?P<label>[A-Za-h]|\d{1,2})"
    r"(?:[)\]>][.:]?|[.:]|(?<!\d) [-–—])(?= |$)(?P<text>.*)",
    re.DOTALL,
)
_SINGLE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?[(\[<]?([A-Za-z])[)\]>]?[.:]?")
_BESIDE = " ()[].:*"
_BARE = re.compile(r"[ (\[*]{0,3}[A-Ha-h][ )\].:*]{0,4}")  # a line that is nothing but a letter
_LABELS = re.compile(  # A and C; ['A', 'C']
    r"[(\[]? ?[A-Za-h] ?[)\]]?(?:(?: ?[,&;|] ?(?:and )?| and )[(\[]?[A-Za-h] ?[)\]]?)*(?: only)?"
)
_VERDICT = re.compile(r"\b(?:(?:in)?correct|wrong|not|too)\b|n['’]t\b")
_LISTED = re.compile(r"(?:- ?)?[(\[]?([A-H])(?:[)\].:]|$)")


def same_choice(answer: str, reference: str) -> tuple[bool, str | None]:
    """Compare the labels where both sides name one, else the texts; and say what was read.

    `(B)`, `B.`, `b) text`, `Option B` and `The answer is (B), not (A)` name the letter B; a text
    counts if it is the reference's, or opens with it and a stop (`True, because …`).
    """
    wanted, wanted_text = _reference(_plain(unwrapped(reference)))
    answer = _plain(stated(answer), keep_lines=True)
    answer = answer.upper() if _LABELS.fullmatch(answer.strip(" .")) else answer
    bare = {line.strip(_BESIDE).upper() for line in answer.split("\n") if _BARE.fullmatch(line)}
    words = {normalize(line) for line in answer.split("\n")} if " " not in answer else set()
    listed = _together(answer) or frozenset()
    echoed = {"A", "B"} <= listed and not _VERDICT.search(answer)
    if len(wanted) < 2 and (max(len(bare), len(words)) > 1 or echoed):
        return False, None  # a letter on each of several lines, or a word, or the options anew
    if wanted:
        label = _DIGITS if min(wanted).isdigit() else _LETTER
        found = listed if len(wanted) > 1 else None
        found = found or _labels(answer, label) or _labels(concluded(answer) or "", label)
        if found:
            return found == wanted, ", ".join(sorted(found))
    labelled = _LABELLED.fullmatch(answer)
    texts = [answer, concluded(answer) or "", labelled["text"] if labelled else ""]
    right = any(_says(text, wanted_text) for text in texts)
    return right, (normalize(answer) or None) if right or not wanted else None


def _plain(text: str, keep_lines: bool = False) -> str:
    text = spaced(unicodedata.normalize("NFKC", text))
    text = _FORMATS.sub(" ", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return ("\n" if keep_lines else " ").join(line for line in lines if line)


def _reference(text: str) -> tuple[frozenset[str], str]:
    """Split a reference into the labels that it names and the option's text."""
    if single := _SINGLE.fullmatch(text):
        return frozenset(single[1].upper()), ""
    if _LABELS.fullmatch(text):
        return frozenset(re.findall(r"\b[A-Z]\b", text.upper())), ""
    if re.fullmatch("[A-H]{2,6}", text):
        return frozenset(text), ""
    if re.fullmatch(r"[(\[]?\d{1,2}[)\].]?", text):
        return frozenset(re.findall(r"\d+", text)), ""
    if labelled := _LABELLED.fullmatch(text):
        return frozenset([labelled["label"].upper()]), labelled["text"]
    return frozenset(), text


def _together(text: str) -> frozenset[str] | None:
    """Read several labels that stand together, as AC does, or one on each line."""
    if re.fullmatch(r"[A-H]{2,6}\W*", text):
        return frozenset(re.findall("[A-H]", text))
    lines = [_LISTED.match(line) for line in text.split("\n") if not line.endswith(":")]
    labels = frozenset(line[1] for line in lines if line)
    return labels if len(labels) == len(lines) > 1 else None


def _labels(text: str, label: re.Pattern[str]) -> frozenset[str] | None:
    """Find the labels that a text names; None without one, and where it leaves a choice."""
    runs: list[tuple[str, list[str], int]] = []  # the text before, labels that are joined, the end
    either = set()  # runs that "or" joins
    for match in label.finditer(text):
        gap = text[runs[-1][2] if runs else 0 : match.start()]
        joined = bool(runs) and (_AND.fullmatch(gap) or _OR.fullmatch(gap))
        if gap == " " and re.match(r"[)\]>] [A-Z]", text[max(match.start() - 2, 0) : match.end()]):
            joined = False  # (E) A and C
        before, labels, _ = runs.pop() if joined else (gap, [], 0)
        either |= {len(runs)} if joined and _OR.fullmatch(gap) else set()
        runs.append((before, [*labels, match[match.lastindex or 0].upper()], match.end()))
    named: set[frozenset[str]] = set()
    opens = False
    for place, (before, labels, end) in enumerate(runs):
        if _DENIED.search(before[-30:]) or _WRONG.match(text, end):
            continue
        if opens and not _CONTRARY.search(before):
            break  # the text opens with its label; what follows explains
        if place in either:
            return None
        named.add(frozenset(labels))
        opens = place == 0 and _LEAD.fullmatch(before) is not None
    return named.pop() if len(named) == 1 else None


def _says(text: str, wanted: str) -> bool:
    """Tell whether a text is an option's text, or opens with it and a stop."""
    said, option = normalize(text), normalize(wanted)
    openings = [said, normalize(text.split("\n")[0])]
    openings = [_PREFACE.sub("", opening, count=1) for opening in openings]
    openings += [_STATEMENT.sub("", opening, count=1) for opening in openings]
    return option != "" and any(
        opening.startswith(option)
        and (len(opening) == len(option) or _STOP.match(opening, len(option)) is not None)
        for opening in openings
    )


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
    """Compare as expressions, of which math-verify tells equal forms; and say what was read."""
    try:
        from math_verify import parse, verify
        from sympy import I
    except ImportError:
        raise RecipeError(
            "eval.grader",
            "`math` needs the package math-verify, which isn't installed",
            'python -m pip install "sftkey[math]"',
        ) from None
    if answer.strip() == reference.strip() != "":
        return True, answer.strip()
    said, told = (normalize(unwrapped(each)) for each in (answer, reference))
    if said == told and "\\" not in said and re.search("[a-z]{3}", said):
        return True, said  # June 20 and \text{June 20}
    written, wanted = _formula(answer), _formula(reference)
    if written is None or wanted is None:
        return False, written
    # The timeout is a signal, which Python allows in the main thread alone.
    seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = (parse(text, parsing_timeout=seconds) for text in (wanted, written))
        gold, found = ([_with_unit(each, I) for each in side] for side in parsed)
        right = verify(gold, found, allow_set_relation_comp=True, timeout_seconds=seconds)
        kinds = {_kind(wanted), _kind(written)} - {""}
        return right and len(kinds) < 2 and not _differ_in_size(
            gold, found
        ), written if found else None
    except Exception:  # sympy and its parser raise anything on texts that are no formulas
        return False, None


def _with_unit(parsed: Any, unit: Any) -> Any:
    """Take i as the imaginary unit, which math-verify reads as one of two symbols."""
    names = {each: unit for each in getattr(parsed, "free_symbols", ()) if each.name == "i"}
    return parsed.xreplace(names) if names else parsed


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
    part = part.replace("\\$", "").replace("、", ",")
    part = re.sub("[！-～]", lambda found: chr(ord(found[0]) - 0xFEE0), part)  # wide signs
    if re.fullmatch(r"\$[^$]+\$(?:,? ?(?:and |or )?\$[^$]+\$)*", part):
        part = part.replace("$", "").strip()
    if re.search(r"\$|\\\(|\\\[", part):
        return _latex(part)
    if set(map(str.lower, _WORDS.findall(part))) - _FUNCTIONS:
        said = stated_numbers(part)
        if said:
            return "$" + ", ".join(str(number.value) for number in said.numbers) + "$"
    return f"${_latex(part.rstrip('.'))}$"


_SIGNS = {"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "±": r"\pm "}


def _latex(text: str) -> str:
    """Write in LaTeX what is often written without: `2*pi`, `sqrt(2)`, `3 1/2`, `x²`."""
    text = _united(re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", "∪", text))
    text = re.sub("[∞∪∩±]", lambda found: _SIGNS[found[0]], text)
    text = re.sub(r"√\s?(\d+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub("[¼-¾⅐-⅞]", _fraction, re.sub("[−–]", "-", text))
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{{{normalize(found[0])[1:]}}}", text)
    text = re.sub(r"(?<=[\dπ]) (?:[cdkm]?m|ft|in)\^\{?[23]\}?$", "", text)  # 10 cm^2
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))", "", text)  # 1\,000
    text = re.sub(r"^(\$?) ?\{([^{}]*,[^{}]*)\} ?(\$?)$", r"\1\\{\2\\}\3", text)
    text = re.sub(r"\\mathbb ([A-Z])", r"\\mathbb{\1}", text)
    text = re.sub(r"\\?\bsqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\?\bexp\s?\(([^()]*)\)", r"e^{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|theta|infty|ln|log|sin|cos|tan)\b", r"\\\1", text)
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\log_e", r"\ln")
    text = re.sub(r"\\frac(\\[a-z]+) ?(?=[\d\\])", r"\\frac{\1}", text)
    text = re.sub(r"(?<![\w.^])(\d+(?:\.\d+)?)[eE]\+?(-?\d+)(?!\w)", r"\1\\cdot 10^{\2}", text)
    if text.count(r"\pm") == 1 and "{" in text:  # math-verify knows it outside of braces alone
        text = re.sub(r"^ ?[a-z] ?= ?", "", text)
        text = text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-")
    text = re.sub(r"\*", r" \\cdot ", text.replace("**", "^"))
    text = re.sub(r"\+\s?-", "-", text)
    text = re.sub(r"(?<=\d) ?[x×] ?(?=10\^)", r"\\cdot ", text)
    text = re.sub(r"\^-(\d+|[a-z]\b)", r"^{-\1}", text)
    text = re.sub(r"[€£¥₹≈] ?(?=\d)", "", text)
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+(?: ?: ?\d+)+", text):
        text = _reduced(text.replace(" ", ""))
    text = re.sub(r"^(?:\\text\{)?all real numbers\}?$", r"\\mathbb{R}", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![\w.^])1(?:\.0+)?(?=[A-Za-z]\b)", "", text)  # 1.0i
    text = re.sub(r"\b(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(\d+)\.(\d*)\\overline\s?\{(\d+)\}", _periodic, text)


def _reduced(ratio: str) -> str:
    parts = [int(part) for part in ratio.split(":")] if ":" in ratio else []
    return ":".join(str(part // (math.gcd(*parts) or 1)) for part in parts) or ratio


_EITHER = re.compile(r"\s*(?:\bor\b|\\text\s*\{\s*or\s*\}|\\(?:lor|vee|cup)(?![a-z]))\s*")
_RELATION = re.compile(
    r"([a-z])\s*(?:(?P<less>\\l(?:eq?|t)|<=|[<≤])|(?P<more>\\g(?:eq?|t)|>=|[>≥]))(?![a-z])\s*"
    r"(?P<end>[^<>=≤≥]+)"
)


def _united(text: str) -> str:
    """Write "x < 1 or x > 3" as a union of intervals; anything else as it stands."""
    found = [_RELATION.fullmatch(part) for part in _EITHER.split(text)]
    sides = [each for each in found if each]
    if not len(found) == len(sides) > 1 or len({side[1] for side in sides}) > 1:
        return text

    def interval(side: re.Match[str]) -> str:
        closed = (side["less"] or side["more"]) not in ("<", ">", "\\lt", "\\gt")
        more = "(["[closed] + rf"{side['end']}, \infty)"
        return more if side["more"] else rf"(-\infty, {side['end']}" + ")]"[closed]

    return r" \cup ".join(map(interval, sides))


def _fraction(match: re.Match[str]) -> str:
    return r"\frac{{{}}}{{{}}}".format(*normalize(match[0]).split("/"))


def _kind(formula: str) -> str:
    """Tell a point, an interval and a set by their brackets, a ratio, and a number's base."""
    bare = re.sub(r"\\(?:left|right|[ ,;!])|[\s$]", "", formula)
    if re.fullmatch(r"\d+(?::\d+)+", bare):
        return bare
    if re.fullmatch(r"\d+/\d+|\\[dt]?frac(?:\{\d+\}\{\d+\}|\d\d)", bare):
        return "/"
    if base := re.fullmatch(r"[\dA-F]+(_)\{?(\d+)\}?", bare):
        return "".join(base.groups())
    brackets = re.fullmatch(r"(\\?[\[({])[^\[\]()]*,[^\[\]()]*(\\?[\])}])", bare)
    return "".join(brackets.groups()) if brackets else ""


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
