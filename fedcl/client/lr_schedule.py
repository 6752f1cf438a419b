"""Learning-rate schedules over tasks."""

from __future__ import annotations

from dataclasses import dataclass

from fedcl.scenario.task import Schedule


@dataclass(frozen=True)
class TaskDecay:
    """The learning rate in a client's k-th task, from 0, is ``lr * decay ** k``.

    Tasks are counted in the order in which the client sees them, so that clients with different orders are treated
    alike.
    """

    lr: float
    decay: float
    schedule: Schedule

    def __call__(self, client: str, server_round: int) -> float:
        """Return a client's learning rate in the 0-based ``server_round``."""
        seen = len(self.schedule.seen(client, server_round))
        return self.lr * self.decay ** max(seen - 1, 0)
