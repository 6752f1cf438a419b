"""What Ditto, APFL and pFedMe share: a second model that stays with the client and makes its predictions."""

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
        return {} if self._personal is None else {"personal": self._personal}

    def load(self, state: State) -> None:
        self._personal = state.get("personal")

    def before_round(self, ctx: Context) -> None:
        if self._personal is None:
            self._personal = ctx.model.vector()

    def personal(self) -> Tensor:
        """Return the personal model within a local round."""
        if self._personal is None:
            raise RuntimeError(f"{type(self).__name__}: a step was taken in a local round that never began")
        return self._personal

    def predicting(self, ctx: Context) -> Tensor | None:
        """Return the vector (P,) to predict with; None for the current model."""
        return self._personal

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        vector_P = self.predicting(ctx)
        if vector_P is None:
            return ctx.model(x).logits
        with torch.no_grad(), standing_at(ctx.model, vector_P.clone()):
            return ctx.model(x).logits
