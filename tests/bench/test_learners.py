from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedcl.bench.learners import BOUND, LEARNERS, TOLERANCE, measure, prepared
from fedcl.bench.result import Result

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "learners"


# tests/clients/learners/test_hand_loops.py has each learner's equations; these tell the loops that time them apart
QUICK = ("naive", "er", "lwf")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LEARNERS]
)
def test_both_loops_do_the_same_mathematics(name: str) -> None:
    overrides, loop = LEARNERS[name]
    bench = prepared(overrides)
    seconds, ours = bench.ours()
    others, theirs = bench.theirs(loop)
    assert min(seconds, others) > 0
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert bench.start is not None
    assert (ours - bench.start).abs().max() > 1e-2
    assert torch.equal(bench.ours()[1], ours)  # every repetition begins where the first did


def test_a_row_says_what_was_measured() -> None:
    row, ratio, apart = measure(*LEARNERS["naive"], repetitions=2)
    assert row["learner"] == "finetune"
    assert row["ratio"] == f"{ratio:.2f}"
    assert ratio == pytest.approx(float(row["fedcl, us a step"]) / float(row["bare, us a step"]))
    assert apart == 0.0


def test_the_committed_table_is_the_committed_result() -> None:
    written = json.loads((FOLDER / "results.json").read_text())
    result = Result(written["bench"], written["ratio"], written["passed"], written["rows"])
    assert result.table() in (FOLDER / "README.md").read_text()
    assert result.passed is (result.ratio <= BOUND)
    assert [row["learner"] for row in written["rows"]] == [o[0].removeprefix("learner=") for o, _ in LEARNERS.values()]
