"""From the stored form of samples to the form that a model reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcl.data.dataset import Dataset
from fedcl.scenario.transforms import apply_transform


def restore(dataset: Dataset, raw: Tensor, transform: dict[str, Any] | None) -> Tensor:
    """Return samples of ``dataset``, normalised and changed by a task's ``transform``: contiguous float32.

    Parameters
    ----------
    dataset
        Normalises its samples.
    raw
        (N, ...) uint8 or float32, on the CPU, as the data set stores them. Samples do not affect each other.
    transform
        As :func:`fedcl.scenario.transforms.apply_transform` takes it; None for none.
    """
    return apply_transform(torch.from_numpy(dataset.normalise(raw.numpy())), transform).contiguous()
