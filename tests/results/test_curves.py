"""Curves out of a run's table: when a task is met, and when it counts as learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedcl.results.curves import client_forgetting, round_curve
from fedcl.results.recorder import Recorder
from fedcl.results.run import load


def test_a_task_is_met_when_it_is_trained_and_learned_when_its_stage_ends(tmp_path: Path) -> None:
    """Three stages of two rounds; task 2 comes first, task 0 last, and nobody ever trains task 1."""
    with Recorder(tmp_path) as recorder:
        for server_round in range(6):
            stage, trained = server_round // 2, (2, 2, 2, 2, 0, 0)[server_round]
            where = {"round": server_round, "virtual_time": 0.0}
            recorder.row(phase="train", name="num_examples", value=5, client="a", task=trained, **where)
            for task in range(3):
                value = (server_round + 10 * task) / 100
                recorder.row(phase="test", name="accuracy", value=value, task=task, after=stage, **where)
    curve, learned = round_curve(load(tmp_path)) or (None, None)
    nan = np.nan
    expected = [[nan, nan, (20 + r) / 100] for r in range(4)] + [[r / 100, nan, (20 + r) / 100] for r in (4, 5)]
    np.testing.assert_array_equal(curve, np.array(expected))
    assert learned == [5, -1, 1]


def test_the_histogram_of_ages(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for age in (0, 3, 0, 10, 3, 0):
            recorder.row(round=0, phase="train", name="age", value=age, client="a", task=0, virtual_time=0.0)
    assert load(tmp_path).staleness().to_dict() == {0: 3, 3: 2, 10: 1}


def test_what_a_client_forgot_of_its_own_tasks(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for client, rows in {"a": [(0, 3, 0.9), (1, 3, 0.6), (1, 0, 0.8)], "b": [(1, 0, 0.5)]}.items():
            for after, task, value in rows:
                where = {"client": client, "task": task, "after": after, "virtual_time": 0.0}
                recorder.row(round=after, phase="personal", name="accuracy", value=value, **where)
    lost = client_forgetting(load(tmp_path))
    np.testing.assert_allclose(lost["a"], 0.9 - 0.6)
    assert np.isnan(lost["b"])
