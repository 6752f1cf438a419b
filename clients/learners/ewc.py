"""EWC: elastic weight consolidation.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, eq. 3:
``L(theta) + lambda/2 sum_i F_i (theta_i - theta*_i)^2`` with the Fisher information's diagonal F of a finished task and
the weights theta* it ended with. ``mode=online`` is Schwarz et al., "Progress & Compress", ICML 2018, section 3.2: one
running F and the latest theta*. F is the empirical Fisher: gradients are taken at the labels of the data.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedcl.client.loop import masked_cross_entropy
from fedcl.client.plugin import Batch, Context, Phase, Plugin, State
from fedcl.models.flat import FlatModel
from fedcl.models.networks import Output

# P = parameter elements, A = anchors (1 online, one a task when separate), N = samples, B = batch
FisherKind = Literal["per_sample", "per_batch"]
_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


class EWC(Plugin):
    """Pull each weight towards where earlier tasks left it, as strongly as they depend on it.

    Parameters
    ----------
    weight
        lambda; 0 turns the term off and computes nothing.
    mode
        ``online``: one penalty, F <- decay F + F_new around the latest weights. ``separate``: a penalty a task.
    decay
        gamma of the online mode; 1 forgets no task.
    fisher
        ``per_sample``: mean over samples of the squared gradient. ``per_batch``: mean over batches of the squared mean
        gradient, as Avalanche computes it; smaller by up to a factor of the batch size.
    half
        Whether the penalty carries the paper's factor 1/2.
    """

    phase = Phase.REGULARISER

    def __init__(
        self,
        *,
        weight: float = 10.0,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        fisher: FisherKind = "per_sample",
        half: bool = True,
    ) -> None:
        self.weight = weight
        self.mode = mode
        self.decay = decay
        self.fisher = fisher
        self.half = half
        self._fisher_AP: Tensor | None = None
        self._anchor_AP: Tensor | None = None

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return the penalty; nothing before a task has ended."""
        if not self.weight or self._fisher_AP is None or self._anchor_AP is None:
            return None
        return penalty(ctx.model, self._fisher_AP, self._anchor_AP, self.weight / 2 if self.half else self.weight)

    def after_task(self, ctx: Context) -> None:
        """Take the task's Fisher on the client's own samples, at the global weights the task ended with."""
        if not self.weight:
            return
        fisher = fisher_diagonal(ctx.model, ctx.data.x, ctx.data.y, ctx.mask, kind=self.fisher, batch=ctx.batch_size)
        fisher_AP, anchor_AP = fisher[None], ctx.model.vector()[None, : ctx.model.num_parameters]
        if self._fisher_AP is not None and self._anchor_AP is not None:
            if self.mode == "online":
                fisher_AP = self.decay * self._fisher_AP + fisher_AP
            else:
                fisher_AP = torch.cat([self._fisher_AP, fisher_AP])
                anchor_AP = torch.cat([self._anchor_AP, anchor_AP])
        self._fisher_AP, self._anchor_AP = fisher_AP, anchor_AP

    def state(self) -> State:
        """Return the Fisher and the anchors, (A, P) each."""
        return {} if self._fisher_AP is None else {"fisher": self._fisher_AP, "anchor": self._anchor_AP}

    def load(self, state: State) -> None:
        """Restore them."""
        self._fisher_AP, self._anchor_AP = state.get("fisher"), state.get("anchor")


def penalty(model: FlatModel, fisher_AP: Tensor, anchor_AP: Tensor, scale: float) -> Tensor:
    """Return ``scale sum_a F_a (theta - theta*_a)^2``, differentiable in the model's trainable parameters."""
    value: Tensor = _Penalty.apply(model, fisher_AP, anchor_AP, scale, *model.trainable)  # type: ignore[no-untyped-call]
    return value


class _Penalty(torch.autograd.Function):
    """The penalty on the flat vector: a few operations however many tensors the model has."""

    @staticmethod
    def forward(ctx: Any, model: FlatModel, fisher_AP: Tensor, anchor_AP: Tensor, scale: float, *_: Tensor) -> Tensor:
        distance_AP = model.flat[: model.num_parameters] - anchor_AP
        pull_AP = fisher_AP * distance_AP
        ctx.model, ctx.gradient_P = model, (2.0 * scale) * pull_AP.sum(0)
        return scale * (pull_AP * distance_AP).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        model: FlatModel = ctx.model
        gradient_P = upstream * ctx.gradient_P
        pairs = zip(model.parameters, model.parameter_specs, strict=True)
        grads = [gradient_P[s.start : s.stop].view(s.shape) for p, s in pairs if p.requires_grad]
        return (None, None, None, None, *grads)


def fisher_diagonal(
    model: FlatModel, x: Tensor, y: Tensor, mask: Tensor | None, *, kind: FisherKind, batch: int
) -> Tensor:
    """Return the diagonal of the empirical Fisher (P,) on x (N, ...), y (N,); 0 where a parameter is frozen.

    The model is left in evaluation mode: no dropout, running statistics. ``batch`` matters to ``per_batch`` alone.
    """
    model.eval()
    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    if kind == "per_batch":
        batches = range(0, len(y), batch)
        for start in batches:
            part = Batch(x[start : start + batch], y[start : start + batch], mask)
            grads = torch.autograd.grad(
                masked_cross_entropy(model(part.x), part), model.trainable, materialize_grads=True
            )
            _accumulate(model, total, [g.square() for g in grads])
        return (total / len(batches)).float()
    step = max(1, _CHUNK_ELEMENTS // max(1, model.num_parameters))
    for start in range(0, len(y), step):
        _accumulate(model, total, _squared_gradients(model, x[start : start + step], y[start : start + step], mask))
    return (total / len(y)).float()


def _squared_gradients(model: FlatModel, x: Tensor, y: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return, for each trainable parameter, the sum over samples of its squared gradient."""
    trainable = {name: p.detach() for name, p in model.module.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.module.named_parameters() if not p.requires_grad}

    def negative_log_likelihood(params: dict[str, Tensor], sample: Tensor, column: Tensor) -> Tensor:
        logits = functional_call(model.module, {**fixed, **params}, (sample[None],)).logits
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return F.cross_entropy(logits, column[None])

    grads = vmap(grad(negative_log_likelihood), in_dims=(None, 0, 0))(trainable, x, y)
    return [grads[name].square().sum(0) for name in trainable]


def _accumulate(model: FlatModel, total_P: Tensor, values: list[Tensor]) -> None:
    specs = [s for p, s in zip(model.parameters, model.parameter_specs, strict=True) if p.requires_grad]
    for spec, value in zip(specs, values, strict=True):
        total_P[spec.start : spec.stop] += value.flatten()
