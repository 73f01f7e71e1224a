"""Which of several options an answer names: by letter or number, or by the option's text."""

# ruff: noqa: RUF001  (quotes and dashes as models write them)
from __future__ import annotations

import re
import unicodedata

from sftkey.evaluation.statement import concluded, normalize, stated

_FORMATS = re.compile(
    r"\\(?:text\w*|math\w*|boxed|fbox|left|right)|\\[()\[\] ,;!]|[*_`$\"'“”«»{}\\]"
)
# "A because …" names A; "A dog" and "I think" name nothing.
_FOLLOWS = (
    r"(?= (?:is|because|since|as|and|or|but|not|seems|looks|for|due|given|if|fails|was|rather"
    r"|instead)\b)"
)
_LETTER = re.compile(
    rf"[(\[<] ?([A-Za-z]) ?[)\]>]|\b(?:[Oo]ption|[Cc]hoice) ([A-Za-z])\b"
    rf"|(?<![\w'’-])(?:([B-HJ-Z])(?![\w'’+#])|([AI])(?![\w'’+#])(?:(?! [a-z])|{_FOLLOWS})"
    r"|(A)(?= (?:would|must|has|will|can|cannot)\b))"
    r"|\A([a-z])(?=[).:\],;]|\Z|\n)"
)
_DIGITS = re.compile(r"(?<![\w.,])(\d{1,2})(?!\w|[.,]\d)")
_LEAD = re.compile(r"\W{0,4}(?:(?:so|it is|it's|i choose|i pick)\b)?\W{0,3}", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b(?:not|never|than|instead of|except|cannot be|can't be|neither|nor|eliminate|rule out)"
    r"|n t|n't)(?: be| option| choice)? ?$",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r" ?(?:(?:is|are|was|seems|looks) (?:not|wrong|incorrect|false|tempting|too|ruled|out"
    r"|eliminated|impossible)\b|isn\b|cannot\b|can ?n.t\b|fails\b|doesn\b|would be wrong)",
    re.IGNORECASE,
)
_AND = re.compile(r" ?(?:,|&|;|,? ?\band)? ?", re.IGNORECASE)
_OR = re.compile(r" ?(?:/|,? ?\bor|,? ?\bnor) ?", re.IGNORECASE)
_STATEMENT = re.compile(
    r"(?:it|this|that|(?:the|this|that) [^.,;:]{1,60}?)(?: ?'s| is| was| must be| would be) "
)
_STOP = re.compile(
    r" ?(?:[,;:(—](?! ?(?:and|or|but)\b)|\. | ?- |(?: (?:because|since|as|it|that|this|they)\b))"
)
_LABELLED = re.compile(
    r"[(\[<]?(?P<label>[A-Z]|\d{1,2})(?:[)\]>][.:]?|[.:])(?= |$)(?P<text>.*)", re.DOTALL
)
_LABELS = re.compile(r"[(\[]?[A-Z][)\]]?(?:(?: ?[,&;] ?(?:and )?| and )[(\[]?[A-Z][)\]]?)*")


def same_choice(answer: str, reference: str) -> tuple[bool, str | None]:
    """Compare the labels where both sides name one, else the texts; and say what was read.

    `(B)`, `B.`, `b) text`, `Option B` and `The answer is (B), not (A)` name the letter B; a text
    counts if it is the reference's, or opens with it and a stop (`True, because …`).
    """
    wanted, wanted_text = _reference(_plain(reference))
    answer = _plain(stated(answer), keep_lines=True)
    if wanted:
        label = _DIGITS if min(wanted).isdigit() else _LETTER
        together = re.fullmatch(r"[A-H]{2,6}\W*", answer) if len(wanted) > 1 else None
        found = (
            frozenset(re.findall("[A-H]", together[0]))
            if together
            else _labels(answer, label) or _labels(concluded(answer) or "", label)
        )
        if found:
            return found == wanted, ", ".join(sorted(found))
    labelled = _LABELLED.fullmatch(answer)
    texts = [answer, concluded(answer) or "", labelled["text"] if labelled else ""]
    right = any(_says(text, wanted_text) for text in texts)
    return right, (normalize(answer) or None) if right or not wanted else None


def _plain(text: str, keep_lines: bool = False) -> str:
    text = unicodedata.normalize("NFKC", text)
    text = _FORMATS.sub(" ", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return ("\n" if keep_lines else " ").join(line for line in lines if line)


def _reference(text: str) -> tuple[frozenset[str], str]:
    """Split a reference into the labels that it names and the option's text."""
    if len(text) == 1 and text.isascii() and text.isalpha():
        return frozenset(text.upper()), ""
    if _LABELS.fullmatch(text) or re.fullmatch("[A-H]{2,6}", text):
        return frozenset(re.findall("[A-Z]", text)), ""
    if re.fullmatch(r"[(\[]?\d{1,2}[)\].]?", text):
        return frozenset(re.findall(r"\d+", text)), ""
    if labelled := _LABELLED.fullmatch(text):
        return frozenset([labelled["label"]]), labelled["text"]
    return frozenset(), text


def _labels(text: str, label: re.Pattern[str]) -> frozenset[str] | None:
    """Find the labels that a text names; None without one, and where it leaves a choice."""
    runs: list[set[str]] = []  # of labels that "and" joins
    mentions = list(label.finditer(text))
    denied = opens = False
    for number, match in enumerate(mentions):
        end = mentions[number - 1].end() if number else 0
        gap = text[end : match.start()]
        if number and _OR.fullmatch(gap):
            if not denied:
                return None
        elif number and _AND.fullmatch(gap) and not _WRONG.match(text, match.end()):
            if not denied and runs:
                runs[-1].add(match[match.lastindex or 0].upper())
        else:
            denied = bool(_DENIED.search(gap[-30:]) or _WRONG.match(text, match.end()))
            if not denied and opens:
                break  # the text opens with its label; what follows explains
            if not denied:
                opens = not number and _LEAD.fullmatch(gap) is not None
                runs.append({match[match.lastindex or 0].upper()})
    return frozenset(runs[0]) if runs and all(run == runs[0] for run in runs) else None


def _says(text: str, wanted: str) -> bool:
    """Tell whether a text is an option's text, or opens with it and a stop."""
    said, option = normalize(text), normalize(wanted)
    openings = [said, normalize(text.split("\n")[0])]
    openings += [_STATEMENT.sub("", opening, count=1) for opening in openings]
    return option != "" and any(
        opening.startswith(option)
        and (len(opening) == len(option) or _STOP.match(opening, len(option)) is not None)
        for opening in openings
    )
