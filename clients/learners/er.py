"""ER: experience replay.

Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, Algorithm 1 with reservoir sampling: every
step trains on the incoming batch joined with a batch drawn from memory; then the incoming batch is offered to memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcl.client.buffer import ReplayBuffer
from fedcl.client.erasing import erase
from fedcl.client.policies import Policy
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State, TaskData
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest

# B = incoming batch, R = replayed samples, C = logit columns, T = tasks


class ER(Plugin):
    """Replay a buffer, ``replay_size`` samples of it a step (null: as many as ``client.batch_size``).

    ``budget`` and ``policy`` are those of :class:`~fedcl.client.buffer.ReplayBuffer`. The stream that fills it counts
    each sample once: in the first epoch of the client's first visit to a task.
    """

    phase = Phase.DATA
    name: ClassVar[str] = "er"

    def __init__(
        self, *, budget: int | str = 200, replay_size: int | None = None, policy: Policy = "reservoir"
    ) -> None:
        self.budget = budget
        self.replay_size = replay_size
        self.policy = policy
        self._buffer = ReplayBuffer(budget, policy, at=f"learner.{self.name}")
        self._mask_TC: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        """Work out which columns a replayed sample of each task may predict."""
        self._mask_TC = masks_by_task(ctx)

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Join replayed samples to the batch, and let the buffer see the new ones."""
        joined = self._join(ctx, batch) if len(self._buffer) else batch
        if ctx.is_new_task and ctx.epoch == 0:
            self._buffer.offer(ctx, batch)
        return joined

    def _join(self, ctx: Context, batch: Batch) -> Batch:
        replayed = self._buffer.draw(ctx, self.replay_size)
        mask = batch.mask
        if mask is not None and self._mask_TC is not None:
            mask = torch.cat([mask.expand(len(batch.y), -1), self._mask_TC[replayed.task]])
        fresh = len(batch.y) if batch.fresh is None else batch.fresh
        return Batch(torch.cat([batch.x, replayed.x]), torch.cat([batch.y, replayed.y]), mask, fresh)

    def after_task(self, ctx: Context) -> None:
        """Choose what to keep of the task, where that is done at its end."""
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


def masks_by_task(ctx: Context) -> Tensor | None:
    """Return the columns allowed to samples of each task met so far, bool (T, C), or None when one mask serves all.

    A task whose columns the present mask allows (one growing head, masked to the columns seen) shares that mask; one
    that it shuts out (a task with columns of its own) may choose among its own columns alone.
    """
    if ctx.task.mask is None or ctx.mask is None:
        return None
    allowed = set(ctx.task.mask)
    own = {task: columns for task, columns in ctx.task_columns.items() if not allowed.issuperset(columns)}
    if not own:
        return None
    mask_TC = ctx.mask.repeat(max(ctx.task_columns) + 1, 1)
    for task, columns in own.items():
        mask_TC[task] = False
        mask_TC[task, list(columns)] = True
    return mask_TC
