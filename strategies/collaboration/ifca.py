"""IFCA on the server: one model for each cluster of clients, and every client trains the one that fits it best.

Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020 (arXiv 2006.04088), Algorithm 1
with model averaging: with S_j the round's clients that chose cluster j, theta_j <- mean of their models.
"""

# k = clusters, P = length of the flat vector
from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec
from fedcl.server.aggregation import aggregate
from strategies.collaboration.fedavg import FedAvg

_PREFIX = "cluster-"


def shuffled(model_P: Tensor, spec: Spec, spread: float, generator: torch.Generator) -> Tensor:
    """Return another start (P,): each parameter tensor w becomes m + sqrt(1 - s^2) (w - m) + s (w' - m).

    w' is w with its elements in random order and m their mean. Layers draw the elements of a tensor independently from
    one law, so with ``spread`` s = 1 the result is a draw as likely as the first, and with any s it has the same mean
    and spread. Buffers stay.
    """
    start = model_P.clone()
    for tensor in spec:
        order = torch.randperm(tensor.size, generator=generator)
        if tensor.kind == "buffer":
            continue
        old = model_P[tensor.start : tensor.stop].double()
        mean = old.mean()
        new = mean + (1 - spread**2) ** 0.5 * (old - mean) + spread * (old[order] - mean)
        start[tensor.start : tensor.stop] = new.float()
    return start


class IFCA(FedAvg):
    """Keep k models as targets ``cluster-0`` ... ``cluster-<k-1>``; average the changes of the clients of each.

    A client is sent the model of the cluster it chose last, at first ``cluster-0``, which starts as the initial global
    model, and the others along with it as ``clusters`` (k - 1, P), in cyclic order. Its reply says how many places on
    its choice was. A cluster that nobody chose stays as it is. The global model is the mean of the clusters' models by
    number of clients whose latest choice they are; nobody trains from it.

    Parameters
    ----------
    clusters
        k, at least 1; with 1 this is FedAvg, bit for bit.
    spread
        How far apart the clusters start, in (0, 1]: see :func:`shuffled`. 1 draws again; a small one keeps near to a
        pretrained model.
    weighting
        Of clients within their cluster.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"
    personal: ClassVar[bool] = True

    def __init__(
        self,
        *,
        clusters: int = 2,
        spread: float = 1.0,
        weighting: Literal["num_examples", "uniform"] = "num_examples",
    ) -> None:
        super().__init__(weighting=weighting)
        self.clusters = clusters
        choice = TensorField((1,), "int64", low=0, high=clusters - 1)
        self.payloads = (Payload("clusters", "down"), Payload("choice", "up", choice, reduction="stack"))  # type: ignore[misc]
        self.spread = spread
        self._choices: dict[str, int] = {}
        self._switched = 0.0
        # one object for all who are sent the same: clients that share model and payload share a message
        self._models: list[Tensor] = []
        self._others: dict[int, Tensor] = {}

    def initial(self, view: ServerView) -> dict[Target, Tensor]:
        """Return where the clusters start: the first at the run's initial weights, the others shuffled."""
        draws = view.rng("ifca")
        others = [shuffled(view.global_model, view.spec, self.spread, draws) for _ in range(self.clusters - 1)]
        return {f"{_PREFIX}{j}": model for j, model in enumerate([view.global_model.clone(), *others])}

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        own = self._choices.get(client, 0)
        if self.clusters == 1:
            return _PREFIX + "0", {}
        models = self._current(view)
        if len(models) != len(self._models) or any(a is not b for a, b in zip(models, self._models, strict=True)):
            self._models, self._others = models, {}
        if own not in self._others:
            self._others[own] = torch.stack([models[(own + i) % self.clusters] for i in range(1, self.clusters)])
        return f"{_PREFIX}{own}", {"clusters": self._others[own]}

    def _current(self, view: ServerView) -> list[Tensor]:
        """Return the clusters' models, float32 (P,) each."""
        return [view.model_at(f"{_PREFIX}{j}") for j in range(self.clusters)]

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Return the models of the clusters that changed and their mean, float64 (P,)."""
        if not updates:
            return {}
        members: dict[int, list[Update]] = {}
        switched = 0
        for update in updates:
            choice = int(update.payload["choice"])
            index = (int(update.target.removeprefix(_PREFIX)) + choice) % self.clusters
            members.setdefault(index, []).append(update)
            self._choices[update.client] = index
            switched += choice != 0
        self._switched = switched / len(updates)
        new = [model.double() for model in self._current(view)]
        for index, chosen in members.items():
            new[index] = new[index] + aggregate(chosen, self.term, view.spec).mean()
        return {GLOBAL: self._mean(new), **{f"{_PREFIX}{index}": new[index] for index in sorted(members)}}

    def _mean(self, models: list[Tensor]) -> Tensor:
        counts = Counter(self._choices.values())
        weights = torch.tensor([counts[index] for index in range(self.clusters)], dtype=torch.float64)
        return (weights / weights.sum()) @ torch.stack(models)

    def state_dict(self) -> dict[str, Any]:
        """Return each client's latest choice, and how many changed theirs in the last round."""
        return {"choices": dict(self._choices), "switched": self._switched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._choices, self._switched = dict(state["choices"]), state["switched"]

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the choices of the clients that hold the forget set; all of them when the request names none."""
        named = request.clients or tuple(self._choices)
        dropped = [client for client in named if self._choices.pop(client, None) is not None]
        name = type(self).__name__
        if not dropped:
            return ErasureOutcome(name, "not applicable", "keeps no choice of the clients concerned")
        why = f"latest cluster of {', '.join(dropped)}; the clusters' models are targets"
        return ErasureOutcome(name, "erased" if request.clients else "reset", why)

    def metrics(self) -> dict[str, float]:
        """Return how many clients chose each cluster last, and the share of the round's that changed theirs."""
        counts = Counter(self._choices.values())
        members = {f"cluster_{index}": float(counts[index]) for index in range(self.clusters)}
        return {**members, "switched": self._switched}
