"""A model's answers to the test questions, each written once."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.data.prepare import Prepared
from sftkey.data.renderer import Renderer, stop_ids
from sftkey.data.response import Example
from sftkey.files import write_text
from sftkey.generation.generate import Key, by_row, generate_to_file, key_of
from sftkey.generation.key_switch import find_switch
from sftkey.models.device import sharded
from sftkey.recipe.schema import Recipe
from sftkey.training.log import RunProgress
from sftkey.training.run_folder import Ledger


def write_parts(
    recipe: Recipe,
    renderer: Renderer,
    model: PreTrainedModel | PeftModel,
    prompts: Mapping[Key, Sequence[int]],
    whole: Path,
    **settings: Any,
) -> dict[Path, dict[Key, Sequence[int]]]:
    """Let each process generate after its share of prompts, row by row into a file of its own.

    The files lie beside `whole`, and are called like it. The recipe's `eval` says how long an
    answer may be; `temperature`, `switch` and `report` are as `generate_to_file` takes them.

    Returns:
        The files of all processes, which are whole now, and the prompts of each.
    """
    processes, keys = PartialState(), list(prompts)
    world = processes.num_processes
    shares = {
        whole.with_name(f"{whole.stem}.part{rank}of{world}.jsonl"): {
            key: prompts[key] for key in keys[rank::world]
        }
        for rank in range(world)
    }
    file, share = list(shares.items())[processes.process_index]
    generate_to_file(
        model,
        renderer.tokenizer,
        share,
        file,
        stop_ids=stop_ids(renderer, model.generation_config.eos_token_id),
        max_new_tokens=recipe.eval.max_new_tokens,
        batch_size=recipe.eval.batch_size,
        seed=recipe.seed,
        **settings,
    )
    processes.wait_for_everyone()
    return shares


@dataclass
class Answers:
    """Writes a run's generations, each once, and goes on with them after a kill.

    `asked` names the stages (or `base`) that answer the test questions; None stands for all.
    """

    ledger: Ledger
    prepared: Prepared
    progress: RunProgress
    asked: Collection[str] | None = None

    @cached_property
    def questions(self) -> list[Example]:
        """Return the test rows that are asked."""
        return self.prepared.questions(self.ledger.recipe)

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
        renderer, recipe = self.prepared.renderer, self.ledger.recipe
        whole = self.ledger.generations(name)
        contexts = {stage.name: stage.context for stage in recipe.stages}
        frozen = contexts.get(name) == "frozen"  # else the key's adapters aren't trained yet
        parts = write_parts(
            recipe,
            renderer,
            model,
            {each.key: renderer.prompt_ids(each.prompt) for each in self.questions},
            whole,
            temperature=recipe.eval.temperature,
            switch=find_switch(model, renderer) if frozen else None,
            report=partial(self.progress.answers, name),
        )
        if self.ledger.main:
            lines = (
                line for part in parts for line in part.read_text(encoding="utf-8").split("\n")
            )
            write_text(whole, with_questions(filter(None, lines), self.questions))
            self.ledger.finish(whole)
            for part in parts:
                part.unlink()
        PartialState().wait_for_everyone()


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
