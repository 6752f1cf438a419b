"""Intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean by Student's t.

    Raises
    ------
    ValueError
        With fewer than two values there is no interval.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} value: an interval needs two")
    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
