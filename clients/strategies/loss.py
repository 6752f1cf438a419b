"""The loss of a model on a client's samples of the task, outside training."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context


@torch.no_grad()
def mean_loss(ctx: Context, batch_size: int = 1024) -> Tensor:
    """Return the mean cross-entropy, float32 (), of the current model on ``ctx.data``, in evaluation mode."""
    ctx.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=ctx.device)
    for start in range(0, len(ctx.data), batch_size):
        x, y = ctx.data.x[start : start + batch_size], ctx.data.y[start : start + batch_size]
        total += len(y) * masked_cross_entropy(ctx.model(x), Batch(x, y, ctx.mask)).double()
    return (total / len(ctx.data)).float()
