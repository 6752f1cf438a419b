"""From arrays as files hold them to samples as models see them: channels first, finite, of a range that is known."""

# N = samples, C = channels, H, W = height, width
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcl.config.value_rules import ConfigError

_COLOURS = (1, 3)
_LOUD = 32.0  # beyond, values are no normalised ones, and training on them is a matter to mention


class Samples(NamedTuple):
    """Both halves as uint8 or float32, the factor that brings them to [0, 1], and notes on them."""

    halves: tuple[NDArray[Any], NDArray[Any]]
    scale: float
    notes: tuple[str, ...]


def as_samples(
    root: object, halves: Sequence[tuple[str, NDArray[Any]]], *, channels: str | None = None, scale: float | None = None
) -> Samples:
    """Return the samples of both halves, given with the names of their arrays, in one layout and one type.

    Images are (N, H, W), or (N, H, W, C), or (N, C, H, W), and become (N, C, H, W); flat features (N, D) stay as they
    are. Values 0..255 of any type are scaled by 1/255, others are not.

    Parameters
    ----------
    root
        The configured ``data.root``, for messages.
    halves
        Name and array of the train and of the test half.
    channels
        ``first`` or ``last``; None finds the axis that can only be the channels'.
    scale
        What values are multiplied by; None finds out.

    Raises
    ------
    ConfigError
        An array has another shape, no numbers, or values that are not finite, or the layout is ambiguous.
    """
    for name, x in halves:
        if x.ndim not in (2, 3, 4) or x.dtype.kind not in "biuf" or not prod(x.shape[1:]):
            raise ConfigError(
                f"data.root={root}: {name}: samples have shape {x.shape} and {x.dtype}; must be numbers of shape "
                "(N, D), (N, H, W), (N, H, W, C) or (N, C, H, W)"
            )
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            at = int(np.argwhere(~np.isfinite(x))[0][0])
            raise ConfigError(f"data.root={root}: {name}: sample {at} has nan or inf; must be finite")
    (_, train), (_, test) = halves
    if train.shape[1:] != test.shape[1:]:
        raise ConfigError(
            f"data.root={root}: train and test samples differ in shape or type: {train.shape[1:]}, {test.shape[1:]}"
        )
    if (train.dtype.kind == "f") != (test.dtype.kind == "f"):
        raise ConfigError(
            f"data.root={root}: train and test samples differ in shape or type: {train.dtype}, {test.dtype}"
        )
    first, notes = _channels_first(root, train.shape, channels)
    x_train, x_test, factor, more = _ranged(root, train, test, scale)
    if train.ndim == 3:
        x_train, x_test = x_train[:, None], x_test[:, None]
    elif not first:
        x_train, x_test = np.moveaxis(x_train, -1, 1), np.moveaxis(x_test, -1, 1)
    return Samples((np.ascontiguousarray(x_train), np.ascontiguousarray(x_test)), factor, (*notes, *more))


def _channels_first(root: object, shape: tuple[int, ...], channels: str | None) -> tuple[bool, list[str]]:
    """Tell whether images (N, ., ., .) have their channels first, and what to say where that is not the usual way."""
    if len(shape) != 4:
        return True, []
    if channels is not None:
        return channels == "first", []
    _, a, b, c = shape
    fits = [a in _COLOURS, c in _COLOURS]
    if all(fits):
        fits = [b == c, a == b]  # images are square more often than not
    elif not any(fits):
        fits = [a < min(b, c), c < min(a, b)]
    if fits[0] == fits[1]:
        raise ConfigError(
            f"data.root={root}: samples of shape {shape[1:]} may have their channels first or last; set "
            "data.source.channels=first or data.source.channels=last"
        )
    note = f"samples of shape {shape[1:]} are taken for {a} channels first; data.source.channels=last if they are not"
    return fits[0], [note] if fits[0] else []


def _ranged(
    root: object, train: NDArray[Any], test: NDArray[Any], scale: float | None
) -> tuple[NDArray[Any], NDArray[Any], float, list[str]]:
    """Return samples as uint8 where they are bytes, or whole numbers that are pixels, else as float32; scale; notes."""
    halves = [x for x in (train, test) if x.size]
    low, high = min((float(x.min()) for x in halves), default=0.0), max((float(x.max()) for x in halves), default=0.0)
    shown = f"values {low:g}..{high:g} stored as {train.dtype}"
    if max(-low, high) > float(np.finfo(np.float32).max):
        raise ConfigError(f"data.root={root}: {shown}: must be within what float32 holds")
    notes: list[str] = []
    if train.dtype == test.dtype == np.uint8:
        if scale is None and high <= 1:
            notes.append(f"{shown} are scaled by 1/255 like any bytes; data.source.scale=1 leaves them as they are")
        return train, test, 1 / 255 if scale is None else scale, notes
    whole = train.dtype.kind != "f" or all(bool((x == np.floor(x)).all()) for x in halves)
    pixels = scale is None and low >= 0 and 128 <= high <= 255 and (whole or train.ndim > 2)
    if pixels:
        notes.append(f"{shown} are taken for pixels and scaled by 1/255; data.source.scale=1 leaves them as they are")
    elif scale is None and max(-low, high) > _LOUD:
        notes.append(f"{shown} are taken as they are; data.source.scale, or mean and std, bring them to about 1")
    kind = np.uint8 if pixels and whole else np.float32
    return train.astype(kind), test.astype(kind), 1 / 255 if pixels else (scale or 1.0), notes
