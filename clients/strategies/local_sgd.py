"""Plain local training outside the loop, for instance of personal models."""

# P = length of the flat vector
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedcl.client.loop import by_batch, masked_cross_entropy
from fedcl.contracts.learner import Batch, Context
from fedcl.models.flat import FlatModel


@contextmanager
def standing_at(model: FlatModel, vector_P: Tensor) -> Iterator[None]:
    """Load ``vector_P`` (P,) into the model; at the end write the model to ``vector_P``, and restore the model."""
    home_P = model.vector()
    model.load(vector_P)
    try:
        yield
    finally:
        vector_P.copy_(model.flat)
        model.load(home_P)


def gradients(model: FlatModel, batch: Batch, parameters: Sequence[nn.Parameter] | None = None) -> list[Tensor]:
    """Return the gradients of the masked cross-entropy at the model's weights, for ``parameters`` or all trainable."""
    chosen = model.trainable if parameters is None else parameters
    loss = masked_cross_entropy(model(batch.x), batch)
    return list(torch.autograd.grad(loss, list(chosen), materialize_grads=True))


def gradient_at(model: FlatModel, vector_P: Tensor, batch: Batch) -> Tensor:
    """Return the same gradients at ``vector_P`` (P,), as one vector over the parameters; 0 where one is frozen.

    The buffers of ``vector_P`` are moved as the forward pass moves them.
    """
    with standing_at(model, vector_P):
        return model.flatten(gradients(model, batch))


def batches(ctx: Context, purpose: str) -> Iterator[Batch]:
    """Yield one epoch of the client's samples, in an order drawn from the generator for ``purpose``."""
    order = torch.randperm(len(ctx.data), generator=ctx.rng(purpose)).to(ctx.device)
    for start in range(0, len(order), ctx.batch_size):
        chosen = order[start : start + ctx.batch_size]
        batch = Batch(ctx.augment(ctx.data.x[chosen]), ctx.data.y[chosen], ctx.mask)
        yield by_batch(batch, ctx.num_columns) if ctx.task.by_batch else batch


def train_epochs(
    ctx: Context, *, epochs: int, lr: float, purpose: str, parameters: Sequence[nn.Parameter] | None = None
) -> None:
    """Train ``parameters``, or all trainable ones, for ``epochs`` epochs of plain SGD on cross-entropy.

    The configuration's momentum and weight decay are not used, and no other plugin takes part.
    """
    for _ in range(epochs):
        descend(ctx, batches(ctx, purpose), lr=lr, parameters=parameters)


def descend(
    ctx: Context, stream: Iterable[Batch], *, lr: float, parameters: Sequence[nn.Parameter] | None = None
) -> None:
    """Take one step of plain SGD on each batch's cross-entropy, for ``parameters`` or all trainable ones."""
    chosen = list(ctx.model.trainable if parameters is None else parameters)
    weights: list[Tensor] = list(chosen)
    ctx.model.train()
    with torch.enable_grad():  # predict hooks are called with gradients off
        for batch in stream:
            found = gradients(ctx.model, batch, chosen)
            with torch.no_grad():
                torch._foreach_add_(weights, found, alpha=-lr)
