"""DC-ASGD: a late change corrected to first order for how far the model has moved since.

Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation", ICML 2017, equations 10 (fixed) and 14
(adaptive): g~ = g + lambda g * g * (w_now - w_base). The Hessian is replaced by the diagonal of g g'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import Staleness, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec
from strategies.staleness.rebase import rebased

# P = parameters
EPS = 1e-7  # the paper's


def compensated(change: Tensor, drift: Tensor, strength: Tensor | float, lr: float) -> Tensor:
    """Return the change of g + strength g * g * drift, where change = -lr g; all (P,) float64."""
    return change - strength / lr * change * change * drift


class DCASGD(Staleness):
    """Compensate late changes by a diagonal of the curvature.

    A change of several local steps is taken for one step of a gradient -change / ``lr``.

    Parameters
    ----------
    strength
        lambda (fixed), or lambda_0 (adaptive).
    lr
        What turns changes into gradients; with 1 the strength applies to changes as they are.
    adaptive
        Divide lambda_0 by sqrt(MS + 1e-7), with MS the moving mean of squared gradients over all updates.
    momentum
        Of that mean, in [0, 1).
    """

    def __init__(
        self, *, strength: float = 4.0, lr: float = 1.0, adaptive: bool = False, momentum: float = 0.95
    ) -> None:
        self.strength, self.lr = strength, lr
        self.adaptive, self.momentum = adaptive, momentum
        self._mean_square = torch.zeros(0, dtype=torch.float64)
        self._buffers = slice(0, 0)

    def setup(self, spec: Spec) -> None:
        """Make room for the moving mean, and learn where the buffers are, which have no curvature."""
        self._buffers = slice(spec.size - sum(tensor.size for tensor in spec if tensor.kind == "buffer"), spec.size)
        self._mean_square = torch.zeros(spec.size if self.adaptive else 0, dtype=torch.float64)

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Correct late updates, each with the curvature known after it."""
        return [self._corrected(update, view) for update in updates]

    def _corrected(self, update: Update, view: ServerView) -> Update:
        strength: Tensor | float = self.strength
        if self.adaptive:
            self._mean_square = self.momentum * self._mean_square + (1 - self.momentum) * (update.delta / self.lr) ** 2
            strength = self.strength / (self._mean_square + EPS).sqrt()
        if update.age == 0:
            return update
        drift = view.model_of(update.client).double() - update.base.double()
        change = compensated(update.delta, drift, strength, self.lr)
        change[self._buffers] = update.delta[self._buffers]
        return rebased(update, change, view)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_square": self._mean_square} if self.adaptive else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.adaptive:
            self._mean_square = state["mean_square"]

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Start the moving mean again: it mixes all clients."""
        if not self.adaptive:
            return super().forget(request)
        self._mean_square = torch.zeros_like(self._mean_square)
        return ErasureOutcome(type(self).__name__, "reset", "the mean of squared changes mixed all clients")
