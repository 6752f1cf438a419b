"""SI: synaptic intelligence.

Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017. While a task is trained, each
weight's share in the fall of the loss is integrated along the path (eq. 3), ``omega_k = -sum_steps g_k dtheta_k``. At
its end (eq. 5) ``Omega_k += max(0, omega_k) / (Delta_k^2 + xi)`` with Delta_k the way gone; the loss is eq. 4,
``L + c sum_k Omega_k (theta_k - theta~_k)^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.learners.quadratic import SUMMANDS, payloads_of, penalty, summands, summed
from fedcl.client.scope import check_scope, in_scope
from fedcl.contracts.learner import Batch, Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements
PATH = "path_importance"  # the question whose answers the server adds up


class SI(Plugin):
    """Pull each weight towards where the last task left it, as strongly as moving it has lowered losses.

    The path of a client is that of its own steps; what averaging at the server moves is no part of it.

    Parameters
    ----------
    weight
        c; 0 turns the method off and records nothing.
    damping
        xi, which bounds the importance of weights that hardly moved.
    scope
        Regular expression searched for in tensor names: only those are held; null: all.
    aggregate
        The mean importance over clients, each weighing as many samples as it holds, around every finished task's
        model, instead of one's own.

    Raises
    ------
    ValueError
        If ``scope`` is no regular expression, or (in :meth:`check`) matches no tensor of the model.
    """

    phase = Phase.REGULARISER
    stackable = True

    def __init__(
        self, *, weight: float = 0.1, damping: float = 0.1, scope: str | None = None, aggregate: bool = False
    ) -> None:
        check_scope(scope, "learner.si.scope")
        self.weight = weight
        self.damping = damping
        self.scope = scope
        self.aggregate = aggregate
        if aggregate:
            self.queries = (PATH,)  # type: ignore[misc]
            self.sums = {PATH: SUMMANDS}  # type: ignore[misc]
            self.payloads = payloads_of(PATH)  # type: ignore[misc]
        self._scope_P: Tensor | None = None
        self._gained_P: Tensor | None = None
        self._gained_in: int | None = None
        self._path_P: Tensor | None = None
        self._way_P: Tensor | None = None
        self._importance_P: Tensor | None = None
        self._anchor_P: Tensor | None = None
        self._gradient_P: Tensor | None = None
        self._before_P: Tensor | None = None

    def check(self, model: FlatModel) -> None:
        """Refuse a scope that matches no tensor."""
        in_scope(model, self.scope, "learner.si.scope")

    def setup(self, ctx: Context) -> None:
        """Find the tensors in scope, and take the sums over clients where they have come."""
        self._scope_P = in_scope(ctx.model, self.scope, "learner.si.scope")
        sums = summed(ctx.payload, PATH, ctx.device) if self.aggregate else None
        if sums is not None:
            self._importance_P, self._anchor_P = sums

    def before_round(self, ctx: Context) -> None:
        """Begin a path where the task has none."""
        if self.weight and self._path_P is None:
            self._path_P = torch.zeros(ctx.model.num_parameters, device=ctx.device)
            self._way_P = torch.zeros_like(self._path_P)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the penalty; nothing before a task has ended."""
        if not self.weight or self._importance_P is None or self._anchor_P is None:
            return None
        return penalty(ctx.model, self._importance_P[None], self._anchor_P[None], self.weight)

    @torch.no_grad()
    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Note the gradient of the loss without the penalty, and where the step starts."""
        if not self.weight:
            return
        self._before_P = ctx.model.flat[: ctx.model.num_parameters].clone()
        self._gradient_P = flattened(ctx.model, grads)
        if self._importance_P is not None and self._anchor_P is not None:
            self._gradient_P -= 2 * self.weight * self._importance_P * (self._before_P - self._anchor_P)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Add the step to the path."""
        if self._path_P is None or self._way_P is None or self._before_P is None or self._gradient_P is None:
            return
        step_P = ctx.model.flat[: ctx.model.num_parameters] - self._before_P
        self._path_P -= self._gradient_P * step_P
        self._way_P += step_P

    def after_task(self, ctx: Context) -> None:
        """Turn the path into importances around the global weights the task ended with."""
        if self._path_P is None or self._way_P is None:
            return
        gained = self._path_P.clamp_min(0.0) / (self._way_P.square() + self.damping)
        gained = gained if self._scope_P is None else gained * self._scope_P
        self._path_P = self._way_P = None
        if self.aggregate:
            self._gained_P, self._gained_in = gained, ctx.task.id
            return
        self._importance_P = gained if self._importance_P is None else self._importance_P + gained
        self._anchor_P = ctx.model.vector()[: ctx.model.num_parameters]

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this client's share of the sums; nothing if it has no part in the task that ends."""
        if self._gained_P is None or self._gained_in != ctx.task.id:
            return {}
        return summands(self._gained_P, ctx.model.flat[: ctx.model.num_parameters], len(ctx.data))

    def state(self) -> State:
        """Return what there is of path, way, importances and anchor, (P,) each; importances summed are the server's."""
        named = {"path": self._path_P, "way": self._way_P}
        if self.aggregate:
            named["gained"] = self._gained_P
        else:
            named |= {"importance": self._importance_P, "anchor": self._anchor_P}
        state: State = {name: tensor for name, tensor in named.items() if tensor is not None}
        return state if self._gained_in is None else {**state, "gained_in": self._gained_in}

    def load(self, state: State) -> None:
        """Restore them."""
        self._path_P, self._way_P = state.get("path"), state.get("way")
        self._importance_P, self._anchor_P = state.get("importance"), state.get("anchor")
        self._gained_P, self._gained_in = state.get("gained"), state.get("gained_in")


def flattened(model: FlatModel, grads: list[Tensor]) -> Tensor:
    """Return gradients of the trainable parameters as one vector (P,), 0 where a parameter is frozen."""
    vector = torch.zeros(model.num_parameters, device=model.device)
    specs = [s for p, s in zip(model.parameters, model.parameter_specs, strict=True) if p.requires_grad]
    for spec, gradient in zip(specs, grads, strict=True):
        vector[spec.start : spec.stop] = gradient.flatten()
    return vector
