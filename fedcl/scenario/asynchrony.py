"""Schedules by which each client goes its own way through the tasks: another order, a later start, another pace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.schedule import Listed, Span, chained


@dataclass(kw_only=True, eq=False, repr=False)
class Shuffled(Listed):
    """Each client goes through the tasks in an order of its own, or through its own choice of them.

    With ``tasks_per_client``, how many of the tasks each client learns (None for all), that is FedWeIT's way (Yoon et
    al., ICML 2021): a list and order of tasks for each client. A task keeps its number of rounds, whenever a client
    comes to it. Each client's order is drawn from the run's seed and the client's name.
    """

    tasks_per_client: int | None = None

    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return an order of tasks for each client; ValueError for more tasks a client than there are."""
        if (self.tasks_per_client or 0) > self.num_tasks:
            raise ValueError(
                f"scenario.schedule.tasks_per_client={self.tasks_per_client}: must be null or in [1, {self.num_tasks}]"
            )
        found = {}
        for client in self.clients:
            order = numpy_generator(self.seed, "order", client).permutation(self.num_tasks)
            chosen = order[: self.tasks_per_client].tolist()
            found[client] = chained(chosen, [rounds[task] for task in chosen])
        return found


@dataclass(kw_only=True, eq=False, repr=False)
class Shifted(Listed):
    """All clients go through the tasks in the same order, but start up to ``max_lag`` rounds late.

    The lags are spread evenly from 0 to ``max_lag``; who has which is drawn by the run's seed.
    """

    max_lag: int = 5

    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return the same order for all, each client with its lag."""
        spread = np.linspace(0, self.max_lag, len(self.clients)).round().astype(int)
        lags = numpy_generator(self.seed, "lag").permutation(spread).tolist()
        tasks = range(self.num_tasks)
        return {client: chained(tasks, rounds, lag) for client, lag in zip(self.clients, lags, strict=True)}


@dataclass(kw_only=True, eq=False, repr=False)
class Asynchronous(Listed):
    """All clients go through the tasks in the same order, but each takes another number of rounds for each task.

    A task's rounds are stretched by a factor between ``shortest`` and ``longest``: an integer is drawn evenly from
    ``shortest`` times the rounds, rounded down and at least 1, to ``longest`` times, rounded up. Each client's numbers
    are drawn from the run's seed and the client's name.
    """

    shortest: float = 0.5
    longest: float = 1.5

    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return the same order for all, each client with its own lengths; ValueError if the bounds are swapped."""
        if self.shortest > self.longest:
            raise ValueError(
                f"scenario.schedule.shortest={self.shortest}, longest={self.longest}: the second must not be below the "
                "first"
            )
        least = [max(1, math.floor(self.shortest * number)) for number in rounds]
        most = [max(1, math.ceil(self.longest * number)) for number in rounds]
        found = {}
        for client in self.clients:
            lengths = numpy_generator(self.seed, "pace", client).integers(least, most, endpoint=True)
            found[client] = chained(range(self.num_tasks), lengths.tolist())
        return found
