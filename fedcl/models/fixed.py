"""What of a network is learned, and what is fixed.

Fixed are parameters that need no gradient (``model.freeze``), the statistics of normalisation layers whose parameters
are all fixed, and buffers that are no state: simplex heads, random features. They are constants: every process builds
them from the configuration, and no message or checkpoint holds them. Their digest says whether two processes agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Learned = tuple[str, Tensor, Literal["parameter", "buffer"]]


def still_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return by name the normalisation layers that have parameters, none of them learned: their statistics stay."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase)
        and any(True for _ in layer.parameters(recurse=False))
        and not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    }


def learned_tensors(module: nn.Module) -> list[Learned]:
    """Return what training may change: parameters with a gradient, then persistent floating-point buffers."""
    persistent, still = module.state_dict().keys(), still_layers(module)
    learned: list[Learned] = [(name, p, "parameter") for name, p in module.named_parameters() if p.requires_grad]
    learned += [
        (name, tensor, "buffer")
        for name, tensor in module.named_buffers()
        if name in persistent and tensor.is_floating_point() and name.rpartition(".")[0] not in still
    ]
    return learned


def every_tensor(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, also buffers that are no state."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def fixed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what is not learned by name, but for batch norm's counter of batches, which its statistics do not use."""
    learned, every = {name for name, _, _ in learned_tensors(module)}, every_tensor(module)
    return {name: t.detach() for name, t in every.items() if name not in learned and not _is_counter(module, name)}


def _is_counter(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    return isinstance(layer, _NormBase) and leaf == "num_batches_tracked" and layer.momentum is not None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes; an empty text for no tensors."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
