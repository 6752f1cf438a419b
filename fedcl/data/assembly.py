"""What sources share: finding files, checking that everything fits together, and decoding images."""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.data.dataset import ArrayDataset, Dataset, Meta

Half = tuple[NDArray[Any], NDArray[Any]]  # samples and labels
Size = int | Sequence[int] | None
_GREY = ("1", "L", "LA")
_EIGHT_BIT = (*_GREY, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def resolve(root: str | None) -> Path:
    """Return the path that ``data.root`` means, here or in the folder that ``FEDCL_DATA`` names.

    Raises
    ------
    ValueError
        It does not exist.
    """
    if root is None:
        raise ValueError("data.root=null: must name the folder or file that holds the data")
    path = Path(root).expanduser()
    shared = os.environ.get("FEDCL_DATA")
    if not path.exists() and shared and not path.is_absolute():
        path = Path(shared).expanduser() / path
    if not path.exists():
        tried = f"neither here nor in FEDCL_DATA={shared}" if shared else "and FEDCL_DATA is not set"
        raise ValueError(f"data.root={root}: does not exist, {tried}")
    return path


def checked_limit(limit: int) -> int:
    """Return ``limit``; ValueError unless it is at least 1."""
    if limit < 1:
        raise ValueError(f"data.source: a limit of {limit} samples must be null or >= 1")
    return limit


def assemble(
    root: str,
    halves: Sequence[Half],
    *,
    scale: float,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None,
    meta: Sequence[Meta] = ({}, {}),
) -> Dataset:
    """Check that samples, labels, columns, class names and normalisation fit together, and build the data set.

    Raises
    ------
    ValueError
        Something does not fit.
    """
    for (x, y), columns in zip(halves, meta, strict=True):
        if y.ndim != 1 or y.dtype.kind not in "ui" or len(x) != len(y):
            raise ValueError(f"data.root={root}: {len(x)} samples with labels of shape {y.shape} and {y.dtype}")
        for name, column in columns.items():
            if column.shape != y.shape:
                raise ValueError(f"data.root={root}: {len(x)} samples with a column {name} of shape {column.shape}")
    (x_train, y_train), (x_test, y_test) = halves
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ValueError(f"data.root={root}: train and test samples differ in shape or type")
    labels = np.concatenate([y_train, y_test]).astype(np.int64)
    names = [str(k) for k in range(int(labels.max(initial=-1)) + 1)] if classes is None else classes
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(
            f"data.root={root}: labels {labels.min()}..{labels.max()} do not fit the {len(names)} data.source.classes"
        )
    channels = x_train.shape[1]
    for key, value in (("mean", mean), ("std", std)):
        if len(value) not in (1, channels) or (key == "std" and min(value) <= 0):
            raise ValueError(f"data.source.{key}={list(value)}: must have 1 or {channels} entries, and std be > 0")
    return Dataset(
        train=ArrayDataset(x_train, y_train.astype(np.int64), dict(meta[0])),
        test=ArrayDataset(x_test, y_test.astype(np.int64), dict(meta[1])),
        classes=tuple(str(name) for name in names),
        scale=scale,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
    )


def stack_images(images: Iterable[tuple[str, Any]], *, root: str, size: Size, grey: bool | None) -> NDArray[np.uint8]:
    """Return Pillow images as one array (N, C, H, W).

    Parameters
    ----------
    images
        Pairs of a name, for messages, and a ``PIL.Image.Image``.
    root
        The configured ``data.root``, for messages.
    size
        Side or (height, width) to which images are resized, bilinearly; None leaves them as they are.
    grey
        Whether images have one channel or three; None takes one if the first image has one.

    Raises
    ------
    ValueError
        There is no image, one has more than 8 bits a channel, or their sizes differ.
    """
    shape = _height_width(size)
    arrays: list[NDArray[np.uint8]] = []
    for name, image in images:
        if image.mode not in _EIGHT_BIT:
            raise ValueError(f"data.root={root}: {name} has mode {image.mode}; images must have 8 bits a channel")
        grey = image.mode in _GREY if grey is None else grey
        image = image.convert("L" if grey else "RGB")
        if shape is not None:
            image = image.resize((shape[1], shape[0]), resample=2)  # Pillow's bilinear
        array = np.asarray(image, np.uint8)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if arrays and array.shape != arrays[0].shape:
            raise ValueError(
                f"data.root={root}: {name} is {array.shape[1]}x{array.shape[2]}, others are {arrays[0].shape[1]}x"
                f"{arrays[0].shape[2]}; set data.source.size"
            )
        arrays.append(array)
    if not arrays:
        raise ValueError(f"data.root={root}: holds no image")
    return np.stack(arrays)


def _height_width(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"data.source.size={size}: must be null, a side, or [height, width], in pixels")
    return pair[0], pair[1]
