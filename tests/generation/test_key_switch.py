"""Generation after a frozen key stage: the key adapter acts from the thinking's last token on."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Segment
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.generation.generate import Generation, generate, generate_to_file
from sftkey.generation.key_switch import StopAtThinkingEnd, Switch, find_switch
from sftkey.models.key_pass import KEY, acting, context_adapters
from sftkey.recipe.schema import ResponseSection
from tests.support.models import made_family, nf4, with_lora
from tests.support.tiny import made_tokenizer
from tests.support.tokenizers import CHATML, KINDS, OPENED, made

MOST, STOP = 14, 2
TEXT = "How many legs do 3 cats and 2 birds have together, and how many have 7 pens?"
TOKENIZER = made_tokenizer()
PROMPTS = [TOKENIZER(TEXT[:end])["input_ids"] for end in (7, 40, 3, 25, 60, 12, 33)]


def with_key(adapted: Any) -> Any:
    """Put a key adapter beside the one that a model has; both of its factors are random."""
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights=False,
        inference_mode=True,
    )
    adapted.add_adapter(KEY, config)
    return adapted.eval()


@cache
def family(name: str) -> Any:
    """Make a model of a family with two adapters, over the vocabulary of the tests' tokenizer."""
    fields = {"tie_word_embeddings": False, "vocab_size": len(TOKENIZER)}
    model = made_family(name, **fields)  # a tied head would write the last token again and again
    return with_key(with_lora(name, Path(), model))


def of_nf4() -> Any:
    """Make a model in NF4 with two adapters."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return with_key(nf4("llama", Path(folder), vocab_size=len(TOKENIZER)))


def base_alone() -> Any:
    """Make a model whose thinking no adapter has touched: after full fine-tuning, say."""
    model = with_key(with_lora("qwen3", Path(), made_family("qwen3", vocab_size=len(TOKENIZER))))
    model.delete_adapter("default")
    model.set_adapter(KEY, inference_mode=True)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: family("llama"),
    "qwen3": lambda: family("qwen3"),
    "gemma3": lambda: family("gemma3"),  # the window is shorter than the prompts
    "nf4": cache(of_nf4),
    "base alone": cache(base_alone),
}


def free(model: Any, prompt: list[int]) -> list[int]:
    """Write with the previous adapters alone, without cache, padding or transformers' loop."""
    ids = list(prompt)
    with torch.no_grad(), acting(model, context_adapters(model)):
        while len(ids) < len(prompt) + MOST:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def key_by_hand(model: Any, ids: list[int], count: int) -> list[int]:
    """Go on after a thinking: all but its last token through the previous adapters into a cache."""
    context, key = torch.tensor([ids[:-1]]), []
    token = torch.tensor([ids[-1:]])
    with torch.no_grad():
        with acting(model, context_adapters(model)):
            past = model(input_ids=context, use_cache=True).cache if len(ids) > 1 else None
        with acting(model, [*context_adapters(model), KEY]):
            while len(key) < count and (not key or key[-1] != STOP):
                output = model(input_ids=token, cache=past, use_cache=True)
                past, token = output.cache, output.logits[:, -1:].argmax(-1)
                key.append(int(token))
    return key


def text_of(ids: list[int]) -> str:
    """Decode ids as they are."""
    return str(TOKENIZER.decode(ids))


@cache
def thinkings_by_hand(name: str) -> list[list[int]]:
    """Return what the previous adapters alone write after each prompt."""
    model = MODELS[name]()
    return [free(model, prompt) for prompt in PROMPTS]


