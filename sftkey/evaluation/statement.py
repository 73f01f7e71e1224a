r"""Which part of a text is its answer: a box, what follows "the answer is", the last correction."""

# ruff: noqa: RUF001  (quotes and dashes as models write them)
import math
import re
import unicodedata
from typing import NamedTuple

_TAGS = re.compile(
    r"<\|[^<>|]{1,40}\|>|</[A-Za-z]\w{0,20}>|~~[^~\n]{1,80}~~"
    r"|<(?:(?:final_?)?(?:answer|output|result|solution|response)|think(?:ing)?)>"
    r"|<(?:b|i|u|p|em|strong|code)>(?=[^<]*</)",
    re.IGNORECASE,
)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]")

_ANSWER = (
    r"(?<![^\W_])(?:answer|ans|solution|result|label|verdict|antwort|lösung|r[ée]ponse|respuesta|risposta"
    r"|resposta|ответ)"
)
_IS = (
    r"(?:is|are|was|would be|must be|should be|will be|seems to be|appears to be|has to be"
    r"|est|es|ist|lautet|è|é)(?![^\W_])"
)
_EASTERN = (
    r"(?:(?:答案|回答|正解|答え|答|정답|답)\s?(?:[:：]|是|为|は|은|는)"
    r"|(?<!不)选择?(?=\s?[:：]?\s?[(（]?[A-H]))"
)
_CORRECTION = (
    r"\b(?:(?:wait|sorry|correction|actually)\s?[,:;.!—–-]|scratch that\b|i meant?\b"
    r"|(?<=[.!?…—–-] )(?:actually(?= )|no[,:;](?= )))(?:\s?no\b(?=\W{1,3}\w))?"
)
_MARKER = re.compile(
    rf"(?:{_ANSWER}(?: to [\w ]{{1,40}}?| for [\w ]{{1,40}}?)?[*_\"'`)]{{0,3}}"
    rf"(?:\s{{1,2}}{_IS}|\s?(?:[=-]+>|[:：=→])|\s[-–—](?=\s[^\w-]{{0,4}}[A-Za-z])|[#*]*\n)"
    rf"|(?<![^\W_])(?:option|choice)\s{_IS}|{_EASTERN}|{_CORRECTION}|####)[\s:：,*_]{{0,4}}",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"(?:^|(?<=[\s.,;]))"
    r"(?:(?<!or )so|therefore|thus|hence|finally|altogether|in total|∴|⇒|=>)(?!\w)[,:]?\s?",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"[^\s$]+")


def cleaned(text: str) -> str:
    """Take away what isn't text: special tokens, tags, struck words, characters without a width."""
    text = re.sub("<sup>([^<>]{1,20})</sup>", r"^{\1}", text)  # 10<sup>6</sup>
    return _INVISIBLE.sub("", _TAGS.sub(" ", text))


def stated(text: str) -> str:
    r"""Find what is stated as the answer: the last box, or what stands behind the last marker.

    A marker is `The answer is`, `Answer:`, `#### ` and the like, or a correction (`no, wait:`).
    Without one it is the whole text. Boxes with nothing but a comma or `and` between them are one.

    >>> stated(r"We add. \boxed{\frac{1}{2}}, since it is so.")
    '\\frac{1}{2}'
    >>> stated("I thought of 6, but the answer is **7**.")
    '7**.'
    """
    boxes = _boxes(text)
    if boxes:
        answer = boxes[-1].content
        for left, right in zip(boxes[-2::-1], boxes[::-1], strict=False):
            between = " ".join(text[left.end : right.start].strip(" \n$").split())
            if between not in ("", ",", "and", ", and", "or", "$ and $", "$, $", "$ or $"):
                break
            answer = f"{left.content} {between.strip('$ ')} {answer}"
        return answer
    last = next((place for place in reversed(range(len(text))) if text[place].isalnum()), -1)
    ends = [match.end() for match in _MARKER.finditer(text) if match.end() <= last]
    return text[ends[-1] if ends else 0 :]


def concluded(text: str) -> str | None:
    """Find what stands behind the last `so`, `therefore` or `in total`; None without one."""
    ends = (match.end() for match in _CONCLUSION.finditer(text))
    told = [text[end:] for end in ends if re.search(r"[^\W_]", text[end:])]
    return told[-1] if told else None


_UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # Thai, kana, Chinese, Korean
_SEAM = re.compile(rf"(?<={_UNSPACED})(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?={_UNSPACED})")


def spaced(text: str) -> str:
    """Set a blank between a Latin letter or digit and a letter of a script without blanks."""
    return _SEAM.sub(" ", text)


_SYMBOLS = {"times": "×", "cdot": "·", "pi": "π", "pm": "±", "approx": "≈", "sim": "~", "div": "÷"}
_SYMBOLS |= {"sqrt": "√", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "lt": "<", "gt": ">"}
_SYMBOLS |= {"neq": "≠", "ne": "≠", "infty": "∞", "rightarrow": "→", "degree": "°"}
_SYMBOLS |= {"Omega": "Ω", "mu": "μ", "pounds": "£", "euro": "€"}
_WRAPPERS = ["text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mbox", "fbox", "boxed"]
_SYMBOLS |= dict.fromkeys([*_WRAPPERS, "left", "right", "quad", "qquad", "displaystyle"], " ")


