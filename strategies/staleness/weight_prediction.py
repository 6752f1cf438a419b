"""Weight prediction: send clients the model extrapolated to the version at which they will reply.

As the linear prediction "W-Pred" in the comparison of Wang and Gao, AAAI 2025 (arXiv 2309.13536), after Hakimi et al.,
"Taming Momentum in a Distributed Asynchronous Environment", 2019 (arXiv 1907.11612).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import Staleness, Update
from fedcl.contracts.view import ServerView
from fedcl.models.flat import Spec
from fedcl.server.strategy import exact_sum

# P = parameters


class WeightPrediction(Staleness):
    """Send w + h v: v the moving mean of the global model's steps, h the versions that will pass meanwhile.

    Clients train from the prediction, and their change is added to the model of their arrival as it is. Only the global
    model is predicted: a client with a personal model is sent that.

    Parameters
    ----------
    horizon
        h, in versions; null: the age of the client's latest update, so that nothing is predicted while all are fresh.
    momentum
        Of the mean over steps, in [0, 1).
    """

    def __init__(self, *, horizon: float | None = None, momentum: float = 0.9) -> None:
        self.horizon, self.momentum = horizon, momentum
        self._last: Tensor | None = None
        self._version = 0
        self._step: Tensor | None = None  # moving mean of steps a version (P,) float64
        self._ages: dict[str, int] = {}
        self._buffers = slice(0, 0)
        self._sent: dict[float, Tensor] = {}  # predictions of the present version: equal ones travel as one message

    def setup(self, spec: Spec) -> None:
        """Learn where the buffers are: running statistics are no weights, and a predicted variance may be below 0."""
        self._buffers = slice(spec.size - sum(tensor.size for tensor in spec if tensor.kind == "buffer"), spec.size)

    def outgoing(self, model: Tensor, client: str, view: ServerView) -> Tensor:
        """Return the model as it is expected to be at the client's reply, float32 (P,)."""
        self._follow(view)
        horizon = self.horizon if self.horizon is not None else self._ages.get(client, 0)
        if model is not view.global_model or self._step is None or horizon == 0:
            return model
        if horizon not in self._sent:
            self._sent[horizon] = exact_sum(model, horizon * self._step)
        return self._sent[horizon]

    def _follow(self, view: ServerView) -> None:
        """Take in how the global model has moved since it was last seen."""
        model, passed = view.global_model, view.version - self._version
        if self._last is not None and passed > 0:
            step = (model.double() - self._last.double()) / passed
            step[self._buffers] = 0.0
            keep = self.momentum**passed
            self._step = step if self._step is None else keep * self._step + (1 - keep) * step
        if self._last is None or passed > 0:
            self._last, self._version = model.clone(), view.version
            self._sent.clear()

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Note how late each client was; the updates enter as they are."""
        for update in updates:
            self._ages[update.client] = update.age
        return updates

    def metrics(self) -> dict[str, float]:
        return {} if self._step is None else {"step_norm": float(torch.linalg.vector_norm(self._step))}

    def state_dict(self) -> dict[str, Any]:
        """Return the latest model seen, its version, the mean step and the clients' ages."""
        state: dict[str, Any] = {}
        if self._last is not None:
            state |= {"last": self._last, "version": self._version, "ages": dict(self._ages)}
        if self._step is not None:
            state["step"] = self._step
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._version = state.get("last"), state.get("version", 0)
        self._step, self._ages = state.get("step"), dict(state.get("ages", {}))
        self._sent.clear()

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop the trajectory: it ends in a model that is about to be edited."""
        self._last, self._step, self._version = None, None, 0
        self._sent.clear()
        for client in request.clients:
            self._ages.pop(client, None)
        return ErasureOutcome(type(self).__name__, "reset", "the model's trajectory holds every client's changes")
