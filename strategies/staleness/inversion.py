"""A client's local round simulated at the server, differentiably: what gradient inversion descends through.

Wang and Gao, AAAI 2025 (arXiv 2309.13536): find samples D with LocalUpdate(w_base; D) - w_base = change. They need not
look like the client's; they stand for them in LocalUpdate(w_now; D). The search is in
:mod:`strategies.staleness.search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedcl.contracts.learner import LocalTraining
from fedcl.models.flat import FlatModel, Spec
from fedcl.models.networks import Output

# K = clients simulated at once, P = parameters and buffers, N = made-up samples, B = rows of a step,
# C = allowed columns
Variant = Literal["consistent", "official"]


@dataclass(frozen=True)
class Simulation:
    """Local rounds of K clients, simulated differentiably in evaluation mode.

    ``trained`` (P,) bool marks what training moves, ``columns`` (C,) the columns a prediction may choose from, None for
    all. Holds no reference to a run, so that it can be sent to another process.
    """

    module: nn.Module
    spec: Spec
    trained: Tensor
    training: LocalTraining
    columns: Tensor | None
    variant: Variant = "consistent"

    def loss(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss at ``weights`` (P,) on x (B, ...) with target logits y (B, C)."""
        parts = torch.split(weights, [tensor.size for tensor in self.spec])
        state = {tensor.name: part.view(tensor.shape) for tensor, part in zip(self.spec, parts, strict=True)}
        logits = cast(Output, functional_call(self.module, state, (x,))).logits
        log_p = F.log_softmax(logits if self.columns is None else logits[:, self.columns], dim=1)
        if self.variant == "official":
            return F.binary_cross_entropy_with_logits(log_p, y)
        return -(F.softmax(y, dim=1) * log_p).sum(1).mean()

    def _losses(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return each client's mean loss (K,) at weights (K, P)."""
        if len(weights) == 1:
            return self.loss(weights[0], x[0], y[0])[None]
        return vmap(self.loss)(weights, x, y)

    def changes(
        self, base: Tensor, x: Tensor, y: Tensor, plan: Sequence[Tensor], *, differentiable: bool = False
    ) -> Tensor:
        """Return what the local rounds change in ``base`` (K, P), float32; zero where nothing is trained.

        ``x`` (K, N, ...) and ``y`` (K, N, C) are the clients' samples and target logits, ``plan`` has the rows (K, B)
        of each step.
        """
        own = torch.arange(len(base), device=base.device)[:, None]
        start = base.detach().requires_grad_()
        weights, velocity = start, None
        for rows in plan:
            loss = self._losses(weights, x[own, rows], y[own, rows]).sum()
            (grad,) = torch.autograd.grad(loss, weights, create_graph=differentiable)
            if self.training.weight_decay:
                grad = grad + self.training.weight_decay * weights
            grad = grad * self.trained
            velocity = grad if velocity is None else self.training.momentum * velocity + grad
            weights = weights - self.training.lr * velocity
            if not differentiable:
                weights = weights.detach().requires_grad_()
        moved = weights - start
        return moved if differentiable else moved.detach()


def trainable(model: FlatModel) -> Tensor:
    """Return bool (P,), set at parameters: a simulation in evaluation mode moves no buffer."""
    return torch.arange(model.spec.size, device=model.device) < model.num_parameters


def batch_plan(rows: int, num_examples: int, training: LocalTraining, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the rows of each step: as many steps as the client took, in an order drawn again for each epoch.

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
        plan += [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(plan)


def largest(change: Tensor, allowed: Tensor, share: float) -> Tensor:
    """Return bool (P,): the ``share`` of the ``allowed`` entries that ``change`` moves most, at least one."""
    if share >= 1:
        return allowed
    size = change.abs().masked_fill(~allowed, -1.0)
    count = max(1, round(share * int(allowed.sum())))
    return torch.zeros_like(allowed).index_fill_(0, size.topk(count).indices, True) & allowed
