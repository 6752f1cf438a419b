"""Schedules: which task a client is in at a round."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

from fedcl.scenario.task import Position, Stage


class Span(NamedTuple):
    """The rounds ``start`` (included) to ``stop`` (not included) that a client spends in a task."""

    task_id: int
    start: int
    stop: int


def nominal_rounds(num_tasks: int, rounds_per_task: int | Sequence[int]) -> list[int]:
    """Return the rounds of each task.

    Raises
    ------
    ValueError
        A number of rounds is below 1, or the list has another length than ``num_tasks``.
    """
    rounds = [rounds_per_task] * num_tasks if isinstance(rounds_per_task, int) else list(rounds_per_task)
    if len(rounds) != num_tasks:
        raise ValueError(f"rounds_per_task={rounds}: must be a number or have one entry for each of {num_tasks} tasks")
    if min(rounds) < 1:
        raise ValueError(f"rounds_per_task={rounds_per_task}: must be >= 1")
    return rounds


class Itineraries:
    """The base of every schedule: each client has spans of rounds, and between them it takes no part.

    A subclass says in :meth:`spans` where each client goes, and in ``stage_ends`` after which rounds the run is looked
    at as a whole: one round, ascending, for each task of the stream, the last round at the end.
    """

    uniform: ClassVar[bool] = False

    def __init__(self, *, stage_ends: Sequence[int]) -> None:
        self.stage_ends = list(stage_ends)
        self.num_rounds = self.stage_ends[-1] + 1

    def spans(self, client: str) -> Sequence[Span]:
        """Return where ``client`` goes, in order of time."""
        raise NotImplementedError

    def position(self, client: str, server_round: int) -> Position | None:
        """Return the position of ``client`` at the 0-based ``server_round``, None where it takes no part.

        Raises
        ------
        IndexError
            Outside the run.
        """
        self._require(server_round)
        for span in self.spans(client):
            if span.start <= server_round < span.stop:
                return Position(span.task_id, server_round - span.start, span.stop - span.start)
        return None

    def met(self, client: str, server_round: int) -> tuple[int, ...]:
        """Return the tasks that ``client`` has been in so far, in the order it came to them; IndexError as above."""
        self._require(server_round)
        return tuple(dict.fromkeys(span.task_id for span in self.spans(client) if span.start <= server_round))

    def stage(self, server_round: int) -> Stage:
        """Return how far the run is; IndexError as above."""
        self._require(server_round)
        index = bisect_right(self.stage_ends, server_round - 1)
        return Stage(index, server_round == self.stage_ends[index])

    def _require(self, server_round: int) -> None:
        if not 0 <= server_round < self.num_rounds:
            raise IndexError(f"round {server_round} is outside [0, {self.num_rounds})")


class Synchronous(Itineraries):
    """All clients go through the tasks together (FOT, GLFC, TARGET).

    Parameters
    ----------
    num_tasks
        Number of tasks of the stream.
    rounds_per_task
        Rounds of every task, or a list with one entry a task.
    clients, seed
        The run's; not needed here.

    Raises
    ------
    ValueError
        A number of rounds is below 1, or the list has another length than ``num_tasks``.
    """

    uniform: ClassVar[bool] = True

    def __init__(
        self, *, num_tasks: int, rounds_per_task: int | Sequence[int], clients: Sequence[str] = (), seed: int = 0
    ) -> None:
        rounds = nominal_rounds(num_tasks, rounds_per_task)
        ends = list(accumulate(rounds))
        super().__init__(stage_ends=[end - 1 for end in ends])
        self._spans = [
            Span(task_id, end - length, end) for task_id, (end, length) in enumerate(zip(ends, rounds, strict=True))
        ]

    def spans(self, client: str) -> Sequence[Span]:
        """Return the one itinerary of all clients."""
        return self._spans

    def position(self, client: str, server_round: int) -> Position:
        """Return the position of every client at the 0-based ``server_round``; IndexError after the last round."""
        span = self._spans[self.stage(server_round).index]
        return Position(span.task_id, server_round - span.start, span.stop - span.start)
