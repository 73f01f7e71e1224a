"""Proof of masks on hard rows: labels found again by decoding token by token."""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sftkey.activity import activity
from sftkey.data.labels import IGNORED, labels_for
from sftkey.data.renderer import Renderer
from sftkey.data.response import TOOLS, Example, Segment
from sftkey.data.template import TEMPLATE_ERRORS, as_taken
from sftkey.data.tokenization import Refusal, Row, tokenize
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
        *("<b>bold</b>", "[link](http://a.b/c?d=e&f)", "| a | b |\n|---|---|", "&lt;", "**x**"),
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
        *("<Thinking>\n", "\n</Thinking>\n<Answer>\n", "\n</Answer>"),
        *("<think>\n", "\n</think>\n\n", "[INST]"),
    ],
}
LETTERS = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x4E00, 0x9FA5), (0x1F300, 0x1F5FF)]


def hard_examples(renderer: Renderer, num_rows: int, seed: int) -> list[Example]:
    """Make examples that a run with this frame might meet, and worse; the same for the same seed.

    Two in a hundred hold the text of a special token; no other does. Thinking may be empty, prompts
    and answers aren't, since such rows never come to be examples.
    """
    draw = random.Random(seed)
    # The response's own tags are added, and what is a special token of this tokenizer is left out.
    own = [tag for tag in vars(renderer.response).values() if tag]
    usual = [
        [text for text in kind if not renderer.special_pattern.search(text)]
        for kind in (*HARD_TEXTS.values(), own)
    ]
    kinds, takes_system = [kind for kind in usual if kind], _takes_system(renderer)
    examples = []
    for index in range(num_rows):
        thinking = "" if draw.random() < 0.1 else _text(draw, kinds, most=8)
        answer = _text(draw, kinds, most=3)
        answer = answer if answer.strip() else f"{answer}7"
        question = f"Q{_text(draw, kinds, most=4)}"
        if renderer.special_ids and draw.random() < SPECIAL_SHARE:
            special = f"see {draw.choice(sorted(renderer.special_ids))} there"
            if draw.random() < 0.5:
                thinking += special
            else:
                answer += special
        prompt = _prompt(draw, question, takes_system) if renderer.kind == "chat" else question
        examples.append(Example(prompt, thinking, answer, index))
    return examples


def _takes_system(renderer: Renderer) -> bool:
    """Tell whether the template writes system messages."""
    if renderer.kind == "plain":
        return False
    try:
        renderer.prompt_text((SYSTEM, {"role": "user", "content": "Q"}))
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
    """Return a question alone mostly, else with a system message or after an earlier turn."""
    user = {"role": "user", "content": question}
    chance = draw.random()
    if chance < 0.15:
        earlier = {"role": "assistant", "content": "It is 4.\n"}
        return ({"role": "user", "content": "What is 2 + 2?"}, earlier, user)
    if chance < 0.3 and takes_system:
        return (SYSTEM, user)
    return question


BEFORE = "cats"  # decoded before a completion, whose first blank SentencePiece would take away
AROUND = "q"  # a letter that no mark behind it is composed with
SIGN = "▁"
BROKEN = "\ufffd"  # what stands for a character of which bytes are missing


@dataclass(frozen=True)
class Wrong:
    """A row that was built wrongly, or refused though it can be built."""

    example: Example
    what: str


@dataclass(frozen=True)
class Proof:
    """What became of the rows of a proof."""

    rows: int  # how many were tried
    right: int  # how many were built, and rightly
    # How many were refused by reason, each confirmed: no row can be built of them.
    refused: dict[str, int] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)  # the others


@activity("proving the masks on hard rows")
def prove(renderer: Renderer, num_rows: int, seed: int) -> Proof:
    """Tokenize hard rows, and judge every one."""
    examples = hard_examples(renderer, num_rows, seed)
    return judge(renderer, examples, tokenize(examples, renderer))


def judge(renderer: Renderer, examples: Sequence[Example], rows: Sequence[Row | Refusal]) -> Proof:
    """Judge what became of examples, in their order."""
    oracle = Oracle(renderer)
    right, refused, wrong = 0, Counter[str](), []
    for example, row in zip(examples, rows, strict=True):
        if isinstance(row, Row):
            fault = oracle.fault(example, row)
        elif oracle.can_be_built(example):
            fault = f"refused, but a row can be built: {row.reason}"
        else:  # what differs between rows that are refused for one reason is left out
            reason = re.sub(r"the special token .*", "a special token", row.reason)
            refused[re.sub(r"holds '.+', which", "holds a character that", reason)] += 1
            continue
        right += fault is None
        wrong += [] if fault is None else [Wrong(example, fault)]
    return Proof(len(examples), right, dict(refused), wrong)