@cache
def written_by_hand(name: str) -> tuple[str, list[list[int]], list[int | None]]:
    """Choose as closing tag what most rows write, at several places; generate by hand.

    Returns:
        The tag, what is written after each prompt, and the tokens of its thinking, if it ended.
    """
    model, thinkings = MODELS[name](), thinkings_by_hand(name)
    texts = [text_of(ids) for ids in thinkings]
    parts = {text[n : n + k] for text in texts for n in range(len(text)) for k in (1, 2, 3)}

    def lengths(tag: str) -> list[int | None]:
        return [
            next((n for n in range(1, MOST + 1) if tag in text_of(ids[:n])), None)
            for ids in thinkings
        ]

    def spread(tag: str) -> tuple[int, int]:
        found = [n for n in lengths(tag) if n is not None]
        return len(set(found)), -len(found)

    usable = sorted(tag for tag in parts if tag.strip() == tag and tag.isprintable() and tag)
    tag = max((each for each in usable if None in lengths(each)), key=spread)
    rows = []
    for prompt, ids, length in zip(PROMPTS, thinkings, lengths(tag), strict=True):
        if length is None:
            rows.append(ids)
            continue
        thinking = ids[:length]
        rows.append([*thinking, *key_by_hand(model, [*prompt, *thinking], MOST - length)])
    return tag, rows, lengths(tag)


def generations(
    model: Any, tag: str, prompts: list[list[int]] = PROMPTS, **changes: Any
) -> dict[int, Generation]:
    """Generate with the key adapter from the tag on."""
    switch = Switch(tuple(context_adapters(model)), tag, "", **changes.pop("switch", {}))
    settings = {"stop_ids": [STOP], "max_new_tokens": MOST, "batch_size": 3, **changes}
    return dict(generate(model, TOKENIZER, prompts, switch=switch, **settings))


def as_generation(ids: list[int]) -> Generation:
    """Cut ids at the stop, as `generate` does."""
    end = ids.index(STOP) if STOP in ids else len(ids)
    return Generation(text_of(ids[:end]), end, STOP in ids)


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, 3) for name in MODELS), ("gemma3", 1), ("gemma3", 7)]
)
def test_it_equals_two_generations_by_hand(name: str, batch_size: int) -> None:
    """Each row switches at its own place, in batches of any composition, token for token."""
    tag, rows, lengths = written_by_hand(name)
    model = MODELS[name]()
    assert len(set(lengths)) >= 4, "rows should switch at several places, one of them never"
    assert None in lengths
    found = generations(model, tag, batch_size=batch_size)
    assert found == {row: as_generation(ids) for row, ids in enumerate(rows)}
    alone = list(map(as_generation, thinkings_by_hand(name)))
    assert sum(found[row] != alone[row] for row in found) >= 3, "the key adapter should matter"


def test_the_thinking_is_what_the_previous_adapters_write() -> None:
    """In the same batches each thinking equals theirs alone, greedy and sampled; the rest doesn't.

    Rows that never switch are theirs to the last token.
    """
    model = family("gemma3")
    tag, _, _ = written_by_hand("gemma3")
    for temperature in (0.0, 1.0):
        settings = {"stop_ids": [STOP], "max_new_tokens": MOST, "batch_size": 3, "seed": 4}
        with acting(model, context_adapters(model)):
            plain = dict(generate(model, TOKENIZER, PROMPTS, temperature=temperature, **settings))
        found = generations(model, tag, temperature=temperature, seed=4)
        thinkings = [plain[row].text.partition(tag) for row in found]
        assert [found[row].text.partition(tag)[:2] for row in found] == [t[:2] for t in thinkings]
        assert any(found[row] != plain[row] for row in found)
        assert generations(model, tag, temperature=temperature, seed=4) == found


def test_a_given_thinking_is_gone_on_from_at_once() -> None:
    """A prompt that holds its thinking is read by the previous adapters but for its last token."""
    model = family("gemma3")
    expected = {
        row: as_generation(key_by_hand(model, ids, MOST)) for row, ids in enumerate(PROMPTS)
    }
    assert generations(model, "x", switch={"thinking_given": True}) == expected
    one = [PROMPTS[0][:1], PROMPTS[1][:1]]  # nothing stands before the only token
    found = generations(model, "x", one, switch={"thinking_given": True})
    assert found == {n: as_generation(key_by_hand(model, ids, MOST)) for n, ids in enumerate(one)}


