"""Examples as token ids, each token with its segment."""

from __future__ import annotations

import json
import os
import unicodedata
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from sftkey.data.prompt import num_dropped_thinkings
from sftkey.data.renderer import Renderer
from sftkey.data.response import TOOLS, Example, Parsed, Response, Segment, as_messages, decoded
from sftkey.data.template import strings
from sftkey.data.values import Refusal, RowError
from sftkey.errors import FrameError

if TYPE_CHECKING:
    from tokenizers import Encoding


# A token that touches several segments belongs to the first of them here, so that nothing of the
# thinking gets into the key, and everything of the answer into the answer.
PRECEDENCE = (Segment.THINKING, Segment.ANSWER, Segment.ANSWER_TAG, Segment.END, Segment.PROMPT)


@dataclass(frozen=True)
class Tokens:
    """The tokens behind a prompt, and the characters that they stand for.

    The encoding is asked for the few tokens that count: lists of all offsets cost more than all
    else that Python does for a row.
    """

    ids: list[int]  # (T,) token ids
    encoding: Encoding  # holds these tokens at its end
    first: int  # the number of its tokens before them
    shift: int = 0  # the number of characters before the text that offsets count in

    def span(self, place: int) -> tuple[int, int]:
        """Return where a token's characters begin and end; -1 is the last token before these."""
        span: Any = self.encoding.token_to_chars(self.first + place)
        return max(span[0] - self.shift, 0), span[1] - self.shift

    def cut(self, character: int) -> tuple[int, int]:
        """Return the first token that reaches behind a place, and the first that begins behind it.

        The place is before a character, given by its number.
        """
        if character == 0:
            return 0, 0
        place = self.encoding.char_to_token(character + self.shift)
        if place is not None and self.first < place < self.first + len(self.ids) - 1:
            place -= self.first
            begins = self.span(place)[0]
            if begins < character <= self.span(place + 1)[0]:  # this one reaches across
                return place, place + 1
            if self.span(place - 1)[1] <= character <= begins:
                return place, place
        # Bytes of one character, or a token of none: pairs compare by their starts.
        span: Any = self.encoding.token_to_chars
        places = range(self.first, self.first + len(self.ids))
        place = behind = bisect_left(places, (character + self.shift,), key=span)
        while place and self.span(place - 1)[1] > character:
            place -= 1
        return place, behind


def segments_of(tokens: Tokens, pieces: Sequence[tuple[Segment, str]]) -> list[int]:
    """Return each token's segment from the characters it stands for.

    Tokens that are bytes of one character all stand for it; a token of no character (the blank that
    SentencePiece sets before a text) goes with the character it stands before. The pieces are the
    texts that follow one another, each with its segment.
    """
    cuts = map(tokens.cut, accumulate(len(text) for _, text in pieces[:-1]))
    bounds = pairwise([(0, 0), *cuts, (len(tokens.ids), len(tokens.ids))])
    owned: dict[Segment, list[slice]] = {segment: [] for segment in PRECEDENCE}
    for (segment, text), ((first, _), (_, last)) in zip(pieces, bounds, strict=True):
        if text:
            owned[segment].append(slice(first, last))
    found = [int(Segment.PROMPT)] * len(tokens.ids)
    for segment in reversed(PRECEDENCE):
        for part in owned[segment]:
            found[part] = [int(segment)] * (part.stop - part.start)
    return found


if TYPE_CHECKING:
    _Encoded = tuple[list[int], list[int], Encoding]  # see `Renderer.encode_rows`

T = TypeVar("T")
DROPS = "the chat template drops"
DROPS_THINKING = f"{DROPS} the thinking of an earlier assistant message"
OWN_TAGS = "the response's own tags stand inside"
NUM_CHARACTERS = 60  # of a text in a message
BATCH_SIZE = 250  # rows that a thread tokenizes at a time


@dataclass
class Row:
    """One row of tokens."""

    input_ids: list[int]  # (T,) token ids; the last one is the end of turn
    segment_ids: list[int]  # (T,) values of `Segment`
    index: int  # the example's row in source order
    # What is worth knowing of it, and an example of that, where there is one.
    notes: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Text:
    """The texts of a row: `pieces` follow the prompt, each with its segment."""

    prompt: str
    pieces: list[tuple[Segment, str]]
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def rest(self) -> str:
        return "".join(text for _, text in self.pieces)


