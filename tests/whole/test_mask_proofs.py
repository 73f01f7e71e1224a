"""Masks are right on real tokenizers: two thousand hard rows for each, with each of its templates.

An oracle that only decodes judges every row, and tries in another way to build what was refused.
"""

from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken

from sftkey.checks.mask_proof import SYSTEM, Proof, judge, prove
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.tokenization import OWN_TAGS, tokenize
from sftkey.errors import FrameError
from sftkey.recipe.schema import ResponseSection
from tests.support.mask_table import SPECIAL_TEXT, num_refused_otherwise, table
from tests.support.real_tokenizers import NAMES, real_tokenizer
from tests.support.tokenizers import LLAMA2, TEXT

NUM_ROWS = 2000
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OWN = "its own"
PLAIN = "plain"
WRITTEN = {  # by a user, for a tokenizer that has none
    "[INST]": LLAMA2,
    "ROLE:": "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}
RESPONSES = {
    "<Thinking>": ResponseSection(),
    "<think>": ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", "")),
    "</think>": ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", "")),
    "channels": ResponseSection(
        thinking=("<|channel|>analysis<|message|>", "<|end|>"),
        answer=("<|start|>assistant<|channel|>final<|message|>", ""),
    ),
}
IM_END, EOT = "<|im_end|>", "<|eot_id|>"
DEEPSEEK_END = "<\uff5cend▁of▁sentence\uff5c>"  # full-width bars
EMPTY_THINKING = "<think>\n\n</think>\n\n"
NO_THINKING = {"enable_thinking": False}
DATED = {"date_string": "1 Jan 2026"}
# Phi-3's vocabulary is Llama 2's and these, which swallow the white space behind them.
PHI3 = tuple(
    AddedToken(token, special=True, rstrip=True)
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
)
GEMMA4 = tuple(AddedToken(token, special=True) for token in ("<|turn>", "<turn|>", "<|think|>"))


@dataclass(frozen=True)
class Pair:
    """A tokenizer and a template, and the frame that they must give.

    Args:
        tokenizer: Its name in `real_tokenizers`.
        template: Its own, one of TRL's, one of `WRITTEN`, or none: `plain`.
        end: What ends a turn.
        bridge: What the template writes between prompt and completion.
        response: The name of the tags.
        kwargs: Handed to the template.
        added: Special tokens that the tokenizer lacks: a copy of it gets them.
    """

    tokenizer: str
    template: str
    end: str
    assistant_prefix: str = ""
    response: str = "<Thinking>"
    kwargs: dict[str, Any] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()

    def __str__(self) -> str:
        return f"{self.tokenizer} + {self.template_in_words}, {self.response}"

    @property
    def template_in_words(self) -> str:
        """The template, what it is handed, and whether tokens were added for it."""
        words = [self.template, *(f"{key}={value}" for key, value in self.kwargs.items())]
        return ", ".join([*words, *(["tokens added"] if self.added else [])])

    def dressed(self) -> Any:
        """Return a copy of the tokenizer with the template."""
        tokenizer = (deepcopy if self.added else copy)(real_tokenizer(self.tokenizer))
        if self.added:
            tokenizer.add_special_tokens({"extra_special_tokens": list(self.added)})
        if self.template in WRITTEN:
            tokenizer.chat_template = WRITTEN[self.template]
        elif self.template == PLAIN:
            tokenizer.chat_template = None
        elif self.template != OWN:
            file = TEMPLATES / f"{self.template}.jinja"
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        return tokenizer

    def section(self) -> ResponseSection:
        """Return the recipe's section."""
        plain = {"frame": "plain", "end": self.end} if self.template == PLAIN else {}
        return RESPONSES[self.response].model_copy(update=plain)

    def renderer(self) -> Renderer:
        """Probe the tokenizer."""
        return Renderer.read(self.dressed(), self.section(), self.kwargs)


PAIRS = [
    Pair("qwen3", OWN, IM_END, EMPTY_THINKING),
    Pair("qwen3", OWN, IM_END, kwargs=NO_THINKING),
    Pair("qwen3", OWN, IM_END, response="<think>"),
    Pair("qwen3", "qwen2_5", IM_END),
    Pair("qwen3", "qwen3_instruct_2507", IM_END),
    Pair("qwen3", "qwen3_5_think", IM_END, response="</think>"),
    Pair("qwen3", "qwen3_5_think", IM_END, "\n</think>\n\n"),
    Pair("qwen3", "nemotron_3_nano", IM_END, response="</think>"),
    Pair("qwen3", PLAIN, "<|endoftext|>"),
    Pair("llama2", "[INST]", "</s>", " "),
    Pair("llama2", "phi3", "<|end|>", added=PHI3),
    Pair("llama2", "phi3", "<|end|>", response="</think>", added=PHI3),
    Pair("llama2", PLAIN, "</s>"),
    Pair("llama3", OWN, EOT),
    Pair("llama3_1", OWN, EOT),
    Pair("llama3_1", "llama3_2", EOT, kwargs=DATED),
    Pair("llama3_1", PLAIN, "<|end_of_text|>"),
    Pair("gemma3", OWN, "<end_of_turn>"),
    Pair("gemma3", "gemma", "<end_of_turn>"),
    Pair("gemma3", "gemma4", "<turn|>", added=GEMMA4),
    Pair("deepseek_v3", OWN, DEEPSEEK_END),
    Pair("deepseek_v3", "deepseekv3", DEEPSEEK_END, response="</think>"),
    Pair("deepseek", "deepseek_r1_distill", DEEPSEEK_END, response="</think>"),
    Pair("deepseek", PLAIN, DEEPSEEK_END),
    Pair("smollm2", OWN, IM_END),
    Pair("smollm2", "ROLE:", IM_END, " "),
    Pair("smollm2", PLAIN, "<|endoftext|>"),
    Pair("gptoss", "gptoss", "<|return|>", response="channels"),
    Pair("gptoss", "gptoss", "<|return|>", "<|channel|>final<|message|>"),
]


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
ANY_TEXT = st.tuples(TEXT, UNICODE).map("".join)


@pytest.fixture(scope="module")
def proofs(request: pytest.FixtureRequest) -> Iterator[list[tuple[Pair, Proof]]]:
    """Gather the proofs, and print the table of them in the end, whether tests pass or not."""
    found: list[tuple[Pair, Proof]] = []
    yield found
    columns = ("rows", "right", "refused: special text", "own tags", "else", "wrong")
    table = Table("tokenizer", "template", "response", title="Masks of hard rows")
    for column in columns:
        table.add_column(column, justify="right")
    for pair, proof in found:
        refused = [num_refused(proof, SPECIAL_TEXT), num_refused(proof, OWN_TAGS)]
        refused.append(num_refused_otherwise(proof))
        numbers = [proof.rows, proof.right, *refused, len(proof.wrong)]
        words = (pair.tokenizer, pair.template_in_words, pair.response)
        table.add_row(*words, *map(str, numbers))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        Console(width=130).print("", table)


def num_refused(proof: Proof, why: str) -> int:
    """Count the rows that were refused for what a text holds of the frame's own."""
    return sum(count for reason, count in proof.refused.items() if why in reason)


@pytest.mark.network
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_hard_rows_are_right(pair: Pair, proofs: list[tuple[Pair, Proof]]) -> None:
    """The frame is the one expected, no row is wrong, and few are refused but for its own texts."""
    renderer = pair.renderer()
    assert (renderer.assistant_prefix, renderer.end) == (pair.assistant_prefix, pair.end)
    assert renderer.end_id == renderer.tokenizer.convert_tokens_to_ids(pair.end)
    proof = prove(renderer, NUM_ROWS, seed=6)
    proofs.append((pair, proof))
    assert [(wrong.what, wrong.example) for wrong in proof.wrong[:3]] == []
    assert proof.rows == NUM_ROWS == proof.right + sum(proof.refused.values())
    assert num_refused_otherwise(proof) <= NUM_ROWS / 100
    assert 0 < num_refused(proof, SPECIAL_TEXT) < NUM_ROWS / 25
    assert num_refused(proof, OWN_TAGS) < NUM_ROWS / 5


def test_there_are_pairs_enough() -> None:
    """Eighteen at least, each once, with every tokenizer that the tests fetch."""
    assert len({str(pair) for pair in PAIRS}) == len(PAIRS) >= 18
    assert {pair.tokenizer for pair in PAIRS} == set(NAMES)
    assert {pair.response for pair in PAIRS} == RESPONSES.keys()


@pytest.mark.network
@pytest.mark.parametrize("number", range(0, len(PAIRS), 4))
@settings(max_examples=60)
@given(prompt=ANY_TEXT, thinking=ANY_TEXT, answer=ANY_TEXT)
def test_any_text_is_right(number: int, prompt: str, thinking: str, answer: str) -> None:
    """Whatever Unicode has, a row is right, or can't be built in another way either."""
    renderer = framed(number)
    example = Example(f"Q{prompt}", thinking, answer, 0)
    assert judge(renderer, [example], tokenize([example], renderer)).wrong == []


@cache
def framed(number: int) -> Renderer:
    """Return the frame of a pair, always the same one."""
    return PAIRS[number].renderer()


OTHER_TEMPLATE = "give a model.chat_template of your own"
NO_END = (
    "expected a special token that ends a turn, the chat template writes {!r}, "
    "which holds none of this tokenizer's\nhint: a base model takes response.frame: plain; "
    "else give a model.chat_template whose turns end with a special token"
)
NO_TEMPLATE = (
    "expected a chat template, the tokenizer has none\n"
    "hint: a base model takes response.frame: plain; else give model.chat_template"
)
NO_PREFIX = (
    "the generation prompt is no prefix of the training text: "
    "one goes on with '<think>\\n', the other with ''\n"
    'hint: the prompt opens the thinking: response.thinking: ["", "\\n</think>"]; '
    f"or {OTHER_TEMPLATE}"
)


@pytest.mark.network
@pytest.mark.parametrize(
    ("pair", "what"),
    [
        (Pair("deepseek", "deepseek_r1_distill", DEEPSEEK_END), NO_PREFIX),
        (Pair("deepseek_v3", "deepseekv3", DEEPSEEK_END), NO_PREFIX),
        (
            Pair("qwen3", "qwen3_5_think", IM_END, response="<think>"),
            "the generation prompt opens the thinking already: "
            "'<|im_start|>assistant\\n<think>\\n'\n"
            'hint: response.thinking: ["", "\\n</think>"]',
        ),
        (
            Pair("qwen3", OWN, IM_END, response="<think>", kwargs=NO_THINKING),
            "the generation prompt ends the thinking already: "
            "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'\n"
            "hint: model.chat_template_kwargs: {enable_thinking: true}, "
            "where the template knows it",
        ),
        (Pair("llama2", "qwen2_5", IM_END), NO_END.format("<|im_end|>\n")),
        (Pair("llama3_1", "qwen3", IM_END, EMPTY_THINKING), NO_END.format("<|im_end|>\n")),
        (Pair("gptoss", "qwen2_5", IM_END), NO_END.format("<|im_end|>\n")),
        (Pair("smollm2", "llama3", EOT), NO_END.format(EOT)),
        (
            Pair("qwen3", "llama3", EOT),
            "the chat template raises on a question and its answer: 'bos_token' is undefined\n"
            "hint: give another model.chat_template",
        ),
        (Pair("smollm2", "gemma", "<end_of_turn>"), NO_END.format("<end_of_turn>\n")),
        (Pair("qwen3", "glm4moe", IM_END), NO_END.format("")),
        (Pair("llama2", OWN, "</s>"), NO_TEMPLATE),
        (Pair("deepseek", OWN, DEEPSEEK_END), NO_TEMPLATE),
        (
            Pair("llama2", PLAIN, "<|endoftext|>"),
            "expected one special token that ends a text, got '<|endoftext|>'\n"
            "hint: response.end: one of <unk>, <s>, </s>",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Pair) else "refused",
)
def test_pair_is_refused(pair: Pair, what: str) -> None:
    """A tokenizer and a template that don't fit are refused with the reason and the way out."""
    with pytest.raises(FrameError) as raised:
        pair.renderer()
    assert str(raised.value) == f"{real_tokenizer(pair.tokenizer).name_or_path}: {what}"


@pytest.mark.network
def test_template_that_takes_no_system_message_says_so() -> None:
    """Gemma's first template raises; nothing of the data's system message gets lost on the way."""
    renderer = Pair("gemma3", "gemma", "<end_of_turn>").renderer()
    with pytest.raises(FrameError) as raised:
        renderer.prompt_text((SYSTEM, {"role": "user", "content": "Q"}))
    assert str(raised.value) == (
        f"{renderer.tokenizer.name_or_path}: the chat template raises on the system message: "
        "System role not supported\n"
        "hint: write it into data.prompt, or choose another model.chat_template"
    )


KNOWN = {  # ids that a model's published vocabulary is known by
    "qwen3": {"Ġthe": 279, IM_END: 151645},
    "llama2": {"▁the": 272, "▁of": 302},  # Mistral 7B v0.1's: `▁the` of Llama 2 is 278
    "llama3_1": {"Ġthe": 279, EOT: 128009},
    "gemma3": {"<end_of_turn>": 106},
    "gptoss": {"<|return|>": 200002},
}


@pytest.mark.network
@pytest.mark.parametrize("name", KNOWN)
def test_a_package_holds_the_vocabulary_that_the_docs_name(name: str) -> None:
    """Whatever the package is called."""
    tokens = list(KNOWN[name])
    assert real_tokenizer(name).convert_tokens_to_ids(tokens) == list(KNOWN[name].values())


@pytest.mark.network
def test_the_table_of_the_docs_is_what_its_command_gives() -> None:
    """Families by invariants, over all recipes."""
    text = (Path(__file__).parents[2] / "docs" / "masks.md").read_text(encoding="utf-8")
    assert [line for line in table() if line not in text] == []
