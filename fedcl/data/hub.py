"""Image sets of the Hugging Face hub, or of a local folder in one of its layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError
from fedcl.data.assembly import Half, Size, assemble, resolve, stack_images
from fedcl.data.dataset import Dataset
from fedcl.data.reading import damaged, require_file

_TEST_NAMES = ("test", "validation", "valid", "val")


def hf(
    *,
    root: str,
    subset: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    size: Size = None,
    grey: bool | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Dataset:
    """Load an image classification set by name, as uint8 of shape (N, C, H, W), all decoded once into memory.

    Numbers and strings beside image and label become meta columns (``coarse_label`` of CIFAR-100, say).

    Parameters
    ----------
    root
        ``owner/name`` on the hub, or a local folder that ``datasets.load_dataset`` reads: parquet files, image folders.
    subset
        The hub's name of a configuration of the set.
    image, label
        Columns; None takes the first whose type is an image, a class label.
    train_split, test_split
        Names of the halves; None takes the first there is of test, validation, valid and val.
    size, grey, mean, std
        As in :func:`fedcl.data.folder.folder`.

    Raises
    ------
    ValueError
        The package ``datasets`` is not installed, the set cannot be reached or has no such split or column, or images
        do not fit together.
    """
    splits = _load(root, subset)
    names = (train_split, test_split or next((name for name in _TEST_NAMES if name in splits), _TEST_NAMES[0]))
    for key, name in zip(("train_split", "test_split"), names, strict=True):
        if name not in splits:
            raise ValueError(f"data.source.{key}={name}: must be one of {root}'s splits: {', '.join(splits)}")
    features = splits[names[0]].features
    image = image or _column(root, "image", features, "Image")
    label = label or _column(root, "label", features, "ClassLabel")
    for key, column in (("image", image), ("label", label)):
        if column not in features:
            raise ValueError(f"data.source.{key}={column}: must be one of {root}'s columns: {', '.join(features)}")
    halves: list[Half] = []
    meta: list[dict[str, NDArray[Any]]] = []
    classes = getattr(features[label], "names", None) or sorted(set(splits[names[0]][label]) - {None})
    for name in names:
        with damaged(root, f"split {name}"):
            x = stack_images(_images(splits[name], image, root), len(splits[name]), root=root, size=size, grey=grey)
            values = list(splits[name][label])
            columns = {key: np.array(list(splits[name][key])) for key in _plain(features, but=(image, label))}
        grey = x.shape[1] == 1
        halves.append((x, _labels(root, values, classes, coded=hasattr(features[label], "names"))))
        meta.append({key: column for key, column in columns.items() if column.dtype.kind in "biufU"})
    return assemble(root, halves, scale=1 / 255, mean=mean, std=std, classes=classes, meta=meta)


def _load(root: str, subset: str | None) -> Any:
    """Return the splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=hf: needs the package datasets: pip install 'fedcl[hf]'; without it use data=folder, data=npz, "
            "data=idx or data=cifar10"
        ) from error
    try:
        place = str(resolve(root))
    except ValueError:
        place = root  # not here, so a name on the hub
    else:
        for path in (Path(place), *Path(place).rglob("*")):
            if not path.is_dir():
                require_file(path, root)
    try:
        return datasets.load_dataset(place, subset)
    except Exception as error:  # the hub, the network and every reader raise what they like
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"data.root={root}: cannot be loaded, here or from the hub ({type(error).__name__}: {reason}); without a "
            "network use files of your own: data=folder, data=npz, data=idx, data=cifar10, or a folder of parquet files"
        ) from error


def _column(root: str, key: str, features: Any, kind: str) -> str:
    """Return the first column of a type."""
    found = next((name for name, feature in features.items() if type(feature).__name__ == kind), None)
    if found is None:
        raise ValueError(
            f"data.source.{key}=null: {root} has no column of type {kind}; name one of {', '.join(features)}"
        )
    return str(found)


def _images(split: Any, column: str, root: str) -> Iterator[tuple[str, Any]]:
    for i, image in enumerate(split[column]):
        if not hasattr(image, "convert"):
            raise ConfigError(f"data.root={root}: sample {i} of column {column} is no image")
        yield f"sample {i}", image


def _labels(root: str, values: Sequence[Any], classes: Sequence[Any], *, coded: bool) -> NDArray[np.int64]:
    """Return labels as codes of ``classes``."""
    if any(value is None for value in values):
        raise ConfigError(f"data.root={root}: sample {list(values).index(None)} has no label")
    if coded:
        return np.array(values, np.int64)
    code = {value: i for i, value in enumerate(classes)}
    unknown = sorted({str(value) for value in values if value not in code})
    if unknown:
        raise ValueError(f"data.root={root}: the test half has labels that the train half lacks: {unknown[:5]}")
    return np.array([code[value] for value in values], np.int64)


def _plain(features: Any, *, but: Sequence[str]) -> list[str]:
    """Return the columns that hold one number or string a sample."""
    kinds = ("Value", "ClassLabel")
    return [name for name, feature in features.items() if type(feature).__name__ in kinds and name not in but]