class Oracle:
    """Judges rows with `decode()` alone."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.normalizer = renderer.tokenizer.backend_tokenizer.normalizer
        added = renderer.tokenizer.added_tokens_decoder.values()
        tokens = sorted((token.content for token in added), key=len, reverse=True)
        # A tokenizer takes its added tokens out of a text before it normalizes what is between.
        self.added = re.compile("(" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")")
        self.before = renderer.encode([BEFORE])[0].ids
        # Older SentencePiece (Llama 2's, Phi-3's) sets a blank behind special tokens too.
        behind = self.decode(renderer.encode([renderer.end_token + BEFORE])[0].ids)
        self.sets_blank = behind == f"{renderer.end_token} {BEFORE}"
        # SentencePiece writes blanks as this sign, and reads the sign itself as a blank.
        self.reads_sign = self.decode(renderer.encode([BEFORE + SIGN])[0].ids).endswith(" ")

    def fault(self, example: Example, row: Row) -> str | None:
        """Say what is wrong with a row, if anything is."""
        ids, segments = row.input_ids, row.segment_ids
        if len(ids) != len(segments):
            return "not a segment for every token"
        fed = self.fed(example)
        if not self.returns(example):
            return "another answer is read from the row than stood in the example"
        if ids[: len(fed)] != fed or self.renderer.prompt_ids(example.prompt) != fed:
            return "the row does not begin with what inference feeds"
        prompt = [n for n, segment in enumerate(segments) if segment == Segment.PROMPT]
        rest = list(range(len(fed), len(ids)))
        if prompt != list(range(len(fed))) or trained(row, "completion") != rest:
            return "stage `completion` does not train exactly what follows the prompt"
        completion = Row(ids[len(fed) :], segments[len(fed) :], row.index)
        return self._completion_fault(example, completion, self._blank(fed))

    def can_be_built(self, example: Example) -> bool:
        """Try to build a row with the tokenizer's own call, whole and apart.

        None is to be built of a chat that holds control text, wherever in it.
        """
        renderer = self.renderer
        said = json.dumps(example.prompt, ensure_ascii=False)
        said = re.sub(r'\\+"', '"', said)  # as it was before it became JSON, or JSON in JSON
        if renderer.kind == "chat" and any(token in said for token in renderer.special_ids):
            return False
        try:
            fed, prompt = self.fed(example), renderer.prompt_text(example.prompt)
        except TEMPLATE_ERRORS:
            return False
        if not self.returns(example):
            return False
        rest = "".join(self.texts(example))
        wanted = (self.normal(rest), self._blank(fed) + self.normal(rest))
        for text, head in ((prompt + rest, renderer.bos_before(prompt)), (rest, fed)):
            ids = [*head, *renderer.tokenizer(text, add_special_tokens=False)["input_ids"]]
            begin, completion = ids[: len(fed)], ids[len(fed) :]
            if begin != fed or renderer.special_in(completion) != renderer.written_special_ids:
                continue
            if completion[-1:] == [renderer.end_id] and self.decode(completion) in wanted:
                return True
        return False

    def returns(self, example: Example) -> bool:
        """Tell whether the answer is read again from what the tokenizer keeps of the response."""
        response = self.renderer.response
        text = self.normal(response.render(example.thinking, example.answer))
        answers = (example.answer, response.parse(text).answer or "")
        return len({unicodedata.normalize("NFC", each.strip()) for each in answers}) == 1

    def fed(self, example: Example) -> list[int]:
        """Return the ids that inference feeds, by upstream's own call."""
        tokenizer, prompt = self.renderer.tokenizer, example.prompt
        if self.renderer.kind == "plain":
            has_bos = tokenizer.bos_token and str(prompt).startswith(tokenizer.bos_token)
            bare: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if has_bos:
                return list(bare)
            ids: Any = list(tokenizer(prompt)["input_ids"])
            while ids[-len(bare) :] != bare and self.renderer.special_in(ids[-1:]):
                ids.pop()  # an end that the tokenizer sets behind a text
            return ids
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        tools = {}
        if messages[0]["role"] == TOOLS:
            tools, messages = {"tools": json.loads(messages[0]["content"])}, messages[1:]
        settings: Any = {**self.renderer.chat_template_kwargs, **tools}
        settings["add_generation_prompt"] = True
        told = as_taken(tokenizer, messages, settings)
        ids = tokenizer.apply_chat_template(told, return_dict=False, **settings)
        return list(ids)

    def texts(self, example: Example) -> tuple[str, str]:
        """Return the text up to the end of the thinking, and the text of the key."""
        pieces = self.renderer.response.pieces(example.thinking, example.answer)
        key = "".join(text for _, text in pieces[1:])
        return self.renderer.assistant_prefix + pieces[0][1], key + self.renderer.end

    def normal(self, text: str) -> str:
        """Return what a tokenizer keeps of a text: its own normal form, blanks as blanks."""
        if self.normalizer is not None:
            parts = enumerate(self.added.split(text))
            text = "".join(part if n % 2 else self._normal_part(part) for n, part in parts)
        return text.replace(SIGN, " ") if self.reads_sign else text

    def _inside(self, text: str) -> str:
        """Return what a tokenizer keeps of a text that stands in another; some strip its ends."""
        normal = self.normal(f"{AROUND}{text}{AROUND}")
        around = normal.startswith(AROUND) and normal.endswith(AROUND)
        return normal[len(AROUND) : -len(AROUND)] if around else self.normal(text)

    def _normal_part(self, text: str) -> str:
        normal = str(self.normalizer.normalize_str(text))
        prefixed = normal.startswith(SIGN) and not text.startswith((SIGN, " "))
        return normal[1:] if prefixed else normal

    def decode(self, ids: Sequence[int]) -> str:
        """Decode what follows a prompt."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = str(self.renderer.tokenizer.decode([*self.before, *ids], **options))
        return text.lstrip(" ").removeprefix(BEFORE)

    def _blank(self, fed: Sequence[int]) -> str:
        """Return what the tokenizer may set between a prompt and the completion."""
        return " " if self.sets_blank and fed and self.renderer.special_in(fed[-1:]) else ""

    def _completion_fault(self, example: Example, row: Row, blank: str) -> str | None:
        thinking, key = self.texts(example)
        text, key = self.normal(thinking + key), self._inside(key)
        thinking, decoded = self._inside(thinking), self.decode(row.input_ids)
        if decoded not in (text, blank + text):
            return f"text was lost: {decoded!r}"
        start = len(decoded) - len(text) + len(thinking)
        return (
            self._key_fault(row, start, key)
            or self._end_fault(row)
            or self._answer_fault(example, row, start)
        )

    def _key_fault(self, row: Row, length: int, key: str) -> str | None:
        """The key is the text after the thinking, but for a token that straddles its beginning."""
        ids, places = row.input_ids, trained(row, "key")
        start = places[0] if places else len(ids)
        if places != list(range(start, len(ids))):
            return "stage `key` trains tokens that do not follow one another up to the row's end"
        text = self.decode(ids)[len(self.decode(ids[:start])) :]
        if not key.endswith(text):
            return f"stage `key` trains more than the key: {text!r}"
        if len(text) < len(key) and not start:
            return f"stage `key` misses what nothing straddles: {text!r}"
        if len(text) < len(key) and len(self._whole(ids[: start - 1])) >= length:
            return f"stage `key` misses a token of the key: {text!r}"
        return None

    def _end_fault(self, row: Row) -> str | None:
        """The end of turn comes last and once, and both stages train it."""
        ids, last = row.input_ids, len(row.input_ids) - 1
        if [n for n, number in enumerate(ids) if number == self.renderer.end_id] != [last]:
            return "the end of turn is not the last token, and once"
        if row.segment_ids[-1] != Segment.END or trained(row, "key")[-1] != last:
            return "the end of turn is not trained as such"
        return None

    def _answer_fault(self, example: Example, row: Row, start: int) -> str | None:
        """Every token that touches the answer is ANSWER, and no other; THINKING comes first."""
        ids, answer = row.input_ids, self._inside(example.answer)
        before = self._inside(self.renderer.response.answer_open)
        if not answer or self._inside(before + answer) != before + answer:
            return None  # the normalizer merges tag and answer, and no decoding tells them apart
        start += len(before)
        places = trained(row, "answer") or trained(row, "key")[:1]
        first, last = places[0], places[-1]
        straddles = first and row.segment_ids[first - 1] == Segment.THINKING
        if row.segment_ids[first] != Segment.ANSWER:  # none is: the thinking's last token has all
            wrong = len(self.decode(ids[:first])) < start + len(answer) or not straddles
        else:
            wrong = (
                places != list(range(first, last + 1))
                or (len(self._whole(ids[:first])) > start and not straddles)
                or len(self._whole(ids[:last])) >= start + len(answer)
                or len(self.decode(ids[: last + 1])) < start + len(answer)
            )
        if wrong:
            return f"stage `answer` trains other text: {self.decode(ids[first : last + 1])!r}"
        return None

    def _whole(self, ids: Sequence[int]) -> str:
        """Decode, and leave out a last character that isn't whole."""
        return self.decode(ids).rstrip(BROKEN)


def trained(row: Row, loss_on: str) -> list[int]:
    """Return the places of the tokens that a stage trains."""
    labels, _ = labels_for(torch.tensor(row.input_ids), torch.tensor(row.segment_ids), loss_on)
    return (labels != IGNORED).nonzero().flatten().tolist()
