"""FedProx: local steps are held near the model that was received.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation (2):
h(w) = F(w) + mu/2 ||w - w_received||^2. The server averages as FedAvg does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, Phase, Plugin


class FedProx(Plugin):
    """Add the proximal term's gradient, ``mu (w - w_received)``, to every gradient.

    The gradient of a sum is the sum of the gradients, so this is the loss term itself, without a graph over all weights
    at each step. The recorded training loss is the data's alone. With ``mu`` 0 nothing is computed: the bits are those
    of plain training.
    """

    phase: ClassVar[Phase] = Phase.GRADIENT

    def __init__(self, *, mu: float) -> None:
        self.mu = mu
        self._anchors: list[Tensor] = []

    def setup(self, ctx: Context) -> None:
        self._anchors = ctx.model.views(ctx.received)  # nothing is copied

    @torch.no_grad()
    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        if self.mu:
            weights: list[Tensor] = list(ctx.model.trainable)
            drift = torch._foreach_sub(weights, self._anchors)
            torch._foreach_add_(grads, drift, alpha=self.mu)
