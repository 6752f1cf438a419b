"""GPM: gradient projection memory.

Saha, Garg and Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021. A layer's gradient lies in the span
of its inputs (section 4); steps orthogonal to the inputs of past tasks leave the layer's outputs on them unchanged.
At a task's end the basis of each layer grows until it holds a share epsilon of the energy of the task's inputs (eq. 9):
``||R_proj||^2 + ||R_hat_k||^2 >= epsilon ||R||^2``; then every gradient loses its part in the span (eq. 6).
"""

from __future__ import annotations

import re
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from clients.strategies.fot import layer_rows
from fedcl.base.linalg import extend_basis, gram_spectrum, leading, project_out, project_out_gram
from fedcl.contracts.learner import Context, Phase, Plugin, State

# D = inputs of a layer and 1 for its bias, K = directions in a basis, M = rows: samples, or patches of samples
_BATCH = 256


class GPM(Plugin):
    """Project the gradients of each layer out of the span of its inputs in the client's past tasks.

    A bias counts as the weight of an input that is always 1.

    Parameters
    ----------
    epsilon
        Share of the energy of a task's inputs that the basis is to hold; 0 turns the method off.
    increment
        Added to epsilon with every finished task (never beyond 1).
    layers
        Regular expression searched for in the names of linear layers and convolutions; the default leaves out only
        heads of single tasks, which later tasks do not train.
    """

    phase = Phase.GRADIENT

    def __init__(self, *, epsilon: float = 0.95, increment: float = 0.003, layers: str = r"^(?!heads\.)") -> None:
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(f"learner.gpm.layers={layers!r}: must be a regular expression ({error})") from error
        self.epsilon = epsilon
        self.increment = increment
        self.layers = layers
        self._bases: dict[str, Tensor] = {}
        self._tasks = 0

    @torch.no_grad()
    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Keep the part of each gradient outside its layer's span, in place."""
        if not self._bases:
            return
        named = {spec.name: gradient for spec, gradient in zip(ctx.model.parameter_specs, grads, strict=True)}
        for layer, basis_DK in self._bases.items():
            project_layer(named[f"{layer}.weight"], named.get(f"{layer}.bias"), basis_DK)

    @torch.no_grad()
    def after_task(self, ctx: Context) -> None:
        """Extend each basis by the inputs of the finished task, under the global model that it ended with."""
        if not self.epsilon:
            return
        share = min(1.0, self.epsilon + self.increment * self._tasks)
        for layer, gram_DD in input_grams(ctx, self.layers).items():
            basis = self._bases.get(layer, gram_DD.new_zeros(len(gram_DD), 0)).to(gram_DD)
            self._bases[layer] = grown(basis, gram_DD, share).float()
        self._tasks += 1

    def state(self) -> State:
        """Return the bases, (D, K) each, and how many tasks have ended."""
        return {"bases": self._bases, "tasks": self._tasks} if self._bases else {}

    def load(self, state: State) -> None:
        self._bases, self._tasks = dict(state.get("bases", {})), state.get("tasks", 0)


def project_layer(weight: Tensor, bias: Tensor | None, basis_DK: Tensor) -> None:
    """Take from a layer's gradients, in place, their part in the span of the basis (D, K)."""
    rows = weight.flatten(1)
    if bias is not None:
        rows = torch.cat([rows, bias[:, None]], dim=1)
    outside = project_out(rows, basis_DK)
    inputs = weight[0].numel()
    weight.copy_(outside[:, :inputs].view_as(weight))
    if bias is not None:
        bias.copy_(outside[:, inputs])


def grown(basis_DK: Tensor, gram_DD: Tensor, share: float) -> Tensor:
    """Return the basis, extended by the fewest directions with which it holds ``share`` of the trace of ``gram_DD``."""
    outside_DD = project_out_gram(gram_DD, basis_DK)
    energies, directions_DD = gram_spectrum(outside_DD)
    total, left = gram_DD.trace(), energies.sum()
    if not left > 0:
        return basis_DK
    needed = 1.0 - (1.0 - share) * float(total / left)  # of what lies outside
    return extend_basis(basis_DK, directions_DD[:, : leading(energies, needed)])


def input_grams(ctx: Context, layers: str) -> dict[str, Tensor]:
    """Return, for each trainable layer that ``layers`` matches, sum over its inputs of x x^T, float64 (D, D).

    Raises
    ------
    ValueError
        If no layer matches.
    """
    chosen = {
        name: module
        for name, module in ctx.model.module.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and re.search(layers, name)
        and all(p.requires_grad for p in module.parameters())
    }
    if not chosen:
        raise ValueError(f"learner.gpm.layers={layers!r}: matches no trainable linear layer or 2-d convolution")
    grams: dict[str, Tensor] = {}

    def read(name: str, module: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        rows = layer_rows(module, x)
        if module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        gram = (rows.T @ rows).double()
        grams[name] = grams[name] + gram if name in grams else gram

    ctx.model.eval()
    with ExitStack() as stack:
        for name, module in chosen.items():
            hook = module.register_forward_pre_hook(lambda module, args, name=name: read(name, module, args[0]))
            stack.callback(hook.remove)
        for x in torch.split(ctx.data.x, _BATCH):
            ctx.model(x)
    return grams
