"""Intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# two-sided 95 % quantiles of Student's t, by degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean (Student's t; the normal beyond 31 values).

    Raises
    ------
    ValueError
        With fewer than two values there is no interval.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} value: an interval needs two")
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else _NORMAL
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
