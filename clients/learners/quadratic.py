"""What EWC, MAS, SI and L2 share: a quadratic pull on the flat vector, and its importances summed over clients.

The sum is that of FedCurv (Shoham et al., "Overcoming Forgetting in Federated Learning on Non-IID Data", 2019,
arXiv 1910.07796): the pull of many anchors, ``sum_j F_j (theta - theta_j)^2``, is known up to a constant from the two
vectors ``sum_j F_j`` and ``sum_j F_j theta_j``, so neither clients nor tasks need to be kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.learner import Payload
from fedcl.models.flat import FlatModel

# P = parameter elements, A = anchors


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
        pairs = zip(model.parameters, model.parameter_specs, strict=True)
        grads = [gradient_P[s.start : s.stop].view(s.shape) for p, s in pairs if p.requires_grad]
        return (None, None, None, None, *grads)


# A client's share of the sums: all three, or none where it has no part in them.
SUMMANDS: Form = {
    "importance": TensorField(("parameters",), "float64", low=0.0, group="sums"),
    "pull": TensorField(("parameters",), "float64", group="sums"),
    "count": TensorField((), "float64", low=1.0, counts=True, group="sums"),
}


def payloads_of(query: str) -> tuple[Payload, ...]:
    """Return what a learner declares that gets the sums of ``query`` with every train message."""
    return (Payload(query, "down"),)


def summands(importance_P: Tensor, anchor_P: Tensor, num_examples: int) -> dict[str, Tensor]:
    """Return a client's share of the sums: the importances, and these times the anchor, as float64 (P,), weighted."""
    weighted_P = num_examples * importance_P.double()
    count = torch.tensor(float(num_examples), dtype=torch.float64)
    return {"importance": weighted_P, "pull": weighted_P * anchor_P.double(), "count": count}


def summed(payload: Mapping[str, Tensor], query: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return importances and anchor, (P,) each, whose one pull is that of all the summands; None before there are any.

    The importances are the mean over all samples of all tasks; the anchor is the mean of the anchors that the
    importances weigh, and where nothing is important 0.

    Raises
    ------
    ValueError
        If the message carries some of the sums but not others.
    """
    names = [f"{query}/{name}" for name in ("importance", "pull", "count")]
    if not any(name in payload for name in names):
        return None
    if not all(name in payload for name in names):
        raise ValueError(f"the sums of {query!r} must come together: {', '.join(names)}")
    importance_P, pull_P, count = (payload[name].to(device) for name in names)
    anchor_P = torch.where(importance_P > 0, pull_P / importance_P, torch.zeros_like(pull_P))
    return importance_P / count, anchor_P
