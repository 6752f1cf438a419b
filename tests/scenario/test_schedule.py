from __future__ import annotations

import pytest

from fedcl.scenario.schedule import Synchronous
from fedcl.scenario.task import Position


def test_rounds_by_hand() -> None:
    schedule = Synchronous(num_tasks=3, rounds_per_task=[2, 1, 3])
    assert schedule.num_rounds == 6
    positions = [schedule.position("any", r) for r in range(6)]
    assert positions == [
        Position(0, 0, 2),
        Position(0, 1, 2),
        Position(1, 0, 1),
        Position(2, 0, 3),
        Position(2, 1, 3),
        Position(2, 2, 3),
    ]
    stages = [schedule.stage(r) for r in range(6)]
    assert [(s.index, s.ends) for s in stages] == [(0, False), (0, True), (1, True), (2, False), (2, False), (2, True)]
    assert [p.is_last for p in positions] == [stage.ends for stage in stages]
    assert [schedule.seen("any", r) for r in range(6)] == [(0,), (0,), (0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)]


def test_one_number_serves_all_tasks() -> None:
    schedule = Synchronous(num_tasks=4, rounds_per_task=5)
    assert schedule.num_rounds == 20
    assert [r for r in range(20) if schedule.stage(r).ends] == [4, 9, 14, 19]


def test_bad_rounds_name_their_key() -> None:
    with pytest.raises(ValueError, match=r"rounds_per_task=\[1, 2\]: .*3 tasks"):
        Synchronous(num_tasks=3, rounds_per_task=[1, 2])
    for outside in (-1, 3):
        with pytest.raises(IndexError, match="outside"):
            Synchronous(num_tasks=3, rounds_per_task=1).position("any", outside)
