"""Heads: what turns features into logits. All have their columns' weights as ``weight`` and draw on nothing else."""

# B = batch, F = features, C = columns of one head, K = columns of all heads
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_LINEAR = ("linear", "random", "unit")  # the latter two are linear heads on other features
_FIRST_SCALE = 10.0


class CosineHead(nn.Module):
    """Logits are the cosines between features and the columns' weights, times a scale.

    As in LUCIR (Hou et al., CVPR 2019, eq. 4): with normalised weights, new classes cannot win by larger norms alone.

    Parameters
    ----------
    num_features, columns
        F and C.
    scale
        A fixed positive factor, or None for a learned one that starts at 10.
    """

    def __init__(self, num_features: int, columns: int, scale: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(num_features, columns, bias=False).weight.detach())
        self.fixed = scale
        if scale is None:
            self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to logits (B, C)."""
        cosines = functional.normalize(features, dim=1) @ functional.normalize(self.weight, dim=1).T
        return cosines * (self.scale if self.fixed is None else self.fixed)

    def extra_repr(self) -> str:
        """Return the part of ``repr`` inside the brackets."""
        return f"scale={'learned' if self.fixed is None else self.fixed}"


class SimplexHead(nn.Module):
    """A classifier that is never trained: its columns are vertices of a regular simplex.

    Biondi et al., "Stationary Representations", CVPR 2024: all clients and all tasks share the directions of the
    classes, so classifiers cannot drift apart. The weights are no state: they follow from the number of columns, and
    take no part in the flat vector or in messages.

    Parameters
    ----------
    vertices
        Unit vectors (C, K - 1), some rows of `simplex`.
    scale
        What the inner products are multiplied by.
    """

    weight: Tensor

    def __init__(self, vertices: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", vertices.clone(), persistent=False)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to logits (B, C)."""
        return self.scale * (features @ self.weight.T)


class RandomFeatures(nn.Module):
    """Features that are never trained: relu(z M), with the entries of M drawn once from N(0, 1 / F).

    RanPAC (McDonnell et al., NeurIPS 2023) puts a linear head on them. M is drawn with the initial weights, so it is
    the same in every process of a run, and is no state: it takes no part in the flat vector or in messages.

    Parameters
    ----------
    num_features, width
        F, and how many features come out.
    """

    matrix: Tensor

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(num_features, width) / num_features**0.5, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to (B, width)."""
        return functional.relu(features @ self.matrix)


class UnitFeatures(nn.Module):
    """Features scaled to length 1, those of length 0 left as they are: a linear head on them reads directions alone."""

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to z / |z|, (B, F)."""
        return functional.normalize(features, dim=1)


def simplex(vertices: int) -> Tensor:
    """Return the unit vectors (K, K - 1) of a regular simplex around the origin; cosines of pairs are -1 / (K - 1).

    The first K - 1 are the unit vectors e_i moved by their common centre, the last is (1 - sqrt(K)) / (K - 1) times the
    vector of ones moved likewise; all are then normalised.

    Raises
    ------
    ValueError
        Fewer than two vertices.
    """
    if vertices < 2:
        raise ValueError(f"model.head=simplex: needs at least 2 classes, there are {vertices}")
    size = vertices - 1
    last = torch.full((1, size), (1.0 - vertices**0.5) / size, dtype=torch.float64)
    points = torch.cat([torch.eye(size, dtype=torch.float64), last])
    return functional.normalize(points - points.mean(0), dim=1).float()


def simplex_features(columns: int) -> int:
    """Return how many features a simplex head over ``columns`` columns reads."""
    return max(columns - 1, 1)


def make_heads(num_features: int, heads: Sequence[int], *, kind: str, scale: float | None) -> list[nn.Module]:
    """Return the heads of one network; parameters and errors as in ``Network.attach_heads``."""
    if scale is not None and kind in _LINEAR:
        raise ValueError(f"model.head_scale={scale}: must be null, a {kind} head has no scale")
    if kind in _LINEAR:
        return [nn.Linear(num_features, columns) for columns in heads]
    if kind == "cosine":
        return [CosineHead(num_features, columns, scale) for columns in heads]
    # One simplex for all heads: classes of different tasks are as far apart as those of one.
    vertices = torch.split(simplex(sum(heads)), list(heads))
    return [SimplexHead(rows, 1.0 if scale is None else scale) for rows in vertices]
