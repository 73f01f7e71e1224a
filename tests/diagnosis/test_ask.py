"""A model is asked after three thinkings: what it reads, what is judged, what is scored."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.tokenization import Row, tokenize
from sftkey.diagnosis.ask import (
    AskedRow,
    KeyContext,
    ask,
    asked_rows,
    key_losses,
    num_thinking_tokens,
)
from sftkey.errors import FrameError
from sftkey.generation.key_switch import find_switch
from sftkey.models.key_pass import KEY, acting
from sftkey.recipe.schema import EvalSection, ResponseSection
from tests.support.models import EQUAL

EXAMPLES = [
    Example("How many legs do 3 cats have?", "3 cats: 12", "12", 0),
    Example("And 2 birds together with them?", "2 birds: 4\n12 + 4", "16", 1),
    Example("Count on from 7.", "7 + 1 = 8\n8 + 1 = 9\n9 + 1 = 10", "10", 2),
]
REFERENCE, NONE, OWN = "<Thinking>\n{}\n</Thinking>", "<Thinking>\n\n</Thinking>", "I guess"
KEY_TEXT = "\n<Answer>\n{}\n</Answer><|im_end|>"


@pytest.fixture
def renderer(tiny_tokenizer: Any) -> Renderer:
    """Return the frame of the tests' tokenizer."""
    return Renderer.read(tiny_tokenizer, ResponseSection())


def made(renderer: Renderer) -> list[AskedRow]:
    """Cut the rows of the examples."""
    rows = [vars(row) for row in tokenize(EXAMPLES, renderer) if isinstance(row, Row)]
    return asked_rows(EXAMPLES, rows, renderer)


SETTINGS = EvalSection(grader="number", max_new_tokens=64, batch_size=2)


def summed(model: Any, context: KeyContext) -> float:
    """Score a key alone, from all logits of one row."""
    ids = torch.tensor([context.before + context.key])
    with torch.no_grad():
        losses = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    places = range(len(context.before) - 1, ids.shape[1] - 1)
    return -sum(float(losses[place, ids[0, place + 1]]) for place in places)


def test_rows_are_cut_where_the_thinking_ends(renderer: Renderer) -> None:
    """Before a key stand the ids of the training row, or those of the row without thinking."""
    rows = tokenize(EXAMPLES, renderer)
    for example, row, each in zip(EXAMPLES, rows, made(renderer), strict=True):
        assert isinstance(row, Row)
        assert each.reference.before + each.reference.key == row.input_ids
        assert each.prompt == renderer.prompt_ids(example.prompt)
        prompt = renderer.prompt_text(example.prompt)
        texts = {"reference": REFERENCE.format(example.thinking), "none": NONE}
        for name, text in texts.items():
            context = getattr(each, name)
            before, key = (renderer.tokenizer.decode(ids) for ids in (context.before, context.key))
            assert before == prompt + text
            assert key == KEY_TEXT.format(example.answer)


@pytest.mark.parametrize(
    ("written", "thinking"),
    [
        ("<Thinking>\nIt is 4.\n</Thinking>\n<Answer>\n4", "<Thinking>\nIt is 4.\n</Thinking>"),
        ("4</Thinking> and </Thinking>", "4</Thinking>"),
        ("<Thinking>\nIt is 4, and", None),
        ("", None),
    ],
)
def test_own_thinking_ends_with_its_closing_tag(
    written: str, thinking: str | None, renderer: Renderer
) -> None:
    """The ids up to the token that completes the tag are the thinking; an open one has no end."""
    ids = renderer.tokenizer(written, add_special_tokens=False)["input_ids"]
    found = num_thinking_tokens(ids, renderer)
    assert (None if found is None else renderer.tokenizer.decode(ids[:found])) == thinking


