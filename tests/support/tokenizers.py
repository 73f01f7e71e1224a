"""Three kinds of tokenizers, trained in-process, and texts that are hard on them."""

import json
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sftkey.data.renderer import Renderer
from sftkey.recipe.schema import ResponseSection

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
TEXTS = [
    "How many legs do 3 cats and 2 birds have together?",
    "<Thinking>\n3 cats: 12\n2 birds: 4\n</Thinking>\n<Answer>\n16\n</Answer>",
    "<think>\nA pen costs 5 dollars, so 7 pens cost 35 dollars.\n</think>\n\n35",
    "\\boxed{\\frac{1}{2}}\n\n    def f(x):\n        return x\n",
    "user\nassistant\n<think>\n\n</think>\n\n12",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, a blank before the assistant's text, bos in the text
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
OPENED = (  # as R1's and Qwen3.5's: the prompt has opened the thinking
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def _trained(backend: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without any splitting, so that `>` merges with the line's end behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, _bpe_trainer(700))


def look_ahead() -> PreTrainedTokenizerFast:
    """BPE whose regular expression looks ahead at white space and digits, with NFC before it.

    Its post-processor trims blanks off the offsets, as GPT-2's does.
    """
    backend = Tokenizer(models.BPE())
    pattern = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, _bpe_trainer(450))


def _bpe_trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def unigram() -> PreTrainedTokenizerFast:
    """Unigram as SentencePiece makes it: a blank before the text, bytes for unknown characters.

    It sets `<s>` before a text by itself.
    """
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(
            vocab_size=480,
            special_tokens=[*SPECIAL, *byte_tokens],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    state = json.loads(backend.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in byte_tokens]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


KINDS = {"byte_level": byte_level, "look_ahead": look_ahead, "unigram": unigram}


@cache
def made(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of that kind with a chat template, always the same one."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = chat_template
    return tokenizer


HARD = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\r\n",
        "\t",
        "12345678901",
        "3.14, -7, 1,000",
        "\\boxed{\\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}}",
        "∑ᵢ xᵢ² ≤ ∞",
        "三只猫有十二条腿。",
        "قطة",
        "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{MICROSCOPE}",
        "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-6}",
        "e\N{COMBINING ACUTE ACCENT}",
        "\N{COMBINING LONG SOLIDUS OVERLAY}",
        "<Thinking>",
        "\n</Thinking>\n<Answer>\n",
        "</Answer>",
        "<think>",
        "</think>\n\n",
        "def f(x):\n    return x  # <b>\n",
        "<|im_",
        "cats",
    ]
)
TEXT = (
    st.lists(
        HARD
        # SentencePiece reads this sign as a blank.
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=6),
        max_size=5,
    )
    .map("".join)
    .filter(lambda text: not any(token in text for token in SPECIAL))
)

NATIVE = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
OPENED_NATIVE = ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", ""))
PLAIN = ResponseSection(frame="plain")
FRAMES = {
    "chatml": (CHATML, ResponseSection()),
    "llama2": (LLAMA2, ResponseSection()),
    "native": (CHATML, NATIVE),
    "opened": (OPENED, OPENED_NATIVE),
    "closed by the prefix": (OPENED, ResponseSection()),
    "plain": (None, PLAIN),
}


@cache
def framed(kind: str = "byte_level", frame: str = "chatml") -> Renderer:
    """Probe a made tokenizer with one of the frames."""
    template, section = FRAMES[frame]
    return Renderer.read(made(kind, template), section)
