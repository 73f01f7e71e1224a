"""A model's answers to the test questions, each written once."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftkey.data.prepare import Prepared
from sftkey.data.renderer import stop_ids
from sftkey.data.response import Example
from sftkey.files import write_text
from sftkey.generation.generate import by_row, generate_to_file, key_of
from sftkey.generation.key_switch import find_switch
from sftkey.models.device import launched_with
from sftkey.recipe.schema import Recipe
from sftkey.training.log import RunProgress
from sftkey.training.run_folder import Ledger


def sharded() -> bool:
    """Tell whether no process holds the whole model (FSDP, DeepSpeed)."""
    return launched_with("FSDP") or launched_with("DEEPSPEED")


@dataclass
class Answers:
    """Writes a run's generations, each once, and goes on with them after a kill.

    `asked` names the stages (or `base`) that answer the test questions; None stands for all.
    """

    recipe: Recipe
    ledger: Ledger
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    progress: RunProgress
    asked: Collection[str] | None = None

    @cached_property
    def questions(self) -> list[Example]:
        """Return the test rows that are asked."""
        return self.prepared.questions(self.recipe)

    def missing(self, name: str) -> bool:
        """Tell whether a stage's answers, or the base model's, are still to be written."""
        asked = self.asked is None or name in self.asked
        return asked and bool(self.questions) and not self.ledger.generations(name).exists()

    def write(self, name: str, model: PreTrainedModel | PeftModel) -> None:
        """Let the model answer; each process takes its share of the questions.

        A sharded model doesn't generate here: `sftkey evaluate` does it later, on one process.
        """
        if sharded():
            self.progress.note(f"{name}: not evaluated; run `sftkey evaluate {self.ledger.folder}`")
            return
        processes = PartialState()
        rank, world = processes.process_index, processes.num_processes
        whole = self.ledger.generations(name)
        parts = [whole.with_name(f"{name}.part{r}of{world}.jsonl") for r in range(world)]
        settings = self.recipe.eval
        contexts = {stage.name: stage.context for stage in self.recipe.stages}
        frozen = contexts.get(name) == "frozen"  # else the key's adapters aren't trained yet
        generate_to_file(
            model,
            self.tokenizer,
            {
                example.key: self.prepared.renderer.prompt_ids(example.prompt)
                for example in self.questions[rank::world]
            },
            parts[rank],
            stop_ids=stop_ids(self.prepared.renderer, model.generation_config.eos_token_id),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            seed=self.recipe.seed,
            switch=find_switch(model, self.prepared.renderer) if frozen else None,
            report=partial(self.progress.answers, name),
        )
        processes.wait_for_everyone()
        if self.ledger.main:
            lines = (
                line for part in parts for line in part.read_text(encoding="utf-8").split("\n")
            )
            write_text(whole, with_questions(filter(None, lines), self.questions))
            self.ledger.finish(whole)
            for part in parts:
                part.unlink()
        processes.wait_for_everyone()


def with_questions(lines: Iterable[str], questions: Iterable[Example]) -> str:
    """Return generations, a JSON object a line, with the `question` and `reference` of each."""
    asked = {example.key: example for example in questions}
    keys = by_row(asked)
    written = []
    for line in lines:
        row = json.loads(line)
        key = key_of(keys.get(row.pop("index"), []), row.pop("turn", None))
        if key is None:  # of a longer evaluation, which was stopped
            continue
        example = asked[key]
        about = {"index": example.index, "turn": example.turn, "question": example.question}
        row = {**about, "reference": example.answer, **row}
        written.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(written)
