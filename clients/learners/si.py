"""SI: synaptic intelligence.

Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017. While a task is trained, each
weight's share in the fall of the loss is integrated along the path (eq. 3), ``omega_k = -sum_steps g_k dtheta_k``. At
its end (eq. 5) ``Omega_k += max(0, omega_k) / (Delta_k^2 + xi)`` with Delta_k the distance moved; the loss is eq. 4,
``L + c sum_k Omega_k (theta_k - theta~_k)^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.learners.quadratic import Quadratic, parameters
from fedcl.contracts.learner import Context, State

# P = parameter elements


class SI(Quadratic):
    """Pull each weight towards where the last task left it, as strongly as moving it has lowered losses.

    The path of a client is that of its own steps; what averaging at the server moves is no part of it.

    Parameters
    ----------
    weight
        c; 0 turns the method off and records nothing.
    damping
        xi, which bounds the importance of weights that hardly moved.
    scope, aggregate
        Those of :class:`~clients.learners.quadratic.Quadratic`. With ``aggregate`` a client's importances weigh as
        many samples as it holds.

    Raises
    ------
    ValueError
        If ``scope`` is not a regular expression, or (in :meth:`check`) matches no tensor of the model.
    """

    key = "learner.si"
    query = "path_importance"

    def __init__(
        self, *, weight: float = 0.1, damping: float = 0.1, scope: str | None = None, aggregate: bool = False
    ) -> None:
        super().__init__(weight=weight, scope=scope, aggregate=aggregate)
        self.damping = damping
        self._gained_P: Tensor | None = None
        self._gained_in: int | None = None
        self._path_P: Tensor | None = None
        self._way_P: Tensor | None = None
        self._gradient_P: Tensor | None = None
        self._before_P: Tensor | None = None

    def before_round(self, ctx: Context) -> None:
        if self.weight and self._path_P is None:
            self._path_P = torch.zeros(ctx.model.num_parameters, device=ctx.device)
            self._way_P = torch.zeros_like(self._path_P)

    @torch.no_grad()
    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Keep the gradient of the loss without the penalty, and the weights before the step."""
        if not self.weight:
            return
        self._before_P = parameters(ctx).clone()
        self._gradient_P = ctx.model.flatten(grads)
        if self._importance_AP is not None and self._anchor_AP is not None:
            self._gradient_P -= 2 * self.weight * self._importance_AP[0] * (self._before_P - self._anchor_AP[0])

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        if self._path_P is None or self._way_P is None or self._before_P is None or self._gradient_P is None:
            return
        step_P = parameters(ctx) - self._before_P
        self._path_P -= self._gradient_P * step_P
        self._way_P += step_P

    def after_task(self, ctx: Context) -> None:
        """Turn the path into importances around the global weights the task ended with."""
        if self._path_P is None or self._way_P is None:
            return
        gained_P = self.held(ctx, self._path_P.clamp_min(0.0) / (self._way_P.square() + self.damping))
        self._path_P = self._way_P = None
        if self.aggregate:
            self._gained_P, self._gained_in = gained_P, ctx.task.id
        else:
            self.add_task(ctx, gained_P)

    def importance(self, ctx: Context) -> Tensor | None:
        return self._gained_P if self._gained_in == ctx.task.id else None

    def state(self) -> State:
        """Return path, way, and importances with their anchor, as far as they exist; the server keeps summed ones."""
        named = {"path": self._path_P, "way": self._way_P, "gained": self._gained_P}
        state: State = {**super().state(), **{name: tensor for name, tensor in named.items() if tensor is not None}}
        return state if self._gained_in is None else {**state, "gained_in": self._gained_in}

    def load(self, state: State) -> None:
        super().load(state)
        self._path_P, self._way_P = state.get("path"), state.get("way")
        self._gained_P, self._gained_in = state.get("gained"), state.get("gained_in")
