"""EWC: elastic weight consolidation.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, eq. 3:
``L(theta) + lambda/2 sum_i F_i (theta_i - theta*_i)^2`` with the Fisher information's diagonal F of a finished task and
the weights theta* it ended with. ``mode=online`` is Schwarz et al., "Progress & Compress", ICML 2018, section 3.2: one
running F and the latest theta*. F is the empirical Fisher: gradients are taken at the labels of the data. With
``aggregate`` the penalty is over all clients: FedCurv (Shoham et al. 2019, arXiv 1910.07796).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.learners.quadratic import Quadratic, parameters
from clients.strategies.local_sgd import gradients
from fedcl.client.sample_gradients import add_to, mean_over_samples
from fedcl.contracts.learner import Batch, Context
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel

# P = parameter elements, A = anchors (1 online, one a task when separate), N = samples
FisherKind = Literal["per_sample", "per_batch"]


class EWC(Quadratic):
    """Pull each weight towards where earlier tasks left it, as strongly as they depend on it.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off and computes nothing.
    mode
        ``online``: one penalty, F <- decay F + F_new around the latest weights. ``separate``: a penalty a task.
    decay
        gamma of the online mode; 1 forgets no task.
    fisher
        ``per_sample``: mean over samples of the squared gradient. ``per_batch``: mean over batches of the squared mean
        gradient, as Avalanche computes it; smaller by up to a factor of the batch size.
    half
        Whether the penalty carries the paper's factor 1/2.
    scope, aggregate
        Those of :class:`~clients.learners.quadratic.Quadratic`. ``aggregate`` needs ``mode="separate"``: sums over
        tasks keep each task's anchor and forget none.

    Raises
    ------
    ValueError
        If ``scope`` is not a regular expression or (in :meth:`check`) matches no tensor, or ``aggregate`` is combined
        with ``online``.
    """

    key = "learner.ewc"
    query = "fisher"

    def __init__(
        self,
        *,
        weight: float = 10.0,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        fisher: FisherKind = "per_sample",
        half: bool = True,
        scope: str | None = None,
        aggregate: bool = False,
    ) -> None:
        if aggregate and mode != "separate":
            raise ValueError("learner.ewc.aggregate=true: needs learner.ewc.mode=separate, whose anchors the sums keep")
        super().__init__(weight=weight, scope=scope, aggregate=aggregate)
        self.mode = mode
        self.decay = decay
        self.fisher = fisher
        self.half = half

    @property
    def scale(self) -> float:
        return self.weight / 2 if self.half else self.weight

    def after_task(self, ctx: Context) -> None:
        """Add the task's Fisher on the client's own samples, at the global weights the task ended with."""
        if not self.weight or self.aggregate:
            return
        fisher_P = self.importance(ctx)
        if self.mode == "online" or self._importance_AP is None or self._anchor_AP is None:
            self.add_task(ctx, fisher_P, self.decay)
            return
        self._importance_AP = torch.cat([self._importance_AP, fisher_P[None]])
        self._anchor_AP = torch.cat([self._anchor_AP, parameters(ctx)[None]])

    def importance(self, ctx: Context) -> Tensor:
        data = ctx.data
        fisher_P = fisher_diagonal(ctx.model, data.x, data.y, ctx.mask, kind=self.fisher, batch=ctx.batch_size)
        return self.held(ctx, fisher_P)


def fisher_diagonal(
    model: FlatModel, x: Tensor, y: Tensor, mask: Tensor | None, *, kind: FisherKind, batch: int
) -> Tensor:
    """Return the diagonal of the empirical Fisher (P,) on x (N, ...), y (N,); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics. ``batch`` matters to ``per_batch`` alone.
    """
    if kind == "per_sample":
        return mean_over_samples(
            model, lambda logits, column: F.cross_entropy(masked(logits, mask), column[None]), torch.square, x, y
        )
    model.eval()
    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    batches = list(zip(torch.split(x, batch), torch.split(y, batch), strict=True))
    for part_x, part_y in batches:
        add_to(total, model, [gradient.square() for gradient in gradients(model, Batch(part_x, part_y, mask))])
    return (total / len(batches)).float()
