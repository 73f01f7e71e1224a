"""Rows that are hard on tokenizers and templates, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sftkey.data.renderer import Frame
from sftkey.data.response import Example
from sftkey.errors import FrameError

SPECIAL_SHARE = 0.02  # of rows whose text holds a special token, which must be refused
SYSTEM = {"role": "system", "content": "Answer briefly."}

# By kind, so that a kind with many texts is not drawn more often than one with few.
HARD_TEXTS: dict[str, list[str]] = {
    "plain": ["3 cats have 12 legs.", "So", "the answer is", "Yes", "a", "I'll see — don't…"],
    "white space": [" ", "  ", "\n", "\n\n", "\n \n", "\t", " \t ", "\N{NO-BREAK SPACE}", "   \n"],
    "line ends": ["\r\n", "\r", "one\r\ntwo\r\n", "a\x0bb\x0cc", "a\N{LINE SEPARATOR}b"],
    "digits": ["12345678901234567890", "3.14159", "-7", "1,000,000", "1e-5", "٣١٤", "½", "10²"],
    "maths": ["∑ᵢ xᵢ² ≤ ∞", "a ≠ b ⇒ ∀ε>0 ∃δ", "2+2=4", "x_1^{2}", "√(b² - 4ac)", "6 ÷ 3 ± ½"],
    "LaTeX": ["\\boxed{\\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}}", "$$x^2$$", "\\(a\\) \\[b\\]", "}}}"],
    "code": [
        "def f(x):\n    return x  # <b>\n",
        "if (a<b && c>d) {\n\t};\n",
        "x = {'a': [1]}",
        "`>`",
    ],
    "markup": [
        "<b>bold</b>",
        "[link](http://a.b/c?d=e&f)",
        "| a | b |\n|---|---|",
        "&lt;",
        "**x**",
    ],
    "Chinese": ["三只猫有十二条腿。", "答案是:", "龍", "𠮷野家"],
    "other letters": ["Ответ", "こんにちは", "안녕하세요", "สวัสดี", "नमस्ते", "Größe", "ﬁ"],
    "right to left": ["قطة", "الجواب هو ٤", "תשובה", "\N{RIGHT-TO-LEFT MARK}a"],
    "emoji": [
        "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{MICROSCOPE}",
        "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-6}",
        "\N{REGIONAL INDICATOR SYMBOL LETTER D}\N{REGIONAL INDICATOR SYMBOL LETTER E}",
        "\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}",
    ],
    "combining": [
        "e\N{COMBINING ACUTE ACCENT}",
        "\N{COMBINING ACUTE ACCENT}",
        "\N{COMBINING LONG SOLIDUS OVERLAY}",
        "a\N{COMBINING DOT BELOW}\N{COMBINING TILDE}",
        "\N{ZERO WIDTH SPACE}",
    ],
    "pieces of tags": [
        "<",
        ">",
        "</",
        "<|",
        "|>",
        "<th",
        "Thinking>",
        "</Answer",
        "assistant",
        "user",
    ],
    "tags": [
        "<Thinking>\n",
        "\n</Thinking>\n<Answer>\n",
        "\n</Answer>",
        "<think>\n",
        "\n</think>\n\n",
        "[INST]",
    ],
}
LETTERS = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x4E00, 0x9FA5), (0x1F300, 0x1F5FF)]


def hard_examples(frame: Frame, num_rows: int, seed: int) -> list[Example]:
    """Make examples that a run with this frame might meet, and worse; the same for the same seed.

    Two in a hundred hold the text of a special token; no other does. Thinking may be empty, prompts
    and answers aren't, since such rows never come to be examples.
    """
    draw = random.Random(seed)
    kinds = _kinds(frame)
    takes_system = _takes_system(frame)
    examples = []
    for index in range(num_rows):
        thinking = "" if draw.random() < 0.1 else _text(draw, kinds, most=8)
        answer = _text(draw, kinds, most=3)
        answer = answer if answer.strip() else f"{answer}7"
        question = f"Q{_text(draw, kinds, most=4)}"
        if frame.special_ids and draw.random() < SPECIAL_SHARE:
            special = f"see {draw.choice(sorted(frame.special_ids))} there"
            if draw.random() < 0.5:
                thinking += special
            else:
                answer += special
        prompt = _prompt(draw, question, takes_system) if frame.kind == "chat" else question
        examples.append(Example(prompt, thinking, answer, index))
    return examples


def _kinds(frame: Frame) -> list[list[str]]:
    """Add the response's own tags, and leave out what is a special token of this tokenizer."""
    own = [tag for tag in vars(frame.response).values() if tag]
    kinds = [*HARD_TEXTS.values(), own]
    kept = [[text for text in kind if not frame.special_pattern.search(text)] for kind in kinds]
    return [kind for kind in kept if kind]


def _takes_system(frame: Frame) -> bool:
    """Tell whether the template writes system messages."""
    if frame.kind == "plain":
        return False
    try:
        frame.prompt_text((SYSTEM, {"role": "user", "content": "Q"}))
    except FrameError:
        return False
    return True


def _text(draw: random.Random, kinds: Sequence[Sequence[str]], most: int) -> str:
    """Join hard texts, with or without blanks between, and random characters."""
    parts = []
    for _ in range(draw.randint(1, most)):
        if draw.random() < 0.15:
            first, last = draw.choice(LETTERS)
            letters = (chr(draw.randint(first, last)) for _ in range(draw.randint(1, 6)))
            parts.append("".join(letters))
        else:
            parts.append(draw.choice(draw.choice(kinds)))
    return draw.choice(["", "", " ", "\n"]).join(parts)


def _prompt(
    draw: random.Random, question: str, takes_system: bool
) -> str | tuple[dict[str, str], ...]:
    """Give a question alone mostly, else with a system message or after an earlier turn."""
    user = {"role": "user", "content": question}
    chance = draw.random()
    if chance < 0.15:
        earlier = {"role": "assistant", "content": "It is 4.\n"}
        return ({"role": "user", "content": "What is 2 + 2?"}, earlier, user)
    if chance < 0.3 and takes_system:
        return (SYSTEM, user)
    return question
