"""Which number, or which numbers, a text states: in digits or words, with signs, powers, units.

A text is read clause by clause. What stands between two numbers says how they belong together:
"4 + 16 = 20" states its result, "5 to 10" two numbers, "16 legs on 4 cows" the one that no
preposition precedes, "9, not 8" the one that isn't denied. Where this leaves two numbers to choose
from, nothing is stated: no rule picks one, so none is right by luck.
"""

# ruff: noqa: RUF001  (minus, times and fraction signs as models write them)
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from sftkey.evaluation.statement import plain

MAX_DIGITS = 4_000  # below Python's own limit; more than that is a model that repeats itself
TOLERANCE = Fraction(1, 10**6)  # relative, where one side is a rounded decimal


class Number(NamedTuple):
    """A number that stood in a text; `rounded` if it was written with decimals."""

    value: Fraction
    rounded: bool
    percent: bool


class Stated(NamedTuple):
    """The numbers that a text states, mostly one; `ordered` if (2, 1) isn't (1, 2)."""

    numbers: tuple[Number, ...]
    ordered: bool
    text: str  # as they were written


_SCALES = {
    "dozen": 12,
    **dict.fromkeys(["hundred", "百", "백"], 100),
    **dict.fromkeys(["thousand", "k", "tausend", "тыс", "тысяч", "千", "천"], 10**3),
    **dict.fromkeys(["万", "萬", "만"], 10**4),
    "lakh": 10**5,
    **dict.fromkeys(["million", "m", "mn", "mio", "millionen", "millone", "млн"], 10**6),
    "crore": 10**7,
    **dict.fromkeys(["億", "亿", "억"], 10**8),
    **dict.fromkeys(["billion", "b", "bn", "mrd", "milliarden", "млрд"], 10**9),
    "trillion": 10**12,
}
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
_SMALL += " fifteen sixteen seventeen eighteen nineteen"
_UNITS = {word: value for value, word in enumerate(_SMALL.split())}
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_UNITS |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4}
_ORDINALS = ["fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_PARTS |= {word + end: value for value, word in enumerate(_ORDINALS, 4) for end in ("", "s")}
_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august"]
_MONTHS += ["september", "october", "november", "december"]
_MONTH = "|".join(rf"{name[:3]}(?:{name[3:]}|t?\b\.?)" for name in _MONTHS)

_WHOLE = r"\d+(?:,\d{3})*"
_TOKEN = re.compile(
    rf"""
    (?<![^\W_])(?<!\d[.,:/])(?:                # no part of a name such as CO2, no rest of 1.2.3
      (?P<several>(?:\d{{4}}|-)-\d\d-\d\d|\d{{4}}/\d\d/\d\d
        |\d+(?:(?::|\ :\ )\d+)+|\d{{1,2}}/\d{{1,2}}/\d{{2,4}})(?![\d/-])
    | (?:(?P<mixed>{_WHOLE})\ )?(?P<above>{_WHOLE})\ ?/\ ?(?P<below>{_WHOLE})(?![\d/,])
    | (?P<plain>\d{{1,3}}(?:\ \d{{3}})+(?:[.,]\d+)?(?![\d,.]*\d)|\d+(?:[.,]\d+)*|\.\d+)
      (?:[eE](?P<power>[+-]?\d+)(?!\w)|\ ?(?:\^|\*\*)\ ?[{{(]?(?P<raised>[+-]?\d+)[}})]?)?
    )
    (?:(?P<factorial>!)|(?P<ordinal>st|nd|rd|th)\b)?
    (?P<scale>(?:\ ?(?i:(?:hundred|thousand|dozen|lakh|crore|[mbtr]{{1,2}}illion)s?|mn|bn|mio|mrd
      |tausend|mill(?:ionen|iarden|ones)|тыс(?:яч)?|млн|млрд)|[kKMB])\b|\ ?[百백千천万萬만億亿억])?
    (?P<percent>\ ?(?:%|percent\b|per\ cent\b))?
    (?:\ ?[aApP](?:m|M|\.m\.|\.M\.)(?!\w))?
    """,
    re.VERBOSE,
)
_WORDS = "|".join([*_UNITS, "hundred", "thousand", "million", "billion", "dozen"])
_SPELLED = re.compile(
    rf"(?<!\d[ ])\b(?:(?:a|an)[ ](?=hundred|thousand|million|billion|dozen))?(?:{_WORDS})\b"
    rf"(?:(?:[ ]?-[ ]?|[ ]and[ ]|[ ])(?:{_WORDS})\b)*"
    rf"(?:[ -](?:{'|'.join(_PARTS)})\b)?!?|\b(?:a[ ])?(?:half|third|quarter)\b",
    re.IGNORECASE,
)


def last_number(text: str) -> Number | None:
    """Find the last number of a text, whatever stands around it; None without one.

    Read are signs, thousands separators, decimals, powers, fractions (3/4, ½, LaTeX's), mixed
    numbers and percent; currencies and units around a number don't matter.

    >>> last_number("The answer is $1,234.50.").value
    Fraction(2469, 2)
    """
    text, end, last = plain(text), 0, None
    for match in _TOKEN.finditer(text):  # a long text's numbers aren't all read for one of them
        end, last = last.end() if last else 0, match
    numbers = _found_at(text, end, last).numbers if last else ()
    return numbers[-1] if numbers else None


def first_number(text: str) -> Number | None:
    """Find the first number of a text, read as `last_number` does; None without one."""
    found = next(_found(plain(text)), None)
    return found.numbers[0] if found and found.numbers else None


def same_number(answer: Number, reference: Number) -> bool:
    """Compare exactly, or within a millionth of the reference where one side has decimals.

    A percent sign on one side only may be there or not: 25% is as right as 25 and as 0.25.
    """
    pairs = [(answer.value, reference.value)]
    if answer.percent and not reference.percent:
        pairs.append((answer.value / 100, reference.value))
    if reference.percent and not answer.percent:
        pairs.append((answer.value, reference.value / 100))
    rounded = answer.rounded or reference.rounded
    return any(abs(a - b) <= (TOLERANCE * abs(b) if rounded else 0) for a, b in pairs)


_HALF = re.compile(r"\d ?([ap])\.?m", re.IGNORECASE)  # 3 pm isn't 3 am


def same_numbers(answer: Stated, reference: Stated) -> bool:
    """Compare number by number; a list of them in any order, where neither side is ordered."""
    halves = {half.lower() for side in (answer, reference) for half in _HALF.findall(side.text)}
    sides = [list(answer.numbers), list(reference.numbers)]
    if not (answer.ordered or reference.ordered):
        sides = [sorted(side) for side in sides]
    return len(halves) < 2 and len(sides[0]) == len(sides[1]) and all(map(same_number, *sides))


def stated_numbers(text: str) -> Stated | None:
    """Read what a text states; None without a number, and where it leaves a choice.

    >>> [int(each.value) for each in stated_numbers("20, because 4 + 16 = 20").numbers]
    [20]
    >>> stated_numbers("5 feet 3 inches") is None
    True
    """
    text = _spelled_out(re.sub(r"(?<=[A-Za-z])_(?:\w|\{\w{1,3}\})(?!\w)", "", plain(text)))  # x_1
    text = re.sub(r" ?\n[ \n]*(= ?)?", lambda found: " = " if found[1] else "\n", text)
    text = re.sub(r"^\W*(?:step|part) \d+: ", "", text, flags=re.MULTILINE | re.IGNORECASE)
    if all(re.search(rf"^{number}[.)] ", text, re.MULTILINE) for number in (1, 2)):
        text = re.sub(r"^\d{1,2}[.)] ", "", text, flags=re.MULTILINE)  # the numbers of a list
    text = re.sub(r"^\(?[a-h]\) ", "", text, flags=re.MULTILINE)
    decimal = r"-?\d+(?:\.\d+)?"  # the point (2,5), the list [2,5] and the set {2,5}
    text = re.sub(rf"([(\[{{])({decimal}),(?!\d{{3}}\}})(?={decimal}[)\]}}])", r"\1\2, ", text)
    # 20 (4 times 5); 8 [1]; but not 8 (or 9)
    outside = re.sub(r"(?<=\S) (?:\((?!or |maybe )[^()]*\)|\[[^\[\]]*\])", "", text)
    text = outside if _TOKEN.search(outside) else text
    either = "(?!(?:or|maybe|perhaps|possibly|alternatively)\\b)"  # 8; or 9
    ends = rf"(?:\n|(?<!\d)[.!;] |(?<=\d)[.;] ){either}|(?<=\?) "
    clauses = re.split(ends, text, flags=re.IGNORECASE)
    numbered = [each for each in clauses if _TOKEN.search(each)]
    answered = [each for each in numbered if not each.endswith("?")] or numbered
    pairs = zip(answered, [*answered, ""][1:], strict=True)
    answered = [each for each, then in pairs if not _goes_on(each, then)]
    bare = {
        each.strip("*$. ") for each in answered if re.fullmatch(r"[-*$ ]*[\d.,]+[%$*. ]*", each)
    }
    readings: list[Stated | None] = []
    for clause in answered:
        found = list(_found(clause))
        reading = _assigned(clause, found) or _read(clause, found)
        opens = not found[0].gap.strip(_AROUND) and not clause.endswith("?")
        if reading and reading.numbers and not readings and opens and len(bare) < 2:
            return reading  # it opens with its number; what follows explains
        readings.append(reading)
    readings = [each for each in readings if each is None or each.numbers]
    told = [each for each in readings if each]
    agree = bool(told) and all(same_numbers(each, told[0]) for each in told)
    return told[0] if agree and len(told) == len(readings) else None


_CALCULATION = re.compile(r"[\d\s.,$%()+*/×·÷-]+= ?\$?(?P<result>-?[\d.,]*\d)")


def _goes_on(clause: str, then: str) -> bool:
    """Tell whether the next clause calculates with this one's result: 16 - 7 = 9; 9 * 2 = 18."""
    calculated = _CALCULATION.fullmatch(clause.strip())
    result = calculated and rf"(?<![\d.,]){re.escape(calculated['result'])}(?![\d]|[.,]\d).*="
    return bool(result and re.search(result, then))


class _Found(NamedTuple):
    """One match of `_TOKEN`, and the text between it and the match before."""

    match: re.Match[str]
    gap: str
    numbers: tuple[Number, ...]  # none where it can't be read; several in a date or a ratio


_AROUND = " $€£¥₹*`\"'“”{}_~([:"
_NEARLY = r"(?: ?(?:about|around|approximately|roughly|only|just|exactly|the|an?|all|each))*\W*$"
_DENIED = re.compile(
    rf"(?:\b(?:not|never|than|instead of|except|cannot be|at least|at most|up to"
    rf"|over|under|above|below|exceeds)|n't)(?: [a-z]+){{0,2}}{_NEARLY}"
)
_RESULT = re.compile(
    rf"(?:[=≈→⇒:]|\b(?:equals?|equal to|is|makes?|gives?|leaves?|totals?"
    rf"|(?:mak|giv|leav|earn|yield|total+)ing)){_NEARLY}"
)
_TOTAL = re.compile(r"(?: [^\W\d]+){0,2} (?:in total|in all|altogether)\b")
_ASIDE = re.compile(
    r"\b(?:with|per|for|(?<!total )(?<!sum )of|in|on|at|by|from|after|before|among|every|within"
    rf"|between|during|into|until){_NEARLY}"
)
# 4 of them, 4 more than 2
_PART = re.compile(
    r"(?: [^\W\d]+)? (?:of (?:which|whom|them|these|those)"
    r"|(?:more|less|fewer|greater|higher|lower|larger|smaller|bigger|older|younger) than)\b"
)
_WRONG = re.compile(
    r"(?: [^\W\d]+)? (?:(?:is|are|was|would be|must be|seems|looks) "
    r"(?:not|wrong|incorrect|too|false|impossible)\b|(?:is|are|was|were|does)n't\b)"
)
_ASSIGNED = re.compile(
    r"^[ $]*(?:(?:[,;&]|(?:, ?)?\b(?:and|or|but|while)\b)[ $]*)?(?P<name>[A-Za-z]|[A-Z][a-z]+)"
    r" ?(?:=|\bis\b) ?\$?$"
)
_REASON = re.compile(r"\b(?:because|since|as|due to|given|if|when|where|while|see|confidence)\b")
_JOIN = re.compile(
    r"^(?:[^\W\d]+\.?)?(?: [^\W\d]+\.?)? ?"  # units
    r"(?P<join>,|;|&|-|(?:, ?)?\b(?:and|or)|\bto|\bthrough)[ $€£¥₹(]*$"
)
_OPENS = re.compile(r"(?:[=:,(\[<>*/]|\b(?:is|be|to|and|or|of)) ?$")
_UNREAD_BEFORE = re.compile(
    r"(?:[√±<>≤≥≠∞^\\] ?[({]?|\b[a-z]\(|\w ?[*+·×÷/]|\w-|\)|\b(?:log|ln|sin|cos|tan) ?\(?) ?$"
)
_UNREAD_BEHIND = re.compile(
    r" ?(?:[π√±∞^\\(‰]|/ ?\d|[+*×·÷] ?[a-z(√π]|[xyzn]\b(?! ?\d))"
    r"|[abij]\b|-(?:[xyzn]\b|[(√π])|pi\b|\+"
    r"|(?: [^\W\d]+)? at (?:most|least)\b| ?[<>≤≥]"
    r"|(?: [^\W\d]+)? or (?:more|less|fewer|over|under|above|below|higher|lower|greater)\b"
)


def _read(clause: str, found: list[_Found]) -> Stated | None:
    """Read one clause by what stands before each number; see the module's docstring."""
    stated: list[_Found] = []
    asides: list[_Found] = []
    before: list[_Found] | None = None  # the left side of "20 = 4 + 16"
    place, ordered, unread = stated, False, False
    for one in found:
        gap, behind = one.gap.lower(), one.match.end()
        join = _JOIN.search(gap) if one is not found[0] else None
        if stated and _REASON.search(gap):
            break
        if _DENIED.search(gap) or _WRONG.match(clause, behind):
            place = []
        elif _PART.match(clause, behind):
            place = asides
        elif _RESULT.search(gap) or (stated and _TOTAL.match(clause, behind)):
            before = stated if not unread else None
            stated, unread, place = [], False, []
            place = stated
        elif _ASIDE.search(gap):
            place = asides
        elif join and join["join"].endswith("or") and stated and _are_same(one, stated[-1]):
            place = []  # 0.2 or 20%
        elif join:
            ordered |= join["join"] in ("to", "-", "through")
        else:
            again = any(one.numbers == other.numbers for other in stated)
            unread |= bool(stated) and not again
            place = [] if again else stated
        place.append(one)
        if place is stated:
            ordered |= bool(one.match["several"]) or gap.rstrip().endswith("(")
            unread |= bool(_UNREAD_BEFORE.search(gap)) or not one.numbers
            unread |= bool(_UNREAD_BEHIND.match(clause, behind))
            share = one.match["below"] or one.match["percent"]
            unread |= bool(share and re.match(r" of \d", clause[behind:]))
    if unread and before and len(before) == 1:
        stated, unread = before, False
    if not (stated or asides or unread):
        return Stated((), False, "")  # all are denied
    between = len(asides) == 2 and found[0].gap.lower().endswith("between ")
    if not stated and (len(asides) == 1 or between):
        stated, ordered = asides, ordered or between
    return _together(stated, ordered) if stated and not unread else None


def _are_same(one: _Found, other: _Found) -> bool:
    alone = len(one.numbers) == len(other.numbers) == 1
    return alone and same_number(one.numbers[0], other.numbers[0])


def _together(found: list[_Found], ordered: bool) -> Stated:
    numbers = tuple(number for one in found for number in one.numbers)
    return Stated(numbers, ordered, ", ".join(map(_written, found)))


def _assigned(clause: str, found: list[_Found]) -> Stated | None:
    """Read "x = 3, y = 4" and "Tom is 12 and Jane is 9": none of them is the others' result."""
    names = [_ASSIGNED.search(one.gap) for one in found]
    unread = any(_UNREAD_BEHIND.match(clause, one.match.end()) for one in found)
    if len(found) < 2 or unread or not all(names) or not all(one.numbers for one in found):
        return None
    return _together(found, len({name["name"] for name in names if name}) > 1)


def _written(one: _Found) -> str:
    sign = "-" if one.numbers[0].value < 0 and not one.match[0].startswith("-") else ""
    return sign + one.match[0]


def _found(text: str) -> Iterator[_Found]:
    end = 0
    for match in _TOKEN.finditer(text):
        yield _found_at(text, end, match)
        end = match.end()


def _found_at(text: str, end: int, match: re.Match[str]) -> _Found:
    """Read a match; the one before it ended at `end`."""
    sign, gap = _sign(text[end : match.start()], first=end == 0)
    numbers = tuple(_numbers(match))
    if sign < 0 and numbers:
        numbers = (numbers[0]._replace(value=-numbers[0].value), *numbers[1:])
    return _Found(match, gap, numbers)


def _sign(gap: str, first: bool) -> tuple[int, str]:
    """Tell a number's sign from a dash, a hyphen or a difference; and the gap without it."""
    if word := re.search(r"\b(?:minus|negative) ?$", gap, re.IGNORECASE):
        head = gap[: word.start()]
        return (-1, head) if first or head.strip() else (1, gap)
    mark = max(gap.rfind("-"), gap.rfind("+"))
    if mark < 0 or gap[mark + 1 :].strip(" $€£¥₹"):
        return 1, gap
    head, spaced = gap[:mark], gap[mark + 1 : mark + 2] == " "
    alone = not head.strip(_AROUND)
    if (alone and first) or _OPENS.search(head) or (not alone and not spaced and head[-1] == " "):
        return (-1 if gap[mark] == "-" else 1), head
    return 1, gap


def _numbers(match: re.Match[str]) -> list[Number]:
    if len(match[0]) > MAX_DIGITS:
        return []
    percent = bool(match["percent"])
    if match["several"]:
        return [Number(Fraction(each), False, False) for each in re.findall(r"\d+", match[0])]
    if match["plain"] is None:
        mixed, above, below = (
            int((match[name] or "0").replace(",", "")) for name in ("mixed", "above", "below")
        )
        return [Number(mixed + Fraction(above, below), False, percent)] if below else []
    values = _decimals(match["plain"])
    if len(values) == 1:
        value = _scaled(Fraction(values[0]), match)
        return [] if value is None else [Number(value, "." in values[0], percent)]
    return [Number(Fraction(value), "." in value, percent) for value in values]


def _scaled(value: Fraction, match: re.Match[str]) -> Fraction | None:
    """Raise and multiply a number as its match says; None where that is no number, or too long."""
    power, raised = int(match["power"] or 0), int(match["raised"] or 1)
    longest = max(len(str(value.numerator)), len(str(value.denominator)))
    if abs(power) + longest * abs(raised) > MAX_DIGITS or (value == 0 and raised < 0):
        return None
    value = value**raised * Fraction(10) ** power
    if match["factorial"]:
        if value.denominator != 1 or not 0 <= value <= 1000:
            return None
        value = Fraction(math.factorial(int(value)))
    return value * _SCALES.get((match["scale"] or "").strip().lower().rstrip("s"), 1)


def _decimals(written: str) -> list[str]:
    """Write a number with a decimal point alone: 1.234,5 as 1234.5, but 1,2,3 as three numbers."""
    written = written.replace(" ", "")
    mark = max(",.", key=written.rfind)
    whole, _, decimals = written.rpartition(mark)
    other = "." if mark == "," else ","
    if other in whole:
        groups = whole.split(other)
        thousands = mark not in whole and _in_thousands(groups)
        return ["".join(groups) + "." + decimals] if thousands else []
    groups = written.split(mark)
    if len(groups) == 1 or ((mark == "," or len(groups) > 2) and _in_thousands(groups)):
        return ["".join(groups)]
    if len(groups) == 2:
        return [".".join(groups)]
    return groups if mark == "," else []


def _in_thousands(groups: list[str]) -> bool:
    first, *between, last = groups
    european = len(first) <= 3 and all(len(group) == 3 for group in between)
    indian = len(first) <= 2 and between != [] and all(len(group) == 2 for group in between)
    return first.strip("0") != "" and len(last) == 3 and (european or indian)


def _spelled_out(text: str) -> str:
    """Write words for numbers as digits, currency names away and dates as 2020-01-05."""
    text = re.sub(r"\b(?:usd|eur|gbp|rs|inr|chf)\.? ?(?=[\d-])", "", text, flags=re.IGNORECASE)
    year = r"(?:,? (\d{4})\b|(?! [a-z]|\w|[-,.:/]?\d| ?%))"  # or none: July 4
    for form, order in (
        (rf"\b({_MONTH}) (\d\d?)(?:st|nd|rd|th)?{year}", (1, 2)),
        (rf"\b(\d\d?)(?:\.|st|nd|rd|th)?(?: of)? ({_MONTH}){year}", (2, 1)),
    ):
        text = re.sub(form, _date(*order), text, flags=re.IGNORECASE)
    text = re.sub(r"\bhalf an? (?=(?:dozen|[mb]illion)\b)", "0.5 ", text, flags=re.IGNORECASE)
    text = _SPELLED.sub(_in_digits, text)
    return re.sub(r"(\d) and (\d{1,3}/\d)", r"\1 \2", text)  # two and a half


def _date(month: int, day: int) -> Callable[[re.Match[str]], str]:
    def written(match: re.Match[str]) -> str:
        number = [name[:3] for name in _MONTHS].index(match[month][:3].lower()) + 1
        return f"{match[3] or '-'}-{number:02}-{int(match[day]):02}"

    return written


def _in_digits(match: re.Match[str]) -> str:
    """Write a number in words as digits; words that make no number together, one by one."""
    total = current = 0
    words = re.findall(r"[a-z]+", match[0].lower())
    for word in words:
        small = _UNITS.get(word)
        if small is not None:
            tens = current % 10 == 0 and current % 100 >= 20 and 0 < small < 10
            if current % 100 and not tens:
                apart = r"[a-z]+" if " and " not in match[0] else r"(?:(?! and )[a-z -])+"
                return re.sub(apart, _in_digits, match[0], flags=re.IGNORECASE)
            current += small
        elif word in ("hundred", "dozen"):
            current = (current or 1) * _SCALES[word]
        elif word in _SCALES:
            total, current = total + (current or 1) * _SCALES[word], 0
        elif word in _PARTS and current >= 20 and not word.endswith("s"):
            current += _PARTS[word]  # twenty-third
        elif word in _PARTS:
            return f"{total + current or 1}/{_PARTS[word]}"
    return str(total + current)
