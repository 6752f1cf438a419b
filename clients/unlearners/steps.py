"""What unlearners that move weights share at a client: local steps over samples."""

# P = length of the flat vector, N = samples, C = logit columns
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedcl.client.loop import masked_cross_entropy
from fedcl.client.moves import SGD, mover
from fedcl.contracts.fields import MODEL, Form, TensorField
from fedcl.contracts.learner import Batch, LocalTraining
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel

BATCH = 512  # samples at once where gradients or predictions are summed, which does not depend on it

Step = Callable[[list[Tensor]], None]  # takes the gradients of the trainable parameters


def cross_entropy(model: FlatModel, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of ``model`` on ``batch`` over the allowed columns."""
    return masked_cross_entropy(model(batch.x), batch)


def gradients(model: FlatModel, loss: Tensor) -> list[Tensor]:
    """Return the gradients of ``loss`` for the trainable parameters, zero where it does not depend on one."""
    return list(torch.autograd.grad(loss, model.trainable, materialize_grads=True))


@torch.no_grad()
def clip(grads: list[Tensor], max_norm: float | None) -> None:
    """Scale ``grads`` in place so that their joint L2 norm is at most ``max_norm``; None leaves them as they are."""
    if max_norm is None:
        return
    norm = float(torch.stack([torch.linalg.vector_norm(g.double()) for g in grads]).norm())
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)


def settings(ctx: UnlearnContext, **changes: float | None) -> LocalTraining:
    """Return how the client trains, with each of ``changes`` that is not None in place of its own setting."""
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(ctx.training, **given)


def as_trained(model: FlatModel, training: LocalTraining) -> Step:
    """Return the client's own steps: its optimizer, with a new state, and its ``clip_norm``."""
    return mover(training, list(model.trainable))


def sgd(model: FlatModel, training: LocalTraining) -> Step:
    """Return steps of SGD with the momentum and weight decay of ``training``, whatever optimizer the client has."""
    optimizer, params = (
        SGD(momentum=training.momentum, weight_decay=training.weight_decay),
        list[Tensor](model.trainable),
    )
    return lambda grads: optimizer.step(params, grads, training.lr)


def adam(params: Sequence[Tensor], lr: float) -> Step:
    """Return steps of Adam. The first one is close to a sign: lr g / (abs(g) + eps)."""
    chosen = torch.optim.Adam(params, lr=lr)

    def step(grads: list[Tensor]) -> None:
        for param, gradient in zip(params, grads, strict=True):
            param.grad = gradient
        chosen.step()
        chosen.zero_grad()

    return step


def optimizer(name: str, model: FlatModel, training: LocalTraining) -> Step:
    """Return the steps of ``adam``, or of ``sgd`` as in training."""
    return adam(model.trainable, training.lr) if name == "adam" else sgd(model, training)


def epochs_of(
    ctx: UnlearnContext, samples: Samples, training: LocalTraining, purpose: str | None = None
) -> Iterable[Batch]:
    """Yield the batches of ``training.epochs`` epochs, in an order of its own for each round of the same request."""
    generator = ctx.rng(purpose or f"batches {ctx.args.get('round', 0)}")
    for _ in range(training.epochs):
        yield from samples.batches(training.batch_size, generator)


def descend(model: FlatModel, batches: Iterable[Batch], step: Step) -> int:
    """Move ``model`` down the cross-entropy of each batch; return the number of steps."""
    steps = 0
    model.train()
    for batch in batches:
        step(gradients(model, cross_entropy(model, batch)))
        steps += 1
    return steps


@torch.no_grad()
def num_correct(model: FlatModel, samples: Samples) -> int:
    """Return for how many of ``samples`` the highest allowed column is the target, in evaluation mode."""
    model.eval()
    right = 0
    for batch in samples.batches(BATCH):
        right += int((masked(model(batch.x).logits, batch.mask).argmax(1) == batch.y).sum())
    return right


def allowed(samples: Samples, num_columns: int) -> Tensor:
    """Return which columns each sample may be given, bool (N, C)."""
    if samples.mask is not None:
        return samples.mask
    return torch.ones(len(samples), num_columns, dtype=torch.bool, device=samples.y.device)


def ignorance(batch: Batch, num_columns: int) -> float:
    """Return the cross-entropy of a uniform guess among the allowed columns: the mean of log C over the batch."""
    columns = torch.full((1,), num_columns) if batch.mask is None else batch.mask.sum(1)
    return float(columns.double().log().mean())


@torch.no_grad()
def project(model: FlatModel, centre: Tensor, radius: float) -> None:
    """Move the parameters of ``model`` to the nearest point of the L2 ball around ``centre`` (P,)."""
    own, middle = model.flat[: model.num_parameters], centre[: model.num_parameters]
    apart = own.double() - middle.double()
    norm = float(apart.norm())
    if norm > radius:
        own.copy_(middle.double() + apart * (radius / norm))


CHANGE: Form = {"change": MODEL}


def responses_of(*numbers: str) -> Form:
    """Return what :func:`change_of` gives with ``numbers`` of these names, each at least 0."""
    return {**CHANGE, **{name: TensorField((1,), low=0.0) for name in numbers}}


def change_of(ctx: UnlearnContext, num_examples: int, **numbers: float) -> Local:
    """Return the change of ``ctx.model`` since it was received, and ``numbers`` for the certificate."""
    tensors = {name: torch.tensor([float(value)]) for name, value in numbers.items()}
    return Local(num_examples, {"change": ctx.model.flat - ctx.received, **tensors})
