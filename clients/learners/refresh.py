"""Refresh learning: before every step the weights unlearn a little of the batch, then learn it as usual.

Wang et al., "A Unified and General Framework for Continual Learning", ICLR 2024 (arXiv 2403.13249). The procedure is
that of the published code, with one unlearning step: climb the batch's cross-entropy, ``Delta = gamma g``; scale it
in each tensor to the tensor's own norm, ``u = |theta| / (|Delta| + eps) Delta``; then

    theta <- theta + delta (u + sigma xi) / (1 + kappa F),   xi ~ N(0, 1)

with the Fisher information F of finished tasks. It combines with any learner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.learners.ewc import FisherKind, fisher_diagonal
from clients.strategies.local_sgd import gradients
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State

# P = parameter elements
_TINY = 1e-12


class Refresh(Plugin):
    """Perturb the weights before each step, away from what they know of the batch.

    The batch is the one that is trained on, replayed samples included; the loss climbed is its plain cross-entropy.

    Parameters
    ----------
    delta
        Size of a perturbation; 0 turns the method off. The published code has 1e-5.
    noise
        sigma, share of the noise.
    damping
        kappa: how much less those weights move that earlier tasks depend on.
    lr
        gamma of the ascent. Norms are matched afterwards, so it matters to vanishing gradients alone.
    fisher
        ``per_batch``: squared gradients of batch means. ``per_sample``: of each sample.
    """

    phase = Phase.OBJECTIVE  # after all data plugins: it uses the final batch

    def __init__(
        self, *, delta: float = 1e-5, noise: float = 1e-3, damping: float = 1e-3, lr: float = 0.01,
        fisher: FisherKind = "per_batch",
    ) -> None:  # fmt: skip
        self.delta = delta
        self.noise = noise
        self.damping = damping
        self.lr = lr
        self.fisher = fisher
        self._fisher_P: Tensor | None = None

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Move the weights; the batch is returned unchanged."""
        if not self.delta:
            return batch
        grads = gradients(ctx.model, batch)
        noise_P = torch.randn(ctx.model.num_parameters, generator=ctx.rng("refresh")).to(ctx.device)
        with torch.no_grad():
            moves = ascent(list(ctx.model.trainable), grads, self.lr)
            for move, noise in zip(moves, ctx.model.views(noise_P), strict=True):
                move += self.noise * noise
            if self._fisher_P is not None:
                for move, fisher in zip(moves, ctx.model.views(self._fisher_P), strict=True):
                    move /= 1.0 + self.damping * fisher
            for parameter, move in zip(ctx.model.trainable, moves, strict=True):
                parameter.add_(move, alpha=self.delta)
        return batch

    def after_task(self, ctx: Context) -> None:
        """Add the finished task's Fisher information, at the global weights it ended with."""
        if not self.delta:
            return
        data = ctx.data
        fisher_P = fisher_diagonal(ctx.model, data.x, data.y, ctx.mask, kind=self.fisher, batch=ctx.batch_size)
        self._fisher_P = fisher_P if self._fisher_P is None else self._fisher_P + fisher_P

    def state(self) -> State:
        return {} if self._fisher_P is None else {"fisher": self._fisher_P}

    def load(self, state: State) -> None:
        self._fisher_P = state.get("fisher")


def ascent(weights: Sequence[Tensor], grads: Sequence[Tensor], lr: float) -> list[Tensor]:
    """Return, for each tensor, a step up its gradient that is as long as the tensor itself."""
    ways = [lr * gradient for gradient in grads]
    return [weight.norm() / (way.norm() + _TINY) * way for weight, way in zip(weights, ways, strict=True)]
