"""Learning-rate schedules over tasks and rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedcl.contracts.optimizer import RateSchedule
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


@dataclass(frozen=True)
class RoundRates:
    """The rate ``base`` times the share that ``shape`` gives at this round of the client's task, or of the run."""

    base: Callable[[str, int], float]
    shape: RateSchedule
    horizon: Literal["task", "run"]
    schedule: Schedule

    def __call__(self, client: str, server_round: int) -> float:
        """Return a client's learning rate in the 0-based ``server_round``; in no task it is the base."""
        rate = self.base(client, server_round)
        if self.horizon == "run":
            return rate * self.shape.share(server_round, self.schedule.num_rounds)
        position = self.schedule.position(client, server_round)
        return rate if position is None else rate * self.shape.share(position.round_in_task, position.num_rounds)
