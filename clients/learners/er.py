"""ER: experience replay from a reservoir.

Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, Algorithm 1 with reservoir sampling: every
step trains on the incoming batch joined with a batch drawn from memory; then the incoming batch is offered to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.client.buffer import ReplayBuffer
from fedcl.client.plugin import Batch, Context, Phase, Plugin, State

# B = incoming batch, R = replayed samples, C = logit columns, T = tasks


class ER(Plugin):
    """Replay a buffer of ``budget`` samples, ``replay_size`` of them a step (null: as many as ``client.batch_size``).

    The stream that fills the buffer counts each sample once: in the first epoch of the client's first visit to a task.
    """

    phase = Phase.DATA

    def __init__(self, *, budget: int = 200, replay_size: int | None = None) -> None:
        self.budget = budget
        self.replay_size = replay_size
        self._buffer = ReplayBuffer(budget)
        self._mask_TC: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        """Work out which columns a replayed sample of each task may predict."""
        self._mask_TC = masks_by_task(ctx)

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Join replayed samples to the batch, and let the reservoir see the new ones."""
        joined = self._join(ctx, batch) if len(self._buffer) else batch
        if ctx.is_new_task and ctx.epoch == 0:
            self._buffer.add(batch.x, batch.y, ctx.task.id, ctx.rng("reservoir"))
        return joined

    def _join(self, ctx: Context, batch: Batch) -> Batch:
        replayed = self._buffer.sample(self.replay_size or ctx.batch_size, ctx.rng("replay"))
        mask = batch.mask
        if mask is not None and self._mask_TC is not None:
            mask = torch.cat([mask.expand(len(batch.y), -1), self._mask_TC[replayed.task]])
        return Batch(torch.cat([batch.x, replayed.x]), torch.cat([batch.y, replayed.y]), mask)

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
