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

from clients.learners.quadratic import SUMMANDS, payloads_of, penalty, summands, summed
from fedcl.client.loop import masked_cross_entropy
from fedcl.client.sample_gradients import add_to, summed_over_samples
from fedcl.client.scope import check_scope, in_scope
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements, A = anchors (1 online, one a task when separate), N = samples, B = batch
FisherKind = Literal["per_sample", "per_batch"]
FISHER = "fisher"  # the question whose answers the server adds up
_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


class EWC(Plugin):
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
    scope
        Regular expression searched for in tensor names: only those are held; null: all.
    aggregate
        One penalty from the samples of all clients, around every finished task's model, instead of one's own. Needs
        ``mode="separate"``: sums over tasks keep each task's anchor and forget none.

    Raises
    ------
    ValueError
        If ``scope`` is no regular expression or (in :meth:`check`) matches no tensor, or
        ``aggregate`` goes with ``online``.
    """

    phase = Phase.REGULARISER
    stackable = True

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
        check_scope(scope, "learner.ewc.scope")
        if aggregate and mode != "separate":
            raise ValueError("learner.ewc.aggregate=true: needs learner.ewc.mode=separate, whose anchors the sums keep")
        self.weight = weight
        self.mode = mode
        self.decay = decay
        self.fisher = fisher
        self.half = half
        self.scope = scope
        self.aggregate = aggregate
        if aggregate:
            self.queries = (FISHER,)  # type: ignore[misc]
            self.sums = {FISHER: SUMMANDS}  # type: ignore[misc]
            self.payloads = payloads_of(FISHER)  # type: ignore[misc]
        self._scope_P: Tensor | None = None
        self._fisher_AP: Tensor | None = None
        self._anchor_AP: Tensor | None = None

    def check(self, model: FlatModel) -> None:
        """Refuse a scope that matches no tensor."""
        in_scope(model, self.scope, "learner.ewc.scope")

    def setup(self, ctx: Context) -> None:
        """Find the tensors in scope, and take the sums over clients where they have come."""
        self._scope_P = in_scope(ctx.model, self.scope, "learner.ewc.scope")
        sums = summed(ctx.payload, FISHER, ctx.device) if self.aggregate else None
        if sums is not None:
            self._fisher_AP, self._anchor_AP = sums[0][None], sums[1][None]

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the penalty; nothing before a task has ended."""
        if not self.weight or self._fisher_AP is None or self._anchor_AP is None:
            return None
        return penalty(ctx.model, self._fisher_AP, self._anchor_AP, self.weight / 2 if self.half else self.weight)

    def after_task(self, ctx: Context) -> None:
        """Take the task's Fisher on the client's own samples, at the global weights the task ended with."""
        if not self.weight or self.aggregate:
            return
        fisher_AP, anchor_AP = self._importance(ctx)[None], ctx.model.vector()[None, : ctx.model.num_parameters]
        if self._fisher_AP is not None and self._anchor_AP is not None:
            if self.mode == "online":
                fisher_AP = self.decay * self._fisher_AP + fisher_AP
            else:
                fisher_AP = torch.cat([self._fisher_AP, fisher_AP])
                anchor_AP = torch.cat([self._anchor_AP, anchor_AP])
        self._fisher_AP, self._anchor_AP = fisher_AP, anchor_AP

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this client's share of the Fisher's sums: nothing where there is no term to use them."""
        if not self.weight:
            return {}
        return summands(self._importance(ctx), ctx.model.flat[: ctx.model.num_parameters], len(ctx.data))

    def _importance(self, ctx: Context) -> Tensor:
        data = ctx.data
        fisher = fisher_diagonal(ctx.model, data.x, data.y, ctx.mask, kind=self.fisher, batch=ctx.batch_size)
        return fisher if self._scope_P is None else fisher * self._scope_P

    def state(self) -> State:
        """Return the Fisher and the anchors, (A, P) each; nothing of one's own where they are the server's."""
        return (
            {} if self._fisher_AP is None or self.aggregate else {"fisher": self._fisher_AP, "anchor": self._anchor_AP}
        )

    def load(self, state: State) -> None:
        """Restore them."""
        self._fisher_AP, self._anchor_AP = state.get("fisher"), state.get("anchor")


def fisher_diagonal(
    model: FlatModel, x: Tensor, y: Tensor, mask: Tensor | None, *, kind: FisherKind, batch: int
) -> Tensor:
    """Return the diagonal of the empirical Fisher (P,) on x (N, ...), y (N,); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics. ``batch`` matters to ``per_batch`` alone.
    """
    if kind == "per_sample":

        def loss(logits: Tensor, column: Tensor) -> Tensor:
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            return F.cross_entropy(logits, column[None])

        total = summed_over_samples(model, loss, torch.square, x, y, chunk_elements=_CHUNK_ELEMENTS)
        return (total / len(y)).float()
    model.eval()
    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    batches = range(0, len(y), batch)
    for start in batches:
        part = Batch(x[start : start + batch], y[start : start + batch], mask)
        grads = torch.autograd.grad(masked_cross_entropy(model(part.x), part), model.trainable, materialize_grads=True)
        add_to(total, model, [g.square() for g in grads])
    return (total / len(batches)).float()
