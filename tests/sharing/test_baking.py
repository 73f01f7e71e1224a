"""A merged folder answers in other programs as `sftkey generate` answers."""

import copy
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from sftkey.commands.sharing import merge
from sftkey.data.renderer import Renderer
from sftkey.data.sources import question_prompt
from sftkey.errors import FrameError
from sftkey.pipeline import open_run
from sftkey.recipe.schema import DataSection, ResponseSection
from sftkey.sharing.merging import (
    asked_ids,
    baked_generation_config,
    baked_template,
    with_template,
)
from tests.support.runs import STAGES, made_run

QUESTIONS = [f"How many legs do {n} cats have?" for n in range(2, 8)]
# It thinks by itself, unless it is told not to, and greets in the caller's name.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if name %}{{ name }}{% endif %}{% if thinks %}<think>\n{% endif %}{% endif %}"
)


def test_a_pipeline_gives_the_answers_of_generate(tmp_path: Path, tiny_folder: Path) -> None:
    """Six questions of six, nothing but the question handed over; and everybody may read them."""
    from transformers import pipeline

    folder, _ = made_run(tmp_path, tiny_folder, num_trained=1, stages=STAGES[:1])
    merge(folder, tmp_path / "merged")
    run = open_run(folder)
    expected = [run.ask(question).text for question in QUESTIONS]
    asked = pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")
    whole = {"return_full_text": False, "skip_special_tokens": False}
    written = [
        asked([{"role": "user", "content": question}], **whole)[0]["generated_text"]
        for question in QUESTIONS
    ]
    written = [text.removesuffix("<|im_end|>") for text in written]
    assert written == expected
    assert len(set(expected)) > 1
    modes = [file.stat().st_mode for file in (tmp_path / "merged").iterdir()]
    assert len(modes) > 4
    assert all(mode & stat.S_IROTH for mode in modes)


def made(tokenizer: Any, data: dict[str, Any], template: str | None = None, **kwargs: Any) -> Any:
    """Return a renderer and a section, and the tokenizer with the template that is made of them."""
    tokenizer = copy.deepcopy(tokenizer)
    if template:
        tokenizer.chat_template = template
    section = DataSection(**{"source": "my.jsonl", **data})
    renderer = Renderer.read(tokenizer, ResponseSection(), kwargs)
    return renderer, section, with_template(tokenizer, baked_template(renderer, section))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"system": "Say 'no', \"yes\" or {% raw %}\n{{ 1 }} ≤ 5 ☃ 🙂."},
        {"prompt": "Q: {question}\nThink, then answer.", "system": "You calculate."},
        {"prompt": "{question}\nAgain: {question}"},
        {"prompt": "{question}\n{options}", "system": "Choose."},
    ],
)
def test_the_template_writes_the_runs_prompt(tiny_tokenizer: Any, data: dict[str, Any]) -> None:
    """Of a question alone, and of the whole prompt that a row has."""
    renderer, section, baked = made(tiny_tokenizer, data)
    prompt = question_prompt(section, "2 + 2?")
    whole = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for messages in ([{"role": "user", "content": "2 + 2?"}], whole):
        assert asked_ids(baked, messages) == renderer.prompt_ids(prompt)


def test_a_row_may_have_a_system_message_of_its_own(tiny_tokenizer: Any) -> None:
    """The recipe's stands where none is given; every question of a conversation is put alike."""
    _, _, baked = made(tiny_tokenizer, {"system": "S", "prompt": "Q: {question}"})
    messages = [
        {"role": "system", "content": "Mine"},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Q: 2?"},
    ]
    text = baked.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nMine<|im_end|>\n<|im_start|>user\nQ: 1?<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nQ: 2?<|im_end|>\n"
    )


def test_variables_of_the_template_are_set_unless_the_caller_does(tiny_tokenizer: Any) -> None:
    """`enable_thinking: false` holds without being said again, and can be said otherwise."""
    _, _, baked = made(tiny_tokenizer, {}, THINKING, thinks=False)
    question = [{"role": "user", "content": "2?"}]
    settings = {"tokenize": False, "add_generation_prompt": True}
    assert baked.apply_chat_template(question, **settings).endswith("assistant\n")
    said = baked.apply_chat_template(question, thinks=True, name="A", **settings)
    assert said.endswith("assistant\nA<think>\n")


def test_a_plain_prompt_becomes_a_template(tiny_tokenizer: Any) -> None:
    """A base model's prompt, its begin of text too, is written of the question of a chat."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    section = DataSection(source="my.jsonl", prompt="Question: {question}\nAnswer:\n")
    renderer = Renderer.read(tokenizer, ResponseSection(frame="plain"))
    baked = with_template(tokenizer, baked_template(renderer, section))
    asked = [{"role": "user", "content": "2 + 2?"}]
    text = "Question: 2 + 2?\nAnswer:\n"
    assert (
        asked_ids(baked, asked) == renderer.prompt_ids(text) == [0, *renderer.prompt_ids(text)[1:]]
    )
    assert asked_ids(baked, [{"role": "user", "content": text}]) == renderer.prompt_ids(text)
    with pytest.raises(Exception, match="trained on single questions without a system message"):
        asked_ids(baked, [{"role": "system", "content": "S"}, *asked])


def test_a_template_that_cannot_carry_the_prompt_is_refused(tiny_tokenizer: Any) -> None:
    """What is written before it must not change what it does."""
    template = tiny_tokenizer.chat_template + "{{ '!' if sftkey is defined }}"
    with pytest.raises(FrameError) as raised:
        made(tiny_tokenizer, {"prompt": "Q: {question}"}, template)
    assert "the chat template can't carry the recipe's prompt: expected" in str(raised.value)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_is_as_it_was_measured(
    temperature: float, tmp_path: Path, tiny_folder: Path
) -> None:
    """Published sampling and penalties go; ends, length and the first token stay."""
    _, recipe = made_run(
        tmp_path, tiny_folder, num_trained=0, eval={"max_new_tokens": 9, "temperature": temperature}
    )
    from tests.support.runs import frame_of

    renderer = frame_of(recipe)
    published = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.8, repetition_penalty=1.2, eos_token_id=[0]
    )
    published.bos_token_id = 5
    config = baked_generation_config(published, renderer, recipe)
    config.save_pretrained(tmp_path / "config")  # refuses what contradicts itself
    assert config.eos_token_id == [renderer.end_id, 0]
    assert (config.max_new_tokens, config.repetition_penalty, config.bos_token_id) == (9, None, 5)
    assert config.do_sample is (temperature > 0)
    assert config.temperature == (temperature or None)
    assert config.top_p is None
