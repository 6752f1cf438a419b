"""What domain-incremental tasks do to a sample: permute its positions, or rotate it."""

# N = samples, C = channels, H, W = height, width, D = flat features
from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def apply_transform(x: Tensor, transform: Mapping[str, Any] | None) -> Tensor:
    """Return float32 samples ``x`` as a task shows them; same shape.

    Parameters
    ----------
    x
        (N, C, H, W), or (N, D).
    transform
        ``{"name": "permute", "seed": s}``: one permutation of the H * W positions (of D), the same for all samples and
        channels. ``{"name": "rotate", "degrees": d}``: counter-clockwise about the centre, bilinear, zero outside.
        None: ``x`` itself.

    Raises
    ------
    ValueError
        The transform has another name, or flat features are to be rotated.
    """
    if transform is None:
        return x
    if transform["name"] == "permute":
        order = torch.from_numpy(
            _permutation(int(transform["seed"]), math.prod(x.shape[2:]) if x.ndim > 2 else x.shape[1])
        )
        flat = x.flatten(2) if x.ndim > 2 else x
        return flat.index_select(-1, order.to(x.device)).view(x.shape)
    if transform["name"] == "rotate":
        return _rotate(x, float(transform["degrees"]))
    raise ValueError(f"transform {transform['name']}: must be permute or rotate")


@lru_cache(maxsize=256)
def _permutation(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(length)


def _rotate(x: Tensor, degrees: float) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"rotate needs samples of shape (N, C, H, W), not {tuple(x.shape)}")
    if degrees == 0.0 or len(x) == 0:
        return x
    samples, channels, height, width = x.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Coordinates run over [-1, 1] along both axes whatever their lengths, hence the ratios.
    theta = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    grid = functional.affine_grid(
        torch.tensor([theta], dtype=x.dtype, device=x.device), [1, 1, height, width], align_corners=False
    )
    # One grid serves all samples when they lie along the channel axis.
    stacked = x.reshape(1, samples * channels, height, width)
    return functional.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False).view(
        x.shape
    )
