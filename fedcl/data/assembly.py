"""What sources share: finding files, checking that everything fits together, splitting, and decoding images."""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import ArrayDataset, Dataset, Meta
from fedcl.data.labels import Codes, encode
from fedcl.data.reading import require_room

Half = tuple[NDArray[Any], NDArray[Any]]  # samples and labels
Size = int | Sequence[int] | None
_GREY = ("1", "L", "LA")
_EIGHT_BIT = (*_GREY, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
MOST_PIXELS = 1 << 26  # of one image, 8192 x 8192


def resolve(root: str | None) -> Path:
    """Return the path that ``data.root`` means, here or in the folder that ``FEDCL_DATA`` names.

    Raises
    ------
    ValueError
        It does not exist.
    """
    if root is None:
        raise ValueError("data.root=null: must name the folder or file that holds the data")
    shared = os.environ.get("FEDCL_DATA")
    try:
        path = Path(root).expanduser()
        if not path.exists() and shared and not path.is_absolute():
            path = Path(shared).expanduser() / path
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, no home, a zero byte
        raise ConfigError(f"data.root={root!r}: cannot be a path here: {error}") from error
    if not there:
        tried = f"neither here nor in FEDCL_DATA={shared}" if shared else "and FEDCL_DATA is not set"
        raise ValueError(f"data.root={root}: does not exist, {tried}")
    return path


def stratified(y: Codes, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask (N,) that is true for ``fraction`` of each class, rounded, for one sample and all but one at least.

    A class with a single sample has none in the mask.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        chosen[members[: min(max(round(fraction * len(members)), 1), len(members) - 1)]] = True
    return chosen


def assemble(
    root: str,
    halves: Sequence[Half],
    *,
    scale: float,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None,
    meta: Sequence[Meta] = ({}, {}),
    notes: Sequence[str] = (),
    vocabulary: bool = False,
) -> Dataset:
    """Check that samples, labels, columns, class names and normalisation fit together, and build the data set.

    Samples are uint8 or float32 in their final layout; labels as :func:`fedcl.data.labels.encode` takes them.

    Raises
    ------
    ValueError
        Something does not fit.
    """
    for (x, y), columns in zip(halves, meta, strict=True):
        if np.ndim(y) not in (1, 2) or len(x) != len(y):
            raise ConfigError(f"data.root={root}: {len(x)} samples with labels of shape {y.shape} and {y.dtype}")
        for name, column in columns.items():
            if column.shape != (len(y),) or column.dtype.kind not in "biufUS":
                raise ConfigError(
                    f"data.root={root}: {len(x)} samples with a column {name} of shape {column.shape} and "
                    f"{column.dtype}"
                )
    (x_train, y_train), (x_test, y_test) = halves
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ConfigError(f"data.root={root}: train and test samples differ in shape or type")
    codes, names, more = encode(root, (y_train, y_test), classes, vocabulary=vocabulary)
    _check_normalisation(scale, mean, std, x_train.shape[1])
    return Dataset(
        train=ArrayDataset(x_train, codes[0], dict(meta[0])),
        test=ArrayDataset(x_test, codes[1], dict(meta[1])),
        classes=names,
        scale=scale,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        notes=(*notes, *more),
        vocabulary=vocabulary,
    )


def _check_normalisation(scale: float, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    for key, value in (("mean", mean), ("std", std)):
        if len(value) not in (1, channels) or (key == "std" and min(value) <= 0):
            raise ConfigError(f"data.source.{key}={list(value)}: must have 1 or {channels} entries, and std be > 0")
    if scale == 1 / 255 and not 0 <= min(mean) <= max(mean) <= 1:
        raise ConfigError(
            f"data.source.mean={list(mean)}: must be in [0, 1], as samples are once they are scaled by 1/255"
        )


def check_halves(dataset: Dataset, root: object, *, train: bool = True, limited: bool = False) -> list[str]:
    """Return notes on a data set that a run trains and tests on.

    Parameters
    ----------
    dataset
        The data set.
    root
        The configured ``data.root``, for messages.
    train
        Whether its train half is used.
    limited
        Whether a limit has cut its halves, so that a class may lack in one.

    Raises
    ------
    ConfigError
        A half has no samples, or a class has none in one half, and no limit is the reason.
    """
    notes = []
    for what, half in (("train", dataset.train), ("test", dataset.test)):
        if what == "train" and not train:
            continue
        if not len(half):
            raise ConfigError(f"data.root={root}: the {what} half has no samples; must have some of each class")
        counts = np.bincount(half.y, minlength=dataset.num_classes)
        lacking = [] if dataset.vocabulary else [dataset.classes[k] for k in np.flatnonzero(counts == 0)]
        if not lacking:
            continue
        shown = ", ".join(lacking[:10]) + (f", ... ({len(lacking)} in all)" if len(lacking) > 10 else "")
        line = f"the {what} half has no samples of the classes {shown}"
        if not limited:
            raise ConfigError(f"data.root={root}: {line}; each class must have some in both halves")
        notes.append(f"{line}, within data.source.train_limit and data.source.test_limit")
    return notes


def stack_images(
    images: Iterable[tuple[str, Any]], count: int, *, root: str, size: Size, grey: bool | None
) -> NDArray[np.uint8]:
    """Return ``count`` Pillow images as one array (N, C, H, W).

    Parameters
    ----------
    images
        Pairs of a name, for messages, and a ``PIL.Image.Image``.
    count
        How many there are: the first one tells how much memory all of them take.
    root
        The configured ``data.root``, for messages.
    size
        Side or (height, width) to which images are resized, bilinearly; None leaves them as they are.
    grey
        Whether images have one channel or three; None takes one if the first image has one.

    Raises
    ------
    ValueError
        There is no image, one has more than 8 bits a channel, their sizes differ, or there are too many for the memory.
    """
    shape = _height_width(size)
    stacked: NDArray[np.uint8] | None = None
    for i, (name, image) in enumerate(images):
        if image.mode not in _EIGHT_BIT:
            raise ValueError(f"data.root={root}: {name} has mode {image.mode}; images must have 8 bits a channel")
        grey = image.mode in _GREY if grey is None else grey
        width, height = image.size if shape is None else (shape[1], shape[0])
        if stacked is None:
            require_room(count * height * width * (1 if grey else 3), root, f"{count} images of {height}x{width}")
            stacked = np.empty((count, 1 if grey else 3, height, width), np.uint8)
        if (height, width) != stacked.shape[2:]:
            raise ValueError(
                f"data.root={root}: {name} is {height}x{width}, others are {stacked.shape[2]}x{stacked.shape[3]}; set "
                "data.source.size"
            )
        image = image.convert("L" if grey else "RGB")
        if shape is not None:
            image = image.resize((width, height), resample=2)  # Pillow's bilinear
        array = np.asarray(image, np.uint8)
        stacked[i] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if stacked is None:
        raise ValueError(f"data.root={root}: holds no image")
    return stacked


def _height_width(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1 or pair[0] * pair[1] > MOST_PIXELS:
        raise ValueError(
            f"data.source.size={size}: must be null, a side, or [height, width], in pixels, {MOST_PIXELS} at most"
        )
    return pair[0], pair[1]
