"""Merging rules: pure functions that put a model together from others, for clients and servers alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.models.flat import Spec

# P = length of the flat vector, L = layers


def layer_factors(spec: Spec, shallow: float) -> Tensor:
    """Return LiNeS's factor of each element (P,): ``shallow + (1 - shallow) l / (L - 1)`` in layer l of L.

    Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025. A layer
    is the tensors of one module, layers in the order of their tensors; all heads together are the last. A network of
    one layer keeps its whole change.
    """
    layers: dict[str, int] = {}
    numbers = []
    for tensor in spec:
        module = "head" if tensor.task is not None else tensor.name.rpartition(".")[0]
        numbers.append(layers.setdefault(module, len(layers)))
    last = max(len(layers) - 1, 1)
    factors = torch.ones(spec.size)
    for tensor, number in zip(spec, numbers, strict=True):
        factors[tensor.start : tensor.stop] = shallow + (1.0 - shallow) * number / last if len(layers) > 1 else 1.0
    return factors


def scaled_change(base_P: Tensor, model_P: Tensor, factors_P: Tensor) -> Tensor:
    """Return ``base + factors (model - base)``, (P,)."""
    return base_P + factors_P * (model_P - base_P)
