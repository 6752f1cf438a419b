"""Accuracy by local step: what is recorded, and that training is what it would be without."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from fedcl.client.local_evaluation import iteration
from tests.toy import configure, run_toy, write_files

CHOICES = {"learner": "er", "scenario": "class_incremental", "model": "fot_mlp"}  # one with dropout
ON = ["evaluation.iterations=2", "evaluation.personal=true"]


def test_names_of_metrics() -> None:
    assert iteration("accuracy@3@12") == (3, 12)
    assert iteration("accuracy_trained") is None


def test_training_is_untouched_and_steps_are_recorded(tmp_path: Path, device: torch.device) -> None:
    files = write_files(tmp_path)
    plain = run_toy(configure(CHOICES, files, device, "evaluation.personal=true"))
    probed = run_toy(configure(CHOICES, files, device, *ON))
    assert plain.hashes == probed.hashes
    table = pd.DataFrame(probed.rows)
    curve = table[table["phase"] == "iteration"].set_index(["client", "round", "task", "step"])["value"]
    steps = table[table["name"] == "steps"].set_index(["client", "round"])["value"]
    for phase, at in (("received", lambda row: 0), ("trained", lambda row: int(steps[row.client, row.round]))):
        ends = table[(table["phase"] == phase) & (table["name"] == "accuracy")]
        assert len(ends)
        for row in ends.itertuples():
            assert curve[row.client, row.round, row.task, at(row)] == pytest.approx(row.value)
    # earlier tasks are tested too, and every second step
    last = table[table["phase"] == "iteration"]["round"].max()
    assert set(curve.xs(last, level="round").reset_index()["task"]) == {0, 1, 2}
    assert {0, 2, 4} <= set(curve.reset_index()["step"])
