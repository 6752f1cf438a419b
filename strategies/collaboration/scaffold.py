"""SCAFFOLD's server half: the mean of the clients' changes, and the mean of their control variates.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1, lines 16
and 17: x <- x + eta_g mean(y_i - x) over the round's clients, c <- c + (1/N) sum(c_i+ - c_i) with N all clients.
"""

# P = length of the flat vector
from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fedcl.contracts.fields import MODEL
from fedcl.contracts.learner import Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import GLOBAL, Aggregate, Collaboration, Target, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec


class Scaffold(Collaboration):
    """Average uniformly, step with ``server_lr`` (the paper's eta_g), and keep the server's control variate c.

    Its client half is ``clients.strategies.scaffold.Scaffold``. The server holds the sum over clients alone, never one
    client's variate, so forgetting starts the variates over: here and, through ``control_epoch``, at every client.
    """

    payloads: ClassVar[tuple[Payload, ...]] = (
        Payload("control", "down"),
        Payload("control_epoch", "down"),
        Payload("control_delta", "up", MODEL),
    )

    def __init__(self, *, server_lr: float = 1.0) -> None:
        self.server_lr = server_lr
        self._epoch = 0
        self._set_control(torch.zeros(0, dtype=torch.float64))

    def _set_control(self, control_P: Tensor) -> None:
        self._control = control_P
        # one object for everybody: clients that share model and payload share a message
        self._payload = {"control": control_P.float(), "control_epoch": torch.tensor([self._epoch])}

    def setup(self, spec: Spec) -> None:
        self._set_control(torch.zeros(spec.size, dtype=torch.float64))

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        return GLOBAL, dict(self._payload)

    def weight(self, update: Update) -> float:
        """Return one for a change, times what staleness made of the weight."""
        return update.weight / update.num_examples

    def finish(self, aggregate: Aggregate, view: ServerView) -> dict[Target, Tensor]:
        """Move c and return the change of the global model."""
        if aggregate.clients:
            self._set_control(self._control + aggregate.payload["control_delta"] / len(view.clients))
        return {GLOBAL: self.server_lr * aggregate.mean()}

    def state_dict(self) -> dict[str, Any]:
        return {"control": self._control, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._set_control(state["control"])

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Start over from c = 0, at the clients too."""
        self._epoch += 1
        self._set_control(torch.zeros_like(self._control))
        return ErasureOutcome(
            type(self).__name__, "reset", "the control variate is a mean over clients: it starts over"
        )

    def metrics(self) -> dict[str, float]:
        return {"control_norm": float(self._control.norm())}
