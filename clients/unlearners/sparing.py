"""Sums of second moments that clients send, and gradients that spare the directions those who stay use."""

# N = samples, D = inputs of a layer and its bias, F = random features and a constant
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clients.fot import layer_rows
from clients.unlearners.steps import BATCH
from fedcl.client.unlearner import Samples
from fedcl.models.flat import FlatModel
from fedcl.randomness import torch_generator

if TYPE_CHECKING:
    from fedcl.server.contracts import Answer


GRAM = "gram"
Layer = nn.Linear | nn.Conv2d


@functools.lru_cache(maxsize=16)
def upper(size: int) -> Tensor:
    """Return the places of the upper triangle in a flattened matrix of ``size`` rows."""
    rows, columns = torch.triu_indices(size, size)
    places: Tensor = rows * size + columns
    return places


def half(symmetric_DD: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix as a vector: all that need travel."""
    places = upper(len(symmetric_DD)).to(symmetric_DD.device)
    return symmetric_DD.flatten()[places]


def total(answers: Sequence[Answer], key: str) -> Tensor:
    """Return the float64 sum of all clients' tensors ``key``."""
    summed = torch.zeros_like(answers[0].tensors[key], dtype=torch.float64)
    for answer in answers:
        summed += answer.tensors[key]
    return summed


def whole(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix whose :func:`half` is ``triangle``."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix_DD = triangle.new_zeros(size, size)
    matrix_DD.view(-1)[upper(size).to(triangle.device)] = triangle
    return matrix_DD + matrix_DD.triu(1).T


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """Return the linear layers and the 2-d convolutions with one group, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


@functools.lru_cache(maxsize=2)
def _drawn(inputs: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch_generator("random features", seed)
    weight = torch.randn(inputs, features, generator=generator) / inputs**0.5
    return weight, torch.rand(features, generator=generator) * 2 - 1


def random_features(x: Tensor, features: int, seed: int) -> Tensor:
    """Return relu(x W / sqrt(inputs) + b) and a constant 1, (N, F).

    W is normal, b uniform on [-1, 1], both drawn from ``seed``.
    """
    flat = x.reshape(len(x), -1).float()
    weight, bias = _drawn(flat.shape[1], features, seed)
    phi = torch.relu(flat @ weight.to(flat.device) + bias.to(flat.device))
    return torch.cat([phi, phi.new_ones(len(phi), 1)], 1)


@torch.no_grad()
def input_sums(model: FlatModel, samples: Samples) -> dict[str, Tensor]:
    """Return, by layer, the sum over samples (and positions) of the inputs' outer products, a 1 for the bias appended.

    Float32 (D, D); a convolution's inputs are its patches. Layers are in evaluation mode.
    """
    layers, sums = layers_of(model.module), dict[str, Tensor]()

    def reads(name: str, layer: Layer) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = layer_rows(layer, args[0])
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if layer.bias is not None else rows
            # float32 is enough: what spares adds far more to the diagonal than its rounding
            sums[name] = torch.addmm(sums[name], rows.T, rows) if name in sums else rows.T @ rows

        stack.callback(layer.register_forward_pre_hook(hook).remove)

    model.eval()
    with ExitStack() as stack:
        for name, layer in layers.items():
            reads(name, layer)
        for batch in samples.batches(BATCH):
            model(batch.x)
    return sums


def sparing_matrices(answers: Sequence[Answer], epsilon: float) -> dict[str, Tensor]:
    """Return, by layer, M = (A + epsilon tr(A)/D I)^-1 of all clients' sums, scaled to a mean diagonal of 1."""
    matrices = {}
    for key in (key for key in answers[0].tensors if key.startswith(f"{GRAM}/")) if answers else ():
        gram = whole(total(answers, key))
        energy, inverse = gram.diagonal().mean(), torch.eye(len(gram), dtype=gram.dtype)
        if energy > 0:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram / energy + epsilon * inverse))
        matrices[key.removeprefix(f"{GRAM}/")] = (inverse / inverse.diagonal().mean()).float()
    return matrices


@torch.no_grad()
def spare(grads: list[Tensor], sparing: Sequence[tuple[int, int | None, Tensor]]) -> None:
    """Multiply the gradients of each layer's [weight, bias] by its M from the right, in place; zero all others'."""
    touched = set()
    for weight, bias, matrix in sparing:
        rows = grads[weight].flatten(1)
        joint = rows if bias is None else torch.cat([rows, grads[bias][:, None]], 1)
        turned = joint @ matrix
        grads[weight].copy_(turned[:, : rows.shape[1]].view_as(grads[weight]))
        touched.add(weight)
        if bias is not None:
            grads[bias].copy_(turned[:, -1])
            touched.add(bias)
    for place, grad in enumerate(grads):
        if place not in touched:
            grad.zero_()
