"""Reads and grades a task that `sftkey export --to lm-eval` has written.

A copy of this file lies in the task's folder as utils.py, where lm-evaluation-harness calls it; the
harness needs sftkey beside it.
"""

import json
from pathlib import Path
from typing import Any

from sftkey.data.response import Response
from sftkey.evaluation.grading import grade

HERE = Path(__file__).parent


def load(**_: Any) -> dict[str, Any]:
    """Return the test rows: `prompt` is a whole prompt, `answer` the reference."""
    from datasets import Dataset

    lines = (HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade one answer as the run's evaluation does."""
    settings = json.loads((HERE / "task.json").read_text(encoding="utf-8"))
    text = results[0].removeprefix(settings["assistant_prefix"]).removesuffix(settings["end"])
    found = Response(*settings["tags"]).parse(text)
    right = grade(found.answer, doc["answer"], settings["grader"])
    return {"acc": float(bool(right)), "fmt": float(found.strict)}