def test_without_tags_nothing_can_be_asked(tiny_tokenizer: Any) -> None:
    """Where no tag ends a thinking, the error says which."""
    section = ResponseSection(thinking=("", ""), answer=("\n\n", ""))
    with pytest.raises(FrameError) as caught:
        asked_rows([], [], Renderer.read(tiny_tokenizer, section))
    assert str(caught.value) == (
        "response.thinking: expected a closing tag, or an opening tag of the answer; both are "
        "empty, so that nothing tells where a thinking ends\nhint: write one of them"
    )


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("batch_tokens", [4096, 120])
def test_a_key_alone_is_scored(
    batch_tokens: int, tiny_model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded batches give each row's sum over its key's tokens, and over no other token."""
    monkeypatch.setattr("sftkey.diagnosis.ask.BATCH_TOKENS", batch_tokens)
    asked = made(renderer)
    contexts = [getattr(each, name) for each in asked for name in ("reference", "none")]
    contexts += [KeyContext(asked[0].prompt, asked[0].reference.key), KeyContext([5], [7, 8])]
    model = tiny_model.train()
    found = key_losses(model, contexts)
    assert model.training
    expected = [summed(model.eval(), context) for context in contexts]
    assert found == pytest.approx(expected, rel=EQUAL)


@pytest.mark.usefixtures("in_float64")
def test_a_token_has_its_place_in_its_own_row(renderer: Renderer) -> None:
    """What fills a batch up takes no place: learned positions would show it, rotary ones don't."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(renderer.tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.normal_()
    contexts = [each.reference for each in made(renderer)] + [KeyContext([5], [7, 8])]
    assert len({len(context.before) for context in contexts}) == 4
    expected = [summed(model, context) for context in contexts]
    assert key_losses(model, contexts) == pytest.approx(expected, rel=EQUAL)


@pytest.mark.usefixtures("in_float64")
def test_a_key_adapter_reads_the_key_alone(tiny_model: Any, renderer: Renderer) -> None:
    """The context is read by the adapters that wrote it, its last token and the key by both."""
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(tiny_model, lora)
    model.add_adapter(KEY, lora)
    model.eval()
    asked = made(renderer)
    contexts = [each.reference for each in asked]
    switch = find_switch(model, renderer, thinking_given=True)
    found = key_losses(model, contexts, switch)
    expected = []
    for context in contexts:
        with torch.no_grad(), acting(model, ["default"]):
            cache = model(input_ids=torch.tensor([context.before[:-1]])).past_key_values
        tail = torch.tensor([[context.before[-1], *context.key]])
        with torch.no_grad(), acting(model, ["default", KEY]):
            logits = model(input_ids=tail, past_key_values=cache).logits[0, :-1]
        labels = torch.tensor(context.key)
        expected.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    assert found == pytest.approx(expected, rel=EQUAL)
    for names in (["default"], ["default", KEY]):
        with acting(model, names):
            assert found != pytest.approx([summed(model, each) for each in contexts], rel=1e-3)


def scripted(renderer: Renderer, answers: Callable[[str], str]) -> Callable[..., torch.Tensor]:
    """Make a `generate` that writes what a function says after a text."""
    tokenizer = renderer.tokenizer

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows: list[Sequence[int]] = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            text = answers(tokenizer.decode(ids[mask]))
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        length = max(map(len, rows))
        padded = [[*row, *[renderer.end_id] * (length - len(row))] for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    return generate


@pytest.mark.usefixtures("in_float64")
def test_each_condition_is_judged_by_what_it_wrote(
    tiny_model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the reference's thinking alone; after its own one is unparsed, and wrong."""

    def answers(text: str) -> str:
        (example,) = (each for each in EXAMPLES if f"{each.prompt}<" in text)
        if text.endswith(REFERENCE.format(example.thinking)):
            return KEY_TEXT.format(example.answer)
        if text.endswith(NONE):
            return KEY_TEXT.format("0")
        assert text.endswith("<|im_start|>assistant\n")
        if example.index == 0:
            return "I don't know.<|im_end|>"
        return REFERENCE.format(OWN) + KEY_TEXT.format(example.answer if example.index == 1 else 3)

    monkeypatch.setattr(tiny_model, "generate", scripted(renderer, answers))
    asked, seen = made(renderer), []
    outcomes = ask(tiny_model, renderer, asked, SETTINGS, lambda *done: seen.append(done))
    right = {name: [row.right for row in rows] for name, rows in outcomes.items()}
    assert right == {"own": [False, True, False], "reference": [True] * 3, "none": [False] * 3}
    assert [row.parsed for row in outcomes["own"]] == [False, True, True]
    assert all(row.stopped for rows in outcomes.values() for row in rows)
    assert seen == [*(("own", n, 3) for n in range(1, 4)), *(("given", n, 6) for n in range(1, 7))]

    own = renderer.tokenizer(REFERENCE.format(OWN), add_special_tokens=False)["input_ids"]
    contexts = {
        "own": [None, *(KeyContext([*e.prompt, *own], e.reference.key) for e in asked[1:])],
        "reference": [each.reference for each in asked],
        "none": [each.none for each in asked],
    }
    for name, rows in outcomes.items():
        for row, each, context in zip(rows, asked, contexts[name], strict=True):
            assert row.nats == (
                None if context is None else pytest.approx(summed(tiny_model, context), rel=EQUAL)
            )
            assert row.num_tokens == len(each.reference.key)


def test_a_response_that_goes_on_has_never_stopped(
    tiny_model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the end of turn in its tokens a response is one that went on."""
    lengths = []

    def generate(input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        lengths.append(generation_config.max_new_tokens)
        return torch.cat([input_ids, torch.full((len(input_ids), 4), 5)], dim=1)

    monkeypatch.setattr(tiny_model, "generate", generate)
    asked = made(renderer)
    outcomes = ask(tiny_model, renderer, asked, SETTINGS)
    assert not any(row.stopped or row.right for rows in outcomes.values() for row in rows)
    longest = max(len(each.reference.key) for each in asked)
    assert lengths == [64, 64, *[longest + 8] * 3]
