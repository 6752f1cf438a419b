"""MAS: memory aware synapses.

Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget", ECCV 2018. The importance of a weight is how
much the output moves with it, with no need of labels (eq. 2 and section 4.3, the squared norm of the output):
``Omega_i = 1/N sum_k |d ||F(x_k)||^2 / d theta_i|``; the loss is eq. 4,
``L + lambda sum_i Omega_i (theta_i - theta*_i)^2``. Importances of tasks are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.learners.quadratic import Quadratic
from fedcl.client.sample_gradients import mean_over_samples
from fedcl.contracts.learner import Context
from fedcl.models.flat import FlatModel

# P = parameter elements, N = samples


class MAS(Quadratic):
    """Pull each weight towards where the last task left it, as strongly as the outputs depend on it.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off and computes nothing.
    decay
        Factor of the earlier importances at each new task; 1 forgets none.
    scope, aggregate
        Those of :class:`~clients.learners.quadratic.Quadratic`. ``aggregate`` needs ``decay=1``: sums over tasks
        forget none.

    Raises
    ------
    ValueError
        If ``scope`` is not a regular expression or (in :meth:`check`) matches no tensor, or ``aggregate`` is combined
        with a decay.
    """

    key = "learner.mas"
    query = "sensitivity"

    def __init__(
        self, *, weight: float = 0.1, decay: float = 1.0, scope: str | None = None, aggregate: bool = False
    ) -> None:
        if aggregate and decay != 1:
            raise ValueError(
                f"learner.mas.decay={decay}: must be 1 with learner.mas.aggregate=true, whose sums keep all"
            )
        super().__init__(weight=weight, scope=scope, aggregate=aggregate)
        self.decay = decay

    def after_task(self, ctx: Context) -> None:
        """Add the importances on the client's own samples, at the global weights the task ended with."""
        if self.weight and not self.aggregate:
            self.add_task(ctx, self.importance(ctx), self.decay)

    def importance(self, ctx: Context) -> Tensor:
        return self.held(ctx, sensitivity(ctx.model, ctx.data.x, ctx.task.columns))


def sensitivity(model: FlatModel, x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Return mean_n |d ||logits(x_n)[columns]||^2 / d theta| (P,) on x (N, ...); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics.
    """
    chosen = list(columns)
    return mean_over_samples(model, lambda logits: logits[0, chosen].square().sum(), torch.abs, x)
