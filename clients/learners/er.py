"""ER: experience replay.

Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, Algorithm 1 with reservoir sampling: every
step trains on the incoming batch joined with a batch drawn from memory; then the incoming batch is offered to memory.
"""

from __future__ import annotations

import torch

from clients.learners.replay import Replay
from fedcl.contracts.learner import Batch, Context

# B = incoming batch, R = replayed samples, C = logit columns, T = tasks


class ER(Replay):
    """Replay samples of a buffer in every step.

    The parameters are those of :class:`~clients.learners.replay.Replay`. The stream that fills the buffer counts each
    sample once: in the first epoch of the client's first local round of a task.
    """

    key = "learner.er"
    _incoming = 0  # samples of the batch before replayed ones are joined

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Join replayed samples to the batch, and offer the new ones to the buffer."""
        self._incoming = len(batch.y)
        joined = self._join(ctx, batch) if len(self._buffer) else batch
        if ctx.is_new_task and ctx.epoch == 0:
            self._buffer.offer(ctx, batch)
        return joined

    def after_task(self, ctx: Context) -> None:
        """Choose what to keep of the task, if the policy chooses at its end."""
        self._buffer.finalize(ctx)

    def _join(self, ctx: Context, batch: Batch) -> Batch:
        past = self.replayed(ctx, self._buffer.draw(ctx, self.replay_size))
        mask = batch.mask
        if mask is not None and past.mask is not None and self._mask_TC is not None:
            mask = torch.cat([mask.expand(len(batch.y), -1), past.mask])
        fresh = len(batch.y) if batch.fresh is None else batch.fresh
        return Batch(torch.cat([batch.x, past.x]), torch.cat([batch.y, past.y]), mask, fresh)
