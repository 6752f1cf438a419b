"""q-FedAvg on the server: clients with a larger loss weigh more.

Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, Algorithm 2. With F_k the loss of client k at
the model it received, L the Lipschitz constant (1 / local learning rate), and delta_k its change:

    Delta_k = L F_k^q (-delta_k),  h_k = q F_k^(q-1) ||L delta_k||^2 + L F_k^q,  w <- w - sum Delta_k / sum h_k
"""

# P = length of the flat vector
from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcl.contracts.fields import TensorField
from fedcl.contracts.learner import Payload
from fedcl.contracts.strategy import Collaboration, Update

_LEAST = 1e-10  # a loss of zero must not divide


class QFedAvg(Collaboration):
    """Average with weights h_k of vectors L F_k^q delta_k / h_k, which is the paper's step.

    With ``q`` 0 it is the plain mean over clients. Its client half is ``clients.strategies.qfedavg.QFedAvg``.
    """

    payloads: ClassVar[tuple[Payload, ...]] = (
        Payload("loss_received", "up", TensorField((1,), low=0.0), reduction="stack"),
    )

    def __init__(self, *, q: float = 0.1, lipschitz: float = 3.3) -> None:
        self.q = q
        self.lipschitz = lipschitz

    def term(self, update: Update) -> tuple[Tensor, float]:
        """Return (L F^q delta / h, h), times what staleness made of the weight."""
        loss = max(float(update.payload["loss_received"]), _LEAST)
        scale = self.lipschitz * loss**self.q
        norm = self.lipschitz * float(update.delta.norm())
        h = self.q * loss ** (self.q - 1) * norm**2 + scale
        return update.delta * (scale / h), h * update.weight / update.num_examples
