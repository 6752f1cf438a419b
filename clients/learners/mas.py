"""MAS: memory aware synapses.

Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget", ECCV 2018. The importance of a weight is how
much the output moves with it, with no need of labels (eq. 2 and section 4.3, the squared norm of the output):
``Omega_i = 1/N sum_k |d ||F(x_k)||^2 / d theta_i|``; the loss is eq. 4,
``L + lambda sum_i Omega_i (theta_i - theta*_i)^2``. Importances of tasks are added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from clients.learners.ewc import penalty
from fedcl.client.plugin import Batch, Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements, N = samples, B = batch
_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


class MAS(Plugin):
    """Pull each weight towards where the last task left it, as strongly as the outputs depend on it.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off and computes nothing.
    decay
        What is left of the old importances at each new task; 1 forgets none.
    """

    phase = Phase.REGULARISER

    def __init__(self, *, weight: float = 0.1, decay: float = 1.0) -> None:
        self.weight = weight
        self.decay = decay
        self._importance_P: Tensor | None = None
        self._anchor_P: Tensor | None = None

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the penalty; nothing before a task has ended."""
        if not self.weight or self._importance_P is None or self._anchor_P is None:
            return None
        return penalty(ctx.model, self._importance_P[None], self._anchor_P[None], self.weight)

    def after_task(self, ctx: Context) -> None:
        """Take the importances on the client's own samples, at the global weights the task ended with."""
        if not self.weight:
            return
        importance = sensitivity(ctx.model, ctx.data.x, ctx.task.columns)
        if self._importance_P is not None:
            importance = self.decay * self._importance_P + importance
        self._importance_P, self._anchor_P = importance, ctx.model.vector()[: ctx.model.num_parameters]

    def state(self) -> State:
        """Return importances and anchor, (P,) each."""
        return {} if self._anchor_P is None else {"importance": self._importance_P, "anchor": self._anchor_P}

    def load(self, state: State) -> None:
        """Restore them."""
        self._importance_P, self._anchor_P = state.get("importance"), state.get("anchor")


def sensitivity(model: FlatModel, x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Return mean_n |d ||logits(x_n)[columns]||^2 / d theta| (P,) on x (N, ...); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics.
    """
    model.eval()
    pairs = list(zip(model.module.named_parameters(), model.parameter_specs, strict=True))
    trainable = {name: p.detach() for (name, p), _ in pairs if p.requires_grad}
    fixed = {name: p.detach() for (name, p), _ in pairs if not p.requires_grad}
    slices = {name: slice(spec.start, spec.stop) for (name, _), spec in pairs}
    chosen = list(columns)

    def squared_norm(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits: Tensor = functional_call(model.module, {**fixed, **params}, (sample[None],)).logits
        return logits[0, chosen].square().sum()

    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    for part in torch.split(x, max(1, _CHUNK_ELEMENTS // max(1, model.num_parameters))):
        grads = vmap(grad(squared_norm), in_dims=(None, 0))(trainable, part)
        for name, gradient in grads.items():
            total[slices[name]] += gradient.abs().sum(0).flatten()
    return (total / len(x)).float()
