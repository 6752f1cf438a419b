"""Schedules: which task a client is in at a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from fedcl.scenario.task import Position, Stage


class Span(NamedTuple):
    """The rounds ``start`` (included) to ``stop`` (not included) that a client spends in a task."""

    task_id: int
    start: int
    stop: int


def nominal_rounds(num_tasks: int, rounds_per_task: int | Sequence[int]) -> list[int]:
    """Return the rounds of each task; ValueError for a list of another length than ``num_tasks``."""
    rounds = [rounds_per_task] * num_tasks if isinstance(rounds_per_task, int) else list(rounds_per_task)
    if len(rounds) != num_tasks:
        raise ValueError(f"rounds_per_task={rounds}: must be a number or have one entry for each of {num_tasks} tasks")
    return rounds


def stage_ends(itineraries: Mapping[str, Sequence[Span]], num_tasks: int) -> list[int]:
    """Return the rounds after which the whole run is evaluated, one for each task, where clients go different ways.

    The k-th is the first round by which every client that ever finishes k tasks has done so. The last one is the run's
    last round. Where that leaves no round between two of them, the earlier one is moved forward.

    Raises
    ------
    ValueError
        The run has fewer rounds than tasks.
    """
    finished = [sorted(span.stop - 1 for span in spans) for spans in itineraries.values()]
    last = max((ends[-1] for ends in finished if ends), default=-1)
    if last + 1 < num_tasks:
        raise ValueError(
            f"scenario.schedule: the run has {last + 1} rounds for {num_tasks} tasks, must have one each; raise "
            f"rounds_per_task"
        )
    latest = [max((ends[k] for ends in finished if k < len(ends)), default=last) for k in range(num_tasks - 1)]
    result = [*accumulate(latest, max), last]
    for k in range(num_tasks - 2, -1, -1):
        result[k] = min(result[k], result[k + 1] - 1)
    return result


class Itineraries:
    """The base of every schedule: each client has spans of rounds, and between them it takes no part.

    A subclass says in :meth:`spans` where each client goes. ``stage_ends`` are the rounds after which the whole run is
    evaluated: one for each task of the stream, ascending, the last round at the end.
    """

    uniform: bool = False

    def __init__(self, *, stage_ends: Sequence[int]) -> None:
        self.stage_ends = list(stage_ends)
        self.num_rounds = self.stage_ends[-1] + 1

    def spans(self, client: str) -> Sequence[Span]:
        """Return where ``client`` goes, in order of time."""
        raise TypeError(f"{type(self).__name__} does not say where clients go")

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

    def seen(self, client: str, server_round: int) -> tuple[int, ...]:
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


@dataclass(kw_only=True, eq=False, repr=False)
class Listed(Itineraries, ABC):
    """A schedule that lists the itinerary of each client.

    The run sets the four fields: the number of tasks of the stream, the rounds of every task or a list with one number
    for each, the clients, and the seed. A subclass adds its hyper-parameters, and defines :meth:`itineraries`.
    """

    num_tasks: int
    rounds_per_task: int | Sequence[int]
    clients: Sequence[str]
    seed: int

    def __post_init__(self) -> None:
        self._itineraries = dict(self.itineraries(nominal_rounds(self.num_tasks, self.rounds_per_task)))
        super().__init__(stage_ends=self.ends())

    @abstractmethod
    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return where each client goes; ``rounds`` is the number of rounds of each task."""

    def ends(self) -> Sequence[int]:
        """Return the last round of each stage: as :func:`stage_ends`; ValueError for fewer rounds than tasks."""
        return stage_ends(self._itineraries, self.num_tasks)

    def spans(self, client: str) -> Sequence[Span]:
        """Return where ``client`` goes; KeyError for a client that the run does not have."""
        return self._itineraries[client]


class Calendar(Listed):
    """A schedule in which each task has its time, and a stage ends with the time of its task."""

    def windows(self) -> list[Span]:
        """Return the time of each task."""
        return chained(range(self.num_tasks), nominal_rounds(self.num_tasks, self.rounds_per_task))

    def ends(self) -> Sequence[int]:
        """Return the last round of each task's time."""
        return [window.stop - 1 for window in self.windows()]


def chained(task_ids: Sequence[int], rounds: Sequence[int], start: int = 0) -> list[Span]:
    """Return the spans of a client that goes through ``task_ids`` without a break, so many ``rounds`` each."""
    stops = [start + total for total in accumulate(rounds)]
    return [Span(task, stop - length, stop) for task, length, stop in zip(task_ids, rounds, stops, strict=True)]


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
        The list has another length than ``num_tasks``.
    """

    uniform: bool = True

    def __init__(
        self, *, num_tasks: int, rounds_per_task: int | Sequence[int], clients: Sequence[str] = (), seed: int = 0
    ) -> None:
        rounds = nominal_rounds(num_tasks, rounds_per_task)
        self._spans = chained(range(num_tasks), rounds)
        super().__init__(stage_ends=[span.stop - 1 for span in self._spans])

    def spans(self, client: str) -> Sequence[Span]:
        """Return the one itinerary of all clients."""
        return self._spans

    def position(self, client: str, server_round: int) -> Position:
        """Return the position of every client at the 0-based ``server_round``; IndexError after the last round."""
        span = self._spans[self.stage(server_round).index]
        return Position(span.task_id, server_round - span.start, span.stop - span.start)
