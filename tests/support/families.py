"""The model families of recipes/: their chat templates, what ends a turn, tokenizers for them.

Where TRL ships a family's template, that one is taken. The others are written here, after the
format that the model's card or tokenizer_config.json documents, without tools and documents.
"""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken

from tests.support.real_tokenizers import real_tokenizer
from tests.support.tokenizers import KINDS

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# What the templates write as one token of their families' vocabularies.
CONTROL = re.compile(
    r"<\|[^|<>'\"{}]+\|>|<\uff5c[^\uff5c<>'\"{}]+\uff5c>|<(?:start|end)_of_turn>|<(?:bos|eos)>"
)
CHATML_OF_SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_4_MINI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Llama 3's without a date: a system part, empty where there is no message for it.
NEMOTRON = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}"
    "<|eot_id|>{% for m in messages if m['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'].split('</think>')[-1].lstrip() if m['role'] == 'assistant' "
    "else m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ROLES_IN_BARS = (  # OLMo 2's, as Tulu's: only an assistant's turn has an end
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FALCON_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (  # TinyLlama's
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today: ' "
    "+ strftime_now('%B %d, %Y') + '<|end_of_text|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: Models of one name share tokenizer and template.
        end: The token that ends an answer.
        stops: What the published generation config stops at, beside it.
        template: The name of one of TRL's, or Jinja; None for a base model's plain frame.
        real: The tokenizer of `real_tokenizers` that has this family's vocabulary.
        kind: The kind of tokenizer that stands in for it.
        eos: What templates know as `eos_token`, if not `end`.
        bos: What templates know as `bos_token`, if they know one.
        swallowing: Whether control tokens swallow the white space behind them.
        others: Tokens of the family that no template of it shows as a whole.
    """

    name: str
    end: str
    stops: tuple[str, ...] = ()
    template: str | None = None
    real: str | None = None
    kind: str = "look_ahead"
    eos: str | None = None
    bos: str | None = None
    swallowing: bool = False
    others: tuple[str, ...] = ()

    @property
    def jinja(self) -> str | None:
        """The text of the template."""
        if self.template is None or "{" in self.template:
            return self.template
        return (TRL_TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")

    def standing_in(self) -> Any:
        """Return a tokenizer trained in-process, with this family's control tokens and template."""
        tokenizer = KINDS[self.kind]()
        found = {*CONTROL.findall(self.jinja or ""), self.end, *self.stops, *self.others}
        new = sorted({*found, self.bos or self.end, self.eos or self.end} - {"<s>", "</s>"})
        tokens = [AddedToken(token, special=True, rstrip=self.swallowing) for token in new]
        tokenizer.add_special_tokens({"extra_special_tokens": tokens})
        return self._dressed(tokenizer)

    @cache  # noqa: B019 (families live as long as the tests, and loading takes seconds)
    def real_one(self) -> Any:
        """Return the family's published tokenizer with its template, always the same one."""
        assert self.real is not None
        tokenizer = deepcopy(real_tokenizer(self.real))
        if self.name == "DeepSeek R1 distilled":  # Qwen's vocabulary, control tokens of its own
            assert self.bos is not None  # the template writes it as a variable
            tokens = sorted({*CONTROL.findall(self.jinja or ""), self.bos, self.end})
            tokenizer.add_special_tokens({"extra_special_tokens": tokens})
        if self.name == "Mistral":  # version 0.1's vocabulary; 0.3 has these tokens more
            tokenizer.add_special_tokens({"extra_special_tokens": ["[INST]", "[/INST]"]})
        return self._dressed(tokenizer)

    def _dressed(self, tokenizer: Any) -> Any:
        tokenizer.eos_token = self.eos or self.end
        tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.jinja
        return tokenizer

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write what a model folder holds beside the weights."""
        tokenizer.save_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids([self.end, *self.stops])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


QWEN_2_5 = Family("Qwen2.5", "<|endoftext|>", real="qwen3")
QWEN_3 = Family("Qwen3", "<|im_end|>", ("<|endoftext|>",), "qwen3", "qwen3")
LLAMA_3_2 = Family(
    "Llama 3.2",
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eom_id|>"),
    "llama3_2",
    "llama3_1",
    bos="<|begin_of_text|>",
)
SMOLLM2 = Family("SmolLM2", "<|im_end|>", (), CHATML_OF_SMOLLM2, "smollm2", bos="<|im_start|>")
FAMILIES = {  # by the folder of recipes/
    "deepseek-r1-distill-qwen-1.5b": Family(
        "DeepSeek R1 distilled",
        "<\uff5cend▁of▁sentence\uff5c>",
        (),
        "deepseek_r1_distill",
        "qwen3",
        bos="<\uff5cbegin▁of▁sentence\uff5c>",
    ),
    "falcon3-1b-instruct": Family("Falcon 3", "<|endoftext|>", (), FALCON_3),
    "gemma-3-1b-it": Family(
        "Gemma 3", "<end_of_turn>", ("<eos>",), "gemma3", "gemma3", bos="<bos>", eos="<eos>"
    ),
    "gemma-3-270m": Family("Gemma 3", "<eos>", real="gemma3", bos="<bos>", eos="<eos>"),
    "gpt-oss-20b": Family(
        "gpt-oss",
        "<|return|>",
        ("<|endoftext|>", "<|call|>"),
        "gptoss",
        "gptoss",
        bos="<|startoftext|>",
    ),
    "granite-3.3-2b-instruct": Family(
        "Granite 3.3", "<|end_of_text|>", (), GRANITE, bos="<|end_of_text|>"
    ),
    "lfm2-1.2b": Family("LFM2", "<|im_end|>", (), "lfm2_v2", bos="<|startoftext|>"),
    "llama-3.2-1b-instruct": LLAMA_3_2,
    "llama-3.2-3b-instruct": LLAMA_3_2,
    "mistral-7b-instruct-v0.3": Family(
        "Mistral", "</s>", (), MISTRAL, "llama2", kind="unigram", bos="<s>"
    ),
    "nemotron-nano-4b": Family(
        "Nemotron Nano",
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>"),
        NEMOTRON,
        "llama3_1",
        bos="<|begin_of_text|>",
    ),
    "olmo-2-1b-instruct": Family("OLMo 2", "<|endoftext|>", (), ROLES_IN_BARS, bos="<|endoftext|>"),
    "phi-4-mini-instruct": Family(
        "Phi-4-mini",
        "<|end|>",
        ("<|endoftext|>",),
        PHI_4_MINI,
        eos="<|endoftext|>",
        bos="<|endoftext|>",
        swallowing=True,
        others=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "qwen2.5-1.5b": QWEN_2_5,
    "qwen2.5-3b": QWEN_2_5,
    "qwen2.5-7b": QWEN_2_5,
    "qwen3-4b": QWEN_3,
    "qwen3-8b": QWEN_3,
    "qwen3-8b-base": Family("Qwen3", "<|endoftext|>", real="qwen3"),
    "smollm2-1.7b-instruct": SMOLLM2,
    "smollm2-135m": SMOLLM2,
    "smollm3-3b-base": Family(
        "SmolLM3", "<|end_of_text|>", (), None, "llama3_1", bos="<|begin_of_text|>"
    ),
    "tinyllama-1.1b-chat": Family("TinyLlama", "</s>", (), ZEPHYR, "llama2", "unigram", bos="<s>"),
}
