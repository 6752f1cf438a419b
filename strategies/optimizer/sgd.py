"""Server SGD with momentum: FedAvgM.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 1 with ServerOpt = SGD; the momentum form is that
of Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
arXiv 1909.06335: v <- momentum v + change; x <- x + lr v.
"""

# P = length of the flat vector
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import ServerOptimizer, Target
from fedcl.models.flat import Spec


class SGD(ServerOptimizer):
    """Move by ``lr`` times the running sum of changes, for each target its own.

    With ``lr`` 1 and ``momentum`` 0 a change is returned as it came, bit for bit. Buffers, such as running statistics,
    are no weights: their change is applied as it is.
    """

    def __init__(self, *, lr: float = 1.0, momentum: float = 0.9) -> None:
        self.lr = lr
        self.momentum = momentum
        self._parameters = 0
        self._velocity: dict[Target, Tensor] = {}

    def setup(self, spec: Spec) -> None:
        self._parameters = sum(tensor.size for tensor in spec if tensor.kind == "parameter")

    def step(self, target: Target, change: Tensor) -> Tensor:
        """Return lr v with v <- momentum v + change, float64 (P,)."""
        if self.lr == 1 and not self.momentum:
            return change
        direction = change[: self._parameters]
        if self.momentum:
            velocity = self._velocity.get(target)
            direction = direction.clone() if velocity is None else self.momentum * velocity + direction
            self._velocity[target] = direction
        return torch.cat([self.lr * direction, change[self._parameters :]])

    def state_dict(self) -> dict[str, Any]:
        """Return the velocity of each target, float64 (parameters,)."""
        return {"velocity": dict(self._velocity)} if self.momentum else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._velocity = dict(state.get("velocity", {}))

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Start the velocities over: they are sums over clients."""
        name = type(self).__name__
        if not self._velocity:
            return ErasureOutcome(name, "not applicable", "keeps nothing about clients")
        self._velocity.clear()
        return ErasureOutcome(name, "reset", "the velocity is a sum over clients: it starts over")
