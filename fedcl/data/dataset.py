"""The one form in which data reach fedcl: arrays in memory, a train and a test half, and how to normalise them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# N = samples, C = channels, H, W = height, width
Indices = NDArray[np.int64]
Meta = Mapping[str, NDArray[Any]]  # column name -> (N,)


@dataclass(frozen=True, slots=True)
class ArrayDataset:
    """Samples and labels held as two arrays.

    ``x`` is uint8 or float32 of shape (N, C, H, W), or (N, D) for flat features; ``y`` is int64 of shape (N,) with
    labels in ``range(num_classes)``. Text is (N, L) character codes. ``meta`` holds further columns of shape (N,) by
    name, of numbers or of strings: a writer, a speaker, a superclass.
    """

    x: NDArray[np.uint8] | NDArray[np.float32]
    y: NDArray[np.int64]
    meta: Meta = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data source once loaded.

    A sample enters a model as ``(x * scale - mean) / std``, computed in float32; ``mean`` and ``std`` have one entry a
    channel (axis 1) or a single entry. ``notes`` are lines to say once about what was read: what has been left out, or
    taken for something. With ``vocabulary``, classes are the characters of an alphabet, some of which may have no
    sample.
    """

    train: ArrayDataset
    test: ArrayDataset
    classes: tuple[str, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    notes: tuple[str, ...] = ()
    vocabulary: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the sample axis."""
        return tuple(self.train.x.shape[1:])

    def normalise(self, x: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``(x * scale - mean) / std`` as a new float32 array of the same shape."""
        out = x.astype(np.float32)
        if self.scale != 1.0:
            out *= np.float32(self.scale)
        if self.mean != (0.0,) or self.std != (1.0,):
            shape = (1, -1) + (1,) * (out.ndim - 2)
            out -= np.asarray(self.mean, np.float32).reshape(shape)
            out /= np.asarray(self.std, np.float32).reshape(shape)
        return out


@dataclass(frozen=True, slots=True)
class Partition:
    """Which samples each client holds: ``train[k]`` and ``test[k]`` index the two halves of a :class:`Dataset`.

    Train parts of different clients are disjoint unless the partitioner says otherwise in its docstring. The test part
    of a client follows the label distribution of its train part and may overlap with that of others. ``moved`` counts
    the train samples that a repair took from one client and gave to another.
    """

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]
    moved: int = 0
