"""Fine-tuning: a few more rounds on what is retained, and the hope that the rest is forgotten on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.unlearners.averaging import Averaged, users_of
from clients.unlearners.steps import as_trained, change_of, descend, epochs_of, settings
from fedcl.contracts.unlearner import Local, UnlearnContext, UnlearnView

if TYPE_CHECKING:
    from torch import Tensor

    from fedcl.contracts.strategy import Target


@dataclass(kw_only=True, eq=False, repr=False)
class FineTune(Averaged):
    """Rounds of FedAvg on the retained samples of all tasks by the clients that stay: w <- w - lr grad CE(R).

    Parameters
    ----------
    rounds, epochs
        Rounds, and a client's epochs in each; 0 of either changes nothing.
    lr
        Learning rate; None for ``client.optimizer.lr``. Momentum and weight decay are the client's own.
    """

    rounds: int = 5
    epochs: int = 1
    lr: float | None = None

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        if not len(ctx.retain):
            return Local(0, {})
        training = settings(ctx, epochs=self.epochs, lr=self.lr)
        steps = descend(ctx.model, epochs_of(ctx, ctx.retain, training), as_trained(ctx.model, training))
        return change_of(ctx, len(ctx.retain), steps=steps)

    def asked(self, target: Target, models: Mapping[Target, Tensor], view: UnlearnView) -> Sequence[str]:
        return users_of(target, models, view)
