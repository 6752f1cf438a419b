"""IFCA's client half: of the clusters' models, train the one that fits the client's samples best.

Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, Algorithm 1, the client's steps.
"""

# k = clusters, P = length of the flat vector
from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clients.strategies.loss import mean_loss
from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Context, Payload, Phase, Plugin

CHOICE = Payload("choice", "up", TensorField((1,), "int64", low=0), reduction="stack")


class IFCA(Plugin):
    """Choose among the received model and those of ``clusters`` (k - 1, P), in this order, by the mean cross-entropy.

    A tie is the received model's. What was trained from another one goes back as received + (trained - chosen),
    computed in float64 and rounded once, so that the server sees the change; without a switch the reply is the trained
    model bit for bit. Messages without ``clusters`` leave the received model where it is.
    """

    # last at the end of a local round, when no other plugin reads the model
    phase: ClassVar[Phase] = Phase.BOOKKEEPING
    payloads: ClassVar[tuple[Payload, ...]] = (
        Payload("clusters", "down"),
        CHOICE,
    )

    def __init__(self) -> None:
        self._choice = 0
        self._sent: Tensor | None = None

    def setup(self, ctx: Context) -> None:
        """Replace the received model by the chosen one, for all plugins that are called later."""
        others = ctx.payload.get("clusters")
        if others is None or len(ctx.data) == 0:
            return
        candidates = [ctx.received, *others.to(ctx.device)]
        losses = []
        for vector_P in candidates:
            ctx.model.load(vector_P)
            losses.append(float(mean_loss(ctx)))
        self._choice = min(range(len(losses)), key=losses.__getitem__)
        ctx.model.load(candidates[self._choice])
        if self._choice:
            self._sent, ctx.received = ctx.received, candidates[self._choice]

    @torch.no_grad()
    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Return ``choice`` (1,): 0 for the received model, i for the i-th of ``clusters``."""
        if self._sent is not None:
            change = ctx.model.flat.double() - ctx.received.double()
            ctx.model.flat.copy_((self._sent.double() + change).float())
        return {"choice": torch.tensor([self._choice])}
