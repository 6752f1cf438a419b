"""IAU: unlearning as one optimizer step up the forget set's loss and down the other's, all clients together."""

# P = length of the flat vector
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.unlearners.averaging import edited_targets, num_parameters, users_of
from clients.unlearners.steps import BATCH, adam, cross_entropy, gradients
from fedcl.client.sample_gradients import add_to
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.requests import ForgetRequest
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext, Unlearner, UnlearnView

if TYPE_CHECKING:
    from fedcl.contracts.strategy import Target
    from fedcl.contracts.view import Response

RESPONSE: Form = {
    "retain": TensorField(("model",), "float64"),
    "forget": TensorField(("model",), "float64"),
    "counts": TensorField((2,), low=0.0, counts=True),
}


class IAU(Unlearner):
    """Influence approximation unlearning: Adam steps at the server on g = grad CE(R) - grad CE(F).

    "Efficient Machine Unlearning via Influence Approximation" (arXiv 2507.23257), its unlearning step. Every client
    sends the sums of its gradients over what it retains and over what is to be forgotten; the server divides each by
    its number of samples. The first step of Adam moves each weight by ``lr`` against the sign of g. Layers are in
    evaluation mode; frozen parameters and running statistics stay.

    Parameters
    ----------
    lr
        Of Adam.
    steps
        How many steps; the paper takes one. 0 changes nothing.
    """

    def __init__(self, *, lr: float = 0.001, steps: int = 1) -> None:
        self.lr, self.steps = lr, steps
        self._norm = 0.0
        self._moved = 0.0

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Return the sums of gradients and the numbers of samples (retained, forgotten)."""
        counts = torch.tensor([float(len(ctx.retain)), float(len(ctx.forget))])
        if not counts.any():
            return Local(0, {})
        sums = {"retain": summed(ctx, ctx.retain), "forget": summed(ctx, ctx.forget)}
        return Local(len(ctx.retain) + len(ctx.forget), {**sums, "counts": counts})

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        self._norm = self._moved = 0.0
        edited: dict[Target, Tensor] = {}
        head = num_parameters(view.spec)
        for target in edited_targets(requests, models):
            model = models[target].clone()
            step = adam([model[:head]], self.lr)
            clients = tuple(dict.fromkeys([*users_of(target, models, view), *view.owners]))
            for _ in range(self.steps):
                gradient = combined(view.ask("gradients", dict.fromkeys(clients, model.clone()), RESPONSE), model)
                step([gradient[:head].float()])
                self._norm = max(self._norm, float(gradient.norm()))
            self._moved = max(self._moved, float((model - models[target]).norm()))
            edited[target] = model
        return edited

    def metrics(self) -> dict[str, float]:
        """Return the largest norms, over targets, of the gradient and of the change."""
        return {"gradient_norm": self._norm, "change_norm": self._moved}


def summed(ctx: UnlearnContext, samples: Samples) -> Tensor:
    """Return the sum over ``samples`` of the gradients of their cross-entropy, float64 (P,); zero without samples."""
    model = ctx.model
    total = torch.zeros_like(model.flat, dtype=torch.float64)
    model.eval()
    for batch in samples.batches(BATCH):
        add_to(total, model, gradients(model, cross_entropy(model, batch) * len(batch.y)))
    return total


def combined(responses: Sequence[Response], like: Tensor) -> Tensor:
    """Return mean gradient of what is retained minus that of what is forgotten, float64 (P,), of all clients."""
    gradient = torch.zeros_like(like, dtype=torch.float64)
    for column, name, sign in ((0, "retain", 1.0), (1, "forget", -1.0)):
        total = sum(float(response.tensors["counts"][column]) for response in responses)
        for response in responses:
            if total:
                gradient += response.tensors[name].double() * (sign / total)
    return gradient
