"""Columns of a buffer's samples, by name: compared, grown, and restored to the form that a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.learner import Restore

# M = samples
Rows = dict[str, Tensor]


def among(held: Tensor, given: Tensor) -> Tensor:
    """Return which rows of ``held`` (M, ...) equal, bit for bit, one of ``given`` (K, ...): bool (M,).

    Raises
    ------
    ValueError
        If the two are of different dtypes or shapes.
    """
    if held.dtype != given.dtype or held.shape[1:] != given.shape[1:]:
        raise ValueError(
            f"the samples given are {given.dtype} {tuple(given.shape[1:])}; "
            f"those held are {held.dtype} {tuple(held.shape[1:])}"
        )
    wanted = {row.tobytes() for row in given.cpu().contiguous().numpy()}
    found = [row.tobytes() in wanted for row in held.cpu().contiguous().numpy()]
    return torch.tensor(found, dtype=torch.bool, device=held.device)


def grown(held: Rows, like: Rows, length: int) -> Rows:
    """Return columns like those of ``like`` with room for ``length`` samples, the first of which are ``held``."""
    made = {name: tensor.new_empty((length, *tensor.shape[1:])) for name, tensor in like.items()}
    for name, tensor in held.items():
        made[name][: len(tensor)] = tensor
    return made


def shown(raw: Tensor, task_M: Tensor, transforms: Mapping[str, dict[str, Any]], restore: Restore) -> Tensor:
    """Return raw samples in the form that the model reads, each changed by the transform (by task id) of its task.

    This is computed on the CPU, as for the originals: on other devices divisions and rotations may round differently.
    """
    device, raw, task_M = raw.device, raw.cpu(), task_M.cpu()
    if not transforms:
        return restore(raw, None).to(device)
    made = torch.empty(raw.shape, dtype=torch.float32)
    for task in torch.unique(task_M).tolist():
        chosen = torch.nonzero(task_M == task).squeeze(1)
        made[chosen] = restore(raw[chosen], transforms.get(str(task)))
    return made.to(device)