def tokenize(examples: Sequence[Example], renderer: Renderer) -> list[Row | Refusal]:
    """Make a row of each example, or say why it can't be one; in order."""
    return [row for batch in tokenize_batches(examples, renderer) for row in batch]


def tokenize_batches(
    examples: Sequence[Example], renderer: Renderer
) -> Iterator[list[Row | Refusal]]:
    """Do as `tokenize`, batch by batch.

    The tokenizer works outside of Python's lock: while its threads are at the next batches, one on
    each core, this thread makes rows of the last.
    """
    num_threads = _num_cores()
    batches = (examples[n : n + BATCH_SIZE] for n in range(0, len(examples), BATCH_SIZE))
    waiting: deque[tuple[Sequence[Example], list[_Text | Refusal], Future[list[_Encoded]]]] = (
        deque()
    )
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in batches:
            written = [_or_refusal(_write, example, renderer) for example in batch]
            texts = [text for text in written if isinstance(text, _Text)]
            prompts = [text.prompt for text in texts]
            wholes = [text.prompt + text.rest for text in texts]
            future = pool.submit(renderer.encode_rows, prompts, wholes)
            waiting.append((batch, written, future))
            if len(waiting) > num_threads:
                yield _rows(*waiting.popleft(), renderer)
        while waiting:
            yield _rows(*waiting.popleft(), renderer)


def _num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rows(
    examples: Sequence[Example],
    written: Sequence[_Text | Refusal],
    encoded: Future[list[_Encoded]],
    renderer: Renderer,
) -> list[Row | Refusal]:
    """Make the rows of a batch when its tokens are there."""
    made = iter(encoded.result())
    rows: list[Row | Refusal] = []
    for example, text in zip(examples, written, strict=True):
        if isinstance(text, Refusal):
            rows.append(text)
        else:
            rows.append(_or_refusal(_row, example, text, next(made), renderer))
    return rows


def _or_refusal(make: Callable[..., T], example: Example, *args: Any) -> T | Refusal:
    """Make something of an example, or say why it can't be."""
    try:
        return make(example, *args)
    except RowError as error:
        return Refusal(example.index, str(error), error.code)


def _write(example: Example, renderer: Renderer) -> _Text:
    """Return the texts of a row, or raise a RowError where there are none."""
    for name, text in _texts(example, renderer):
        token = renderer.special_pattern.search(text)
        if token:
            what = f"the {name} holds the text of the special token {token[0]!r}"
            raise RowError(what, "special-token-text")
    try:
        prompt = renderer.prompt_text(example.prompt)
    except FrameError as error:
        raise RowError(error.problems[0].what, "template") from error
    pieces = renderer.response.pieces(example.thinking, example.answer)
    left_out = renderer.unwritten_of_tools(example.prompt)
    dropped = 0
    if not isinstance(example.prompt, str):
        dropped = num_dropped_thinkings(example.prompt, prompt)
    return _Text(
        prompt,
        [(Segment.THINKING, renderer.assistant_prefix), *pieces, (Segment.END, renderer.end)],
        ((DROPS_THINKING, ""),) * bool(dropped)
        + tuple((f"{DROPS} `{name}` of `tools`", "") for name in left_out),
    )


def _texts(example: Example, renderer: Renderer) -> Iterator[tuple[str, str]]:
    """Return texts that may not hold special tokens: a plain prompt may, it is its own frame."""
    yield "thinking", example.thinking
    yield "answer", example.answer
    if renderer.kind == "chat":
        for message in as_messages(example.prompt):
            # As they are: JSON writes a backslash before a token's quotation mark.
            said = json.loads(message["content"]) if message["role"] == TOOLS else message
            yield from (("prompt", text) for text in strings(said))