def test_nothing_is_computed_twice_but_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read once; every other pass is over one token a row."""
    model = family("llama")
    tag, rows, lengths = written_by_hand("llama")
    passes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: passes.append(tuple(inputs[0].shape))
    )
    generations(model, tag, batch_size=len(PROMPTS))
    hook.remove()
    switched = [row for row, length in enumerate(lengths) if length is not None]
    first, second = MOST, max(len(rows[row]) - (lengths[row] or 0) for row in switched)
    assert passes == [
        (len(PROMPTS), max(len(prompt) for prompt in PROMPTS)),
        *[(len(PROMPTS), 1)] * (first - 1),
        *[(len(switched), 1)] * second,
    ]


def test_no_row_is_longer_than_asked_and_a_stop_ends_the_thinking() -> None:
    """A tag that comes last leaves nothing to switch for; after a stop there is no key."""
    model = family("llama")
    tag, rows, lengths = written_by_hand("llama")
    row = next(n for n, length in enumerate(lengths) if length is not None and length > 1)
    length = lengths[row] or 0
    (found,) = generations(model, tag, [PROMPTS[row]], max_new_tokens=length).values()
    assert found == Generation(text_of(rows[row][:length]), length, False)
    stop = rows[row][length - 2]
    (stopped,) = generations(model, tag, [PROMPTS[row]], stop_ids=[stop]).values()
    assert stopped.stopped
    assert tag not in stopped.text


@pytest.mark.fault("a kill")
def test_a_killed_generation_goes_on(tmp_path: Path) -> None:
    """What a file holds already is not written again, and the rest is as it would have been."""
    model = family("llama")
    tag, _, _ = written_by_hand("llama")
    switch = Switch(tuple(context_adapters(model)), tag, "")
    settings = {"stop_ids": [STOP], "max_new_tokens": MOST, "batch_size": 3, "switch": switch}
    prompts, file = dict(enumerate(PROMPTS)), tmp_path / "rows.jsonl"
    whole = generate_to_file(model, TOKENIZER, prompts, file, **settings)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4])[:-9])
    assert generate_to_file(model, TOKENIZER, prompts, file, **settings) == whole


def test_the_adapters_are_left_as_they_were() -> None:
    """After a generation those act that acted before it."""
    model = family("llama")
    active = [model.base_model.active_adapters, model.active_adapters]
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    before = [list(layer.active_adapters) for layer in layers]
    generations(model, written_by_hand("llama")[0])
    assert [list(layer.active_adapters) for layer in layers] == before
    assert [model.base_model.active_adapters, model.active_adapters] == active


FRAMES: dict[str, dict[str, Any]] = {
    "default": {},
    "a line's end behind the tag": {"thinking": ("<Thinking>\n", "\n</Thinking>\n")},
    "native": {"thinking": ("<think>\n", "\n</think>"), "answer": ("\n\n", "")},
    "opened by the prompt": {"thinking": ("", "\n</think>"), "answer": ("\n\n", "")},
    "special token": {"thinking": ("", "[/INST]"), "answer": ("", "")},
    "no closing tag": {"thinking": ("", ""), "answer": ("\n#### ", "")},
    "bridge": {"thinking": ("", ""), "answer": ("\n\n", "")},
    "blank closing tag": {"thinking": ("", "\n"), "answer": ("#### ", "")},
}
EXAMPLES = [
    ("3 cats: 12\n2 birds: 4", "16"),
    ("A pen costs 5 dollars.", "dollars"),
    ("3 \u00d7 \u6c34 = \U0001f427", "\U0001f427"),
    ("", "35"),
]
# What the template writes before a thinking holds what ends it here.
BRIDGED = CHATML.replace(
    "{{ m['content'] }}", "{{ '\n\n' if m['role'] == 'assistant' }}{{ m['content'] }}"
)
TEMPLATES = {"opened by the prompt": OPENED, "bridge": BRIDGED}


def ends_of(renderer: Renderer, ids: list[int]) -> dict[int, int]:
    """Let the ids be written one by one, and give the tokens of the thinking, if it ended."""
    switch = Switch(
        (),
        renderer.response.thinking_close,
        renderer.response.answer_open,
        renderer.assistant_prefix,
    )
    ends = StopAtThinkingEnd(switch, renderer.tokenizer, 1, [renderer.end_id])
    for length in range(1, len(ids) + 1):
        ended = ends(torch.tensor([[0, *ids[:length]]]), None)
        assert ended.tolist() == [0 in ends.num_tokens]
    return ends.num_tokens


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_thinking_ends_where_training_has_it_end(kind: str, name: str) -> None:
    """The token found is the last one of the segment THINKING, a straddling one too."""
    renderer = Renderer.read(
        made(kind, TEMPLATES.get(name, CHATML)), ResponseSection(**FRAMES[name])
    )
    count = 0
    for row in tokenize([Example("Q", *texts, n) for n, texts in enumerate(EXAMPLES)], renderer):
        if not isinstance(row, Row):
            continue  # a character that this vocabulary lacks
        start = row.segment_ids.count(Segment.PROMPT)
        thinking = row.segment_ids.count(Segment.THINKING)
        assert ends_of(renderer, row.input_ids[start:]) == {0: thinking}
        count += 1
    assert count >= 2
    assert (renderer.assistant_prefix == "\n\n") == (name == "bridge")


def test_a_row_that_stopped_never_switches() -> None:
    """A turn that ends right behind the tag, where a line's end was awaited, has no key."""
    renderer = Renderer.read(
        made("byte_level", CHATML), ResponseSection(thinking=("", "\n</Thinking>\n"))
    )
    ids = renderer.encode(["1\n</Thinking>"])[0].ids
    assert ends_of(renderer, [*ids, renderer.end_id, renderer.end_id]) == {}
    assert ends_of(renderer, [*ids, *renderer.encode(["5"])[0].ids]) == {0: len(ids)}


