"""Sums over samples of something made of each sample's own gradient, such as its square: a diagonal Fisher."""

# P = parameter elements, N = samples, C = logit columns
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fedcl.models.flat import FlatModel

_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


def add_to(total_P: Tensor, model: FlatModel, values: Sequence[Tensor]) -> None:
    """Add a value for each parameter to its place in ``total_P``, in place."""
    for view, value in zip(model.views(total_P), values, strict=True):
        view += value


def summed_over_samples(
    model: FlatModel,
    loss: Callable[..., Tensor],
    term: Callable[[Tensor], Tensor],
    *samples: Tensor,
    chunk_elements: int,
) -> Tensor:
    """Return the float64 sum (P,) over samples of ``term(gradient)``.

    The model is left in evaluation mode: no dropout, running statistics.

    Parameters
    ----------
    loss
        Function of one sample's logits (1, C) and of its rows of ``samples`` but the first.
    term
        What is summed, element by element, of gradients (N, ...).
    samples
        Inputs (N, ...), then whatever ``loss`` needs by sample (N, ...).
    chunk_elements
        Gradient elements held at once. Float32 terms are summed in float32 within a chunk.
    """
    model.eval()
    names = [tensor.name for tensor in model.parameter_specs]
    weights = {name: p.detach() for name, p in zip(names, model.trainable, strict=True)}

    def of_one(params: dict[str, Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        output: Any = functional_call(model.module, params, (x[None],))
        return loss(output.logits, *rest)

    gradients = vmap(grad(of_one), in_dims=(None, *[0] * len(samples)))
    total_P = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    step = max(1, chunk_elements // max(1, model.num_parameters))
    for start in range(0, len(samples[0]), step):
        found = gradients(weights, *(part[start : start + step] for part in samples))
        add_to(total_P, model, [term(found[name]).sum(0) for name in names])
    return total_P


def mean_over_samples(
    model: FlatModel, loss: Callable[..., Tensor], term: Callable[[Tensor], Tensor], *samples: Tensor
) -> Tensor:
    """Return the float32 mean (P,) over samples of ``term(gradient)``, as :func:`summed_over_samples` adds them up."""
    total_P = summed_over_samples(model, loss, term, *samples, chunk_elements=_CHUNK_ELEMENTS)
    return (total_P / len(samples[0])).float()