def plain(text: str) -> str:
    """Write a text's numbers with ASCII signs, such as `1/2` for `½` and `e5` for `x 10^5`."""
    text = re.sub("[\u200b\u2060\ufeff\u00ad]|<<[^<>]*>>", "", text)  # GSM8K: <<2+3=5>>
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(r"(⁻?[⁰¹²³⁴-⁹]+)", r"^\1", text)
    # Separators of thousands other than the comma; NFKC would turn most of them into blanks.
    separator = r"(?:\{,\}|,?\\[,!]|[\u00a0\u202f\u2009'’_])"
    text = re.sub(rf"(?<=\d){separator}(?=\d{{3}}(?!\d))", "", text)
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("−‐–⁄’٪٫٬", "---/'%.,"))
    text = re.sub(r"(?<!\.)\.{2,}(?=\d)", " ", text)
    text = re.sub(r"\b[A-Z]{1,2}(?=\$-?\d)|[₠-⃏](?= ?-?\d)", "", text)  # US$5, ₩5
    text = re.sub(r"\\([%${}])", r"\1", re.sub(r"[^\S\n]+", " ", spaced(text)))
    text = re.sub(r"\^ ?\{? ?\\(?:circ|degree)\b ?\}?", "°", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda found: _SYMBOLS.get(found[1], found[0]), text)
    text = re.sub(r"((?:^|[=:({$]) ?)- ?\((\d[\d.,]*)\)", r"\1-\2", text)  # -(12)
    text = re.sub(r"\\[()\[\],;:!> ]|\\+(?:n\b|\s|$)", " ", text)  # LaTeX's own brackets and spaces
    text = re.sub(r"(?<=\d)\s*\\([dtc]?frac)", r" \\\1", text)
    number = r"\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}"
    text = re.sub(rf"\\[dtc]?frac\s*(?:{number}|(\d)\s*(\d))", r"\1\3/\2\4", text)
    text = re.sub(r"√ ?(?:[({] ?(\d{1,40}) ?[)}]|(\d{1,40})(?!\d))", _root, text)
    ten = r"(?<=\d)\s*[x*×·]\s*10\s*(?:\^|\*\*)\s*[{(]?\s*([+-]?\d+)(?:\s*[})])?"
    text = re.sub(ten, r"e\1", text)
    text = re.sub(r"\*\*(?!\d)|(?<!\d)\*\*", "", text)  # bold
    return re.sub(r"(?<=[^\W\d])(\}?)\^\s*\{?-?\d+\}?", r"\1", text)  # cm^2: no number of its own


def _root(match: re.Match[str]) -> str:
    value = int(match[1] or match[2])
    root = math.isqrt(value)
    return str(root) if root * root == value else match[0]


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    """Find the outermost boxes in one pass; one that isn't closed goes on to the text's end."""
    boxes: list[_Box] = []
    depth, opened, outside = 0, None, 0
    for match in _BOX.finditer(text):
        is_box = match[0].startswith(("\\boxed", "\\fbox"))
        if is_box and opened is None and not match["brace"]:
            word = _BARE_BOX.match(text, match.end())
            if word:
                boxes.append(_Box(match.start(), word.end(), word[0]))
        elif is_box and opened is None:
            opened, outside = match, depth
        depth = max(depth + (match[0] == "{" or match["brace"] == "{") - (match[0] == "}"), 0)
        if opened and depth == outside:
            content = text[opened.end() : match.start()]
            boxes.append(_Box(opened.start(), match.end(), content))
            opened = None
    if opened:
        boxes.append(_Box(opened.start(), len(text), text[opened.end() :]))
    return boxes


_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻]+")
_ASCII = str.maketrans("‐‑‒–—−’‘‚ʼ“”„⁄", "------''''\"\"\"/")
_PAIRS = {'"': '"', "'": "'", "`": "`", "*": "*", "«": "»", "「": "」", "『": "』", "$": "$"}
_STOPS = ".,;:!?。"


def normalize(text: str) -> str:
    """Write a text without what `exact` overlooks.

    That is: the form of characters (NFKC, but 10⁵ isn't 105), upper and lower case, repeated white
    space, the form of dashes and quotes, quotes and Markdown's marks around the whole text, and
    `.,;:!?` at its end. Articles and inner punctuation count.

    >>> normalize("  **New   York.** ")
    'new york'
    """
    text = _RAISED.sub(lambda found: f"^{found[0]}", _INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.translate(_ASCII).split())
    stops = _STOPS if text.strip(_STOPS + " ") else ""
    start, end = 0, len(text)
    while end - start > 1:
        first, before, last = text[start], text[end - 2], text[end - 1]
        factorial = last == "!" and (before.isdigit() or end - start == 2)
        if first == " ":
            start += 1
        elif last == " " or (last in stops and not factorial):
            end -= 1
        elif end - start > 2 and _PAIRS.get(first) == last:
            start, end = start + 1, end - 1
        else:
            break
    return text[start:end].strip()  # a blank may be all that stood in quotes


_OPENING = re.compile(
    rf"\W{{0,8}}(?:(?:the|my|final|correct|so|thus|therefore|die|la|a|il)\W{{1,3}}){{0,3}}{_ANSWER}"
    rf"|\s*(?:####|{_EASTERN})",
    re.IGNORECASE,
)
_FENCE = re.compile(r"\s*```[\w+#-]*\n(.*?)\n?```\s*", re.DOTALL)
_STRESSED = re.compile(r"\s*(_{1,3})(?=\S)(.+ .+)(?<=\S)\1[\s.]*")  # but not __init__
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{|\\[()\[\]]|[{}$]")


def unwrapped(text: str) -> str:
    """Take away `The answer is` before an answer, and LaTeX, a fence or `_` around it."""
    if _OPENING.match(text) or "\\boxed" in text:
        text = stated(text).strip(" \n*`.")
    if around := _FENCE.fullmatch(text) or _STRESSED.fullmatch(text):
        return around[around.lastindex or 0]
    bare = text.strip(" \n*$`.")
    if bare.startswith("\\"):
        words = _WRAPPER.sub(" ", bare)
        return (
            re.sub(r"\\[()\[\]]", " ", bare) if "\\" in words else words
        )  # a formula's braces stay
    return text
