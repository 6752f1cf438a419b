"""MAS: memory aware synapses.

Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget", ECCV 2018. The importance of a weight is how
much the output moves with it, with no need of labels (eq. 2 and section 4.3, the squared norm of the output):
``Omega_i = 1/N sum_k |d ||F(x_k)||^2 / d theta_i|``; the loss is eq. 4,
``L + lambda sum_i Omega_i (theta_i - theta*_i)^2``. Importances of tasks are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.learners.quadratic import SUMMANDS, payloads_of, penalty, summands, summed
from fedcl.client.sample_gradients import summed_over_samples
from fedcl.client.scope import check_scope, in_scope
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements, N = samples, B = batch
SENSITIVITY = "sensitivity"  # the question whose answers the server adds up
_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


class MAS(Plugin):
    """Pull each weight towards where the last task left it, as strongly as the outputs depend on it.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off and computes nothing.
    decay
        What is left of the old importances at each new task; 1 forgets none.
    scope
        Regular expression searched for in tensor names: only those are held; null: all.
    aggregate
        Importances from the samples of all clients, around every finished task's model, instead of one's own. Needs
        ``decay=1``: sums over tasks forget none.

    Raises
    ------
    ValueError
        If ``scope`` is no regular expression or (in :meth:`check`) matches no tensor, or
        ``aggregate`` goes with a decay.
    """

    phase = Phase.REGULARISER
    stackable = True

    def __init__(
        self, *, weight: float = 0.1, decay: float = 1.0, scope: str | None = None, aggregate: bool = False
    ) -> None:
        check_scope(scope, "learner.mas.scope")
        if aggregate and decay != 1:
            raise ValueError(
                f"learner.mas.decay={decay}: must be 1 with learner.mas.aggregate=true, whose sums keep all"
            )
        self.weight = weight
        self.decay = decay
        self.scope = scope
        self.aggregate = aggregate
        if aggregate:
            self.queries = (SENSITIVITY,)  # type: ignore[misc]
            self.sums = {SENSITIVITY: SUMMANDS}  # type: ignore[misc]
            self.payloads = payloads_of(SENSITIVITY)  # type: ignore[misc]
        self._scope_P: Tensor | None = None
        self._importance_P: Tensor | None = None
        self._anchor_P: Tensor | None = None

    def check(self, model: FlatModel) -> None:
        """Refuse a scope that matches no tensor."""
        in_scope(model, self.scope, "learner.mas.scope")

    def setup(self, ctx: Context) -> None:
        """Find the tensors in scope, and take the sums over clients where they have come."""
        self._scope_P = in_scope(ctx.model, self.scope, "learner.mas.scope")
        sums = summed(ctx.payload, SENSITIVITY, ctx.device) if self.aggregate else None
        if sums is not None:
            self._importance_P, self._anchor_P = sums

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the penalty; nothing before a task has ended."""
        if not self.weight or self._importance_P is None or self._anchor_P is None:
            return None
        return penalty(ctx.model, self._importance_P[None], self._anchor_P[None], self.weight)

    def after_task(self, ctx: Context) -> None:
        """Take the importances on the client's own samples, at the global weights the task ended with."""
        if not self.weight or self.aggregate:
            return
        importance = self._importance(ctx)
        if self._importance_P is not None:
            importance = self.decay * self._importance_P + importance
        self._importance_P, self._anchor_P = importance, ctx.model.vector()[: ctx.model.num_parameters]

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this client's share of the sums: nothing where there is no term to use them."""
        if not self.weight:
            return {}
        return summands(self._importance(ctx), ctx.model.flat[: ctx.model.num_parameters], len(ctx.data))

    def _importance(self, ctx: Context) -> Tensor:
        importance = sensitivity(ctx.model, ctx.data.x, ctx.task.columns)
        return importance if self._scope_P is None else importance * self._scope_P

    def state(self) -> State:
        """Return importances and anchor, (P,) each; nothing of one's own where they are the server's."""
        if self._anchor_P is None or self.aggregate:
            return {}
        return {"importance": self._importance_P, "anchor": self._anchor_P}

    def load(self, state: State) -> None:
        """Restore them."""
        self._importance_P, self._anchor_P = state.get("importance"), state.get("anchor")


def sensitivity(model: FlatModel, x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Return mean_n |d ||logits(x_n)[columns]||^2 / d theta| (P,) on x (N, ...); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics.
    """
    chosen = list(columns)

    def squared_norm(logits: Tensor) -> Tensor:
        return logits[0, chosen].square().sum()

    total = summed_over_samples(model, squared_norm, torch.abs, x, chunk_elements=_CHUNK_ELEMENTS)
    return (total / len(x)).float()
