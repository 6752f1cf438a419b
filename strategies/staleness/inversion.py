"""Gradient inversion: made-up samples whose training, played through at the server, gives a client's change.

Wang and Gao, AAAI 2025 (arXiv 2309.13536): find D with LocalUpdate(w_base; D) - w_base = change, by descent through the
local steps. The samples need not look like the client's; they stand for them in LocalUpdate(w_now; D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fedcl.client.loop import LocalTraining
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameters and buffers, N = made-up samples, C = allowed columns
Variant = Literal["consistent", "official"]
BOX = 2.0  # official: inputs are kept within (0.5 +- 0.5) / 0.25 of the published code's normalisation


@dataclass(frozen=True)
class Simulation:
    """A client's visit, played through differentiably in evaluation mode.

    ``columns`` (C,) are the columns a prediction may choose from, None for all; ``plan`` the rows of each step.
    """

    model: FlatModel
    training: LocalTraining
    columns: Tensor | None
    plan: tuple[Tensor, ...]
    variant: Variant = "consistent"

    def loss(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss at ``weights`` (P,) on x (N, ...) with target logits y (N, C)."""
        spec = self.model.spec
        parts = torch.split(weights, [tensor.size for tensor in spec])
        state = {tensor.name: part.view(tensor.shape) for tensor, part in zip(spec, parts, strict=True)}
        logits = cast(Output, functional_call(self.model.module, state, (x,))).logits
        log_p = F.log_softmax(logits if self.columns is None else logits[:, self.columns], dim=1)
        if self.variant == "official":
            return F.binary_cross_entropy_with_logits(log_p, y)
        return -(F.softmax(y, dim=1) * log_p).sum(1).mean()

    def change(self, base: Tensor, x: Tensor, y: Tensor, *, differentiable: bool = False) -> Tensor:
        """Return what the visit changes in ``base`` (P,), float32; zero where nothing is trained."""
        trained = trainable(self.model)
        start = base.detach().requires_grad_()
        weights, velocity = start, None
        for rows in self.plan:
            loss = self.loss(weights, x[rows], y[rows])
            (grad,) = torch.autograd.grad(loss, weights, create_graph=differentiable)
            if self.training.weight_decay:
                grad = grad + self.training.weight_decay * weights
            grad = grad * trained
            velocity = grad if velocity is None else self.training.momentum * velocity + grad
            weights = weights - self.training.lr * velocity
            if not differentiable:
                weights = weights.detach().requires_grad_()
        moved = weights - start
        return moved if differentiable else moved.detach()


def trainable(model: FlatModel) -> Tensor:
    """Return bool (P,), set where local training moves the model."""
    frozen = {name for name, parameter in model.module.named_parameters() if not parameter.requires_grad}
    mask = torch.zeros(model.spec.size, dtype=torch.bool, device=model.device)
    for tensor in model.parameter_specs:
        mask[tensor.start : tensor.stop] = tensor.name not in frozen
    return mask


def batch_plan(
    rows: int, num_examples: int, training: LocalTraining, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the rows of each step: as many steps as the client took, in an order drawn anew for each epoch.

    With as many rows as the client has samples the batches have its sizes; with fewer they shrink in proportion.

    Raises
    ------
    ValueError
        If there are fewer rows than steps in an epoch.
    """
    steps = math.ceil(num_examples / training.batch_size)
    if rows < steps:
        raise ValueError(f"strategy.staleness.server.samples={rows}: must be at least the {steps} batches of an epoch")
    ends = [round(min(training.batch_size * (i + 1) / num_examples, 1.0) * rows) for i in range(steps)]
    ends = [min(max(end, i + 1), rows - (steps - 1 - i)) for i, end in enumerate(ends)]
    plan: list[Tensor] = []
    for _ in range(training.epochs):
        order = torch.randperm(rows, generator=generator) if steps > 1 else torch.arange(rows)
        plan += [order[start:end].to(device) for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(plan)


def largest(change: Tensor, allowed: Tensor, share: float) -> Tensor:
    """Return bool (P,): the ``share`` of the ``allowed`` entries that ``change`` moves most, at least one."""
    if share >= 1:
        return allowed
    size = change.abs().masked_fill(~allowed, -1.0)
    count = max(1, round(share * int(allowed.sum())))
    return torch.zeros_like(allowed).index_fill_(0, size.topk(count).indices, True) & allowed


@dataclass(frozen=True, slots=True)
class Search:
    """How samples are searched for: Adam's steps and learning rate, and when to stop.

    It stops after ``patience`` steps without a gain of one percent. ``official`` descends on the sign of the inputs'
    gradient, cuts the learning rate to a tenth at 3/8, 5/8 and 7/8 of the steps and keeps inputs in a box; otherwise
    the learning rate follows half a cosine.
    """

    iterations: int = 400
    lr: float = 0.1
    patience: int = 100
    variant: Variant = "consistent"

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the 0-based ``step``."""
        if self.variant == "official":
            return self.lr * 0.1 ** sum(step >= self.iterations * eighths / 8 for eighths in (3, 5, 7))
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.iterations))

    def descend(self, optimizer: torch.optim.Adam, x: Tensor, step: int) -> None:
        """Move inputs ``x`` and whatever else ``optimizer`` holds along their gradients."""
        optimizer.param_groups[0]["lr"] = self.lr_at(step)
        if self.variant == "official":
            assert x.grad is not None
            x.grad = x.grad.sign()
        optimizer.step()
        if self.variant == "official":
            x.data.clamp_(-BOX, BOX)


def invert(
    simulation: Simulation, base: Tensor, change: Tensor, start: Sequence[Tensor], matched: Tensor, search: Search
) -> tuple[Tensor, Tensor]:
    """Return inputs (N, ...) and target logits (N, C) whose training at ``base`` gives ``change``, as near as found.

    The disparity is the L1 distance over the ``matched`` entries (P,); the best samples met are returned, which are
    those of ``start`` if nothing improves on them.
    """
    x, y = (tensor.clone().requires_grad_() for tensor in start)
    best, best_x, best_y, since = math.inf, start[0], start[1], 0
    optimizer = torch.optim.Adam([x, y], lr=search.lr)
    goal = change[matched]
    for step in range(search.iterations):
        moved = simulation.change(base, x, y, differentiable=True)
        disparity = (moved[matched] - goal).abs().sum() / goal.abs().sum()
        value = float(disparity.detach())
        since = 0 if value < 0.99 * best else since + 1
        if not math.isfinite(value) or since > search.patience:
            break
        if value < best:
            best, best_x, best_y = value, x.detach().clone(), y.detach().clone()
        x.grad, y.grad = torch.autograd.grad(disparity, [x, y])
        search.descend(optimizer, x, step)
    return best_x, best_y
