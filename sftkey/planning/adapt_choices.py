"""All that was chosen for a recipe that is written for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sftkey.models.facts import ModelFacts
from sftkey.planning.data_choice import DataChoice, Lengths
from sftkey.planning.frame_choice import FrameChoice
from sftkey.recipe.schema import Recipe


@dataclass(frozen=True)
class Choices:
    """All that was chosen.

    Args:
        facts: The model.
        frame: Its frame and tags.
        data: How the data is read; None without data of its own.
        lengths: What the data needs; None where it can't be told.
        other: The recipe that this one is like.
        like: How the user named that one.
        source: How the user named the data.
        seed: Of the run.
        path: Where the recipe will lie.
        gpu: The size of the GPU's memory, as the user wrote it; None: unknown.
        most_rows: How many rows fit it at once, by the plan.
    """

    facts: ModelFacts
    frame: FrameChoice
    data: DataChoice | None
    lengths: Lengths | None
    other: Recipe | None
    like: str
    source: str | None
    seed: int
    path: Path
    gpu: str | None = None
    most_rows: int = 1

    @property
    def as_other(self) -> str:
        """The reason for what was taken over."""
        return f"as in {self.like}"

    @property
    def full(self) -> bool:
        """All weights are trained, as in the other recipe."""
        return self.other is not None and self.other.lora is None

    @property
    def name(self) -> str:
        """A name for the runs: in a collection the path's, else model and data."""
        parts = self.path.with_suffix("").parts
        if "recipes" in parts[:-1]:
            return _slug("-".join(parts[parts.index("recipes") + 1 :]))
        named = [str(self.facts.section.name_or_path), self.source or ""]
        if not self.source and self.other:
            named[1] = self.other.data.task or self.other.data.source
        return "-".join(filter(None, (_slug(_last(each)) for each in named)))

    @property
    def end_is_known(self) -> bool:
        """The model has learned to stop with the frame's end, by what is published of it."""
        frame = self.frame.frame
        if frame is None or frame.end_id in self.facts.published_stops:
            return True
        of_tokenizer = frame.end_token == self.facts.tokenizer.eos_token
        return of_tokenizer and (frame.kind == "plain" or not self.facts.stops_verified)

    @property
    def why_unknown(self) -> str:
        """Why it may not have."""
        stops = list(self.facts.published_stops)
        if not stops:
            return "nothing says that the model stops there"
        tokens = ", ".join(map(str, self.facts.tokenizer.convert_ids_to_tokens(stops)))
        return f"the model stops at {tokens}, and may never have learned this one"


def _last(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].removeprefix("pypi:")
    return re.sub(r"\.(jsonl?|csv|parquet)$", "", last)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-.")
