"""APFL: predict with a learned mixture of a personal and the shared model.

Deng et al., "Adaptive Personalized Federated Learning", arXiv 2003.13461, Algorithm 1 with its adaptive alpha. With v
the personal and w the client's copy of the shared model, m = alpha v + (1 - alpha) w:

    v <- v - lr alpha grad F(m);  alpha <- alpha - lr <v - w, grad F(m)>, kept in [0, 1]

The server averages w as FedAvg does.
"""

# P = length of the flat vector
from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from clients.strategies.local_sgd import gradient_at
from clients.strategies.personal import PersonalModel
from fedcl.contracts.learner import Batch, Context, Phase, State


class APFL(PersonalModel):
    """Move v on each batch, by plain SGD, and alpha once per local round, on its first batch.

    On the first batch v and w differ by what the other clients have learned. With ``adaptive`` false alpha is constant.
    """

    phase: ClassVar[Phase] = Phase.BOOKKEEPING

    def __init__(self, *, alpha: float = 0.5, adaptive: bool = True) -> None:
        super().__init__()
        self.alpha = alpha
        self.adaptive = adaptive

    def state(self) -> State:
        state = super().state()
        return {**state, "alpha": self.alpha} if state and self.adaptive else state

    def load(self, state: State) -> None:
        super().load(state)
        self.alpha = state.get("alpha", self.alpha)

    def predicting(self, ctx: Context) -> Tensor | None:
        """Return the mixture with the current model."""
        if self._personal is None:
            return None
        return self.alpha * self._personal + (1 - self.alpha) * ctx.model.flat

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Move v, and in the first step alpha, before w moves; the buffers of v become those of the mixture."""
        personal_P, weights = self.personal(), slice(ctx.model.num_parameters)
        mixture_P = self.alpha * personal_P + (1 - self.alpha) * ctx.model.flat
        gradient_P = gradient_at(ctx.model, mixture_P, batch)
        alpha = self.alpha
        if self.adaptive and ctx.step == 0:
            slope = float((personal_P - ctx.model.flat)[weights] @ gradient_P)
            self.alpha = min(max(alpha - ctx.lr * slope, 0.0), 1.0)
        personal_P[weights] -= ctx.lr * alpha * gradient_P
        personal_P[ctx.model.num_parameters :] = mixture_P[ctx.model.num_parameters :]
        return batch
