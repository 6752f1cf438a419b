"""A-GEM: averaged gradient episodic memory.

Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, eq. 11. With g the gradient of the step and g_ref
that of a batch from past tasks: if g . g_ref < 0, so that the step would raise the loss on the past, g becomes
``g - (g . g_ref / g_ref . g_ref) g_ref``, the nearest gradient that does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.learners.replay import Replay
from clients.strategies.local_sgd import gradients
from fedcl.contracts.learner import Context, Phase


class AGEM(Replay):
    """Remove from every gradient what would raise the loss on samples of past tasks.

    The buffer holds samples of all finished tasks; ``replay_size`` of them give the reference gradient of a step. The
    parameters are those of :class:`~clients.learners.replay.Replay`. With a budget of 0 nothing is computed.
    """

    phase = Phase.GRADIENT
    key = "learner.agem"

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Project the gradient where it points against the past."""
        if len(self._buffer):
            project(grads, gradients(ctx.model, self.replayed(ctx, self._buffer.draw(ctx, self.replay_size))))

    def after_task(self, ctx: Context) -> None:
        self._buffer.offer_task(ctx)
        self._buffer.finalize(ctx)


@torch.no_grad()
def project(grads: list[Tensor], reference: Sequence[Tensor]) -> None:
    """Remove from ``grads``, in place, the part along ``reference`` where the two, as one vector each, disagree."""
    agreement = _dot(grads, reference)
    if agreement < 0:
        torch._foreach_add_(grads, list(reference), alpha=float(-agreement / _dot(reference, reference)))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.sum(x * y) for x, y in zip(a, b, strict=True)]).sum()
