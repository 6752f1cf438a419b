"""RMSprop: steps along the gradient, divided by the root of the mean squared gradient.

Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012, with torch.optim's momentum. With g the gradient plus weight_decay w:

    v <- alpha v + (1 - alpha) g^2;  b <- momentum b + g / (sqrt(v) + eps);  w <- w - lr b
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.optimizer import Elementwise


class RMSprop(Elementwise):
    """RMSprop, not centred."""

    num_slots: ClassVar[int] = 2

    def __init__(
        self, *, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0
    ) -> None:
        super().__init__()
        self.alpha, self.eps, self.weight_decay, self.momentum = alpha, eps, weight_decay, momentum

    def update(
        self, params: list[Tensor], grads: list[Tensor], slots: list[list[Tensor]], count: int, lr: float
    ) -> None:
        square, buffer = slots
        if self.weight_decay:
            torch._foreach_add_(grads, params, alpha=self.weight_decay)
        torch._foreach_mul_(square, self.alpha)
        torch._foreach_addcmul_(square, grads, grads, 1.0 - self.alpha)
        root = torch._foreach_sqrt(square)
        torch._foreach_add_(root, self.eps)
        torch._foreach_mul_(buffer, self.momentum)
        torch._foreach_addcdiv_(buffer, grads, root)
        torch._foreach_add_(params, buffer, alpha=-lr)
