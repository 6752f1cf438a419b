"""Any optimizer of torch.optim's kind, for a client's local round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.optimizer import LocalOptimizer


class TorchOptimizer(LocalOptimizer):
    """Wraps what ``make`` builds for the weights; it is built at the first step, which costs more than a small step."""

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self._make = make
        self._made: torch.optim.Optimizer | None = None
        self._loaded: dict[str, Any] = {}

    def step(self, params: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """Hand the gradients to torch's optimizer."""
        if self._made is None:
            self._made = self._begin(params)
        for group in self._made.param_groups:
            group["lr"] = lr
        for param, gradient in zip(params, grads, strict=True):
            param.grad = gradient
        self._made.step()
        for param in params:
            param.grad = None

    def state(self) -> dict[str, Any]:
        """Return what torch's optimizer keeps for each weight tensor, by its place."""
        if self._made is None:
            return self._loaded
        return {str(place): dict(kept) for place, kept in self._made.state_dict()["state"].items()}

    def load(self, state: dict[str, Any]) -> None:
        """Give it to the optimizer when that is built."""
        self._made, self._loaded = None, state

    def _begin(self, params: list[Tensor]) -> torch.optim.Optimizer:
        made = self._make(params)
        if self._loaded:
            kept = {int(place): values for place, values in self._loaded.items()}
            made.load_state_dict({**made.state_dict(), "state": kept})
        return made
