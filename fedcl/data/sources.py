"""Where samples come from: the built-in digits, idx files (MNIST and its kin), and npz archives.

Other kinds of files have modules of their own beside this one. Every source is a function of keyword-only parameters
that returns a :class:`Dataset` held in memory. A relative ``root`` that does not exist here is looked for in the folder
that the environment variable ``FEDCL_DATA`` names.
"""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError
from fedcl.data.assembly import assemble, resolve, stratified
from fedcl.data.dataset import ArrayDataset, Dataset
from fedcl.data.labels import encode
from fedcl.data.reading import Archive, opened_archive, read_idx
from fedcl.data.samples import as_samples

_KEYS = ("x_train", "y_train", "x_test", "y_test")


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
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data=digits needs scikit-learn: pip install 'fedcl[sim]'") from error
    bunch = load_digits()
    x = np.asarray(bunch.images, np.float32)[:, None]
    y = np.asarray(bunch.target, np.int64)
    test = stratified(y, test_fraction, seed)
    return Dataset(
        train=ArrayDataset(x[~test], y[~test]),
        test=ArrayDataset(x[test], y[test]),
        classes=tuple(str(name) for name in bunch.target_names),
        scale=1 / 16,
    )


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
        Class names; None names them by their labels. Classes without a sample are left out.

    Raises
    ------
    ValueError
        The folder or a file is missing, is no idx file of bytes, holds less than its header says or more, or the halves
        do not fit together.
    """
    folder = resolve(root)
    if not folder.is_dir():
        raise ValueError(f"data.root={root}: must be a folder with idx files")
    halves = []
    for prefix, limit in (("train", train_limit), ("t10k", test_limit)):
        x = read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3, limit=limit)
        y = read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1, limit=limit)
        halves.append((x[:, None], y.astype(np.int64)))
    return assemble(root, halves, scale=1 / 255, mean=mean, std=std, classes=classes)


def npz(
    *,
    root: str,
    keys: Mapping[str, str] | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    channels: str | None = None,
    scale: float | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    classes: Sequence[str] | None = None,
    superclasses: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Load an npz archive with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, optionally, ``classes``.

    Layouts, types and ranges of samples are those of :func:`fedcl.data.samples.as_samples`, labels those of
    :func:`fedcl.data.labels.encode`. A further pair of arrays (N,) called ``NAME_train`` and ``NAME_test`` is the meta
    column NAME. Pickled arrays are refused.

    Parameters
    ----------
    root
        The archive.
    keys
        Names in the archive of the four arrays that are called otherwise there.
    test_fraction
        Share of each class of the train arrays that becomes the test half, at least one sample; the archive's own test
        arrays are then not read. None takes these.
    seed
        Draws that split. It is the source's own, so runs with different seeds share their test half.
    channels
        ``first`` or ``last`` axis of images (N, H, W, C) or (N, C, H, W); None finds out where it can.
    scale
        What values are multiplied by; None scales those that are pixels by 1/255.
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
    named = _names_of_arrays(keys)
    with opened_archive(resolve(root), root) as archive:
        arrays, columns = _halves(root, archive, named, split=test_fraction is not None)
    if classes is None and "classes" in arrays:
        classes = [str(name) for name in arrays["classes"].ravel().tolist()]
    if test_fraction is not None:
        _split(root, arrays, columns, test_fraction, seed)
    halves = {"train": train_limit, "test": test_limit}
    images = [(named[f"x_{half}"], arrays[f"x_{half}"][:limit]) for half, limit in halves.items()]
    samples = as_samples(root, images, channels=channels, scale=scale)
    labels = [arrays[f"y_{half}"][:limit] for half, limit in halves.items()]
    meta = [{name: arrays[f"{name}_{half}"][:limit] for name in columns} for half, limit in halves.items()]
    dataset = assemble(
        root,
        list(zip(samples.halves, labels, strict=True)),
        scale=samples.scale,
        mean=mean,
        std=std,
        classes=classes,
        meta=meta,
        notes=samples.notes,
    )
    return dataset if superclasses is None else _with_superclasses(dataset, superclasses, classes or dataset.classes)


def _names_of_arrays(keys: Mapping[str, str] | None) -> dict[str, str]:
    given = dict(keys or {})
    if not given.keys() <= set(_KEYS) or not all(isinstance(name, str) for name in given.values()):
        raise ConfigError(f"data.source.keys={given}: must give names of arrays for some of {', '.join(_KEYS)}")
    return {key: given.get(key, key) for key in _KEYS}


def _halves(
    root: str, archive: Archive, named: Mapping[str, str], *, split: bool
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Return the arrays of an archive by what they are, and the names of its columns; without a test half to split."""
    wanted = {key: name for key, name in named.items() if not (split and key.endswith("_test"))}
    missing = [key for key, name in wanted.items() if name not in archive.names]
    if missing:
        raise ConfigError(
            f"data.root={root}: the archive lacks {', '.join(wanted[key] for key in missing)}; it has "
            f"{', '.join(archive.names[:20]) or 'nothing'}; name yours with data.source.keys.{missing[0]}=NAME"
            + ("" if split or "x_test" not in missing else ", or draw a test half with data.source.test_fraction=0.2")
        )
    others = [name for name in archive.names if name not in named.values()]
    columns = [name[:-6] for name in others if name.endswith("_train") and (split or f"{name[:-6]}_test" in others)]
    columns = [name for name in columns if name not in ("x", "y")]
    wanted |= {
        f"{name}_{half}": f"{name}_{half}" for name in columns for half in (("train",) if split else ("train", "test"))
    }
    wanted |= {"classes": "classes"} if "classes" in others else {}
    found = archive.read(set(wanted.values()))
    return {key: found[name] for key, name in wanted.items()}, columns


def _split(root: str, arrays: dict[str, NDArray[Any]], columns: Sequence[str], fraction: float, seed: int) -> None:
    """Part the train arrays into a train and a test half, class by class."""
    y = arrays["y_train"]
    lengths = {len(arrays[f"{name}_train"]) if arrays[f"{name}_train"].ndim else 0 for name in ("x", "y", *columns)}
    if len(lengths) != 1:
        raise ConfigError(
            f"data.root={root}: samples, labels and columns have the lengths {sorted(lengths)}; must agree"
        )
    test = stratified(encode(root, [y], None)[0][0], fraction, seed)
    for name in ("x", "y", *columns):
        whole = arrays[f"{name}_train"]
        arrays[f"{name}_train"], arrays[f"{name}_test"] = whole[~test], whole[test]


def _with_superclasses(dataset: Dataset, superclasses: Mapping[str, Sequence[str]], declared: Sequence[str]) -> Dataset:
    names = [name for members in superclasses.values() for name in members]
    if sorted(names) != sorted(declared):
        wrong = sorted(set(names) ^ set(declared)) or "some twice"
        raise ValueError(f"data.source.superclasses: must name each class once; wrong: {wrong}")
    of_class = {name: group for group, members in superclasses.items() for name in members}
    column = np.array([of_class[name] for name in dataset.classes])
    train, test = (
        replace(half, meta={**half.meta, "superclass": column[half.y]}) for half in (dataset.train, dataset.test)
    )
    return replace(dataset, train=train, test=test)
