"""The steps of an elementwise optimizer for many clients at once, on weights that are stacked."""

# K = clients of the stack
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcl.client.moves import is_plain, optimizer_of
from fedcl.contracts.learner import LocalTraining
from fedcl.contracts.optimizer import Elementwise


class StackedMoves:
    """Moves slices of stacked weights (K, ...), each client by its own gradient, clipped by its own norm."""

    def __init__(self, stacked: Sequence[Tensor], training: LocalTraining) -> None:
        optimizer = optimizer_of(training)
        if not isinstance(optimizer, Elementwise):
            raise TypeError(f"{type(optimizer).__name__} cannot be stacked")
        self._optimizer, self._clip_norm = optimizer, training.clip_norm
        self._stacked = list(stacked)
        self._slots = optimizer.zeros(self._stacked)

    @classmethod
    def of(cls, stacked: Sequence[Tensor], training: LocalTraining) -> StackedMoves | None:
        """Return None for plain SGD, whose steps are written out."""
        return None if is_plain(training) else cls(stacked, training)

    @torch.no_grad()
    def step(self, part: slice, grads: list[Tensor], number: int, lr: float) -> None:
        """Take the clients' step ``number``, from 0; ``grads`` are those of the clients ``part``."""
        if self._clip_norm is not None:
            clip_each(grads, self._clip_norm)
        params = [stacked[part] for stacked in self._stacked]
        slots = [[stacked[part] for stacked in slot] for slot in self._slots]
        self._optimizer.update(params, grads, slots, number + 1, lr)


def clip_each(grads: list[Tensor], max_norm: float) -> None:
    """Scale each client's part of ``grads`` (K, ...) in place, as `fedcl.client.moves.clip` does."""
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads])
    factor_K = (max_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor_K.view(-1, *[1] * (grad.dim() - 1)))
