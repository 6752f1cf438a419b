"""Adaptive server optimizers: FedAdagrad, FedYogi and FedAdam.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2. With Delta the combined change (the negative of
the pseudo-gradient), coordinate by coordinate:

    m <- beta_1 m + (1 - beta_1) Delta          m starts at 0
    v <- v + Delta^2                            Adagrad
    v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)      Yogi
    v <- beta_2 v + (1 - beta_2) Delta^2        Adam; v starts at no less than tau^2
    x <- x + lr m / (sqrt(v) + tau)

As in the paper there is no bias correction. (Flower 1.41's FedAdam multiplies lr by sqrt(1 - beta_2^(t+1)) /
(1 - beta_1^(t+1)) in its round t = 1, 2, ...; its FedYogi and FedAdagrad do not; all three start v at 0.)
"""

# P = length of the flat vector
from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import ServerOptimizer, Target
from fedcl.models.flat import Spec


class Adaptive(ServerOptimizer):
    """What the three share: both moments for each target, and the step.

    Buffers, such as running statistics, are no weights: their change is applied as it is. A weight that nobody trained
    this round has change 0 and still moves by what is left of m.

    Parameters
    ----------
    lr
        The paper's eta.
    beta_1
        Decay of the first moment, in [0, 1).
    tau
        Degree of adaptivity: the smaller, the more alike all steps are.
    initial_v
        Where v starts; ``None`` is tau^2, the least that the paper allows.
    """

    def __init__(
        self, *, lr: float = 0.01, beta_1: float = 0.0, tau: float = 1e-3, initial_v: float | None = None
    ) -> None:
        self.lr = lr
        self.beta_1 = beta_1
        self.tau = tau
        self.initial_v = tau**2 if initial_v is None else initial_v
        self._parameters = 0
        self._m: dict[Target, Tensor] = {}
        self._v: dict[Target, Tensor] = {}

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new v from the old one and the squared change, float64 (parameters,)."""

    def setup(self, spec: Spec) -> None:
        self._parameters = sum(tensor.size for tensor in spec if tensor.kind == "parameter")

    def step(self, target: Target, change: Tensor) -> Tensor:
        """Return lr m / (sqrt(v) + tau) for weights and the change itself for buffers, float64 (P,)."""
        delta = change[: self._parameters]
        m = self._m.get(target, torch.zeros_like(delta))
        v = self._v.get(target, torch.full_like(delta, self.initial_v))
        m = self.beta_1 * m + (1 - self.beta_1) * delta
        v = self.second_moment(v, delta.square())
        self._m[target], self._v[target] = m, v
        return torch.cat([self.lr * m / (v.sqrt() + self.tau), change[self._parameters :]])

    def state_dict(self) -> dict[str, Any]:
        """Return both moments of each target, float64 (parameters,)."""
        return {"m": dict(self._m), "v": dict(self._v)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._m, self._v = dict(state["m"]), dict(state["v"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Start the moments over: they are sums over clients."""
        name = type(self).__name__
        if not self._m:
            return ErasureOutcome(name, "not applicable", "keeps nothing about clients")
        self._m.clear()
        self._v.clear()
        return ErasureOutcome(name, "reset", "the moments are sums over clients: they start over")


class Adagrad(Adaptive):
    """FedAdagrad: v is the sum of all squared changes. The paper runs it with ``beta_1`` 0."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


class _Decaying(Adaptive):
    def __init__(
        self,
        *,
        lr: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        initial_v: float | None = None,
    ) -> None:
        super().__init__(lr=lr, beta_1=beta_1, tau=tau, initial_v=initial_v)
        self.beta_2 = beta_2


class Adam(_Decaying):
    """FedAdam: v is a running mean of squared changes."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square


class Yogi(_Decaying):
    """FedYogi: as Adam, but v moves by an amount that depends on the new change alone."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * torch.sign(v - square)
