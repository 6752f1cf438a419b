"""How much a model's loss on some samples hangs on each of its parameters: sums over samples, or over batches.

The sum over samples of squared gradients does not depend on how samples are batched, on who holds them or in which
order; the squared gradient of batch means, which published code takes, depends on all three.
"""

# P = parameter elements, N = samples, C = logit columns
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.unlearners.steps import gradients
from fedcl.client.sample_gradients import add_to, summed_over_samples
from fedcl.contracts.fields import MAX_EXAMPLES, Form, TensorField
from fedcl.contracts.unlearner import Local, Samples, UnlearnContext
from fedcl.evaluation.predictions import masked
from fedcl.models.flat import FlatModel

if TYPE_CHECKING:
    from fedcl.contracts.view import Response

Kind = Literal["per_sample", "official"]
Loss = Literal["cross_entropy", "output_norm"]
Order = Literal["class_ordered", "mixed"]
STEP = "importance"  # what clients are asked for
_CHUNK_ELEMENTS = 1 << 22  # of gradients held at once, 16 MiB: more only misses the caches


class Importance(NamedTuple):
    """The sum (P,), float64, of ``terms`` terms: one a sample, or one a batch. Sums of many clients add up."""

    total: Tensor
    terms: int


@dataclass(frozen=True)
class Settings:
    """What importances are of: see :func:`importance` and :func:`arranged`; ``order`` matters to ``official`` alone.

    ``forget_in_whole`` says that the importance on all data counts the forget set.
    """

    kind: Kind = "per_sample"
    loss: Loss = "cross_entropy"
    order: Order = "class_ordered"
    batch_size: int = 64
    forget_in_whole: bool = True


@dataclass(frozen=True)
class Masses:
    """Importances over all clients, as means over terms (P,), and the numbers of samples behind them.

    ``forget`` is of the forget set, ``whole`` of all data.
    """

    forget: Tensor
    whole: Tensor
    forget_samples: int
    whole_samples: int


def response(ctx: UnlearnContext, settings: Settings) -> Local:
    """Return a client's share of both importances at the model that came: plain sums, to be added over clients."""
    forget, retain = ctx.forget, ctx.retain
    if not len(forget) + len(retain):
        return Local(0, {})
    whole_samples = len(retain) + len(forget) * settings.forget_in_whole
    if settings.kind == "per_sample":
        lost, whole = _of(ctx, forget, settings), _of(ctx, retain, settings)
        if settings.forget_in_whole:
            whole = Importance(whole.total + lost.total, whole.terms + lost.terms)
    else:
        first, every = arranged(forget, retain, settings, ctx.rng("order"))
        lost, whole = _of(ctx, first, settings), _of(ctx, every, settings)
    tensors = {
        "whole": whole.total,
        "terms": torch.tensor([lost.terms, whole.terms], dtype=torch.float64),
        "samples": torch.tensor([len(forget), whole_samples], dtype=torch.float64),
    }
    if len(forget):
        tensors["forget"] = lost.total
    return Local(len(forget) + len(retain), tensors)


_NUMBERS = TensorField((2,), "float64", low=0.0, high=float(MAX_EXAMPLES))
RESPONSE: Form = {  # of `response`; clients without any of the forget set leave out `forget`
    "whole": TensorField(("parameters",), "float64", low=0.0),
    "terms": _NUMBERS,
    "samples": _NUMBERS,
    "forget": TensorField(("parameters",), "float64", low=0.0, group="forget"),
}


def masses(responses: Sequence[Response]) -> Masses | None:
    """Return the importances over all clients that responded; None without any forget set, or any data."""
    forgets = [one.tensors["forget"] for one in responses if "forget" in one.tensors]
    terms = torch.stack([one.tensors["terms"] for one in responses]).sum(0).tolist() if forgets else [0.0, 0.0]
    if not all(terms):
        return None
    samples = torch.stack([one.tensors["samples"] for one in responses]).sum(0).tolist()
    whole = torch.stack([one.tensors["whole"] for one in responses]).sum(0)
    forget = torch.stack(forgets).sum(0)
    return Masses(forget / terms[0], whole / terms[1], int(samples[0]), int(samples[1]))


def importance(
    model: FlatModel, samples: Samples, *, kind: Kind = "per_sample", loss: Loss = "cross_entropy", batch_size: int = 64
) -> Importance:
    """Return how much the loss on ``samples`` hangs on each parameter; 0 where one is frozen.

    With the cross-entropy a term is the squared gradient: the sum over samples, divided by their number, is the
    diagonal of the empirical Fisher information. With ``output_norm``, the squared length of the logits, which needs no
    labels, it is the gradient's absolute value. ``per_sample`` sums over samples; ``official`` over batches of
    ``batch_size``, in the order of ``samples``, with the gradient of the batch's mean. Columns that a sample's mask
    leaves out play no part. The model is left in evaluation mode: no dropout, running statistics.
    """
    if kind == "per_sample":

        def of_one(logits: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
            return _mean_loss(logits, y[None], None if mask is None else mask[None], loss)

        parts = [samples.x, samples.y] if samples.mask is None else [samples.x, samples.y, samples.mask]
        term = functools.partial(_term, loss=loss)
        return Importance(
            summed_over_samples(model, of_one, term, *parts, chunk_elements=_CHUNK_ELEMENTS), len(samples)
        )
    model.eval()
    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    terms = 0
    for batch in samples.batches(batch_size):
        value = _mean_loss(model(batch.x).logits, batch.y, batch.mask, loss)
        add_to(total, model, [_term(g, loss) for g in gradients(model, value)])
        terms += 1
    return Importance(total, terms)


def arranged(
    forget: Samples, retain: Samples, settings: Settings, generator: torch.Generator
) -> tuple[Samples, Samples]:
    """Return (the forget set, all samples) in the order in which batches are made of them.

    ``class_ordered`` sorts by column, the forget set last; ``mixed`` draws both orders from ``generator``.
    """

    def order(samples: Samples) -> Samples:
        if settings.order == "mixed":
            return samples.at(torch.randperm(len(samples), generator=generator).to(samples.y.device))
        return samples.at(torch.argsort(samples.y, stable=True))

    first = order(forget) if len(forget) else forget
    parts = [retain, first] if settings.forget_in_whole else [retain]
    filled = [part for part in parts if len(part)]
    if not filled:
        return first, retain
    if settings.order == "mixed":
        return first, order(Samples.join(filled))
    return first, Samples.join([order(part) for part in filled])


def _of(ctx: UnlearnContext, samples: Samples, settings: Settings) -> Importance:
    return importance(ctx.model, samples, kind=settings.kind, loss=settings.loss, batch_size=settings.batch_size)


def _mean_loss(logits: Tensor, y: Tensor, mask: Tensor | None, loss: Loss) -> Tensor:
    if loss == "output_norm":
        kept = logits if mask is None else logits.masked_fill(~mask, 0.0)
        return kept.square().sum(1).mean()
    return F.cross_entropy(masked(logits, mask), y)


def _term(gradient: Tensor, loss: Loss) -> Tensor:
    return gradient.abs().double() if loss == "output_norm" else gradient.double().square()
