"""What FOT makes of its clients' responses: which layers there are to protect, and which directions of their inputs."""

# D = inputs of a layer, K = rank of its basis, Q = columns of a sketch, M = spectrum's length, N = new directions
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcl.base.linalg import (
    gram_spectrum,
    leading,
    nystrom_spectrum,
    project_out_gram,
    random_signs,
    sketch_spectrum,
)
from fedcl.contracts.view import Response
from fedcl.models.flat import Spec, TensorSpec

KEY = "strategy.projection.server"


@dataclass(frozen=True)
class Found:
    """New directions (D, N) for one layer; ``short`` says that the sketch was too narrow for the share asked for."""

    directions_DN: Tensor
    short: bool = False


def protected(spec: Spec, layers: Sequence[str] | None, project_heads: bool) -> list[TensorSpec]:
    """Return the weights to protect: those named, else every matrix and 2-d kernel that no task head owns.

    Without ``project_heads`` a head that all tasks share is left out too, unless it is named. Raises ``ValueError``
    where a named layer is not learned or cannot be protected, or no layer is named.
    """
    if layers is None:
        found = [t for t in spec if t.kind == "parameter" and t.task is None and _is_weight(t)]
        found = [t for t in found if project_heads or not _shared_head(t)]
    else:
        missing = [name for name in layers if name not in spec]
        if missing:
            raise ValueError(f"{KEY}.layers={list(layers)}: {missing[0]} is no tensor that the model learns")
        found = [spec[name] for name in layers]
    if not found and layers is not None:
        raise ValueError(f"{KEY}.layers={layers}: leaves no weight to protect")
    for tensor in found:
        if not _is_weight(tensor):
            raise ValueError(
                f"{KEY}.layers: {tensor.name} of shape {tensor.shape} is no weight of a linear or 2-d convolution "
                f"layer; name the layers to protect"
            )
    return found


def readable(network: nn.Module, layer: str) -> bool:
    """Whether a client can read what ``layer`` of the network is given: a linear layer, or an ungrouped convolution."""
    module = dict(network.named_modules()).get(layer)
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def unprotected(spec: Spec, weights: Collection[TensorSpec], project_heads: bool) -> list[str]:
    """Return the names of shared matrices and kernels that are not among ``weights``, though nobody left them out."""
    shared = [t for t in spec if t.kind == "parameter" and t.task is None and len(t.shape) >= 2 and not t.norm]
    return [t.name for t in shared if t not in weights and (project_heads or not _shared_head(t))]


def frozen(spec: Spec, *, biases: bool, norms: bool, project_heads: bool) -> list[TensorSpec]:
    """Return what stays as it is once a task has ended: biases, and all that normalisation layers own, if so chosen.

    A task's own head never does, nor does a shared head's bias where its weight is free.
    """
    chosen = []
    for tensor in spec:
        if tensor.task is not None or (_shared_head(tensor) and not project_heads):
            continue
        bias = tensor.kind == "parameter" and not tensor.norm and tensor.name.rpartition(".")[2] == "bias"
        if (tensor.norm and norms) or (bias and biases):
            chosen.append(tensor)
    return chosen


def inputs(weight: TensorSpec) -> int:
    """Return D: what one output of the layer reads, a whole patch for a convolution."""
    return weight.size // weight.shape[0]


def directions_official(sketch_DQ: Tensor, ratio: float, epsilon: float) -> Tensor:
    """Return the directions (D, N) that the published code adds for a sketch of the residual inputs.

    N is the smallest count whose share of the sketch's energy exceeds 1 - (1 - epsilon) / ratio, and at least 1;
    ``ratio`` is the norm of the residual over the norm of the inputs. None for a sketch of zeros.
    """
    if ratio <= 0 or not bool(sketch_DQ.any()):
        return sketch_DQ[:, :0]
    energies, directions = sketch_spectrum(sketch_DQ)
    return directions[:, : leading(energies, 1 - (1 - epsilon) / ratio, strict=True)]


