"""Schedules by which not everybody is in every task: a population that grows, and tasks that only some clients have."""

from __future__ import annotations

from collections.abc import Sequence

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.schedule import Listed, Span, chained, nominal_rounds


class Growing(Listed):
    """Clients join with later tasks, and some who are there stay with an old one (GLFC).

    Dong et al., "Federated Class-Incremental Learning", CVPR 2022; official code: 30 clients at the start and 10 more
    with each of 9 later tasks, of the old ones 90 % go on to the new task. A client that stays keeps learning its old
    task; when it moves on, it moves to the task of the time. All clients of the run join in the end, equally many with
    each task but the first. The run is looked at when the time of a task is over.

    Parameters
    ----------
    num_tasks
        Number of tasks of the stream.
    rounds_per_task
        Rounds of every task, or a list with one entry a task.
    clients, seed
        The run's: who joins when, and who stays, is drawn by the seed.
    start
        Share of the clients that are there from the start, in (0, 1]; at least one.
    stay
        Share of the clients that were there before which do not go on to a new task, in [0, 1].

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
        start: float = 0.25,
        stay: float = 0.1,
    ) -> None:
        windows = chained(range(num_tasks), nominal_rounds(num_tasks, rounds_per_task))
        if not 0 < start <= 1:
            raise ValueError(f"scenario.schedule.start={start}: must be in (0, 1]")
        if not 0 <= stay <= 1:
            raise ValueError(f"scenario.schedule.stay={stay}: must be in [0, 1]")
        order = [clients[i] for i in numpy_generator(seed, "join").permutation(len(clients))]
        first = max(1, round(start * len(clients)))
        itineraries: dict[str, list[Span]] = {client: [] for client in clients}
        present = 0
        for window in windows:
            drawn = numpy_generator(seed, "stay", window.task_id).permutation(present)
            staying = set(drawn[: round(stay * present)].tolist())
            for i in range(present):
                _go_on(itineraries[order[i]], window, stays=i in staying)
            joined = first + round((len(clients) - first) * window.task_id / max(num_tasks - 1, 1))
            for client in order[present:joined]:
                itineraries[client].append(window)
            present = joined
        super().__init__(itineraries, num_tasks, ends=[window.stop - 1 for window in windows])


def _go_on(spans: list[Span], window: Span, *, stays: bool) -> None:
    """Add to a client's spans what it does during ``window``."""
    if stays:
        spans[-1] = spans[-1]._replace(stop=window.stop)
    else:
        spans.append(window)


class Availability(Listed):
    """All together, but only a share of the clients has data of a task (FOT's ``task_pct_per_client``).

    Bakman et al., "Federated Orthogonal Training", ICLR 2024, official code: for each task, the clients that own data
    of it are drawn; the others pause. The run is looked at when the time of a task is over. ``num_tasks`` and
    ``rounds_per_task`` as for :class:`~fedcl.scenario.schedule.Synchronous`; ``share`` in (0, 1], at least one client.
    ValueError for a parameter outside its range.
    """

    def __init__(
        self,
        *,
        num_tasks: int,
        rounds_per_task: int | Sequence[int],
        clients: Sequence[str],
        seed: int,
        share: float = 0.5,
    ) -> None:
        windows = chained(range(num_tasks), nominal_rounds(num_tasks, rounds_per_task))
        if not 0 < share <= 1:
            raise ValueError(f"scenario.schedule.share={share}: must be in (0, 1]")
        count = max(1, round(share * len(clients)))
        itineraries: dict[str, list[Span]] = {client: [] for client in clients}
        for window in windows:
            drawn = numpy_generator(seed, "available", window.task_id).permutation(len(clients))[:count]
            for i in drawn.tolist():
                itineraries[clients[i]].append(window)
        super().__init__(itineraries, num_tasks, ends=[window.stop - 1 for window in windows])
