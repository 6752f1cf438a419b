"""A-GEM: averaged gradient episodic memory.

Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, eq. 11. With g the gradient of the step and g_ref
that of a batch from past tasks: if g . g_ref < 0, so that the step would raise the loss on the past, g becomes
``g - (g . g_ref / g_ref . g_ref) g_ref``, the nearest gradient that does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.learners.er import masks_by_task
from fedcl.client.buffer import ReplayBuffer
from fedcl.client.erasing import erase
from fedcl.client.loop import masked_cross_entropy
from fedcl.client.policies import Policy
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest

# R = replayed samples, C = logit columns, T = tasks


class AGEM(Plugin):
    """Take from every gradient what would raise the loss on samples of past tasks.

    Memory is of all finished tasks (``budget`` and ``policy`` as for :class:`~fedcl.client.buffer.ReplayBuffer`);
    ``replay_size`` of its samples make the reference gradient of a step (null: as many as ``client.batch_size``). With
    a budget of 0 nothing is computed.
    """

    phase = Phase.GRADIENT

    def __init__(
        self, *, budget: int | str = 200, replay_size: int | None = None, policy: Policy = "reservoir"
    ) -> None:
        self.budget = budget
        self.replay_size = replay_size
        self.policy = policy
        self._buffer = ReplayBuffer(budget, policy, at="learner.agem")
        self._mask_TC: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        """Work out which columns a replayed sample of each task may predict."""
        self._mask_TC = masks_by_task(ctx)

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Project the gradient where it points against the past."""
        if not len(self._buffer):
            return
        past = self._buffer.draw(ctx, self.replay_size)
        mask = ctx.mask if self._mask_TC is None else self._mask_TC[past.task]
        loss = masked_cross_entropy(ctx.model(past.x), Batch(past.x, past.y, mask))
        project(grads, torch.autograd.grad(loss, list(ctx.model.trainable), materialize_grads=True))

    def after_task(self, ctx: Context) -> None:
        """Show the finished task's samples to memory."""
        self._buffer.offer_task(ctx)
        self._buffer.finalize(ctx)

    def forget(self, ctx: Context, request: ForgetRequest, gone: TaskData) -> ErasureOutcome:
        """Erase the forget set from the buffer; the other samples stay."""
        return erase(self._buffer, self, request, gone)

    def state(self) -> State:
        """Return the buffer."""
        return self._buffer.state()

    def load(self, state: State) -> None:
        """Restore the buffer."""
        self._buffer.load(state)


@torch.no_grad()
def project(grads: list[Tensor], reference: Sequence[Tensor]) -> None:
    """Take from ``grads``, in place, their part along ``reference`` where the two, as one vector each, disagree."""
    agreement = _dot(grads, reference)
    if agreement < 0:
        torch._foreach_add_(grads, list(reference), alpha=float(-agreement / _dot(reference, reference)))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.sum(x * y) for x, y in zip(a, b, strict=True)]).sum()
