"""How far a group of clients has moved the global model: a bound, round by round, and the rounds one can go back to."""

# P = length of the flat vector
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from clients.unlearners.local_rounds import LocalTask


@dataclass
class Round:
    """The effect of a round: the factor on earlier differences, and each client's share, distance and local task.

    ``distances`` are those of the clients' models from the mean that the round ended with.
    """

    factor: float
    shares: dict[str, float]
    distances: dict[str, float]
    local_tasks: dict[str, LocalTask]

    def moved(self, group: Collection[str]) -> float:
        """Return a bound on how far the mean is from that of the round without ``group``; inf if nobody is left.

        The mean without is ``mean - sum_W p_i (theta_i - mean) / (1 - p_W)``; the triangle inequality does the rest.
        """
        mine = [client for client in self.distances if client in group]
        rest = 1.0 - sum(self.shares[client] for client in mine)
        pull = sum(self.shares[client] * self.distances[client] for client in mine)
        if not mine:
            return 0.0
        return pull / rest if rest > 1e-12 else math.inf

    def state(self) -> dict[str, Any]:
        """Return the round for a checkpoint."""
        local_tasks = {client: local_task.state() for client, local_task in self.local_tasks.items()}
        return {"factor": self.factor, "shares": self.shares, "distances": self.distances, "local_tasks": local_tasks}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Round:
        """Read what :meth:`state` returned."""
        local_tasks = {client: LocalTask.of(local_task) for client, local_task in state["local_tasks"].items()}
        return cls(float(state["factor"]), dict(state["shares"]), dict(state["distances"]), local_tasks)


@dataclass
class Path:
    """The rounds that led to the present global model, and the models (P,) of some of them, by how many came before.

    A model is kept while it is the last one on which some client's sensitivity is within the budget: at most one a
    client, the first and the present one. ``rolled_back_to`` is the place of the last rollback.
    """

    rounds: list[Round] = field(default_factory=list)
    models: dict[int, Tensor] = field(default_factory=dict)
    rolled_back_to: int = 0
    _single: dict[int, dict[str, float]] = field(default_factory=dict)  # place -> client -> sensitivity

    def begin(self, model: Tensor) -> None:
        """Start from ``model`` (P,), which nobody has touched."""
        self.models[0], self._single[0] = model.clone(), {}

    def add(self, one: Round, model: Tensor, budget: float) -> None:
        """Go on to ``model`` (P,) by a round, and let go of the models that no client needs to go back to."""
        last = self._single[len(self.rounds)]
        clients = dict.fromkeys([*last, *one.distances])
        self.rounds.append(one)
        here = len(self.rounds)
        self._single[here] = {c: one.factor * last.get(c, 0.0) + one.moved([c]) for c in clients}
        self.models[here] = model.clone()
        wanted = {0, here}
        for client in clients:
            wanted.add(max(n for n in self.models if self._single[n].get(client, 0.0) <= budget))
        for place in self.models.keys() - wanted:
            del self.models[place], self._single[place]

    def sensitivity(self, group: Collection[str], place: int | None = None) -> float:
        """Return the bound for ``group`` after ``place`` rounds (None: all of them)."""
        bound = 0.0
        for one in self.rounds[:place]:
            bound = (one.factor * bound if bound else 0.0) + one.moved(group)
        return bound

    def rollback_point(self, group: Collection[str], budget: float) -> int:
        """Return the last place with a model on which the group's sensitivity is within ``budget``."""
        return max(place for place in self.models if self.sensitivity(group, place) <= budget)

    def cut(self, place: int, model: Tensor) -> list[Round]:
        """Go back to ``place``, put ``model`` (P,) there, and return the rounds that came after."""
        lost = self.rounds[place:]
        del self.rounds[place:]
        for later in [n for n in self.models if n > place]:
            del self.models[later], self._single[later]
        self.models[place], self.rolled_back_to = model.clone(), place
        return lost

    def drop(self, clients: Collection[str]) -> None:
        """Forget the sensitivities of ``clients``: their trace is covered."""
        for one in self.rounds:
            for client in clients:
                for kept in (one.shares, one.distances, one.local_tasks):
                    kept.pop(client, None)
        for known in self._single.values():
            for client in clients:
                known.pop(client, None)

    def state(self) -> dict[str, Any]:
        """Return everything for a checkpoint."""
        return {
            "rounds": [one.state() for one in self.rounds],
            "models": {str(place): model for place, model in self.models.items()},
            "single": {str(place): known for place, known in self._single.items()},
            "rolled_back_to": self.rolled_back_to,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Path:
        """Read what :meth:`state` returned."""
        models = {int(place): model for place, model in state["models"].items()}
        single = {int(place): dict(known) for place, known in state["single"].items()}
        return cls([Round.of(one) for one in state["rounds"]], models, int(state["rolled_back_to"]), single)


def budget(epsilon: float, delta: float, sigma: float, mechanism: Literal["classic", "analytic"]) -> float:
    """Return the largest sensitivity that normal noise of deviation ``sigma`` makes (epsilon, delta)-private.

    ``classic``: epsilon sigma / sqrt(2 ln(1.25 / delta)) (Dwork and Roth 2014, Theorem A.1, for epsilon <= 1).
    ``analytic``: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, Theorem 8.
    """
    if mechanism == "classic":
        return epsilon * sigma / math.sqrt(2 * math.log(1.25 / delta))

    def excess(sensitivity: float) -> float:
        half, tilt = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
        return _normal(half - tilt) - math.exp(epsilon) * _normal(-half - tilt)

    low, high = 0.0, sigma
    while excess(high) < delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) <= delta else (low, middle)
    return low


def _normal(x: float) -> float:
    """Return the standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