def _row(example: Example, text: _Text, encoded: _Encoded, renderer: Renderer) -> Row:
    """Return the row of an example, or raise a RowError where there is none."""
    lost = renderer.lost_character(text.rest)
    if lost:
        raise RowError(f"the completion holds {lost!r}, which the tokenizer would lose")
    # 1. Prompt and completion are tokenized as one text, as the model will read them.
    prompt_ids, ids, whole = encoded
    start = len(prompt_ids)
    tokens = Tokens(ids[start:], whole, start)
    pieces = [(Segment.PROMPT, text.prompt), *text.pieces]
    if renderer.kind == "chat":
        _check_prompt(prompt_ids, text.prompt, renderer)
    # 2. Where that changes the prompt's own ids, the completion is tokenized by itself.
    changed = ids[:start] != prompt_ids
    # A special token may swallow the white space behind it, here the completion's first. And a
    # character that is lost makes the offsets behind it wrong.
    swallowed = not changed and start and tokens.span(-1)[1] > len(text.prompt)
    if changed or swallowed or renderer.lost_character(text.prompt):
        apart = _apart(text, prompt_ids, None if swallowed else ids, renderer)
        if apart is None:
            _check_swallowing(ids, whole, renderer)
            raise RowError(
                "the ids do not begin with the prompt's, "
                "and the rest tokenized apart decodes to another text",
                "prefix",
            )
        tokens, pieces = apart, text.pieces
    # 3. What can't be told apart, or doesn't come back as it was written, makes no row.
    _check_special(tokens, pieces, renderer)
    change = change_of(example, tokens.ids, renderer)
    if change and change.in_answer:
        raise RowError(change.what, "not-returned")
    notes = text.notes + (((change.what, change.shown),) if change else ())
    # 4. Each token gets the segment that its characters lie in.
    before = [*renderer.bos_before(text.prompt), *prompt_ids]
    segments = [*[int(Segment.PROMPT)] * len(before), *segments_of(tokens, pieces)]
    return Row([*before, *tokens.ids], segments, example.index, notes)


@dataclass(frozen=True)
class Change:
    """What of a row doesn't come back."""

    what: str  # the kind of change, for people
    shown: str  # one example of it
    in_answer: bool  # whether the answer is another one, and not the thinking alone


def change_of(example: Example, ids: list[int], renderer: Renderer) -> Change | None:
    """Read a completion as grading does, and say what differs from the example, if anything does.

    Texts are the same where Unicode calls them so (NFC), but for white space around them. The ids
    (T,) reach from behind the prompt to the end of turn.
    """
    written = renderer.response.render(example.thinking, example.answer)
    whole = renderer.assistant_prefix + written + renderer.end
    read = whole if renderer.spells(ids, whole) else renderer.decode_behind(ids)
    who = OWN_TAGS if _same(read, whole) else "the tokenizer changes"
    if read.strip() != whole.strip():  # as the tokenizer writes it, be it NFC alone
        inner = read.strip().removesuffix(renderer.end.strip())
        written = inner.removeprefix(renderer.assistant_prefix.strip())
    return _difference(example, renderer.response.parse(written), who, renderer.response)


def _difference(example: Example, found: Parsed, who: str, tags: Response) -> Change | None:
    answer, thinking = found.answer or "", found.thinking or ""
    if not _same(answer, example.answer):
        return Change(f"{who} the answer", _arrow(example.answer, answer), True)
    if not _same(thinking, example.thinking):
        return Change(f"{who} the thinking", _arrow(example.thinking, thinking), False)
    if not found.strict:  # both come back, though one holds a tag
        in_answer = tags.holds_tag(answer) and not tags.holds_tag(thinking)
        name, text = ("answer", answer) if in_answer else ("thinking", thinking)
        return Change(f"{who} the {name}", repr(text[:NUM_CHARACTERS]), False)
    return None


