"""From labels as files hold them to codes 0..C-1 and the names of the classes, without classes that nothing has."""

# N = samples, C = classes
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError

Codes = NDArray[np.int64]
_MOST = 1 << 16  # labels up to here are class numbers, however few samples there are


def encode(
    root: object, labels: Sequence[NDArray[Any]], classes: Sequence[str] | None, *, vocabulary: bool = False
) -> tuple[list[Codes], tuple[str, ...], list[str]]:
    """Return the labels of each half as codes (N,), the names of the classes, and notes on them.

    Labels are whole numbers >= 0 of any type, strings, or one-hot rows (N, C); (N, 1) is (N,). Numbers are positions
    in ``classes`` if given, else their own names. Classes without a sample in any half are left out, the others keep
    their order, unless they are a ``vocabulary``, whose codes stand for themselves.

    Raises
    ------
    ConfigError
        Labels are none of these, do not fit ``classes``, or are too large to be class numbers.
    """
    plain = [_flat(root, half) for half in labels]
    named = any(half.dtype.kind == "U" for half in plain)
    if named and not all(half.dtype.kind == "U" or not len(half) for half in plain):
        raise ConfigError(f"data.root={root}: labels are strings in one half and numbers in the other")
    if named:
        texts = [half.astype(np.str_) for half in plain]
        names = sorted(set(np.concatenate(texts).tolist())) if classes is None else [str(name) for name in classes]
        codes = [_positions(root, half, names) for half in texts]
    else:
        codes, names = _numbers(root, plain, classes)
    notes = (
        ["one-hot labels are taken for the class whose entry is 1"]
        if any(y.ndim == 2 for y in map(_squeezed, labels))
        else []
    )
    if vocabulary:
        return codes, tuple(names), notes
    return _without_absent(codes, names, notes, numbers=classes is None and not named)


def _squeezed(y: NDArray[Any]) -> NDArray[Any]:
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _flat(root: object, y: NDArray[Any]) -> NDArray[Any]:
    """Return labels (N,) as integers or strings."""
    y = _squeezed(np.asarray(y))
    shown = f"data.root={root}: labels of shape {y.shape} and {y.dtype}"
    if y.ndim == 2 and y.dtype.kind in "biuf":
        if not (np.isin(y, (0, 1)).all() and (y.sum(axis=1, dtype=np.int64) == 1).all()):
            raise ConfigError(
                f"{shown}: must be (N,), or one-hot rows with a single 1 each; several labels a sample do not fit"
            )
        return np.asarray(y.argmax(axis=1))
    if y.ndim != 1 or y.dtype.kind not in "biufUS":
        raise ConfigError(f"{shown}: must be (N,) whole numbers or strings, or one-hot rows (N, C)")
    if y.dtype.kind == "S":
        try:
            return np.char.decode(y, "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.root={root}: labels are bytes that are no UTF-8 text") from error
    if y.dtype.kind == "f":
        broken = ~np.isfinite(y) | (y != np.floor(y))
        if broken.any():
            at = int(broken.argmax())
            raise ConfigError(f"data.root={root}: label {y[at]} of sample {at} is no whole number; a class has one")
    return y.astype(np.int64) if y.dtype.kind == "b" else y


def _positions(root: object, y: NDArray[np.str_], names: Sequence[str]) -> Codes:
    code = {name: position for position, name in enumerate(names)}
    unknown = sorted(set(y.tolist()) - code.keys())
    if unknown:
        raise ConfigError(f"data.root={root}: labels {', '.join(unknown[:5])} are none of the {len(names)} class names")
    return np.array([code[name] for name in y.tolist()], np.int64)


def _numbers(
    root: object, labels: Sequence[NDArray[Any]], classes: Sequence[str] | None
) -> tuple[list[Codes], list[str]]:
    """Return labels that are numbers as int64, and a name for each number up to the largest one."""
    count = sum(len(half) for half in labels)
    ends = [(int(half.min()), int(half.max())) for half in labels if len(half)]
    low, high = min((a for a, _ in ends), default=0), max((b for _, b in ends), default=-1)
    if classes is not None:
        if not 0 <= low <= high + 1 <= len(classes):
            raise ConfigError(
                f"data.root={root}: labels {low}..{high} do not fit the {len(classes)} data.source.classes"
            )
    elif low < 0:
        raise ConfigError(
            f"data.root={root}: labels {low}..{high}: must be >= 0; leave samples without a label out, or store labels "
            "as strings"
        )
    elif high >= max(count, _MOST):
        raise ConfigError(
            f"data.root={root}: label {high}: must be below {max(count, _MOST)}, there being {count} samples; labels "
            "that are no class numbers can be stored as strings"
        )
    names = [str(k) for k in range(high + 1)] if classes is None else [str(name) for name in classes]
    return [half.astype(np.int64) for half in labels], names


def _without_absent(
    codes: Sequence[Codes], names: Sequence[str], notes: list[str], *, numbers: bool
) -> tuple[list[Codes], tuple[str, ...], list[str]]:
    """Leave out the classes that have no sample in any half."""
    counts = sum(np.bincount(half, minlength=len(names)) for half in codes)
    present = np.flatnonzero(counts)
    if len(present) == len(names):
        return list(codes), tuple(names), notes
    absent = [names[k] for k in np.flatnonzero(counts == 0).tolist()]
    shown = ", ".join(absent[:10]) + (f", ... ({len(absent)} in all)" if len(absent) > 10 else "")
    what = "labels" if numbers else "classes"
    notes.append(f"no sample has the {what} {shown}: they are left out; the {len(present)} classes keep their names")
    code = np.full(len(names), -1, np.int64)
    code[present] = np.arange(len(present))
    return [code[half] for half in codes], tuple(names[k] for k in present.tolist()), notes
