"""Adam and AdamW: steps along the mean gradient, divided by the root of the mean squared gradient.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1; Loshchilov and Hutter, "Decoupled
Weight Decay Regularization", ICLR 2019, Algorithm 2. With g the gradient of the t-th step:

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Adam adds weight_decay w to g; AdamW multiplies w by 1 - lr weight_decay before the step, as torch.optim does.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.optimizer import Elementwise


class Adam(Elementwise):
    """Adam with weight decay in the gradient."""

    num_slots: ClassVar[int] = 2
    decoupled: ClassVar[bool] = False

    def __init__(
        self, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay

    def update(
        self, params: list[Tensor], grads: list[Tensor], slots: list[list[Tensor]], count: int, lr: float
    ) -> None:
        mean, square = slots
        if self.weight_decay and self.decoupled:
            torch._foreach_mul_(params, 1.0 - lr * self.weight_decay)
        elif self.weight_decay:
            torch._foreach_add_(grads, params, alpha=self.weight_decay)
        torch._foreach_lerp_(mean, grads, 1.0 - self.beta1)
        torch._foreach_mul_(square, self.beta2)
        torch._foreach_addcmul_(square, grads, grads, 1.0 - self.beta2)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, math.sqrt(1.0 - self.beta2**count))
        torch._foreach_add_(root, self.eps)
        torch._foreach_addcdiv_(params, mean, root, -lr / (1.0 - self.beta1**count))


class AdamW(Adam):
    """Adam whose weight decay is a step of its own."""

    decoupled: ClassVar[bool] = True
