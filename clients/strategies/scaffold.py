"""SCAFFOLD's client half: every gradient is corrected by what the client drifts from the average client.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1, lines 7
to 14, with option II of line 12.
"""

# P = length of the flat vector
from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcl.contracts.fields import MODEL
from fedcl.contracts.learner import Context, Payload, Phase, Plugin, State


class Scaffold(Plugin):
    """Train with the gradient g - c_i + c and update the client's control variate c_i.

    c_i+ = c_i - c + (x - y) / (K lr) after K steps from x to y; it is the mean of the gradients used, so weight decay
    enters it. With momentum, x - y counts a gradient up to 1 / (1 - momentum) times: use plain SGD.

    ``control_epoch`` changes when the server starts over, as it does after forgetting: c_i is then zero.
    """

    phase: ClassVar[Phase] = Phase.GRADIENT
    payloads: ClassVar[tuple[Payload, ...]] = (
        Payload("control", "down"),
        Payload("control_epoch", "down"),
        Payload("control_delta", "up", MODEL),
    )

    def __init__(self) -> None:
        self._own: Tensor | None = None
        self._epoch = 0
        self._server = torch.zeros(0)
        self._correction: list[Tensor] = []

    def state(self) -> State:
        """Return c_i (P,) and the epoch of the server's variate it belongs to."""
        return {} if self._own is None else {"control": self._own.cpu(), "epoch": self._epoch}

    def load(self, state: State) -> None:
        """Restore c_i; a client that has never trained starts from zero."""
        self._own = state.get("control")
        self._epoch = state.get("epoch", 0)

    def before_round(self, ctx: Context) -> None:
        """Take the server's variate and prepare c - c_i for each trainable tensor.

        Raises
        ------
        ValueError
            If the message carries no variate of the model's size.
        """
        control = ctx.payload.get("control")
        if control is None or control.shape != ctx.model.flat.shape:
            raise ValueError("SCAFFOLD needs the server's control variate, one number for each of the model's")
        epoch = int(ctx.payload["control_epoch"])
        if self._own is None or epoch != self._epoch:
            self._own, self._epoch = torch.zeros_like(control), epoch
        self._server, self._own = control.to(ctx.device), self._own.to(ctx.device)
        self._correction = ctx.model.views(self._server - self._own)

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Replace each gradient g by g - c_i + c."""
        torch._foreach_add_(grads, self._correction)

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Update c_i and return its change, ``control_delta`` (P,)."""
        if self._own is None:
            raise RuntimeError("SCAFFOLD: a local round ended that never began")
        mean_gradient = (ctx.received - ctx.model.flat) / (max(ctx.step, 1) * ctx.lr)
        delta = torch.zeros_like(mean_gradient)  # as frozen parameters and buffers have no gradient
        torch._foreach_copy_(ctx.model.views(delta), ctx.model.views(mean_gradient - self._server))
        self._own = self._own + delta
        return {"control_delta": delta}
