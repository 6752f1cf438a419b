"""Byzantine-robust rules in place of the mean: median, trimmed mean, Krum and geometric median.

- Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, Definitions 1, 2.
- Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017, section 4.
- Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 2022 (arXiv 1912.13445), Algorithm 2.

All rules look at changes. They commute with a shift, so with fresh updates it is as if they looked at models.
"""

# K = updates, P = length of the flat vector, G = coordinates that the same clients trained
from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.strategy import GLOBAL, Collaboration, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec


def median(deltas_KG: Tensor) -> Tensor:
    """Return the coordinate-wise median (G,): of an even number, the mean of the middle two."""
    ordered_KG = deltas_KG.sort(dim=0).values
    count = len(ordered_KG)
    return (ordered_KG[(count - 1) // 2] + ordered_KG[count // 2]) / 2


def trimmed_mean(deltas_KG: Tensor, share: float) -> Tensor:
    """Return the coordinate-wise mean (G,) without the int(share K) smallest and as many largest values."""
    cut = int(share * len(deltas_KG))
    return deltas_KG.sort(dim=0).values[cut : len(deltas_KG) - cut].mean(0)


def krum_scores(deltas_KP: Tensor, attackers: int) -> Tensor:
    """Return each update's sum of squared distances to its K - attackers - 2 nearest others, at least one; (K,)."""
    count = len(deltas_KP)
    squared_KK = torch.stack([(deltas_KP - delta).square().sum(1) for delta in deltas_KP])
    squared_KK.fill_diagonal_(float("inf"))  # an update is no neighbour of its own
    nearest = min(max(1, count - attackers - 2), count - 1)
    return squared_KK.sort(dim=1).values[:, :nearest].sum(1)


def geometric_median(deltas_KP: Tensor, weights_K: Tensor, nu: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the smoothed geometric median (P,) and the weights (K,) that make it of the updates.

    Weiszfeld's iteration from the weighted mean: beta_k = alpha_k / max(nu, ||v - delta_k||), v <- sum beta delta /
    sum beta.
    """
    weights = weights_K / weights_K.sum()
    centre = weights @ deltas_KP
    for _ in range(iterations):
        beta = weights_K / (deltas_KP - centre).norm(dim=1).clamp_min(nu)
        weights = beta / beta.sum()
        centre = weights @ deltas_KP
    return centre, weights


class Robust(Collaboration):
    """What the rules share: the stack of changes, and that a task head is moved by those alone who trained it.

    The number of samples is what a client says of itself: unless a rule says otherwise, all updates count alike.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "stack"

    def weigh(self, deltas_KP: Tensor, updates: list[Update]) -> Tensor:
        """Return the weight of each update (K,), from its whole change; heads it did not train count as unmoved."""
        return torch.tensor([update.weight / update.num_examples for update in updates], dtype=torch.float64)

    def reduce(self, deltas_KG: Tensor, weights_K: Tensor) -> Tensor:
        """Return the change (G,) of coordinates that all of these updates trained: their weighted mean."""
        return weights_K @ deltas_KG / weights_K.sum()

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        if not updates:
            return {}
        deltas_KP = torch.stack([update.delta for update in updates])
        trained = {head: _trained(updates, head) for head in {tensor.task for tensor in view.spec}}
        for tensor in view.spec:
            deltas_KP[~trained[tensor.task], tensor.start : tensor.stop] = 0.0
        weights_K = self.weigh(deltas_KP, updates)
        change = torch.zeros(view.spec.size, dtype=torch.float64)
        for head, members in trained.items():
            counting = members & (weights_K > 0)
            if bool(counting.any()):
                columns = _columns(view.spec, head)
                change[columns] = self.reduce(deltas_KP[counting][:, columns], weights_K[counting])
        return {GLOBAL: view.global_model.double() + change}


def _trained(updates: list[Update], head: int | None) -> Tensor:
    return torch.tensor([head is None or update.head == head for update in updates])


def _columns(spec: Spec, head: int | None) -> Tensor:
    return torch.cat([torch.arange(tensor.start, tensor.stop) for tensor in spec if tensor.task == head])


class Median(Robust):
    """Coordinate-wise median. It takes no weights: staleness can only hold an update back or drop it."""

    def reduce(self, deltas_KG: Tensor, weights_K: Tensor) -> Tensor:
        return median(deltas_KG)


class TrimmedMean(Robust):
    """Coordinate-wise mean without the ``share`` smallest and largest values. It takes no weights either."""

    def __init__(self, *, share: float = 0.25) -> None:
        self.share = share

    def reduce(self, deltas_KG: Tensor, weights_K: Tensor) -> Tensor:
        return trimmed_mean(deltas_KG, self.share)


class Krum(Robust):
    """Krum (``keep`` 1) and Multi-Krum: the mean of the updates that are nearest to their neighbours.

    The paper's guarantee needs K >= 2 ``attackers`` + 3 updates; with fewer, a score still counts one neighbour.
    """

    def __init__(self, *, attackers: int = 1, keep: int = 1) -> None:
        self.attackers = attackers
        self.keep = keep

    def weigh(self, deltas_KP: Tensor, updates: list[Update]) -> Tensor:
        """Return the weights of those kept, and 0 for the others; among equal scores the first client wins."""
        kept = torch.argsort(krum_scores(deltas_KP, self.attackers), stable=True)[: self.keep]
        weights_K = torch.zeros(len(updates), dtype=torch.float64)
        weights_K[kept] = super().weigh(deltas_KP, updates)[kept]
        return weights_K


class GeometricMedian(Robust):
    """RFA: the point with the least sum of distances to the updates, by the smoothed Weiszfeld iteration.

    Parameters
    ----------
    nu
        Distance below which an update's influence grows no more.
    iterations
        Steps from the mean; 0 is the mean itself.
    weighting
        The paper's alpha_k: ``num_examples`` as there, or ``uniform``, which no client can raise for itself.
    """

    def __init__(
        self,
        *,
        nu: float = 1e-6,
        iterations: int = 10,
        weighting: Literal["num_examples", "uniform"] = "uniform",
    ) -> None:
        self.nu = nu
        self.iterations = iterations
        self.weighting = weighting

    def weigh(self, deltas_KP: Tensor, updates: list[Update]) -> Tensor:
        """Return the weights that make the geometric median of the whole changes."""
        alpha_K = super().weigh(deltas_KP, updates)
        if self.weighting == "num_examples":
            alpha_K = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        return geometric_median(deltas_KP, alpha_K, self.nu, self.iterations)[1]
