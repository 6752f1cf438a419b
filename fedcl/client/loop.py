"""The local training loop: gradients, the optimizer's steps and the plugins' hooks.

One resident model, gradients by ``autograd.grad`` and foreach updates on the views of its flat vector: no data loader,
no copy of the model, and for SGD no optimizer object. A hook that no plugin overrides costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.client.fused import FusedStep, needs_gradient
from fedcl.client.moves import Gathered, is_plain, mover, with_rate
from fedcl.contracts.learner import Batch, Context, LocalTraining, Plugin, overrides
from fedcl.evaluation.predictions import masked
from fedcl.models.chain import chain_of
from fedcl.models.masks import columns_of
from fedcl.models.networks import Output


def ordered(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Return plugins by phase, stable within a phase."""
    return sorted(plugins, key=lambda plugin: plugin.phase)


def owner(plugins: Sequence[Plugin], hook: str) -> Plugin | None:
    """Return the one plugin that defines an exclusive hook.

    Raises
    ------
    ValueError
        If two plugins define it, naming both.
    """
    claims = [plugin for plugin in plugins if overrides(plugin, hook)]
    if len(claims) > 1:
        names = " and ".join(type(plugin).__name__ for plugin in claims)
        raise ValueError(f"learner: {names} both define {hook!r}: choose one of them")
    return claims[0] if claims else None


def masked_cross_entropy(out: Output, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the allowed columns."""
    return F.cross_entropy(masked(out.logits, batch.mask), batch.y)


def by_batch(batch: Batch, num_columns: int) -> Batch:
    """Return the batch with the columns of its own classes alone, replayed ones included, of those it may choose."""
    present = columns_of(batch.y, num_columns)
    return batch._replace(mask=present if batch.mask is None else present & batch.mask)


# takes one step and returns the detached loss before it; None if the step has further batches
Step = Callable[[Batch], Tensor | None]


def fit(ctx: Context, plugins: Sequence[Plugin], training: LocalTraining, *, fused: bool = False) -> dict[str, float]:
    """Train ``ctx.model`` on ``ctx.data``; return mean ``loss``, ``loss_first``, ``steps`` and ``samples_trained``.

    ``fused`` takes written-out steps (`fedcl.client.fused`) where model and plugins allow it.
    """
    training = with_rate(training, ctx.lr)
    before_step = [p for p in plugins if overrides(p, "before_step")]
    after_step = [p for p in plugins if overrides(p, "after_step")]
    sampler, step = owner(plugins, "indices"), _step(ctx, plugins, training, fused)
    # a learner with an objective of its own has its own rule for the columns
    narrows = ctx.task.by_batch and owner(plugins, "objective") is None
    data, batches = ctx.data, ctx.rng("batches")
    losses: list[Tensor] = []
    samples = 0
    ctx.model.train()
    for ctx.epoch in range(training.epochs):
        order = torch.randperm(len(data), generator=batches)
        order = (order if sampler is None else sampler.indices(ctx, order)).to(ctx.device)
        x, y, ctx.order = data.x[order], data.y[order], order
        parts = zip(torch.split(x, training.batch_size), torch.split(y, training.batch_size), strict=True)
        # without samples there is one part, and no start
        for ctx.start, part in zip(range(0, len(order), training.batch_size), parts, strict=False):
            batch = Batch(ctx.augment(part[0]), part[1], ctx.mask)
            for plugin in before_step:
                batch = plugin.before_step(ctx, batch)
            if narrows:
                batch = by_batch(batch, ctx.num_columns)
            loss = step(batch)
            samples += len(batch.y)
            if loss is None:
                continue
            losses.append(loss)
            ctx.step += 1
            for plugin in after_step:
                plugin.after_step(ctx)
    ctx.lr = training.lr
    return summary(torch.stack(losses).tolist() if losses else [], samples)


def summary(losses: Sequence[float], samples: int) -> dict[str, float]:
    """Return a local round's metrics: of its steps' losses, perhaps none, and its number of ``samples``."""
    return {
        "loss": math.fsum(losses) / len(losses) if losses else 0.0,
        "loss_first": losses[0] if losses else 0.0,
        "steps": float(len(losses)),
        "samples_trained": float(samples),
    }


def _step(ctx: Context, plugins: Sequence[Plugin], training: LocalTraining, fused: bool) -> Step:
    fits = fused and training.precision == "float32" and is_plain(training)
    chain = chain_of(ctx.model.module) if fits and not needs_gradient(plugins) else None
    if chain is not None:
        how = {"lr": training.lr, "momentum": training.momentum, "weight_decay": training.weight_decay}
        return FusedStep(ctx, chain, **how)
    return _autograd_step(ctx, plugins, training)


def _autograd_step(ctx: Context, plugins: Sequence[Plugin], training: LocalTraining) -> Step:
    losses = [p for p in plugins if overrides(p, "loss")]
    after_backward = [p for p in plugins if overrides(p, "after_backward")]
    objective = owner(plugins, "objective")
    model, params = ctx.model, list[Tensor](ctx.model.trainable)
    move = mover(training, params, ctx)
    gathered = Gathered(ctx, training.accumulate) if training.accumulate > 1 else None

    def loss_of(batch: Batch) -> Tensor:
        out = model(batch.x)
        loss = masked_cross_entropy(out, batch) if objective is None else objective.objective(ctx, batch, out)
        for plugin in losses:
            term = plugin.loss(ctx, batch, out)
            if term is not None:
                loss = loss + term
        return loss

    def step(batch: Batch) -> Tensor | None:
        if training.precision == "float32":
            loss = loss_of(batch)
        else:
            with torch.autocast(ctx.device.type, getattr(torch, training.precision)):
                loss = loss_of(batch)
        grads = list(torch.autograd.grad(loss, params, materialize_grads=True))
        if gathered is not None:
            whole = gathered.add(loss, grads, len(batch.y))
            if whole is None:
                return None
            loss, grads = whole
        for plugin in after_backward:
            plugin.after_backward(ctx, grads)
        move(grads)
        return loss.detach()

    return step
