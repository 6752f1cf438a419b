"""Schedules by which not everybody is in every task: a population that grows, and tasks that only some clients have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedcl.base.randomness import numpy_generator
from fedcl.scenario.schedule import Calendar, Span


@dataclass(kw_only=True, eq=False, repr=False)
class Growing(Calendar):
    """Clients join with later tasks, and some who are there stay with an old one (GLFC).

    Dong et al., "Federated Class-Incremental Learning", CVPR 2022; official code: 30 clients at the start and 10 more
    with each of 9 later tasks, of the old ones 90 % go on to the new task. A client that stays keeps learning its old
    task; when it moves on, it moves to the task of the time. All clients of the run join in the end, equally many with
    each task but the first. Who joins when, and who stays, is drawn by the run's seed.

    Parameters
    ----------
    start
        Share of the clients that are there from the start, in (0, 1]; at least one.
    stay
        Share of the clients already there that do not go on to a new task, in [0, 1].
    """

    start: float = 0.25
    stay: float = 0.1

    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return what each client does from the task that it joins with."""
        total = len(self.clients)
        order = [self.clients[i] for i in numpy_generator(self.seed, "join").permutation(total)]
        first = max(1, round(self.start * total))
        found: dict[str, list[Span]] = {client: [] for client in self.clients}
        present = 0
        for window in self.windows():
            drawn = numpy_generator(self.seed, "stay", window.task_id).permutation(present)
            staying = set(drawn[: round(self.stay * present)].tolist())
            for i in range(present):
                _go_on(found[order[i]], window, stays=i in staying)
            joined = first + round((total - first) * window.task_id / max(self.num_tasks - 1, 1))
            for client in order[present:joined]:
                found[client].append(window)
            present = joined
        return found


def _go_on(spans: list[Span], window: Span, *, stays: bool) -> None:
    """Add to a client's spans what it does during ``window``."""
    if stays:
        spans[-1] = spans[-1]._replace(stop=window.stop)
    else:
        spans.append(window)


@dataclass(kw_only=True, eq=False, repr=False)
class Availability(Calendar):
    """All together, but only a share of the clients has data of a task (FOT's ``task_pct_per_client``).

    Bakman et al., "Federated Orthogonal Training", ICLR 2024, official code: for each task, the clients that own data
    of it are drawn; the others pause. ``share`` is in (0, 1]; at least one client is drawn.
    """

    share: float = 0.5

    def itineraries(self, rounds: Sequence[int]) -> Mapping[str, Sequence[Span]]:
        """Return the tasks that each client has data of."""
        total = len(self.clients)
        count = max(1, round(self.share * total))
        found: dict[str, list[Span]] = {client: [] for client in self.clients}
        for window in self.windows():
            drawn = numpy_generator(self.seed, "available", window.task_id).permutation(total)[:count]
            for i in drawn.tolist():
                found[self.clients[i]].append(window)
        return found
