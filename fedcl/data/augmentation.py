"""Random changes of training images, a whole batch at a time, on the batch's device.

Offsets are drawn on the CPU, so that a device with another generator trains on the same views.
"""

# B = batch, C = channels, H, W = height, width
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation:
    """What changes the samples of a training step: ``data.augment``."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError, naming the configuration key, for samples of a shape that cannot be augmented."""
        if len(shape) != 3:
            raise ValueError(f"data.augment: needs images (C, H, W), samples are {tuple(shape)}; set data/augment=none")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed copies (B, ...) of the samples ``x``; ``generator`` is on the CPU."""
        raise TypeError(f"{type(self).__name__} does not change samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Views(Augmentation):
    """A random crop, then a mirror image, then a cut-out square, with draws of its own for every sample.

    Parameters
    ----------
    padding
        Pixels of zeros added on each side before a crop of the original size is cut out; 0: no crop.
    flip
        Probability that a sample is mirrored left to right.
    cutout
        Side of the square set to zero, in pixels. Its middle is any pixel, so that a part of it may lie outside
        (DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout"); 0: none.
    """

    padding: int = 0
    flip: float = 0.0
    cutout: int = 0

    def check(self, shape: Sequence[int]) -> None:
        """Also refuse a padding or a square that the images are too small for."""
        Augmentation.check(self, shape)
        most = min(shape[1:])
        for key, value, limit in (("padding", self.padding, most - 1), ("cutout", self.cutout, most)):
            if value > limit:
                raise ValueError(f"data.augment.{key}={value}: must be at most {limit} for images of {tuple(shape)}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return views (B, C, H, W) of the images ``x``."""
        count, height, width = len(x), *x.shape[2:]
        if self.padding:
            top, left = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(x.device)
            x = crop(x, top, left, self.padding)
        if self.flip:
            x = mirror(x, (torch.rand(count, generator=generator) < self.flip).to(x.device))
        if self.cutout:
            row = torch.randint(height, (count,), generator=generator).to(x.device)
            x = cut_out(x, row, torch.randint(width, (count,), generator=generator).to(x.device), self.cutout)
        return x


def crop(x: Tensor, top_B: Tensor, left_B: Tensor, padding: int) -> Tensor:
    """Return (B, C, H, W): of ``x`` with ``padding`` zeros on each side, the part that starts at (top, left)."""
    count, channels, height, width = x.shape
    rows = (top_B[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left_B[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    sample = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return F.pad(x, (padding,) * 4)[sample, channel, rows, columns]


def mirror(x: Tensor, which_B: Tensor) -> Tensor:
    """Return ``x`` (B, C, H, W) with the samples that ``which_B`` (bool) names mirrored left to right."""
    return torch.where(which_B[:, None, None, None], x.flip(3), x)


def cut_out(x: Tensor, row_B: Tensor, column_B: Tensor, size: int) -> Tensor:
    """Return ``x`` (B, C, H, W) with a square of ``size`` pixels a side at zero around (row, column) of each sample.

    The square covers the pixels from ``row - size // 2`` up to, not including, ``row - size // 2 + size``.
    """
    down = torch.arange(x.shape[2], device=x.device) - row_B[:, None] + size // 2
    across = torch.arange(x.shape[3], device=x.device) - column_B[:, None] + size // 2
    inside = ((down >= 0) & (down < size))[:, :, None] & ((across >= 0) & (across < size))[:, None, :]
    return x.masked_fill(inside[:, None], 0.0)
