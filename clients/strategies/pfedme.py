"""pFedMe: the shared model learns from personal models that are kept near it by a Moreau envelope.

T. Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, Algorithm 1. On each batch
theta ~ argmin F(theta) + lambda/2 ||theta - w||^2 by a few gradient steps, then w <- w - lr lambda (w - theta). The
server takes the plain mean; the paper's beta is the learning rate of ``strategy/optimizer=sgd``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clients.strategies.local_sgd import gradient_at
from clients.strategies.personal import PersonalModel
from fedcl.contracts.learner import Batch, Context, Phase


class PFedMe(PersonalModel):
    """Replace every gradient of the shared model by lambda (w - theta), and predict with the last theta.

    In a local round theta starts at the received model and moves on from batch to batch, as in the authors' code. What
    other plugins add to the loss does not reach theta. The steps are stable while lr lambda and inner_lr lambda are
    well below 2.
    """

    phase: ClassVar[Phase] = Phase.GRADIENT

    def __init__(self, *, weight: float = 1.0, inner_lr: float = 0.1, inner_steps: int = 5) -> None:
        super().__init__()
        self.weight = weight
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps

    def before_round(self, ctx: Context) -> None:
        """Start theta at the received model, in every local round."""
        self._personal = ctx.model.vector()

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Move theta towards the minimum for this batch."""
        theta_P, weights = self.personal(), slice(ctx.model.num_parameters)
        shared_P = ctx.model.vector()
        for _ in range(self.inner_steps):
            gradient_P = gradient_at(ctx.model, theta_P, batch)
            pull = theta_P[weights] - shared_P[weights]
            theta_P[weights] -= self.inner_lr * (gradient_P + self.weight * pull)
        return batch

    @torch.no_grad()
    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        thetas = ctx.model.views(self.personal())
        for grad, parameter, theta in zip(grads, ctx.model.trainable, thetas, strict=True):
            grad.copy_(self.weight * (parameter - theta))
