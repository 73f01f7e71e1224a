"""What preparing rows costs: TRL's own preparation and sftkey's, on the same rows and all cores.

    python tests/benchmarks/tokenizing.py [--rows 2000] [--repeats 5]

Tokenizer and rows are made in-process, the chat template is Llama 3's: nothing is downloaded. TRL
is measured in one process, as it is by default, and with one on each core; the faster one counts.
"""

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import trl
from datasets import Dataset, disable_progress_bars
from measuring import Bar, Spread, alternate
from models import SHAPES, made_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.row_cache import tokenized_rows
from sftkey.recipe.schema import ResponseSection

NUM_ROWS = 2000
MAX_LENGTH = 1024
# Llama 3's way of splitting a text before it is tokenized.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SYLLABLES = [
    "ka",
    "lo",
    "min",
    "tra",
    "ser",
    "pen",
    "dol",
    "gar",
    "vi",
    "tu",
    "os",
    "ra",
    "bel",
    "qui",
    "st",
    "er",
    "an",
    "ing",
    "ed",
    "ment",
]
COMMON = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "each",
    "has",
    "how",
    "many",
    "if",
    "then",
    "so",
    "there",
    "are",
    "total",
    "after",
    "gives",
]


def made_examples(num_rows: int) -> list[Example]:
    """Make word problems of GSM8K's lengths and longer, with words that nobody knows."""
    dice = random.Random(0)
    rare = ["".join(dice.choices(SYLLABLES, k=dice.randint(1, 4))) for _ in range(3000)]

    def sentence(most: int) -> str:
        words = [
            dice.choice((*COMMON, *dice.choices(rare, k=20), str(dice.randrange(1000))))
            for _ in range(dice.randint(5, most))
        ]
        return f"{' '.join(words).capitalize()}."

    def step() -> str:
        first, second = dice.randrange(1000), dice.randrange(1000)
        total = f"{first}+{second}={first + second}"
        return f"{sentence(14)} {first} + {second} = <<{total}>>{first + second}"

    examples = []
    for number in range(num_rows):
        question = " ".join(sentence(18) for _ in range(dice.randint(2, 4)))
        steps = [step() for _ in range(dice.randint(2, 10))]
        answer = steps[-1].rpartition(">>")[2]
        examples.append(Example(f"{question} How many?", "\n".join(steps), answer, number))
    return examples


def made_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of some thousand tokens, with Llama 3's special tokens and template.

    This template writes nothing behind the end of turn, so that both sides make the same rows.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f"{it.prompt}\n{it.thinking}" for it in examples), trainer)
    bos, *_, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=end, pad_token=end
    )
    template = Path(trl.__file__).parent / "chat_templates" / "llama3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


class Preparations:
    """Both ways of preparing the same rows.

    Args:
        examples: The rows.
        folder: Where the sides write.
    """

    def __init__(self, examples: Sequence[Example], folder: Path) -> None:
        self.examples, self.folder = examples, folder
        self.tokenizer = made_tokenizer(examples[:1000])
        self.renderer: Renderer = Renderer.read(self.tokenizer, ResponseSection())
        self.rows = Dataset.from_list([self._as_messages(example) for example in examples])
        self.trainer = SFTTrainer(
            made_model(SHAPES["toy"], "cpu"),
            args=SFTConfig(
                output_dir=str(folder / "trl"),
                bf16=False,
                use_cpu=True,
                completion_only_loss=True,
                max_length=MAX_LENGTH,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=self.rows.select([0]),
            processing_class=self.tokenizer,
        )

    def trl(self, num_processes: int | None = None) -> Dataset:
        """Let TRL render, tokenize and label; it keeps the result in memory."""
        arguments = self.trainer.args
        arguments.dataset_num_proc = num_processes
        return self.trainer._prepare_dataset(
            self.rows, self.tokenizer, arguments, False, None, "train"
        )

    def ours(self) -> Dataset:
        """Render, tokenize, write into a cache that is empty, and map what was written."""
        empty = tempfile.mkdtemp(dir=self.folder)
        with mock.patch.dict(os.environ, {"SFTKEY_CACHE": empty}):
            return tokenized_rows(self.examples, self.renderer, MAX_LENGTH, trim=False)[0]

    def _as_messages(self, example: Example) -> dict[str, list[dict[str, str]]]:
        completion = self.renderer.response.render(example.thinking, example.answer)
        return {
            "prompt": [{"role": "user", "content": str(example.prompt)}],
            "completion": [{"role": "assistant", "content": completion}],
        }


def seconds(repeats: int, num_rows: int) -> dict[str, list[float]]:
    """Measure in alternating rounds, after one that warms up."""
    disable_progress_bars()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        sides = Preparations(made_examples(num_rows), Path(folder))
        jobs = {
            "trl": sides.trl,
            f"trl, {cores} processes": lambda: sides.trl(cores),
            "sftkey": sides.ours,
        }
        alternate(jobs, 1)
        return alternate(jobs, repeats)


def bar(repeats: int, num_rows: int = NUM_ROWS) -> Bar:
    """Take the bar: TRL's faster way over ours."""
    return bar_of(seconds(repeats, num_rows))


def bar_of(measured: dict[str, list[float]]) -> Bar:
    """Take the bar from measured seconds: the median of the rounds' own ratios."""
    ours = measured["sftkey"]
    ratios = [
        statistics.median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
        for side, times in measured.items()
        if side != "sftkey"
    ]
    return Bar("tokenization_over_trl", min(ratios), 1.5)


def main() -> None:
    """Measure, and print rows a second."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    measured = seconds(arguments.repeats, arguments.rows)
    for side, times in measured.items():
        speed = arguments.rows / statistics.median(times)
        print(f"{side:16} {Spread.of(times)!s:>24} s  {speed:8.0f} rows/s")
    print(bar_of(measured))


if __name__ == "__main__":
    main()
