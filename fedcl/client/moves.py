"""How a step's gradients move a client's weights: SGD, another optimizer, clipping, several batches for one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.learner import Context, LocalTraining
from fedcl.contracts.optimizer import Elementwise, LocalOptimizer

Move = Callable[[list[Tensor]], None]  # moves the weights along gradients


class SGD(Elementwise):
    """SGD with heavy-ball momentum as in PyTorch: v <- momentum v + g + weight_decay w; w <- w - lr v."""

    num_slots: ClassVar[int] = 1

    def __init__(self, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.momentum, self.weight_decay = momentum, weight_decay

    def zeros(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Return the velocity, if there is one."""
        return super().zeros(params) if self.momentum else []

    def update(
        self, params: list[Tensor], grads: list[Tensor], slots: list[list[Tensor]], count: int, lr: float
    ) -> None:
        """Take a step."""
        if self.weight_decay:
            torch._foreach_add_(grads, params, alpha=self.weight_decay)
        for velocity in slots:
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_add_(velocity, grads)
            grads = velocity
        torch._foreach_add_(params, grads, alpha=-lr)


def optimizer_of(training: LocalTraining) -> LocalOptimizer:
    """Return a new optimizer of a client that trains so."""
    if training.optimizer is None:
        return SGD(momentum=training.momentum, weight_decay=training.weight_decay)
    return training.optimizer()


def is_plain(training: LocalTraining) -> bool:
    """Whether every step is SGD on one batch, with one learning rate and a velocity that starts at zero."""
    special = training.keep or training.schedule is not None or training.clip_norm is not None
    return training.optimizer is None and training.accumulate == 1 and not special


def mover(training: LocalTraining, params: list[Tensor], ctx: Context | None = None) -> Move:
    """Return what moves ``params`` in place; with ``ctx`` its optimizer goes on, and its rate follows the schedule."""
    kept = None if ctx is None else ctx.optimizer
    optimizer, rate = optimizer_of(training) if kept is None else kept, _rate(training, ctx)

    def move(grads: list[Tensor]) -> None:
        if training.clip_norm is not None:
            clip(grads, training.clip_norm)
        optimizer.step(params, grads, rate())

    return move


def _rate(training: LocalTraining, ctx: Context | None) -> Callable[[], float]:
    """Return the learning rate of the present step; ``ctx.lr`` is that of the next one from then on."""
    schedule = training.schedule
    if schedule is None or ctx is None:
        return lambda: training.lr
    total = num_steps(len(ctx.data), training)

    def at(step: int) -> float:  # a plugin may choose more samples than the client has
        return training.lr * schedule.share(min(step, total - 1), total)

    def rate() -> float:
        now, ctx.lr = ctx.lr, at(ctx.step + 1)
        return now

    ctx.lr = at(0)
    return rate


def num_steps(size: int, training: LocalTraining) -> int:
    """Return how many optimizer steps a client with ``size`` samples takes in a local round."""
    return training.epochs * -(-size // (training.batch_size * training.accumulate))


@torch.no_grad()
def clip(grads: list[Tensor], max_norm: float) -> None:
    """Scale ``grads`` in place by min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))


class Gathered:
    """Gradients and losses of the batches of one step: their mean over all samples.

    ``client.accumulate`` batches make one step. What remains at the end of an epoch makes a smaller one, so that the
    steps are those of batches that are larger by this factor.
    """

    def __init__(self, ctx: Context, batches: int) -> None:
        self._ctx, self._batches = ctx, batches
        self._held = self._samples = 0
        self._grads: list[Tensor] = []
        self._loss = torch.empty(0)

    @torch.no_grad()
    def add(self, loss: Tensor, grads: list[Tensor], samples: int) -> tuple[Tensor, list[Tensor]] | None:
        """Take a batch's; return loss and gradients of the step, None if it has further batches."""
        torch._foreach_mul_(grads, samples)
        if self._held:
            torch._foreach_add_(self._grads, grads)
            self._loss = self._loss + samples * loss.detach()
        else:
            self._grads, self._loss = grads, samples * loss.detach()
        self._held, self._samples = self._held + 1, self._samples + samples
        ctx = self._ctx
        ends = ctx.order is None or ctx.start + ctx.batch_size >= len(ctx.order)
        if self._held < self._batches and not ends:
            return None
        torch._foreach_div_(self._grads, self._samples)
        whole = self._loss / self._samples, self._grads
        self._held = self._samples = 0
        return whole


def with_rate(training: LocalTraining, lr: float) -> LocalTraining:
    """Return ``training`` with the learning rate ``lr``."""
    return training if training.lr == lr else replace(training, lr=lr)
