"""Gradient ascent on the forget set by its owners, clipped and stopped at ignorance so that it cannot diverge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clients.unlearners.averaging import Averaged
from clients.unlearners.steps import (
    change_of,
    clip,
    cross_entropy,
    epochs_of,
    gradients,
    ignorance,
    responses_of,
    settings,
    sgd,
)
from fedcl.contracts.fields import Form
from fedcl.contracts.unlearner import Local, UnlearnContext, UnlearnView

if TYPE_CHECKING:
    from torch import Tensor

    from fedcl.contracts.strategy import Target


@dataclass(kw_only=True, eq=False, repr=False)
class GradientAscent(Averaged):
    """Let every owner climb its cross-entropy on what is to be forgotten: w <- w + lr grad CE(F).

    Momentum is the client's own; weight decay is none. Layers are in evaluation mode: running statistics of
    normalisation layers do not follow the forget set.

    Parameters
    ----------
    rounds, epochs
        Rounds, and an owner's epochs in each; 0 of either changes nothing.
    lr
        Learning rate; None for ``client.optimizer.lr``.
    max_norm
        L2 norm to which each gradient is clipped; None for plain ascent.
    stop_loss
        An owner stops at the first batch whose loss is above this; None for log C, the loss of a uniform guess among
        the C allowed columns.
    """

    rounds: int = 1
    epochs: int = 5
    lr: float | None = 0.01
    max_norm: float | None = 5.0
    stop_loss: float | None = None

    @property
    def response(self) -> Form:
        """The change, how many steps it took, and whether it was stopped."""
        return responses_of("steps", "stopped")

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        if not len(ctx.forget):
            return Local(0, {})
        training = settings(ctx, epochs=self.epochs, lr=self.lr, weight_decay=0.0)
        descent = sgd(ctx.model, training)
        steps, stopped = 0, False
        ctx.model.eval()
        for batch in epochs_of(ctx, ctx.forget, training):
            loss = cross_entropy(ctx.model, batch)
            bound = ignorance(batch, ctx.num_columns) if self.stop_loss is None else self.stop_loss
            stopped = not float(loss.detach()) <= bound  # NaN stops too
            if stopped:
                break
            grads = gradients(ctx.model, loss)
            clip(grads, self.max_norm)
            descent([torch.neg(grad) for grad in grads])
            steps += 1
        return change_of(ctx, len(ctx.forget), steps=steps, stopped=stopped)

    def asked(self, target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> Sequence[str]:
        return view.owners
