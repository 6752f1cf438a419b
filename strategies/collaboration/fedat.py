"""FedAT: synchronous averaging within tiers of equally fast clients, and slow tiers weigh more across tiers.

Chai et al., "FedAT: A High-Performance and Communication-Efficient Federated Learning System with Asynchronous Tiers",
SC 2021 (arXiv 2010.05958). With w_m the model of tier m of M, tier 1 the fastest, T_m the number of its updates so far
and T their sum, the global model is, as commonly implemented,

    w = sum over m of (T_{M+1-m} / T) w_m
"""

# M = tiers, P = length of the flat vector
from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.server.aggregation import aggregate
from strategies.collaboration.fedavg import FedAvg


def tier_of(age: float, ages: list[float], tiers: int) -> int:
    """Return the tier, from 0, of a client of mean age ``age``: by the share of ``ages`` that are smaller.

    Clients of equal age are in one tier, so as long as nobody is late there is one tier alone.
    """
    return tiers * sum(other < age for other in ages) // len(ages)


def tier_weights(counts: list[int]) -> list[float]:
    """Return each tier's weight T_{M+1-m} / T, over the tiers that have updates; 0 for those that have none."""
    active = [tier for tier, count in enumerate(counts) if count]
    weights = [0.0] * len(counts)
    for tier, mirrored in zip(active, reversed(active), strict=True):
        weights[tier] = counts[mirrored] / sum(counts)
    return weights


class FedAT(FedAvg):
    """Group clients by how late they are, keep each group's latest model, and mix these into the global model.

    A round's updates of one tier are one update of that tier: their mean replaces its model. All clients are sent the
    global model. What the server sees of a client's latency is the age of its updates in versions; a client's tier goes
    by its mean age and is looked at again every ``retier_every`` aggregations, a newcomer's at once. While one tier has
    updates, this is FedAvg: bit for bit with fresh updates.

    Parameters
    ----------
    tiers
        M, at least 1.
    retier_every
        Aggregations between two looks, at least 1.
    weighting
        Of clients within their tier.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"

    def __init__(
        self,
        *,
        tiers: int = 3,
        retier_every: int = 10,
        weighting: Literal["num_examples", "uniform"] = "num_examples",
    ) -> None:
        super().__init__(weighting=weighting)
        self.tiers = tiers
        self.retier_every = retier_every
        self._aggregations = 0
        self._ages: dict[str, list[float]] = {}  # mean age, and of how many updates
        self._tier: dict[str, int] = {}
        self._counts = [0] * tiers
        self._models: dict[str, Tensor] = {}  # tier's number as text -> its model, float64 (P,)

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        if not updates:
            return {}
        self._observe_ages(updates)
        global_P = view.global_model.double()

        def term(update: Update) -> tuple[Tensor, float]:
            # tiers average models, however old: for a fresh update this is its change
            return update.model.double() - global_P, self.weight(update)

        for tier in sorted({self._tier[update.client] for update in updates}):
            members = [update for update in updates if self._tier[update.client] == tier]
            self._models[str(tier)] = global_P + aggregate(members, term, view.spec).mean()
            self._counts[tier] += 1
        self._aggregations += 1
        weights = tier_weights(self._counts)
        models = [self._models[str(tier)] * weight for tier, weight in enumerate(weights) if weight]
        return {GLOBAL: torch.stack(models).sum(0)}

    def _observe_ages(self, updates: list[Update]) -> None:
        for update in updates:
            mean, count = self._ages.get(update.client, [0.0, 0])
            self._ages[update.client] = [mean + (update.age - mean) / (count + 1), count + 1]
        ages = [mean for mean, _ in self._ages.values()]
        for client, (mean, _) in self._ages.items():
            if client not in self._tier or self._aggregations % self.retier_every == 0:
                self._tier[client] = tier_of(mean, ages, self.tiers)

    def state_dict(self) -> dict[str, Any]:
        """Return tiers' models and numbers of updates, clients' tiers and mean ages, and how many aggregations."""
        return {
            "aggregations": self._aggregations,
            "ages": {client: list(age) for client, age in self._ages.items()},
            "tier": dict(self._tier),
            "counts": list(self._counts),
            "models": dict(self._models),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._aggregations = state["aggregations"]
        self._ages = {client: list(age) for client, age in state["ages"].items()}
        self._tier, self._counts, self._models = dict(state["tier"]), list(state["counts"]), dict(state["models"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Start over with no tier's model: each holds every member's contribution."""
        for client in request.clients:
            self._ages.pop(client, None)
            self._tier.pop(client, None)
        self._counts, self._models = [0] * self.tiers, {}
        return ErasureOutcome(type(self).__name__, "reset", "tiers' models are means over clients: they start over")

    def metrics(self) -> dict[str, float]:
        """Return how many clients each tier has, how many updates, and its weight."""
        numbers: dict[str, float] = {}
        for tier, weight in enumerate(tier_weights(self._counts) if any(self._counts) else self._counts):
            clients = sum(own == tier for own in self._tier.values())
            count = self._counts[tier]
            numbers |= {f"clients_{tier}": clients, f"updates_{tier}": count, f"weight_{tier}": weight}
        return {name: float(value) for name, value in numbers.items()}
