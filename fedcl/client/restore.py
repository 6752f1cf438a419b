"""From the form samples are stored in to the form a model sees them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.data.dataset import Dataset
from fedcl.scenario.transforms import apply_transform


def restore(dataset: Dataset, raw: Tensor, transform: dict[str, Any] | None) -> Tensor:
    """Return samples of ``dataset``, normalised and shown through a task's ``transform``: contiguous float32.

    Parameters
    ----------
    dataset
        Says how its samples are normalised.
    raw
        (N, ...) uint8 or float32, on the CPU, as the data set stores them. What becomes of a sample does not depend on
        which others are there.
    transform
        As :func:`fedcl.scenario.transforms.apply_transform` takes it; None for none.
    """
    return apply_transform(torch.from_numpy(dataset.normalise(raw.numpy())), transform).contiguous()
