"""What a model folder must say so that other programs ask the model as its run asked it.

A run's recipe holds a system message, the text around a question, variables of the chat template
and how answers are generated. A folder has two places for them: its chat template, and its
generation config.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sftkey.data.renderer import Renderer, render, stop_ids
from sftkey.data.response import as_messages
from sftkey.data.sources import question_prompt
from sftkey.errors import FrameError
from sftkey.generation.generate import generation_config
from sftkey.recipe.schema import DataSection, Recipe

QUESTION = "How many are 2 and 2?"


def baked_template(renderer: Renderer, data: DataSection) -> str:
    """Return a chat template that makes the run's prompt of a user's question alone.

    Messages that have all of it already, a row's own system message for one, stay as they are.

    Args:
        renderer: The run's.
        data: The recipe's section: its `system`, and the text that `prompt` has around a question.

    Raises:
        FrameError: The template doesn't write the run's prompt.
    """
    pieces = _text_around(data)
    if renderer.kind == "plain":
        template = _plain_template(renderer, pieces)
    else:
        own = renderer.tokenizer.get_chat_template()
        template = _defaults(renderer.chat_template_kwargs)
        template += _system(data.system) + _around(pieces) + own
    _prove(renderer, data, template)
    return template


def _text_around(data: DataSection) -> list[str]:
    """Return the recipe's text before a question, after it, and between where it stands twice."""
    prompt = question_prompt(data, QUESTION)
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text.split(QUESTION)


def _defaults(variables: Any) -> str:
    """Set variables of the template where the caller doesn't."""
    return "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    )


def _system(system: str | None) -> str:
    """Put a system message before messages that have none."""
    if system is None:
        return ""
    message = f"[{{'role': 'system', 'content': {_literal(system)}}}]"
    return (
        "{%- if messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{%- set messages = {message} + messages %}}{{%- endif %}}"
    )


def _around(pieces: list[str]) -> str:
    """Put the recipe's text around each question that hasn't got it."""
    if not any(pieces):
        return ""
    content = "message['content']"
    return (
        "{%- set sftkey = namespace(messages=[]) %}{%- for message in messages %}"
        f"{{%- if message['role'] == 'user' and {content} is string"
        f" and not {_is_whole(content, pieces)} %}}"
        "{%- set message = {'role': 'user', 'content': "
        f"{_put_around(content, pieces)}}} %}}{{%- endif %}}"
        "{%- set sftkey.messages = sftkey.messages + [message] %}{%- endfor %}"
        "{%- set messages = sftkey.messages %}"
    )


def _put_around(content: str, pieces: list[str]) -> str:
    """Join in Jinja what stands around a question with the question itself."""
    return "(" + f" ~ {content} ~ ".join(map(_literal, pieces)) + ")"


def _is_whole(content: str, pieces: list[str]) -> str:
    """Ask in Jinja whether a message's content has the text around a question already."""
    before, *between, after = pieces
    conditions = [
        f"{content}.startswith({_literal(before)})",
        f"{content}.endswith({_literal(after)})",
        *(f"{_literal(text)} in {content}" for text in between),
        f"{content} | length > {len(''.join(pieces))}",
    ]
    return f"({' and '.join(conditions)})"


def _plain_template(renderer: Renderer, pieces: list[str]) -> str:
    """Write a template for a model that was trained without one: the question, and nothing else."""
    tokens = renderer.tokenizer.convert_ids_to_tokens(list(renderer.bos_ids))
    bos = "".join(map(str, tokens))
    text = content = "messages[0]['content']"
    if any(pieces):
        whole = _is_whole(content, pieces)
        text = f"({content} if {whole} else {_put_around(content, pieces)})"
    refusal = "this model was trained on single questions without a system message"
    template = (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' %}"
        f"{{{{- raise_exception({_literal(refusal)}) }}}}{{%- endif %}}{{%- set text = {text} %}}"
    )
    if bos:
        first = str(renderer.tokenizer.bos_token or bos)
        template += (
            f"{{%- if not text.startswith({_literal(first)}) %}}"
            f"{{{{- {_literal(bos)} }}}}{{%- endif %}}"
        )
    return template + "{{- text }}"


def _literal(value: Any) -> str:
    """Write a value as Jinja reads it."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with another chat template."""
    other: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def asked_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]
) -> list[int]:
    """Return the ids that a program without our code feeds for a question or messages."""
    text = render(tokenizer, as_messages(prompt), {})
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _prove(renderer: Renderer, data: DataSection, template: str) -> None:
    """Compare what a question, and the run's whole prompt, become with what the run feeds."""
    baked = with_template(renderer.tokenizer, template)
    prompt = question_prompt(data, QUESTION)
    wanted = renderer.prompt_ids(prompt)
    for asked in (QUESTION, prompt):
        ids = asked_ids(baked, asked)
        if ids != wanted:
            got = renderer.tokenizer.decode(ids)
            raise FrameError(
                renderer.tokenizer.name_or_path or "tokenizer",
                f"the chat template can't carry the recipe's prompt: expected "
                f"{renderer.tokenizer.decode(wanted)!r}; got {got!r}",
                "serve the adapter beside its base, with the prompts of `sftkey prompts RUN`",
            )


def baked_generation_config(
    published: GenerationConfig, renderer: Renderer, recipe: Recipe
) -> GenerationConfig:
    """Return a generation config that answers as the run's evaluation did.

    Ends and first token are the published ones of the base, beside the run's own end of turn.
    """
    settings = recipe.eval
    config = generation_config(
        renderer.tokenizer,
        stop_ids(renderer, published.eos_token_id),
        settings.max_new_tokens,
        settings.temperature,
    )
    config.bos_token_id = published.bos_token_id
    return config
