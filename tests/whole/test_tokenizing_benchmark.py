from pathlib import Path

import pytest
import torch

from sftkey.data.labels import labels_for


def test_both_sides_make_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ids and labels of the benchmark's two preparations are equal: they do equal work."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import tokenizing

    sides = tokenizing.Preparations(tokenizing.made_examples(40), tmp_path)
    theirs, ours = sides.trl(), sides.ours()
    assert len(theirs) == len(ours) == 40
    for one, other in zip(theirs, ours, strict=True):
        ids, segments = torch.tensor(other["input_ids"]), torch.tensor(other["segment_ids"])
        assert one["input_ids"] == other["input_ids"]
        assert one["labels"] == labels_for(ids, segments, "completion")[0].tolist()
    lengths = [len(row["input_ids"]) for row in ours]
    assert min(lengths) > 100
    assert max(lengths) <= tokenizing.MAX_LENGTH
