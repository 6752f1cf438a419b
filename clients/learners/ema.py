"""EMA with a coefficient of plasticity and stability, tensor by tensor.

Qiao et al., "Large Continual Instruction Assistant", ICML 2025 (arXiv 2410.10868), after its published code: beside the
weights theta that are trained a moving average theta* is kept, ``theta* <- (1 - alpha) theta* + alpha theta`` after
each step, with

    alpha = 2 (1 + b) / (a c),  a = |theta - theta*|_1,  b = |g_t|_1,  c = |g_t - g_(t-1)|_1

for each tensor where that lies in (0, 1), and a small constant elsewhere. The client sends the average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin


class EMA(Plugin):
    """Send a moving average of the local round's weights, which starts at the received ones.

    Parameters
    ----------
    alpha
        The same coefficient for all tensors and steps instead; 1 is plain training, and computes nothing.
    fallback
        alpha where the coefficient is not in (0, 1), and in the first step, which has no gradient before it.
    """

    phase = Phase.WEIGHT

    def __init__(self, *, alpha: float | None = None, fallback: float = 0.01) -> None:
        self.alpha = alpha
        self.fallback = fallback
        self._average: list[Tensor] = []
        self._gradient: list[Tensor] = []
        self._previous: list[Tensor] = []

    def before_round(self, ctx: Context) -> None:
        """Start the average at the received weights."""
        if self.alpha != 1.0:
            self._average = [weight.detach().clone() for weight in ctx.model.trainable]

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Keep the step's gradient, without momentum and weight decay."""
        if self.alpha is None:
            self._gradient = [gradient.clone() for gradient in grads]

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        for i, (average, weight) in enumerate(zip(self._average, ctx.model.trainable, strict=False)):
            if self.alpha is not None:
                average.lerp_(weight, self.alpha)
            elif self._previous:
                alpha = coefficient(average, weight, self._gradient[i], self._previous[i], self.fallback)
                average.add_(alpha * (weight - average))
            else:
                average.lerp_(weight, self.fallback)
        self._previous = self._gradient

    @torch.no_grad()
    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Write the average into the model; buffers stay those of the last step."""
        for weight, average in zip(ctx.model.trainable, self._average, strict=False):
            weight.copy_(average)
        return {}


def coefficient(average: Tensor, weight: Tensor, gradient: Tensor, previous: Tensor, fallback: float) -> Tensor:
    """Return alpha of one tensor, a scalar."""
    distance = (weight - average).abs().sum()
    change = (gradient - previous).abs().sum()
    alpha = 2.0 * (1.0 + gradient.abs().sum()) / (distance * change)
    return torch.where((alpha > 0) & (alpha < 1), alpha, fallback)
