"""Sums of second moments that clients send, and gradients that spare the directions those who stay use."""

# N = samples (or patches), D = inputs of a layer and its bias, O = its outputs, F = random features and a constant
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clients.strategies.fot import layer_rows
from clients.unlearners.averaging import summed
from clients.unlearners.steps import BATCH
from fedcl.base.linalg import definite
from fedcl.base.randomness import torch_generator
from fedcl.contracts.unlearner import Samples
from fedcl.models.flat import FlatModel

if TYPE_CHECKING:
    from fedcl.contracts.view import Response


GRAM = "gram"
Layer = nn.Linear | nn.Conv2d
_STRIP = 96  # rows of a Gram matrix that are worked out at once: wide enough for a fast product


@functools.lru_cache(maxsize=16)
def upper(size: int) -> Tensor:
    """Return the places of the upper triangle in a flattened matrix of ``size`` rows."""
    rows, columns = torch.triu_indices(size, size)
    places: Tensor = rows * size + columns
    return places


def half(symmetric_DD: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix as a vector: all that need travel, and all that is read."""
    places = upper(len(symmetric_DD)).to(symmetric_DD.device)
    return symmetric_DD.flatten().index_select(0, places)


def add_gram(total_DD: Tensor, rows_ND: Tensor) -> None:
    """Add rows^T rows to ``total_DD`` in place, on and above the diagonal: the half that :func:`half` reads.

    In strips of rows, each from its diagonal on: nearly half of the multiplications, and of the time, of the whole.
    """
    for start in range(0, len(total_DD), _STRIP):
        strip = rows_ND[:, start : start + _STRIP]
        total_DD[start : start + _STRIP, start:].addmm_(strip.T, rows_ND[:, start:])


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
    phi_NF = flat.new_ones(len(flat), features + 1)
    torch.addmm(bias.to(flat.device), flat, weight.to(flat.device), out=phi_NF[:, :features])
    return phi_NF.relu_()


@torch.no_grad()
def input_sums(model: FlatModel, samples: Samples) -> dict[str, Tensor]:
    """Return, by layer, the sum over samples (and positions) of the inputs' outer products, a 1 for the bias appended.

    Float32, the :func:`half` of a matrix (D, D); a convolution's inputs are its patches. Layers are in evaluation mode.
    """
    layers, sums = layers_of(model.module), dict[str, Tensor]()

    def reads(name: str, layer: Layer) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = layer_rows(layer, args[0])
            count, inputs = rows.shape
            if name not in sums:
                width = inputs + (layer.bias is not None)
                sums[name] = rows.new_zeros(width, width)
            # float32 is enough: what spares adds far more to the diagonal than its rounding
            add_gram(sums[name][:inputs, :inputs], rows)
            if layer.bias is not None:
                sums[name][:inputs, inputs] += rows.sum(0)
                sums[name][inputs, inputs] += count

        stack.callback(layer.register_forward_pre_hook(hook).remove)

    model.eval()
    with ExitStack() as stack:
        for name, layer in layers.items():
            reads(name, layer)
        for batch in samples.batches(BATCH):
            model(batch.x)
    return {name: half(gram) for name, gram in sums.items()}


def cholesky(gram_DD: Tensor) -> Tensor:
    """Return the lower triangular factor of a Gram matrix, or of the definite matrix next to what is none."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram_DD)
    return torch.linalg.cholesky(definite(gram_DD)) if int(info) else factor


def sparing_matrices(responses: Sequence[Response], epsilon: float) -> dict[str, Tensor]:
    """Return, by layer, M = (A + epsilon tr(A)/D I)^-1 of all clients' sums, scaled to a mean diagonal of 1."""
    matrices = {}
    for key, triangle in summed(responses).items():
        if not key.startswith(f"{GRAM}/"):
            continue
        gram = whole(triangle)
        energy = gram.diagonal().mean()
        if energy > 0:
            gram.div_(energy).diagonal().add_(epsilon)
            inverse = torch.cholesky_inverse(cholesky(gram))
        else:
            inverse = torch.eye(len(gram), dtype=gram.dtype)
        matrices[key.removeprefix(f"{GRAM}/")] = (inverse / inverse.diagonal().mean()).float()
    return matrices


class Spared:
    """Gradients that spare what the layers read elsewhere: each layer's [weight, bias], times its M from the right.

    With delta the loss's gradient for a layer's outputs and X the rows it read, the gradient is delta^T X: so its
    product with M is (delta^T X) M or delta^T (X M), whichever has fewer rows to multiply. Parameters of no such layer
    have gradient zero.
    """

    def __init__(self, model: FlatModel, matrices: Mapping[str, Tensor]) -> None:
        places = {id(parameter): place for place, parameter in enumerate(model.trainable)}
        self._params = model.trainable
        self._layers = [
            (layer, places[id(layer.weight)], places.get(id(layer.bias)), matrices[name].to(model.device))
            for name, layer in layers_of(model.module).items()
            if id(layer.weight) in places
        ]

    def gradients(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Return the gradients of ``loss()``, which must run the model, for all of its trainable parameters."""
        read: list[tuple[int, Tensor]] = []
        outputs: list[Tensor] = []

        def hook(at: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                read.append((at, args[0].detach()))
                outputs.append(output)
                return output.clone()  # what follows may work in place, and would change what is noted

            return note

        with ExitStack() as stack:
            for at, (layer, *_) in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(hook(at)).remove)
            value = loss()
        grads = [torch.zeros_like(parameter) for parameter in self._params]
        for (at, x), delta in zip(
            read, torch.autograd.grad(value, outputs, materialize_grads=True) if outputs else (), strict=True
        ):
            self._add(grads, at, x, delta)
        return grads

    def _add(self, grads: list[Tensor], at: int, x: Tensor, delta: Tensor) -> None:
        layer, weight, bias, matrix_DD = self._layers[at]
        rows_ND, delta_NO = layer_rows(layer, x), delta
        if isinstance(layer, nn.Conv2d):
            delta_NO = delta.movedim(1, -1)
        delta_NO = delta_NO.reshape(len(rows_ND), -1)
        if layer.bias is not None:
            rows_ND = torch.cat([rows_ND, rows_ND.new_ones(len(rows_ND), 1)], 1)
        if len(rows_ND) <= delta_NO.shape[1]:
            turned_OD = delta_NO.T @ (rows_ND @ matrix_DD)
        else:
            turned_OD = (delta_NO.T @ rows_ND) @ matrix_DD
        inputs = layer.weight[0].numel()
        grads[weight] += turned_OD[:, :inputs].view_as(grads[weight])
        if bias is not None:
            grads[bias] += turned_OD[:, inputs]
