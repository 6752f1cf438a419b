"""Plain local training away from the loop: what personal models need besides the model that is exchanged."""

# P = length of the flat vector
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedcl.client.loop import masked_cross_entropy
from fedcl.contracts.learner import Batch, Context
from fedcl.models.flat import FlatModel


@contextmanager
def standing_at(model: FlatModel, vector_P: Tensor) -> Iterator[None]:
    """Let the model hold ``vector_P`` (P,) for a while; ``vector_P`` follows it, and then the model goes back."""
    home_P = model.vector()
    model.load(vector_P)
    try:
        yield
    finally:
        vector_P.copy_(model.flat)
        model.load(home_P)


def gradients(ctx: Context, batch: Batch, parameters: Sequence[nn.Parameter] | None = None) -> list[Tensor]:
    """Return the gradients of the masked cross-entropy where the model stands, for ``parameters`` or all trainable."""
    chosen = ctx.model.trainable if parameters is None else parameters
    loss = masked_cross_entropy(ctx.model(batch.x), batch)
    return list(torch.autograd.grad(loss, list(chosen), materialize_grads=True))


def flat_gradient(ctx: Context, batch: Batch) -> Tensor:
    """Return the same gradients as one vector (P,): zero for frozen parameters and for buffers."""
    vector = torch.zeros_like(ctx.model.flat)
    found = iter(gradients(ctx, batch))
    for parameter, spec in zip(ctx.model.parameters, ctx.model.parameter_specs, strict=True):
        if parameter.requires_grad:
            vector[spec.start : spec.stop] = next(found).flatten()
    return vector


def batches(ctx: Context, purpose: str) -> Iterator[Batch]:
    """Yield one epoch of the client's samples, in an order drawn from the visit's generator for ``purpose``."""
    order = torch.randperm(len(ctx.data), generator=ctx.rng(purpose)).to(ctx.device)
    for start in range(0, len(order), ctx.batch_size):
        chosen = order[start : start + ctx.batch_size]
        yield Batch(ctx.data.x[chosen], ctx.data.y[chosen], ctx.mask)


def train_epochs(
    ctx: Context, *, epochs: int, lr: float, purpose: str, parameters: Sequence[nn.Parameter] | None = None
) -> None:
    """Move ``parameters``, or all trainable ones, by ``epochs`` epochs of plain SGD on cross-entropy.

    Neither momentum nor weight decay of the configuration is used, and no other plugin takes part.
    """
    for _ in range(epochs):
        descend(ctx, batches(ctx, purpose), lr=lr, parameters=parameters)


def descend(
    ctx: Context, stream: Iterable[Batch], *, lr: float, parameters: Sequence[nn.Parameter] | None = None
) -> None:
    """Move ``parameters``, or all trainable ones, by a step of plain SGD on the cross-entropy of each batch."""
    chosen = list(ctx.model.trainable if parameters is None else parameters)
    weights: list[Tensor] = list(chosen)
    ctx.model.train()
    with torch.enable_grad():  # predictions are asked for where gradients are off
        for batch in stream:
            found = gradients(ctx, batch, chosen)
            with torch.no_grad():
                torch._foreach_add_(weights, found, alpha=-lr)
