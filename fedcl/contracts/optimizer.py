"""What moves a client's weights: an optimizer, and a learning rate that follows a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class LocalOptimizer(ABC):
    """Moves the weights of one client by their gradients; built for each local round.

    Constructors take keyword-only hyper-parameters. The learning rate comes with each step, from the schedule.
    """

    @abstractmethod
    def step(self, params: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """Move ``params`` in place by one step along ``grads``, which may be overwritten."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what the next local round goes on from: nested dicts and lists of tensors and numbers."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned; an empty state is that of an optimizer that has not moved yet."""


class Elementwise(LocalOptimizer):
    """An optimizer that treats each weight by itself, with ``num_slots`` numbers of memory for each.

    So many clients can be moved at once, with weights that are stacked.
    """

    num_slots: ClassVar[int] = 0

    def __init__(self) -> None:
        self._count = 0
        self._slots: list[list[Tensor]] = []

    @abstractmethod
    def update(
        self, params: list[Tensor], grads: list[Tensor], slots: list[list[Tensor]], count: int, lr: float
    ) -> None:
        """Move ``params`` and ``slots`` in place. Each slot is shaped like ``params``, zero before the first step.

        ``count`` is the number of this step, from 1.
        """

    @torch.no_grad()
    def step(self, params: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """Take the next step; see :meth:`update`."""
        if not self._count:
            self._slots = self.zeros(params)
        self._count += 1
        self.update(params, grads, self._slots, self._count, lr)

    def zeros(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Return slots for ``params`` as they are before the first step."""
        return [[torch.zeros_like(param) for param in params] for _ in range(self.num_slots)]

    def state(self) -> dict[str, Any]:
        """Return the number of steps so far, and the slots."""
        return {"count": self._count, "slots": self._slots} if self._count else {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._count, self._slots = int(state.get("count", 0)), state.get("slots", [])


class RateSchedule(ABC):
    """The learning rate as a share of ``client.optimizer.lr``: a pure function of where training stands."""

    @abstractmethod
    def share(self, at: int, of: int) -> float:
        """Return the share, positive, at the ``at``-th (from 0) of ``of`` steps or rounds."""
