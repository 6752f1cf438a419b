"""Ditto: a personal model is trained beside the shared one and held near it.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, Algorithm 1:
v <- v - lr (grad F(v) + lambda (v - w_received)). The server averages as FedAvg does.
"""

from __future__ import annotations

from typing import ClassVar

from clients.strategies.local_sgd import gradient_at
from clients.strategies.personal import PersonalModel
from fedcl.contracts.learner import Batch, Context, Phase


class Ditto(PersonalModel):
    """Take one step of the personal model on each batch, by plain SGD.

    The shared model trains exactly as without Ditto, unless dropout draws for both.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING

    def __init__(self, *, weight: float = 0.1, lr: float | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.lr = lr

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Move the personal model on the batch as the other plugins left it."""
        personal_P = self.personal()
        gradient_P = gradient_at(ctx.model, personal_P, batch)
        weights = slice(ctx.model.num_parameters)
        pull = personal_P[weights] - ctx.received[weights]
        personal_P[weights] -= (self.lr or ctx.lr) * (gradient_P + self.weight * pull)
        return batch
