"""What domain-incremental tasks do to a sample: permute its positions, rotate, recolour or corrupt it.

A transform is a record with a ``name`` and parameters. What becomes of a sample depends on the record and on the sample
alone, bit for bit, so that samples may be transformed in any company: noise is a function of the image itself and of a
seed, sums run over a sample's own elements in one order, and no exponential or sine of a pixel is taken (vectorised and
scalar versions of these differ).
"""

# N = samples, C = channels, H, W = height, width, D = flat features
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CORRUPTIONS = ("noise", "blur", "contrast", "pixelate")
_INT64 = 1 << 64
_EVENS = 0x0000FFFF0000FFFF  # two of a number's four parts of 16 bits
_ROWS = 32  # samples at a time where there is much to do: what lies between stays in the cache


def apply_transform(x: Tensor, transform: Mapping[str, Any] | None) -> Tensor:
    """Return float32 samples ``x`` as a task shows them; same shape.

    Parameters
    ----------
    x
        (N, C, H, W), or (N, D).
    transform
        None: ``x`` itself. Else a record, of one of these; only ``permute`` takes (N, D). r is an image's largest value
        minus its smallest.

        - ``{"name": "permute", "seed": s}``: one permutation of the H * W positions (of D), the same for all
          samples and channels.
        - ``{"name": "rotate", "degrees": d}``: counter-clockwise about the centre, bilinear, zero outside.
        - ``{"name": "hue", "degrees": d}``: three channels turned about the axis on which they are equal.
        - ``{"name": "tone", "contrast": a, "brightness": b}``: a x + b.
        - ``{"name": "noise", "severity": s, "seed": k}``: x + 0.08 s r z with z of unit variance (the sum of four
          uniform numbers), within the image's own range; the same image always has the same noise.
        - ``{"name": "blur", "severity": s}``: s times the binomial filter (1, 2, 1) / 4 along both axes.
        - ``{"name": "contrast", "severity": s}``: drawn towards the middle of its range by 0.16 s of the distance.
        - ``{"name": "pixelate", "severity": s}``: 1 - 0.15 s of the rows and columns, rounded up, each the wider.

    Raises
    ------
    ValueError
        The transform has another name, or the samples have not the shape it needs.
    """
    if transform is None:
        return x
    params = {key: value for key, value in transform.items() if key != "name"}
    name = str(transform["name"])
    if name not in _TRANSFORMS:
        raise ValueError(f"transform {name}: must be one of {', '.join(_TRANSFORMS)}")
    if name != "permute" and x.ndim != 4:
        raise ValueError(f"{name} needs samples of shape (N, C, H, W), not {tuple(x.shape)}")
    return _TRANSFORMS[name](x, **params) if len(x) else x


def _permute(x: Tensor, *, seed: int) -> Tensor:
    order = torch.from_numpy(_permutation(int(seed), math.prod(x.shape[2:]) if x.ndim > 2 else x.shape[1]))
    flat = x.flatten(2) if x.ndim > 2 else x
    return flat.index_select(-1, order.to(x.device)).view(x.shape)


@lru_cache(maxsize=256)
def _permutation(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(length)


def _rotate(x: Tensor, *, degrees: float) -> Tensor:
    if degrees == 0.0:
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


def _hue(x: Tensor, *, degrees: float) -> Tensor:
    """Turn the three channels about the grey axis (Rodrigues' formula with the axis (1, 1, 1) / sqrt 3)."""
    if x.shape[1] != 3:
        raise ValueError(f"hue needs samples with three channels, not of shape {tuple(x.shape)}")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    own, left, right = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / math.sqrt(3), (1 - cos) / 3 + sin / math.sqrt(3)
    r, g, b = x.unbind(1)
    # a product of matrices would add up in an order that depends on how many samples there are
    turned = [own * r + left * g + right * b, right * r + own * g + left * b, left * r + right * g + own * b]
    return torch.stack(turned, 1)


def _tone(x: Tensor, *, contrast: float, brightness: float) -> Tensor:
    return x * contrast + brightness


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each image, (N, 1, 1, 1): free of rounding, unlike mean and variance."""
    return x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)


def _noise(x: Tensor, *, severity: int, seed: int) -> Tensor:
    noise = torch.cat([_noise_of(rows, seed) for rows in _blocks(x)])
    low, high = _range(x)
    return torch.clamp(x + 0.08 * severity * (high - low) * noise, low, high)


def _noise_of(x: Tensor, seed: int) -> Tensor:
    """Return noise of mean 0 and variance 1, shape of ``x``, that follows from each sample and ``seed`` alone.

    An image's bits are hashed to one integer (sums of integers wrap around, so their order does not matter), and that
    integer and the position to four numbers of 16 bits each.
    """
    bits = x.contiguous().view(torch.int32).flatten(1).long()
    keys = torch.from_numpy(_keys(int(seed), bits.shape[1])).to(x.device)
    image = _mix((bits * keys).sum(1, keepdim=True))
    mixed = _mix(image + keys)
    pairs = (mixed & _EVENS) + ((mixed >> 16) & _EVENS)
    total = (pairs & 0xFFFFFFFF) + (pairs >> 32)
    return ((total.to(torch.float32) / 65536.0 - 2.0) * math.sqrt(3.0)).view(x.shape)


@lru_cache(maxsize=64)
def _keys(seed: int, length: int) -> NDArray[np.int64]:
    """Return odd numbers, so that multiplying by one loses nothing."""
    return np.random.default_rng(seed).integers(-(1 << 63), 1 << 63, length, dtype=np.int64) | 1


def _mix(z: Tensor) -> Tensor:
    """Scramble integers: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * (factor - _INT64)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # without the sign that >> fills in


def _blocks(x: Tensor) -> list[Tensor]:
    return [x[start : start + _ROWS] for start in range(0, len(x), _ROWS)]


def _blur(x: Tensor, *, severity: int) -> Tensor:
    return torch.cat([_blurred(rows, severity) for rows in _blocks(x)])


def _blurred(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        for axis in (2, 3):
            padding = (1, 1, 0, 0) if axis == 3 else (0, 0, 1, 1)
            padded, length = functional.pad(x, padding, mode="replicate"), x.shape[axis]
            before, here, after = (padded.narrow(axis, start, length) for start in range(3))
            x = (before + here + here + after) * 0.25
    return x


def _contrast(x: Tensor, *, severity: int) -> Tensor:
    low, high = _range(x)
    middle = (low + high) * 0.5
    return middle + (x - middle) * (1 - 0.16 * severity)


def _pixelate(x: Tensor, *, severity: int) -> Tensor:
    for axis in (2, 3):
        length = x.shape[axis]
        cells = -(-length * (20 - 3 * severity) // 20)
        cell = torch.arange(length, device=x.device) * cells // length
        x = x.index_select(axis, (2 * cell + 1) * length // (2 * cells))  # what lies in the middle of the cell
    return x


_TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "permute": _permute,
    "rotate": _rotate,
    "hue": _hue,
    "tone": _tone,
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "pixelate": _pixelate,
}
