"""A stream under a schedule: what each client learns at a round, and which tasks end with it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedcl.contracts.requests import Forgotten
from fedcl.scenario.task import Schedule, Stage, Stream, Task

KEPT = 1024  # different tasks that are cached: mostly a handful


@dataclass(frozen=True)
class Curriculum:
    """The tasks of any client in any round: pure functions of stream, schedule and what has been forgotten."""

    stream: Stream
    schedule: Schedule
    forgotten: Forgotten = field(default_factory=Forgotten, compare=False)
    # equal tasks are one object: ten thousand clients mostly share it
    _tasks: dict[str, Task] = field(default_factory=dict, init=False, repr=False, compare=False)

    def task(self, client: str, server_round: int) -> Task | None:
        """Return what ``client`` trains on at ``server_round``; None where it takes no part."""
        position, task = self.schedule.position(client, server_round), self.whole_task(client, server_round)
        if position is None or task is None or not self.stream.online:
            return task
        return task.part(position.round_in_task, position.num_rounds)

    def whole_task(self, client: str, server_round: int) -> Task | None:
        """Return the same task with all samples that the client is shown of it in any round."""
        position = self.schedule.position(client, server_round)
        if position is None:
            return None
        return self.seen_task(client, position.task_id, server_round)

    def seen_task(self, client: str, task_id: int, server_round: int) -> Task:
        """Return a task that ``client`` has seen by ``server_round``, with the samples that may still be trained."""
        return self.forgotten.task(client, self.plain_task(client, task_id, server_round))

    def plain_task(self, client: str, task_id: int, server_round: int) -> Task:
        """Return the same task with all its samples, whatever has been forgotten."""
        return self._task(client, task_id, self.schedule.seen(client, server_round))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a run has one curriculum, and it lives as long
    def _task(self, client: str, task_id: int, seen: tuple[int, ...]) -> Task:
        task = self.stream.client_task(task_id, client, seen)
        if len(self._tasks) >= KEPT:
            self._tasks.clear()
        return self._tasks.setdefault(task.to_json(), task)

    def active(self, clients: Sequence[str], server_round: int) -> list[str]:
        """Return the clients that take part in ``server_round``."""
        if self.schedule.uniform:
            return list(clients) if self.schedule.position(clients[0], server_round) is not None else []
        return [client for client in clients if self.schedule.position(client, server_round) is not None]

    def ended(self, clients: Sequence[str], server_round: int) -> dict[str, int]:
        """Return the clients whose task ends with ``server_round``, and its id."""
        positions = {client: self.schedule.position(client, server_round) for client in clients}
        return {client: p.task_id for client, p in positions.items() if p is not None and p.is_last}

    def seen(self, clients: Sequence[str], server_round: int) -> list[int]:
        """Return the ids of the tasks that any of ``clients`` has seen so far, ascending."""
        asked = clients[:1] if self.schedule.uniform else clients
        return sorted({task for client in asked for task in self.schedule.seen(client, server_round)})

    def stage(self, server_round: int) -> Stage:
        """Return how far the run is."""
        return self.schedule.stage(server_round)