@pytest.mark.parametrize(
    ("close", "text", "end"),
    [
        ("\n</T>\n", "1</T>\n5", 6),  # no line's end before the tag
        ("\n</T>\n", "1\n</T>", None),  # one may come behind it
        ("\n</T>\n", "1\n</T> 5", 6),  # none came
        ("\n</T>", "1\n</T>\n", 6),
        ("\n</T>", "</T>1</T>", 4),
        ("", "1\n#### 5", 1),
        ("\n", "1\n#### 5", None),  # the blank tag and the answer's belong together
        ("\n", "1\n\n####", 2),
    ],
)
def test_white_space_around_the_tag(close: str, text: str, end: int | None) -> None:
    """White space counts where the tag has it, and a missing one keeps no thinking open."""
    assert Switch((), close, "\n#### ").thinking_end(text) == end


def test_a_thinking_that_nothing_ends_is_refused() -> None:
    """Without any tag there is no place to switch at."""
    with pytest.raises(FrameError) as error:
        Switch((), "", "")
    assert str(error.value) == (
        "response.thinking: expected a closing tag, or an opening tag of the answer; both are "
        "empty, so that nothing tells where the key adapter of `context: frozen` is to act\n"
        "hint: write one of them"
    )


def test_a_model_without_key_adapter_never_switches() -> None:
    """The switch is found from the model and the run's tags; there is none without the adapter."""
    renderer = Renderer.read(made("byte_level", CHATML), ResponseSection())
    assert find_switch(made_family("llama"), renderer) is None
    found = find_switch(family("llama"), renderer, thinking_given=True)
    assert found == Switch(("default",), "\n</Thinking>", "\n<Answer>\n", "", True)
