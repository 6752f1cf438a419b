"""What Ditto, APFL and pFedMe share: a second model that a client keeps for itself and predicts with."""

# B = batch, C = logit columns, P = length of the flat vector
from __future__ import annotations

import torch
from torch import Tensor

from clients.strategies.local_sgd import standing_at
from fedcl.contracts.learner import Context, Plugin, State


class PersonalModel(Plugin):
    """Keep a vector (P,) that starts as the first model received and never travels.

    A client that has never trained predicts with what it receives.
    """

    def __init__(self) -> None:
        self._personal: Tensor | None = None

    def state(self) -> State:
        """Return the personal model."""
        return {} if self._personal is None else {"personal": self._personal}

    def load(self, state: State) -> None:
        """Restore it."""
        self._personal = state.get("personal")

    def before_round(self, ctx: Context) -> None:
        """Begin with the received model."""
        if self._personal is None:
            self._personal = ctx.model.vector()

    def personal(self) -> Tensor:
        """Return the personal model of a visit that trains."""
        if self._personal is None:
            raise RuntimeError(f"{type(self).__name__}: a step was taken in a visit that never began")
        return self._personal

    def predicting(self, ctx: Context) -> Tensor | None:
        """Return the vector (P,) to predict with; None is the model at hand."""
        return self._personal

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        """Return the personal model's logits (B, C)."""
        vector_P = self.predicting(ctx)
        if vector_P is None:
            return ctx.model(x).logits
        with torch.no_grad(), standing_at(ctx.model, vector_P.clone()):
            return ctx.model(x).logits
