"""Gradients of single samples, as EWC and MAS need them."""

# N = samples, C = logit columns, P = parameter elements
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fedcl.models.flat import FlatModel

_CHUNK_ELEMENTS = 1 << 24  # of gradients held at once, 64 MiB


def mean_over_samples(
    model: FlatModel, scalar: Callable[..., Tensor], measure: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor
) -> Tensor:
    """Return mean_n measure(d scalar(logits(x_n), others_n) / d theta) (P,); 0 where a parameter is frozen.

    ``scalar`` takes the logits (1, C) of one sample and its entries of ``others`` (N, ...). The model is left in
    evaluation mode.
    """
    model.eval()
    trainable = {name: p.detach() for name, p in model.module.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.module.named_parameters() if not p.requires_grad}

    def of_sample(params: dict[str, Tensor], sample: Tensor, *rest: Tensor) -> Tensor:
        return scalar(functional_call(model.module, {**fixed, **params}, (sample[None],)).logits, *rest)

    gradients = vmap(grad(of_sample), in_dims=(None, *[0] * (1 + len(others))))
    total = torch.zeros(model.num_parameters, dtype=torch.float64, device=model.device)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, model.num_parameters))
    for parts in zip(*(torch.split(tensor, chunk) for tensor in (x, *others)), strict=True):
        grads = gradients(trainable, *parts)
        for view, name in zip(model.views(total), trainable, strict=True):
            view += measure(grads[name]).sum(0)
    return (total / len(x)).float()
