"""Schedules: which task a client is in at a round."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from fedcl.scenario.task import Position


class Synchronous:
    """All clients go through the tasks together (FOT, GLFC, TARGET).

    Parameters
    ----------
    num_tasks
        Number of tasks of the stream.
    rounds_per_task
        Rounds of every task, or a list with one entry a task.

    Raises
    ------
    ValueError
        A number of rounds is below 1, or the list has another length than ``num_tasks``.
    """

    def __init__(self, *, num_tasks: int, rounds_per_task: int | Sequence[int]) -> None:
        rounds = [rounds_per_task] * num_tasks if isinstance(rounds_per_task, int) else list(rounds_per_task)
        if len(rounds) != num_tasks:
            raise ValueError(
                f"rounds_per_task={rounds}: must be a number or have one entry for each of {num_tasks} tasks"
            )
        if min(rounds) < 1:
            raise ValueError(f"rounds_per_task={rounds_per_task}: must be >= 1")
        self._rounds = rounds
        self._ends = list(accumulate(rounds))
        self.num_rounds = self._ends[-1]

    def position(self, client: str, server_round: int) -> Position:
        """Return the position of every client at the 0-based ``server_round``; IndexError after the last round."""
        task_id = self._task_at(server_round)
        start = self._ends[task_id] - self._rounds[task_id]
        return Position(task_id, server_round - start, self._rounds[task_id])

    def boundary(self, server_round: int) -> int | None:
        """Return the id of the task that ends with ``server_round``, or None; IndexError after the last round."""
        task_id = self._task_at(server_round)
        return task_id if server_round == self._ends[task_id] - 1 else None

    def _task_at(self, server_round: int) -> int:
        if not 0 <= server_round < self.num_rounds:
            raise IndexError(f"round {server_round} is outside [0, {self.num_rounds})")
        return bisect_right(self._ends, server_round)
