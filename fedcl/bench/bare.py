"""Local learners as bare loops over tensors: what a person would write for one method and one network, and no more.

Each takes a network of torch's own and trains it by plain SGD on the second task; what the first left behind (a Fisher,
a teacher, a memory) is given. They share nothing with the learners but the order in which samples are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

# N = samples, D = inputs, M = samples in memory


@dataclass
class Work:
    """What a loop needs: samples x (N, D), y (N,), how to train, what the first task left, and generators."""

    x: Tensor
    y: Tensor
    epochs: int
    batch_size: int
    lr: float
    left: dict[str, Any]
    starts: Sequence[int]
    batches: torch.Generator
    replay: torch.Generator
    reservoir: torch.Generator


Loop = Callable[[nn.Sequential, Work], int]


def epochs(work: Work) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every step's epoch and batch."""
    for epoch in range(work.epochs):
        order = torch.randperm(len(work.y), generator=work.batches)
        x, y = work.x[order], work.y[order]
        for start in range(0, len(y), work.batch_size):
            yield epoch, x[start : start + work.batch_size], y[start : start + work.batch_size]


def weights_of(net: nn.Module) -> list[Tensor]:
    """Return what there is to train."""
    return list(net.parameters())


def step(weights: list[Tensor], loss: Tensor, lr: float) -> tuple[Tensor, ...]:
    """Move the weights by one step of SGD and return the gradients."""
    grads: tuple[Tensor, ...] = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        torch._foreach_add_(weights, grads, alpha=-lr)
    return grads


def naive(net: nn.Sequential, work: Work) -> int:
    """Train on; return the number of steps, as all these loops do."""
    weights, steps = weights_of(net), 0
    for _, x, y in epochs(work):
        step(weights, cross_entropy(net(x), y), work.lr)
        steps += 1
    return steps


def split(work: Work, vector: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a flat vector as tensors shaped like the weights."""
    return [vector[s : s + w.numel()].view(w.shape) for s, w in zip(work.starts, weights, strict=True)]


def pulled(net: nn.Sequential, work: Work, importance: Tensor, anchor: Tensor, scale: float) -> int:
    """Train with ``scale sum F (w - w*)^2`` added to the loss."""
    weights = weights_of(net)
    strengths, anchors = split(work, importance, weights), split(work, anchor, weights)
    steps = 0
    for _, x, y in epochs(work):
        loss = cross_entropy(net(x), y)
        for w, strength, home in zip(weights, strengths, anchors, strict=True):
            loss = loss + scale * (strength * (w - home) ** 2).sum()
        step(weights, loss, work.lr)
        steps += 1
    return steps


def ewc(net: nn.Sequential, work: Work) -> int:
    """Train with EWC's penalty, lambda = 10 and the factor 1/2."""
    return pulled(net, work, work.left["importance"][0], work.left["anchor"][0], 5.0)


def mas(net: nn.Sequential, work: Work) -> int:
    """Train with MAS's penalty, lambda = 0.1."""
    return pulled(net, work, work.left["importance"][0], work.left["anchor"][0], 0.1)


def si(net: nn.Sequential, work: Work, c: float = 0.1) -> int:
    """Train with SI's penalty, c = 0.1, and integrate the new task's path along the gradient of its own loss."""
    weights = weights_of(net)
    strengths, anchors = split(work, work.left["importance"][0], weights), split(work, work.left["anchor"][0], weights)
    path, way = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    steps = 0
    for _, x, y in epochs(work):
        loss = cross_entropy(net(x), y)
        for w, strength, home in zip(weights, strengths, anchors, strict=True):
            loss = loss + c * (strength * (w - home) ** 2).sum()
        before = [w.detach().clone() for w in weights]
        grads = step(weights, loss, work.lr)
        with torch.no_grad():
            for k, gradient in enumerate(grads):
                moved = weights[k] - before[k]
                path[k] -= (gradient - 2 * c * strengths[k] * (before[k] - anchors[k])) * moved
                way[k] += moved
        steps += 1
    return steps


def lwf(net: nn.Sequential, work: Work) -> int:
    """Train with LwF's distillation over the old columns, T = 2, weight 1, times T^2."""
    weights, old, steps = weights_of(net), work.left["groups"][0], 0
    teacher = copy.deepcopy(net)
    torch._foreach_copy_([w.data for w in teacher.parameters()], split(work, work.left["teacher"], weights))
    for _, x, y in epochs(work):
        logits = net(x)
        with torch.no_grad():
            target = log_softmax(teacher(x)[:, old] / 2.0, dim=1)
        kept = kl_div(log_softmax(logits[:, old] / 2.0, dim=1), target, reduction="batchmean", log_target=True)
        step(weights, cross_entropy(logits, y) + 4.0 * kept, work.lr)
        steps += 1
    return steps


class Memory:
    """A full reservoir on plain tensors, of which the columns are x, y and perhaps logits."""

    def __init__(self, work: Work, names: Sequence[str]) -> None:
        self.columns = [work.left[name] for name in names]
        self.columns[0] = self.columns[0].flatten(1).float() / 16
        self.seen: int = work.left["seen"]
        self.work = work

    def draw(self) -> list[Tensor]:
        """Return as many samples as a batch has."""
        chosen = torch.randperm(len(self.columns[0]), generator=self.work.replay)[: self.work.batch_size]
        return [column[chosen] for column in self.columns]

    def see(self, *rows: Tensor) -> None:
        """Let samples of the stream take the slots they draw."""
        arrival = torch.arange(self.seen, self.seen + len(rows[0]), dtype=torch.float64)
        draws = torch.rand(len(rows[0]), generator=self.work.reservoir, dtype=torch.float64)
        slots = (draws * (arrival + 1)).long()
        inside = torch.nonzero(slots < len(self.columns[0])).squeeze(1)
        for column, values in zip(self.columns, rows, strict=True):
            column[slots[inside]] = values[inside]
        self.seen += len(rows[0])


def er(net: nn.Sequential, work: Work) -> int:
    """Train on every batch joined with one from memory, which sees the batches of the first epoch."""
    weights, memory, steps = weights_of(net), Memory(work, ("x", "y")), 0
    for epoch, x, y in epochs(work):
        old_x, old_y = memory.draw()
        if epoch == 0:
            memory.see(x, y)
        step(weights, cross_entropy(net(torch.cat([x, old_x])), torch.cat([y, old_y])), work.lr)
        steps += 1
    return steps


def derpp(net: nn.Sequential, work: Work) -> int:
    """Train with DER++'s two terms, alpha = 0.1 over old samples' logits, beta = 0.5, from two draws of memory.

    The logits of samples of the present task are not held until it has ended.
    """
    weights, memory, steps = weights_of(net), Memory(work, ("x", "y", "task", "logits")), 0
    for epoch, x, y in epochs(work):
        logits = net(x)
        loss = cross_entropy(logits, y)
        past, _, task, answers = memory.draw()
        known = (task == 0)[:, None].expand_as(answers)
        squared = mse_loss(net(past), answers, reduction="none")
        loss = loss + 0.1 * (squared * known).sum() / known.sum().clamp_min(1)
        past, labels, _, _ = memory.draw()
        loss = loss + 0.5 * cross_entropy(net(past), labels)
        if epoch == 0:
            memory.see(x, y, torch.ones_like(y), logits.detach())
        step(weights, loss, work.lr)
        steps += 1
    return steps
