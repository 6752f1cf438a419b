"""FedAvg with local fine-tuning: a client adapts the model it received before it uses it.

The baseline of personalised federated learning, as in Collins et al., "Exploiting Shared Representations for
Personalized Federated Learning", ICML 2021, section 5 (FedAvg-FT).
"""

# B = batch, C = logit columns, P = length of the flat vector
from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clients.strategies.local_sgd import train_epochs
from fedcl.contracts.learner import Context, Phase, Plugin


class FineTuned(Plugin):
    """Predict with the received model after ``epochs`` epochs of plain SGD on the client's own samples.

    Training does not change. After it, within the same message, the model predicts as it is: it has just been trained.

    Parameters
    ----------
    epochs
        0 predicts with the received model.
    lr
        Learning rate; ``None`` is the client's own.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING

    def __init__(self, *, epochs: int = 5, lr: float | None = None) -> None:
        self.epochs = epochs
        self.lr = lr
        self._tuned: Tensor | None = None
        self._trained = False

    def before_round(self, ctx: Context) -> None:
        """From here on the current model is the client's own."""
        self._trained = True

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        if self._trained or len(ctx.data) == 0:
            return ctx.model(x).logits
        received_P = ctx.model.vector()
        if self._tuned is None:
            train_epochs(ctx, epochs=self.epochs, lr=self.lr or ctx.lr, purpose="fine-tuning")
            self._tuned = ctx.model.vector()
        ctx.model.load(self._tuned)
        ctx.model.eval()
        with torch.no_grad():
            logits = ctx.model(x).logits
        ctx.model.load(received_P)
        return logits
