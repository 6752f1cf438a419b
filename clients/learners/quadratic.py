"""What EWC, MAS, SI and L2 share: a quadratic penalty on the flat vector, and its importances summed over clients.

The sum is that of FedCurv (Shoham et al., "Overcoming Forgetting in Federated Learning on Non-IID Data", 2019,
arXiv 1910.07796): the penalty of many anchors, ``sum_j F_j (theta - theta_j)^2``, is known up to a constant from the
two vectors ``sum_j F_j`` and ``sum_j F_j theta_j``, so neither clients nor tasks need to be kept apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcl.client.scope import check_scope, in_scope
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.learner import Batch, Context, Payload, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements, A = anchors
# A client's share of the sums: all three tensors, or none where it has no part in them.
SUMMANDS: Form = {
    "importance": TensorField(("parameters",), "float64", low=0.0, group="sums"),
    "pull": TensorField(("parameters",), "float64", group="sums"),
    "count": TensorField((), "float64", low=1.0, counts=True, group="sums"),
}


class Quadratic(Plugin, ABC):
    """Pull each weight towards its anchors, as strongly as it is important.

    A subclass gives the importances of a finished task (:meth:`importance`).

    Parameters
    ----------
    weight
        Factor of the penalty; 0 turns the term off and computes nothing.
    scope
        Regular expression searched for in tensor names: only those are held; null: all.
    aggregate
        One penalty from the importances of all clients, around every finished task's model, instead of one's own.

    Raises
    ------
    ValueError
        If ``scope`` is not a regular expression or (in :meth:`check`) matches no tensor.
    """

    phase = Phase.REGULARISER
    key: ClassVar[str]  # of the configuration
    query: ClassVar[str]  # whose responses the server adds up

    def __init__(self, *, weight: float, scope: str | None, aggregate: bool = False) -> None:
        check_scope(scope, f"{self.key}.scope")
        self.weight = weight
        self.scope = scope
        self.aggregate = aggregate
        if aggregate:
            self.queries = (self.query,)  # type: ignore[misc]
            self.sums = {self.query: SUMMANDS}  # type: ignore[misc]
            self.payloads = (Payload(self.query, "down"),)  # type: ignore[misc]
        self._importance_AP: Tensor | None = None
        self._anchor_AP: Tensor | None = None

    @property
    def scale(self) -> float:
        """Factor of the penalty."""
        return self.weight

    @abstractmethod
    def importance(self, ctx: Context) -> Tensor | None:
        """Return how important each weight is for the finished task, (P,); None if the client has no part in it."""

    def check(self, model: FlatModel) -> None:
        in_scope(model, self.scope, f"{self.key}.scope")

    def setup(self, ctx: Context) -> None:
        """Take the sums over clients where they have arrived."""
        sums = summed(ctx.payload, self.query, ctx.device) if self.aggregate else None
        if sums is not None:
            self._importance_AP, self._anchor_AP = sums[0][None], sums[1][None]

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        if not self.weight or self._importance_AP is None or self._anchor_AP is None:
            return None
        return penalty(ctx.model, self._importance_AP, self._anchor_AP, self.scale)

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this client's share of the sums; nothing if it has no part in the task or the term is off."""
        importance_P = self.importance(ctx) if self.weight else None
        return {} if importance_P is None else summands(importance_P, parameters(ctx), len(ctx.data))

    def held(self, ctx: Context, importance_P: Tensor) -> Tensor:
        """Return the importances with zeros outside ``scope``."""
        scope_P = in_scope(ctx.model, self.scope, f"{self.key}.scope")
        return importance_P if scope_P is None else importance_P * scope_P

    def add_task(self, ctx: Context, importance_P: Tensor, decay: float = 1.0) -> None:
        """Add a task's importances to ``decay`` times the earlier ones, around the global weights it ended with."""
        importance_AP = importance_P[None]
        if self._importance_AP is not None:
            importance_AP = decay * self._importance_AP + importance_AP
        self._importance_AP, self._anchor_AP = importance_AP, parameters(ctx).clone()[None]

    def state(self) -> State:
        """Return importances and anchors, (A, P) each; nothing if the server keeps them."""
        if self._anchor_AP is None or self.aggregate:
            return {}
        return {"importance": self._importance_AP, "anchor": self._anchor_AP}

    def load(self, state: State) -> None:
        self._importance_AP, self._anchor_AP = state.get("importance"), state.get("anchor")


def parameters(ctx: Context) -> Tensor:
    """Return the model's parameters (P,), a view of its flat vector."""
    return ctx.model.flat[: ctx.model.num_parameters]


def penalty(model: FlatModel, importance_AP: Tensor, anchor_AP: Tensor, scale: float) -> Tensor:
    """Return ``scale sum_a F_a (theta - theta*_a)^2``, differentiable in the model's trainable parameters."""
    value: Tensor = _Penalty.apply(model, importance_AP, anchor_AP, scale, *model.trainable)  # type: ignore[no-untyped-call]
    return value


class _Penalty(torch.autograd.Function):
    """The penalty on the flat vector: a few operations however many tensors the model has."""

    @staticmethod
    def forward(
        ctx: Any, model: FlatModel, importance_AP: Tensor, anchor_AP: Tensor, scale: float, *_: Tensor
    ) -> Tensor:
        distance_AP = model.flat[: model.num_parameters] - anchor_AP
        pull_AP = importance_AP * distance_AP
        ctx.model, ctx.gradient_P = model, (2.0 * scale) * pull_AP.sum(0)
        return scale * (pull_AP * distance_AP).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        model: FlatModel = ctx.model
        gradient_P = upstream * ctx.gradient_P
        return (None, None, None, None, *model.views(gradient_P))


def summands(importance_P: Tensor, anchor_P: Tensor, num_examples: int) -> dict[str, Tensor]:
    """Return a client's share of the sums: the importances, and these times the anchor, as float64 (P,), weighted."""
    weighted_P = num_examples * importance_P.double()
    count = torch.tensor(float(num_examples), dtype=torch.float64)
    return {"importance": weighted_P, "pull": weighted_P * anchor_P.double(), "count": count}


def summed(payload: Mapping[str, Tensor], query: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return importances and anchor, (P,) each, whose penalty is that of all summands; None before there are any.

    The importances are the mean over all samples of all tasks; the anchor is the mean of the anchors, weighted by
    the importances, and 0 where nothing is important.

    Raises
    ------
    ValueError
        If the message carries only some of the sums.
    """
    names = [f"{query}/{name}" for name in ("importance", "pull", "count")]
    if not any(name in payload for name in names):
        return None
    if not all(name in payload for name in names):
        raise ValueError(f"the sums of {query!r} must come together: {', '.join(names)}")
    importance_P, pull_P, count = (payload[name].to(device) for name in names)
    anchor_P = torch.where(importance_P > 0, pull_P / importance_P, torch.zeros_like(pull_P))
    return importance_P / count, anchor_P
