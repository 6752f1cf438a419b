"""The local training loop: plain SGD around bound hooks.

One resident model, gradients by ``autograd.grad`` and foreach updates on the views of its flat vector: no data loader,
no optimizer object, no copy of the model. A hook that no plugin overrides costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.client.plugin import Batch, Context, Plugin, overrides
from fedcl.models.networks import Output


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains: ``client.*`` of the configuration.

    SGD with heavy-ball momentum as in PyTorch (v <- momentum v + g; w <- w - lr v), velocity zero at the start of each
    visit; ``weight_decay`` adds weight_decay * w to every gradient.
    """

    epochs: int = 1
    batch_size: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0


def ordered(plugins: Sequence[Plugin]) -> list[Plugin]:
    """Return plugins by phase, stable within a phase."""
    return sorted(plugins, key=lambda plugin: plugin.phase)


def owner(plugins: Sequence[Plugin], hook: str) -> Plugin | None:
    """Return the one plugin that owns an exclusive hook.

    Raises
    ------
    ValueError
        If two plugins claim it, naming both.
    """
    claims = [plugin for plugin in plugins if overrides(plugin, hook)]
    if len(claims) > 1:
        names = " and ".join(type(plugin).__name__ for plugin in claims)
        raise ValueError(f"learner: {names} both own {hook!r}: choose one of them")
    return claims[0] if claims else None


def masked_cross_entropy(out: Output, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the allowed columns."""
    logits = out.logits
    if batch.mask is not None:
        logits = logits.masked_fill(~batch.mask, float("-inf"))
    return F.cross_entropy(logits, batch.y)


def fit(ctx: Context, plugins: Sequence[Plugin], training: LocalTraining) -> dict[str, float]:
    """Train ``ctx.model`` on ``ctx.data``; return mean ``loss``, ``loss_first``, ``steps`` and ``samples_trained``."""
    before_step = [p for p in plugins if overrides(p, "before_step")]
    losses = [p for p in plugins if overrides(p, "loss")]
    after_backward = [p for p in plugins if overrides(p, "after_backward")]
    after_step = [p for p in plugins if overrides(p, "after_step")]
    sampler, objective = owner(plugins, "indices"), owner(plugins, "objective")
    model, data = ctx.model, ctx.data
    params: list[Tensor] = list(model.trainable)
    velocity: list[Tensor] | None = None
    first: Tensor | None = None
    samples = 0
    total = torch.zeros((), device=ctx.device)
    batches = ctx.rng("batches")
    model.train()
    for ctx.epoch in range(training.epochs):
        order = torch.randperm(len(data), generator=batches)
        order = (order if sampler is None else sampler.indices(ctx, order)).to(ctx.device)
        x, y, ctx.order = data.x[order], data.y[order], order
        parts = zip(torch.split(x, training.batch_size), torch.split(y, training.batch_size), strict=True)
        for ctx.start, part in zip(range(0, len(order), training.batch_size), parts, strict=False):  # none is one part
            batch = Batch(*part, ctx.mask)
            for plugin in before_step:
                batch = plugin.before_step(ctx, batch)
            out = model(batch.x)
            loss = masked_cross_entropy(out, batch) if objective is None else objective.objective(ctx, batch, out)
            for plugin in losses:
                term = plugin.loss(ctx, batch, out)
                if term is not None:
                    loss = loss + term
            found = torch.autograd.grad(loss, params, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
            for plugin in after_backward:
                plugin.after_backward(ctx, grads)
            velocity = sgd_step(params, grads, velocity, training)
            ctx.step += 1
            samples += len(batch.y)
            detached = loss.detach()
            first = detached if first is None else first
            total += detached
            for plugin in after_step:
                plugin.after_step(ctx)
    steps = max(ctx.step, 1)
    return {
        "loss": float(total) / steps,
        "loss_first": float(first) if first is not None else 0.0,
        "steps": float(ctx.step),
        "samples_trained": float(samples),
    }


@torch.no_grad()
def sgd_step(
    params: list[Tensor], grads: list[Tensor], velocity: list[Tensor] | None, training: LocalTraining
) -> list[Tensor] | None:
    """Move ``params`` in place by one step of SGD and return the velocity."""
    if training.weight_decay:
        torch._foreach_add_(grads, params, alpha=training.weight_decay)
    if training.momentum:
        if velocity is None:
            velocity = grads
        else:
            torch._foreach_mul_(velocity, training.momentum)
            torch._foreach_add_(velocity, grads)
        grads = velocity
    torch._foreach_add_(params, grads, alpha=-training.lr)
    return velocity


@torch.no_grad()
def accuracy(ctx: Context, plugins: Sequence[Plugin], x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Return the share of samples whose highest allowed column is their target."""
    predictor = owner(plugins, "predict")
    ctx.model.eval()
    correct = 0
    for start in range(0, len(y), batch_size):
        part = x[start : start + batch_size]
        logits = ctx.model(part).logits if predictor is None else predictor.predict(ctx, part)
        if ctx.mask is not None:
            logits = logits.masked_fill(~ctx.mask, float("-inf"))
        correct += int((logits.argmax(1) == y[start : start + batch_size]).sum())
    return correct / len(y)
