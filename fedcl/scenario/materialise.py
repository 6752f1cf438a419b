"""From a task and local labels to samples and targets: pure functions, the same in a simulation and on a device."""

# N = local samples, S = samples of the task
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcl.data.dataset import ArrayDataset, Dataset, Indices
from fedcl.scenario.task import Task
from fedcl.scenario.transforms import apply_transform


class Gathered(NamedTuple):
    """The samples of a task, on the CPU: ``x`` (S, ...) float32 as a model sees them, and their columns ``y`` (S,).

    ``raw`` (S, ...) are the same samples as the data set stores them, ``positions`` (S,) their places there.
    """

    x: Tensor
    y: Tensor
    raw: Tensor
    positions: Indices


def gather(dataset: Dataset, half: ArrayDataset, held: Indices, task: Task) -> Gathered:
    """Gather, normalise and transform the samples of ``task`` among the positions ``held`` of ``half``."""
    held = retained(task, held, half.y)
    chosen = held[materialise(task, half.y[held])]
    raw = torch.from_numpy(half.x[chosen])
    columns = np.ascontiguousarray(targets(task, half.y[chosen]))
    return Gathered(restore(dataset, raw, task.transform), torch.from_numpy(columns), raw, chosen)


def restore(dataset: Dataset, raw: Tensor, transform: dict[str, Any] | None) -> Tensor:
    """Return samples ``raw`` (N, ...) as a model sees them: normalised, transformed, contiguous float32.

    ``raw`` is on the CPU, uint8 or float32 as the data set stores it. What becomes of a sample does not depend on the
    samples beside it.
    """
    return apply_transform(torch.from_numpy(dataset.normalise(raw.numpy())), transform).contiguous()


def materialise(task: Task, y: NDArray[np.int64]) -> Indices:
    """Return the ascending positions (S,) in local labels ``y`` (N,) that belong to ``task``; perhaps none.

    Where a task has a portion (start, stop) of a class, it owns those of the class's n local samples, in their order,
    that lie from start n to stop n, both rounded to the nearest: portions that meet in the very same number share no
    sample and leave none out.
    """
    if task.portions is None:
        return np.flatnonzero(np.isin(y, task.classes)).astype(np.int64)
    chosen = [np.empty(0, np.int64)]
    for label, (start, stop) in zip(task.classes, task.portions, strict=True):
        held = np.flatnonzero(y == label)
        first, end = (int(share * len(held) + 0.5) for share in (start, stop))
        chosen.append(held[first:end])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def retained(task: Task, held: Indices, y: NDArray[np.int64]) -> Indices:
    """Return those of the positions ``held`` (N,) in labels ``y`` that ``task`` does not leave out, in their order."""
    if not task.without_classes and not task.without_samples:
        return held
    left_out = np.isin(y[held], task.without_classes) | np.isin(held, task.without_samples)
    return held[~left_out]


def targets(task: Task, y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the logit column (S,) of each label in ``y`` (S,).

    Raises
    ------
    ValueError
        A label is not a class of ``task``.
    """
    column_of = np.full(max(task.classes, default=-1) + 1, -1, np.int64)
    column_of[list(task.classes)] = task.columns
    foreign = ~np.isin(y, task.classes)
    if foreign.any():
        raise ValueError(f"label {y[foreign][0]} is not a class of task {task.id}, which has {task.classes}")
    return column_of[y]