def directions_corrected(
    energies: Tensor, directions_DM: Tensor, outside: float, epsilon: float, *, total: float | None = None
) -> Tensor:
    """Return the directions (D, N) without which less than ``epsilon`` of the inputs' energy would be kept.

    ``energies`` (M,) and ``directions_DM`` are the spectrum of the residual, ``outside`` its share of the inputs'
    energy, ``total`` the residual's energy where the spectrum does not hold all of it. The residual must contribute
    1 - (1 - epsilon) / outside of its own; nothing where outside <= 1 - epsilon.
    """
    if outside <= 1 - epsilon:
        return directions_DM[:, :0]
    return directions_DM[:, : leading(energies, 1 - (1 - epsilon) / outside, total=total)]


def from_official(responses: Sequence[Response], layer: str, epsilon: float, device: torch.device) -> Found:
    """Return what the published code makes of sketches: ratios of norms, averaged over clients by samples."""
    total = sum(response.num_examples for response in responses)
    ratio = sum(
        response.num_examples / total * _ratio(_scalar(response, layer, "residual"), _scalar(response, layer, "energy"))
        for response in responses
    )
    return Found(directions_official(_summed(responses, f"{layer}/sketch").to(device), ratio, epsilon))


def from_sketches(responses: Sequence[Response], layer: str, epsilon: float, device: torch.device) -> Found:
    """Return the principal directions of sketches with private random matrices."""
    energies, directions = sketch_spectrum(_summed(responses, f"{layer}/sketch").to(device))
    return Found(directions_corrected(energies, directions, _outside(responses, layer), epsilon))


def from_grams(
    responses: Sequence[Response], layer: str, epsilon: float, device: torch.device, basis_DK: Tensor
) -> Found:
    """Return the principal directions of what the Gram matrices hold outside the basis: exact."""
    gram_DD = _summed(responses, f"{layer}/gram").to(device)
    residual_DD = project_out_gram(gram_DD, basis_DK.to(device))
    energy = float(gram_DD.trace())
    energies, directions = gram_spectrum(residual_DD)
    outside = float(residual_DD.trace()) / energy if energy > 0 else 0.0
    return Found(directions_corrected(energies, directions, outside, epsilon))


def from_ranges(responses: Sequence[Response], layer: str, epsilon: float, device: torch.device, draw: Tensor) -> Found:
    """Return the principal directions of C Omega, the residual's Gram matrix times the signs that ``draw`` names."""
    sketch_DQ, outside = _summed(responses, f"{layer}/range").to(device), _outside(responses, layer)
    if outside <= 1 - epsilon or not bool(sketch_DQ.any()):
        return Found(sketch_DQ[:, :0])
    seed, width = draw.tolist()
    residual = sum(_scalar(response, layer, "residual") for response in responses)
    energies, directions = nystrom_spectrum(sketch_DQ, random_signs(len(sketch_DQ), width, seed).to(sketch_DQ))
    short = float(energies.sum()) < (1 - (1 - epsilon) / outside) * residual and width < len(sketch_DQ)
    return Found(directions_corrected(energies, directions, outside, epsilon, total=residual), short)


def _is_weight(tensor: TensorSpec) -> bool:
    return len(tensor.shape) in (2, 4) and tensor.name.endswith(".weight")


def _shared_head(tensor: TensorSpec) -> bool:
    return tensor.name.startswith("head.")


def _summed(responses: Sequence[Response], name: str) -> Tensor:
    total = torch.zeros(responses[0].tensors[name].shape, dtype=torch.float64)
    for response in responses:
        total += response.tensors[name].double()
    return total


def _scalar(response: Response, layer: str, name: str) -> float:
    return float(response.tensors[f"{layer}/{name}"][0])


def _outside(responses: Sequence[Response], layer: str) -> float:
    """Return the residual's share of the inputs' energy, pooled over clients."""
    energy = sum(_scalar(response, layer, "energy") for response in responses)
    return sum(_scalar(response, layer, "residual") for response in responses) / energy if energy else 0.0


def _ratio(residual: float, energy: float) -> float:
    """Return the ratio of norms, from squared norms."""
    return (residual / energy) ** 0.5 if energy > 0 else 0.0
