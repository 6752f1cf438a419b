"""q-FedAvg's client half: say how large the loss of the received model is.

Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, Algorithm 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clients.strategies.loss import mean_loss
from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Context, Payload, Phase, Plugin


class QFedAvg(Plugin):
    """Upload F_k: the mean cross-entropy of the received model on the client's samples of the task."""

    phase: ClassVar[Phase] = Phase.BOOKKEEPING
    payloads: ClassVar[tuple[Payload, ...]] = (
        Payload("loss_received", "up", TensorField((1,), low=0.0), reduction="stack"),
    )

    def __init__(self) -> None:
        self._loss = torch.zeros(())

    def before_round(self, ctx: Context) -> None:
        self._loss = mean_loss(ctx)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        return {"loss_received": self._loss.reshape(1)}
