"""CIFAR-10 and CIFAR-100 as their authors publish them: folders of Python pickles, read without running any code."""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.data.assembly import Half, assemble, resolve
from fedcl.data.dataset import Dataset
from fedcl.data.reading import damaged, read_bytes

SHAPE = (3, 32, 32)
_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))
# Mean and deviation of the train images on the [0, 1] scale.
_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(
    *,
    root: str,
    labels: str = "fine",
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """Load CIFAR-10 (``data_batch_1..5``, ``test_batch``, ``batches.meta``) or CIFAR-100 (``train``, ``test``).

    Images are uint8 of shape (N, 3, 32, 32). CIFAR-100 has the meta column ``superclass``, the index of its 20 coarse
    labels.

    Parameters
    ----------
    root
        The folder of the "python version", unpacked. Which of the two it is, its files tell.
    labels
        fine or coarse; CIFAR-10 has fine ones only.
    train_limit, test_limit
        Take only the first so many samples of a half.
    mean, std
        Normalisation on the [0, 1] scale; None takes those of the train images.

    Raises
    ------
    ValueError
        A file is missing or damaged, holds anything but numbers and names, or the labels are not there.
    """
    folder = resolve(root)
    hundred = os.path.lexists(folder / "train")
    if labels not in ("fine", "coarse") or (labels == "coarse" and not hundred):
        raise ValueError(f"data.source.labels={labels}: must be fine, or coarse for CIFAR-100")
    key = f"{labels}_labels" if hundred else "labels"
    sources = (("train",), ("test",)) if hundred else (_TEN, ("test_batch",))
    halves: list[Half] = []
    meta: list[dict[str, NDArray[Any]]] = []
    for files, limit in zip(sources, (train_limit, test_limit), strict=True):
        batches = [_read(folder, name) for name in files]
        x = np.concatenate([_images(folder, batch) for batch in batches])[:limit]
        halves.append((x, _labels(folder, batches, key)[:limit]))
        meta.append({"superclass": _labels(folder, batches, "coarse_labels")[:limit]} if hundred else {})
    about = _read(folder, "meta" if hundred else "batches.meta")
    names = about.get(f"{labels}_label_names" if hundred else "label_names")
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise ValueError(f"data.root={folder}: the meta file has no list of label names")
    classes = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names]
    own_mean, own_std = _STATISTICS[100 if hundred else 10]
    return assemble(root, halves, scale=1 / 255, mean=mean or own_mean, std=std or own_std, classes=classes, meta=meta)


def _images(folder: Path, batch: dict[str, Any]) -> NDArray[np.uint8]:
    x = batch.get("data")
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3 * 32 * 32:
        raise ValueError(f"data.root={folder}: data must be uint8 rows of 3072, as CIFAR's are")
    return x.reshape(-1, *SHAPE)


def _labels(folder: Path, batches: Sequence[dict[str, Any]], key: str) -> NDArray[np.int64]:
    lists = [batch.get(key) for batch in batches]
    for labels in lists:
        # lists within lists are refused before they are unfolded: a few bytes of them can say billions
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
            raise ValueError(f"data.root={folder}: a batch has no list of numbers called {key}")
    return np.concatenate([np.array(labels, np.int64) for labels in lists])


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return one pickled dict with text keys."""
    path = folder / name
    if not os.path.lexists(path):
        raise ValueError(f"data.root={folder}: file {name} is missing; must be CIFAR's python version, unpacked")
    data = read_bytes(path, folder)
    with damaged(folder, name, "is damaged, or no CIFAR batch"):
        _check_memo(data)
        tree = PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(tree, dict) or not all(isinstance(key, (bytes, str)) for key in tree):
        raise ValueError(f"data.root={folder}: {name} must hold a dict")
    return {key.decode(errors="replace") if isinstance(key, bytes) else key: value for key, value in tree.items()}


def _check_memo(data: bytes) -> None:
    """Refuse a pickle whose memo has gaps: a place far out would make the unpickler take memory up to there."""
    memoized = 0
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            memoized += 1
            if isinstance(argument, int) and argument > memoized:
                raise pickle.UnpicklingError(f"remembers a value at place {argument}, out of order")


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, text, lists, dicts and numpy arrays; any other name in the file is refused.

    A pickle is a program: whatever callable it names is called. These few build arrays and bytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the callable of a permitted name; UnpicklingError otherwise."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty
        if module == "numpy" and name in ("ndarray", "dtype"):
            return np.ndarray if name == "ndarray" else _dtype
        if module == "_codecs" and name == "encode":
            return _latin_bytes
        raise pickle.UnpicklingError(f"names {module}.{name}, which no array needs")


def _empty(subtype: type, shape: tuple[int, ...], kind: bytes) -> NDArray[Any]:
    """Return the empty array that a pickle goes on to fill."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("names an array that is not numpy's own, or not to be filled")
    return np.ndarray(shape, np.int8)


def _dtype(code: str | bytes, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """Return a number type: Python 2 wrote its code as bytes, and flags as 0 and 1."""
    found = np.dtype(code.decode() if isinstance(code, bytes) else code)
    if found.kind not in "biuf":
        raise pickle.UnpicklingError(f"holds an array of {found}, not of numbers")
    return found


def _latin_bytes(text: str, encoding: str | bytes) -> bytes:
    """Return bytes that Python 3 wrote as text in an old protocol."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encodes bytes as {encoding!r}")
    return text.encode("latin1")
