"""Schedules by which each client goes its own way through the tasks: another order, a later start, another pace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.schedule import Listed, chained, nominal_rounds


class Shuffled(Listed):
    """Each client goes through the tasks in an order of its own, or through its own choice of them.

    With ``tasks_per_client`` that is FedWeIT's way (Yoon et al., ICML 2021): a list and order of tasks for each client.

    Parameters
    ----------
    num_tasks
        Number of tasks of the stream.
    rounds_per_task
        Rounds of every task, or a list with one entry a task; they go with the task, whenever a client comes to it.
    clients, seed
        The run's: each client's order is drawn from the seed and its name.
    tasks_per_client
        How many of the tasks each client learns; None for all.

    Raises
    ------
    ValueError
        A parameter is outside its range, or the run gets fewer rounds than there are tasks.
    """

    def __init__(
        self,
        *,
        num_tasks: int,
        rounds_per_task: int | Sequence[int],
        clients: Sequence[str],
        seed: int,
        tasks_per_client: int | None = None,
    ) -> None:
        rounds = nominal_rounds(num_tasks, rounds_per_task)
        if tasks_per_client is not None and not 1 <= tasks_per_client <= num_tasks:
            raise ValueError(
                f"scenario.schedule.tasks_per_client={tasks_per_client}: must be null or in [1, {num_tasks}]"
            )
        orders = {
            client: numpy_generator(seed, "order", client).permutation(num_tasks)[:tasks_per_client].tolist()
            for client in clients
        }
        super().__init__({c: chained(order, [rounds[t] for t in order]) for c, order in orders.items()}, num_tasks)


class Shifted(Listed):
    """All clients go through the tasks in the same order, but start up to ``max_lag`` rounds late.

    The lags are spread evenly from 0 to ``max_lag``; who has which is drawn by the run's seed. ``num_tasks`` and
    ``rounds_per_task`` as for :class:`~fedcl.scenario.schedule.Synchronous`. ValueError for a parameter outside its
    range.
    """

    def __init__(
        self,
        *,
        num_tasks: int,
        rounds_per_task: int | Sequence[int],
        clients: Sequence[str],
        seed: int,
        max_lag: int = 5,
    ) -> None:
        rounds = nominal_rounds(num_tasks, rounds_per_task)
        if max_lag < 0:
            raise ValueError(f"scenario.schedule.max_lag={max_lag}: must be >= 0")
        lags = np.linspace(0, max_lag, len(clients)).round().astype(int)
        dealt = numpy_generator(seed, "lag").permutation(lags).tolist()
        super().__init__(
            {client: chained(range(num_tasks), rounds, lag) for client, lag in zip(clients, dealt, strict=True)},
            num_tasks,
        )


class Asynchronous(Listed):
    """All clients go through the tasks in the same order, but each takes another number of rounds for each task.

    Parameters
    ----------
    num_tasks
        Number of tasks of the stream.
    rounds_per_task
        Rounds of every task, or a list with one entry a task, before they are stretched.
    clients, seed
        The run's: each client's numbers are drawn from the seed and its name.
    shortest, longest
        Factors between which a task's rounds are stretched: an integer is drawn evenly from ``shortest`` times the
        rounds, rounded down and at least 1, to ``longest`` times, rounded up.

    Raises
    ------
    ValueError
        A parameter is outside its range.
    """

    def __init__(
        self,
        *,
        num_tasks: int,
        rounds_per_task: int | Sequence[int],
        clients: Sequence[str],
        seed: int,
        shortest: float = 0.5,
        longest: float = 1.5,
    ) -> None:
        rounds = nominal_rounds(num_tasks, rounds_per_task)
        if not 0 < shortest <= longest:
            raise ValueError(
                f"scenario.schedule.shortest={shortest}, longest={longest}: must be > 0, the second not below the first"
            )
        least = [max(1, math.floor(shortest * number)) for number in rounds]
        most = [max(1, math.ceil(longest * number)) for number in rounds]
        drawn = {
            client: numpy_generator(seed, "pace", client).integers(least, most, endpoint=True).tolist()
            for client in clients
        }
        super().__init__({c: chained(range(num_tasks), lengths) for c, lengths in drawn.items()}, num_tasks)
