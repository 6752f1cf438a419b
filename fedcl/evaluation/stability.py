"""Metrics of an accuracy curve: how low it falls on the way, not only where it ends.

De Lange, van de Ven, Tuytelaars, "Continual evaluation for lifelong learning: Identifying the stability gap", ICLR
2023: min-ACC, WC-ACC, windowed forgetting and plasticity. Throughout, ``curve_NT[n, j]`` in [0, 1] is the accuracy on
task j at the n-th evaluation, NaN where it was not measured; ``learned_T[j]`` is the index of the evaluation with which
task j was learned, or -1 for a task that was not. A column of NaN only is a task without test samples: means over tasks
leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# N = evaluations in order of time, T = tasks
Floats = NDArray[np.float64]


def min_accuracy(curve_NT: ArrayLike, learned_T: Sequence[int]) -> float:
    """Return min-ACC: the lowest accuracy on each earlier task after it was learned, averaged over those tasks.

    The task learned last is left out, whether it has test samples or not; NaN where there is no other with some, or
    one of them was not measured since it was learned.

    Raises
    ------
    ValueError
        The curve has no columns for the tasks.
    """
    curve, earlier, _ = _parts(curve_NT, learned_T)
    return _mean([_lowest(curve[learned_T[task] + 1 :, task]) for task in earlier])


def worst_case_accuracy(curve_NT: ArrayLike, learned_T: Sequence[int]) -> float:
    """Return WC-ACC = 1/k A(E_k, f_t) + (1 - 1/k) min-ACC, with k tasks learned and t the last evaluation.

    With one task it is that task's accuracy; NaN where the task learned last has no test samples. k counts those that
    have. Raises ``ValueError`` as `min_accuracy`.
    """
    curve, earlier, last = _parts(curve_NT, learned_T)
    if last is None:
        return float("nan")
    share = 1 / (len(earlier) + 1)
    present = float(curve[-1, last])
    return present if not earlier else share * present + (1 - share) * min_accuracy(curve, learned_T)


def windowed_forgetting(curve_NT: ArrayLike, window: int) -> float:
    """Return WF^w: the largest drop in accuracy within ``window`` evaluations in a row, averaged over tasks.

    Raises
    ------
    ValueError
        ``window`` is below 2: one evaluation shows no change.
    """
    return _largest_change(-np.asarray(curve_NT, dtype=np.float64), window)


def windowed_plasticity(curve_NT: ArrayLike, window: int) -> float:
    """Return WP^w: the largest rise in accuracy within ``window`` evaluations in a row, averaged over tasks.

    Raises ``ValueError`` as `windowed_forgetting`.
    """
    return _largest_change(np.asarray(curve_NT, dtype=np.float64), window)


def anytime_accuracy(curve_NT: ArrayLike) -> float:
    """Return the mean over evaluations of the mean accuracy on the tasks measured in each: A_AUC of i-Blurry.

    Koh et al., "Online Continual Learning on Class Incremental Blurry Task Configuration", ICLR 2022, for evaluations
    at equal distances; NaN without any.
    """
    curve = np.asarray(curve_NT, dtype=np.float64)
    measured = curve[~np.isnan(curve).all(axis=1)]
    return _mean([float(np.nanmean(row)) for row in measured])


def aggregation_drop(before: ArrayLike, after: ArrayLike) -> float:
    """Return the mean of accuracy before sending minus accuracy of what is received next: what aggregation costs.

    Both of equal length, NaN pairs left out; NaN without any.
    """
    drop = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    return _mean(list(drop[~np.isnan(drop)]))


def _parts(curve_NT: ArrayLike, learned_T: Sequence[int]) -> tuple[Floats, list[int], int | None]:
    """Return the curve, the tasks with test samples learned before the last one, and that one."""
    curve = np.asarray(curve_NT, dtype=np.float64)
    if curve.ndim != 2 or curve.shape[1] != len(learned_T):
        raise ValueError(f"curve of shape {curve.shape}: must have a column for each of {len(learned_T)} tasks")
    learned = [task for task in np.argsort(learned_T, kind="stable") if learned_T[task] >= 0]
    tested = np.asarray(~np.isnan(curve).all(axis=0))
    return curve, [int(task) for task in learned[:-1] if tested[task]], int(learned[-1]) if learned else None


def _lowest(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.min()) if len(present) else float("nan")


def _largest_change(curve_NT: Floats, window: int) -> float:
    if window < 2:
        raise ValueError(f"window={window}: must be >= 2")
    columns = [column[~np.isnan(column)] for column in curve_NT.T]
    return _mean([_largest_rise(column, window) for column in columns if len(column)])


def _largest_rise(values: Floats, window: int) -> float:
    """Return the largest values[j] - values[i] with i <= j < i + window: 0 where the curve never rises."""
    return max(float((values[lag:] - values[: len(values) - lag]).max()) for lag in range(min(window, len(values))))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
