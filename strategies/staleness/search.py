"""The search of gradient inversion: samples whose training gives a client's change, for several clients at once.

Wang and Gao, AAAI 2025 (arXiv 2309.13536), section 3; the published search is ``variant="official"``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.staleness.inversion import Simulation, Variant, largest

# K = clients of a batch, P = parameters and buffers, N = made-up samples, C = allowed columns
BOX = 2.0  # official: inputs are kept within (0.5 +- 0.5) / 0.25 of the published code's normalisation
GAIN = 0.99  # of the best disparity so far: what counts as progress


@dataclass(frozen=True)
class Riddle:
    """One late client: its base and its change (P,), the model of now (P,), where the search starts, and its batches.

    ``x`` (N, ...) are inputs, ``y`` (N, C) target logits, ``plan`` the rows of each step.
    """

    base: Tensor
    change: Tensor
    now: Tensor
    x: Tensor
    y: Tensor
    plan: tuple[Tensor, ...]


@dataclass(frozen=True)
class Answer:
    """What was found for a :class:`Riddle`.

    ``x``, ``y`` are the samples, ``change`` (P,) what they change in the model of now, ``residual`` the part
    ||found - change|| / ||change|| of the late change that they leave unexplained, ``iterations`` the search's steps.
    """

    x: Tensor
    y: Tensor
    change: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Search:
    """How samples are searched for: Adam's steps and learning rate, and when to stop.

    It stops for a client when the disparity, an L1 distance relative to the change's, is at most ``tolerance``, or
    after ``patience`` steps without a gain of one percent; the learning rate follows half a cosine. ``official``
    descends on the sign of the inputs' gradient, cuts the learning rate to a tenth at 3/8, 5/8 and 7/8 of the steps,
    keeps inputs in a box, and takes the last samples after all its steps. ``top`` is the share of the entries that are
    matched.
    """

    iterations: int = 120
    lr: float = 0.2
    patience: int = 100
    tolerance: float = 0.0
    top: float = 1.0
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


class _Best:
    """The best samples found by each of K searches, and which of the searches are over.

    The official search has no best: whatever came last counts.
    """

    def __init__(self, search: Search, x: Tensor, y: Tensor) -> None:
        self.search = search
        self.x, self.y = x.detach().clone(), y.detach().clone()
        self.value = [math.inf] * len(x)
        self.since = [0] * len(x)
        self.steps = [0] * len(x)
        self.over = [False] * len(x)

    def take(self, values: Sequence[float], x: Tensor, y: Tensor) -> bool:
        """Take in the samples whose disparities are ``values``; return whether any search goes on."""
        official = self.search.variant == "official"
        for k, value in enumerate(values):
            if self.over[k]:
                continue
            self.since[k] = 0 if value < GAIN * self.value[k] else self.since[k] + 1
            if official or value < self.value[k]:
                self.value[k], self.x[k], self.y[k] = value, x[k].detach(), y[k].detach()
            done = value <= self.search.tolerance or self.since[k] > self.search.patience
            self.over[k] = not math.isfinite(value) or (done and not official)
            self.steps[k] += not self.over[k]
        return not all(self.over)


def invert(
    simulation: Simulation, base: Tensor, change: Tensor, start: tuple[Tensor, Tensor], plan: Sequence[Tensor],
    search: Search,
) -> tuple[Tensor, Tensor, list[int]]:  # fmt: skip
    """Return inputs (K, N, ...) and target logits (K, N, C) whose training at ``base`` gives ``change``, and the steps.

    ``base`` and ``change`` are (K, P), ``plan`` has rows (K, B). Returns the best samples found: those of ``start`` if
    nothing improves on them. One client's search does not depend on the others' but for rounding.
    """
    matched = torch.stack([largest(one, simulation.trained, search.top) for one in change])
    goal = change * matched
    size = goal.abs().sum(1)
    x, y = (tensor.clone().requires_grad_() for tensor in start)
    best = _Best(search, x, y)
    optimizer = torch.optim.Adam([x, y], lr=search.lr)
    for step in range(search.iterations + 1):
        moved = simulation.changes(base, x, y, plan, differentiable=True)
        disparity = (moved * matched - goal).abs().sum(1) / size
        if not best.take(disparity.tolist(), x, y) or step == search.iterations:
            break
        x.grad, y.grad = torch.autograd.grad(disparity.sum(), [x, y])
        search.descend(optimizer, x, step)
    return best.x, best.y, [min(steps, search.iterations) for steps in best.steps]


def solve(simulation: Simulation, search: Search, riddles: Sequence[Riddle]) -> tuple[list[Answer], float]:
    """Solve ``riddles`` of one shape together; return the solutions and the seconds it took.

    A pure function of its arguments but for the seconds: it gives the same solutions in every process.
    """
    started = time.perf_counter()
    base, change, now, x, y = (
        torch.stack([getattr(riddle, name) for riddle in riddles]) for name in ("base", "change", "now", "x", "y")
    )
    plan = [torch.stack(rows) for rows in zip(*(riddle.plan for riddle in riddles), strict=True)]
    x, y, steps = invert(simulation, base, change, (x, y), plan, search)
    left = torch.linalg.vector_norm(simulation.changes(base, x, y, plan) - change, dim=1)
    outcomes = (left / torch.linalg.vector_norm(change, dim=1)).tolist()
    predicted = simulation.changes(now, x, y, plan)
    solutions = [Answer(x[k], y[k], predicted[k], outcomes[k], steps[k]) for k in range(len(riddles))]
    return solutions, time.perf_counter() - started