def _same(one: str, other: str) -> bool:
    one, other = one.strip(), other.strip()
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _arrow(before: str, after: str) -> str:
    """Show two texts from a little before the place where they part."""
    pairs = enumerate(zip(before, after, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(place - NUM_CHARACTERS // 3, 0)
    parts = (repr(text[start : start + NUM_CHARACTERS]) for text in (before, after))
    return " is read as ".join(parts)


def _apart(
    text: _Text, prompt_ids: list[int], whole_ids: list[int] | None, renderer: Renderer
) -> Tokens | None:
    """Tokenize what follows the prompt on its own, so that no character gets lost or comes in.

    SentencePiece sets a blank before a text: behind an anchor, which is cut off again, it doesn't.
    """
    tokenizer = renderer.tokenizer
    wanted = {decoded(tokenizer, prompt_ids) + text.rest}
    wanted |= {decoded(tokenizer, whole_ids)} if whole_ids else set()
    for anchor in ("", renderer.end_token, "\n", "x"):
        head, both = renderer.encode([anchor, anchor + text.rest])
        ids = both.ids[len(head.ids) :]
        if [*head.ids, *ids] == both.ids and decoded(tokenizer, [*prompt_ids, *ids]) in wanted:
            return Tokens(ids, both, len(head.ids), len(anchor))
    return None


def _check_prompt(ids: Sequence[int], prompt: str, renderer: Renderer) -> None:
    """See that no text of a prompt became a special token when the tokenizer rewrote it."""
    unknown = renderer.tokenizer.unk_token_id
    written = [renderer.special_ids[token] for token in renderer.special_pattern.findall(prompt)]
    special = renderer.special_in(ids)
    if [n for n in special if n != unknown] != [n for n in written if n != unknown]:
        what = "the prompt holds what the tokenizer rewrites to a special token"
        raise RowError(what, "special-token-text")


def _check_special(
    tokens: Tokens, pieces: Sequence[tuple[Segment, str]], renderer: Renderer
) -> None:
    """See that the special tokens behind the prompt are those that were written."""
    length = sum(len(text) for _, text in pieces)
    ids, token = tokens.ids, renderer.end_token
    if not ids or ids[-1] != renderer.end_id:
        raise RowError(f"the end of turn {token!r} is not the last token", "end-of-turn")
    if tokens.span(len(ids) - 1) != (length - len(token), length):
        raise RowError(f"the end of turn {token!r} swallows white space before it", "end-of-turn")
    if renderer.special_in(ids) != renderer.written_special_ids:
        what = "a character that the tokenizer doesn't know became a special token"
        raise RowError(what, "unknown-character")
    _check_swallowing(ids, tokens.encoding, renderer, tokens.first)


def _check_swallowing(
    ids: Sequence[int], encoding: Encoding, renderer: Renderer, first: int = 0
) -> None:
    """See that no token takes the white space beside it away."""
    lengths = renderer.swallowing_lengths
    if not lengths or lengths.keys().isdisjoint(ids):
        return
    for place in (n for n, number in enumerate(ids) if number in lengths):
        span: Any = encoding.token_to_chars(first + place)
        if span[1] - span[0] != lengths[ids[place]]:
            token = renderer.tokenizer.convert_ids_to_tokens(ids[place])
            raise RowError(f"the token {token!r} swallows white space beside it", "end-of-turn")


def fit(
    rows: Sequence[Row | Refusal],
    examples: Sequence[Example],
    renderer: Renderer,
    max_length: int,
    trim: bool,
) -> list[Row | Refusal]:
    """Refuse the rows of examples that are longer than `max_length` tokens, or shorten them.

    To `trim` a row, text is taken off the end of its thinking, before the closing tag, and it is
    tokenized anew; the key is never cut.
    """
    fitted = list(rows)
    for place, row in enumerate(rows):
        if isinstance(row, Row) and len(row.input_ids) > max_length:
            if trim:
                fitted[place] = _trim(row, examples[place], renderer, max_length)
            else:
                fitted[place] = Refusal(row.index, f"longer than {max_length} tokens", "too-long")
    return fitted


def _trim(row: Row, example: Example, renderer: Renderer, max_length: int) -> Row | Refusal:
    """Shorten the thinking until the row fits; tokenized anew, since cut text has other tokens."""
    thinking = example.thinking
    while len(row.input_ids) > max_length:
        if not thinking:
            what = f"longer than {max_length} tokens even without thinking"
            return Refusal(row.index, what, "too-long")
        spans = renderer.encode([thinking])[0].offsets
        kept = max(len(spans) - (len(row.input_ids) - max_length), 0)
        cut = spans[kept][0] if spans else 0
        thinking = thinking[: min(cut, len(thinking) - 1)]
        (shorter,) = tokenize([replace(example, thinking=thinking)], renderer)
        if isinstance(shorter, Refusal):
            return shorter
        row = shorter
    return row
