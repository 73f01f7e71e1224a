"""How the text of one response is split into thinking and answer.

A rule gives `(thinking, answer)`, or the reason why this text can't be split: a text. It never
guesses, for a wrong split trains the wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Rule = Callable[[str], "tuple[str, str] | str"]

# GSM8K's calculator marks: `48/2 = <<48/2=24>>24`. Without `=` it is none: `a << b >> c`.
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
HASH_MARK = re.compile(r"^[ \t]*####[ \t]*(?!#)", re.MULTILINE)
# What a box leaves open before it: `the answer is $\boxed{5}$`.
OPEN_MATHS = re.compile(r"\s*(?:\$\$?|\\\(|\\\[)?\s*\Z")


def think_tags(text: str) -> tuple[str, str] | str:
    """Split `<think>thinking</think>answer`; the opening tag may stand in the prompt already."""
    if text.count("</think>") != 1:
        return "more than one `</think>`" if "</think>" in text else "no `</think>`"
    thinking, answer = text.split("</think>")
    before, tag, inside = thinking.partition("<think>")
    if tag and before.strip():
        return "text before `<think>`"
    if "<think>" in inside:
        return "more than one `<think>`"
    return (inside if tag else thinking).strip(), answer.strip()


def boxed(text: str) -> tuple[str, str] | str:
    r"""Take the last `\boxed{answer}`, braces balanced; the thinking is what stands before it."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return r"no `\boxed{`"
    content = start + len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[content:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            thinking = OPEN_MATHS.sub("", text[:start])
            return thinking.strip(), text[content : content + brace.start()].strip()
    return r"a `\boxed{` that is not closed"


def hash_marks(text: str) -> tuple[str, str] | str:
    """Split at the last line that begins with `####`, as in GSM8K; remove its calculator marks."""
    marks = list(HASH_MARK.finditer(text))
    if not marks:
        return "no line that begins with `####`"
    thinking = CALCULATOR_MARK.sub("", text[: marks[-1].start()])
    return thinking.strip(), text[marks[-1].end() :].strip()


RULES: dict[str, Rule] = {"think_tags": think_tags, "boxed": boxed, "hash_marks": hash_marks}


def make_rule(name: str) -> Rule:
    """Give the rule of that name, or one made of a regular expression.

    The expression has the groups `thinking` and `answer` (the recipe has checked it); it is
    searched for, `.` matches line ends too, and what the groups hold is taken as it is.
    """
    if name in RULES:
        return RULES[name]
    pattern = re.compile(name, re.DOTALL)

    def by_expression(text: str) -> tuple[str, str] | str:
        match = pattern.search(text)
        if match is None:
            return "the regular expression doesn't match"
        thinking, answer = match["thinking"], match["answer"]
        if thinking is None or answer is None:
            return f"the group {'thinking' if thinking is None else 'answer'} matched nothing"
        return thinking, answer

    return by_expression
