"""Learning rates that are not the same in every task."""

from __future__ import annotations

from dataclasses import dataclass

from fedcl.scenario.task import Schedule


@dataclass(frozen=True)
class TaskDecay:
    """The learning rate of a client's k-th task, from 0, is ``lr * decay ** k``, as long as the task lasts.

    Tasks are counted as the client meets them, so that clients with orders of their own are all treated alike.
    """

    lr: float
    decay: float
    schedule: Schedule

    def __call__(self, client: str, server_round: int) -> float:
        """Return the learning rate of a client's visit in the 0-based ``server_round``."""
        seen = len(self.schedule.seen(client, server_round))
        return self.lr * self.decay ** max(seen - 1, 0)
