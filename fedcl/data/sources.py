"""Where samples come from: the built-in digits, idx files (MNIST and its kin), and npz archives.

Other kinds of files have modules of their own beside this one. Every source is a function of keyword-only parameters
that returns a :class:`Dataset` held in memory. A relative ``root`` that does not exist here is looked for in the folder
that the environment variable ``FEDCL_DATA`` names.
"""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.data.assembly import assemble, checked_limit, resolve
from fedcl.data.dataset import ArrayDataset, Dataset

_UINT8_CODE = 0x08


def digits(*, root: str | None = None, test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """Load the 1,797 handwritten digits (8x8, values 0..16) that come with scikit-learn; no file is needed.

    Parameters
    ----------
    root
        Must be None; the parameter exists so that all sources are called alike.
    test_fraction
        Share of each class that goes to the test half.
    seed
        Draws the split. It is the source's own, so runs with different seeds share their test half.

    Raises
    ------
    ImportError
        scikit-learn is not installed.
    ValueError
        ``root`` is given, or ``test_fraction`` is outside (0, 1).
    """
    if root is not None:
        raise ValueError(f"data.root={root}: must be null, data=digits is built in; use data=idx or data=npz for files")
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"data.source.test_fraction={test_fraction}: must be in (0, 1)")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data=digits needs scikit-learn: pip install 'fedcl[sim]'") from error
    bunch = load_digits()
    x = np.asarray(bunch.images, np.float32)[:, None]
    y = np.asarray(bunch.target, np.int64)
    test = _stratified(y, test_fraction, np.random.default_rng(seed))
    return Dataset(
        train=ArrayDataset(x[~test], y[~test]),
        test=ArrayDataset(x[test], y[test]),
        classes=tuple(str(name) for name in bunch.target_names),
        scale=1 / 16,
    )


def _stratified(y: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask (N,) that is true for ``fraction`` of each class, rounded."""
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def idx(
    *,
    root: str,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Load the four idx files of MNIST, Fashion-MNIST and their kin, gzipped or not, as uint8 of shape (N, 1, H, W).

    Parameters
    ----------
    root
        Folder with ``{train,t10k}-images-idx3-ubyte[.gz]`` and ``{train,t10k}-labels-idx1-ubyte[.gz]``.
    train_limit, test_limit
        Take only the first so many samples of a half.
    mean, std
        Normalisation on the [0, 1] scale.
    classes
        Class names; None names them 0, 1, ... up to the largest label.

    Raises
    ------
    ValueError
        The folder or a file is missing, is no idx file of bytes, is cut short, or the halves do not fit together.
    """
    folder = resolve(root)
    if not folder.is_dir():
        raise ValueError(f"data.root={root}: must be a folder with idx files")
    halves = []
    for prefix, limit in (("train", train_limit), ("t10k", test_limit)):
        x = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3, limit=limit)
        y = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1, limit=limit)
        halves.append((x[:, None], y.astype(np.int64)))
    return assemble(root, halves, scale=1 / 255, mean=mean, std=std, classes=classes)


def _read_idx(folder: Path, name: str, *, ndim: int, limit: int | None) -> NDArray[np.uint8]:
    """Read one idx file: two zero bytes, type code, number of axes, big-endian int32 lengths, then the data."""
    path = next((folder / file for file in (name, f"{name}.gz") if (folder / file).is_file()), None)
    if path is None:
        raise ValueError(f"data.root={folder}: file {name} or {name}.gz is missing")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4 + 4 * ndim)
            if head[:4] != bytes((0, 0, _UINT8_CODE, ndim)):
                expected = bytes((0, 0, _UINT8_CODE, ndim)).hex()
                raise ValueError(f"data.root={folder}: {path.name} starts with {head[:4].hex()}, must be {expected}")
            shape = [int(n) for n in np.frombuffer(head[4 : 4 + (len(head) - 4) // 4 * 4], ">u4")]
            if len(shape) == ndim:
                shape[0] = shape[0] if limit is None else min(shape[0], checked_limit(limit))
                body = stream.read(prod(shape))
                if len(body) == prod(shape):
                    return np.frombuffer(body, np.uint8).reshape(shape)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"data.root={folder}: {path.name} is damaged: {error}") from error
    raise ValueError(f"data.root={folder}: {path.name} is cut short; its header announces more data")


def npz(
    *,
    root: str,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    classes: Sequence[str] | None = None,
    superclasses: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Load an npz archive with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, optionally, ``classes``.

    Images are (N, H, W, C) or (N, H, W) and become (N, C, H, W); flat features (N, D) stay as they are. uint8 stays
    uint8 and is scaled by 1/255, other numbers become float32 and are not scaled. A further pair of arrays (N,) called
    ``NAME_train`` and ``NAME_test`` is the meta column NAME. Pickled arrays are refused.

    Parameters
    ----------
    root
        The archive.
    train_limit, test_limit, mean, std, classes
        As in :func:`idx`.
    superclasses
        Names of classes by superclass, each class once: gives the meta column ``superclass``.

    Raises
    ------
    ValueError
        The file or an array in it is missing, is no plain array, the arrays do not fit together, or the superclasses do
        not name the classes.
    """
    path = resolve(root)
    if not path.is_file():
        raise ValueError(f"data.root={root}: must be an .npz file")
    try:
        # Opened here because np.load leaves its own file open when the archive is broken.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data.root={root}: not an npz archive of plain arrays: {error}") from error
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise ValueError(f"data.root={root}: the archive lacks {', '.join(missing)}")
    halves, meta = [], []
    columns = [name[:-6] for name in arrays if name.endswith("_train") and f"{name[:-6]}_test" in arrays]
    for half, limit in (("train", train_limit), ("test", test_limit)):
        taken = None if limit is None else checked_limit(limit)
        halves.append((_channels_first(root, arrays[f"x_{half}"][:taken]), arrays[f"y_{half}"][:taken]))
        meta.append({name: arrays[f"{name}_{half}"][:taken] for name in columns if name not in ("x", "y")})
    if classes is None and "classes" in arrays:
        classes = [str(name) for name in arrays["classes"]]
    scale = 1 / 255 if halves[0][0].dtype == np.uint8 else 1.0
    dataset = assemble(root, halves, scale=scale, mean=mean, std=std, classes=classes, meta=meta)
    return dataset if superclasses is None else _with_superclasses(dataset, superclasses)


def _with_superclasses(dataset: Dataset, superclasses: Mapping[str, Sequence[str]]) -> Dataset:
    names = [name for members in superclasses.values() for name in members]
    if sorted(names) != sorted(dataset.classes):
        wrong = sorted(set(names) ^ set(dataset.classes)) or "some twice"
        raise ValueError(f"data.source.superclasses: must name each class once; wrong: {wrong}")
    of_class = {name: group for group, members in superclasses.items() for name in members}
    column = np.array([of_class[name] for name in dataset.classes])
    train, test = (
        replace(half, meta={**half.meta, "superclass": column[half.y]}) for half in (dataset.train, dataset.test)
    )
    return replace(dataset, train=train, test=test)


def _channels_first(root: str, x: NDArray[Any]) -> NDArray[Any]:
    """Return images (N, H, W[, C]) as (N, C, H, W) and flat features as they are, in uint8 or float32."""
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "uif":
        raise ValueError(f"data.root={root}: samples have shape {x.shape} and {x.dtype}; must be (N, H, W, C) numbers")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    if x.ndim == 3:
        x = x[..., None]
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x
