"""One run or several seeds of it: means and 95 % intervals over them."""

# S = seeds, N = places
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedcl.results.intervals import half_width
from fedcl.results.run import Run

Runs = Run | Sequence[Run]
"""One run, or several that differ in their seed."""


def as_list(runs: Runs) -> list[Run]:
    """Return the runs as a list.

    Raises
    ------
    ValueError
        If there is none.
    """
    found = [runs] if isinstance(runs, Run) else list(runs)
    if not found:
        raise ValueError("no run: there is nothing to draw")
    return found


def the_one(runs: Runs, what: str) -> Run:
    """Return the only run, for ``what`` means nothing over several.

    Raises
    ------
    ValueError
        If there are several.
    """
    found = as_list(runs)
    if len(found) > 1:
        raise ValueError(f"{what} shows one run, not {len(found)}: its clients or times differ between seeds")
    return found[0]


def interval(values_SN: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean (N,) over the seeds that have a value, and half the width of its 95 % interval, NaN below two."""
    means, halves = np.full(values_SN.shape[1], np.nan), np.full(values_SN.shape[1], np.nan)
    for place, column in enumerate(values_SN.T):
        known = column[np.isfinite(column)]
        if len(known):
            means[place] = known.mean()
        if len(known) > 1:
            halves[place] = half_width(known.tolist())
    return means, halves


def over_seeds(series: Sequence[pd.Series[float]]) -> pd.DataFrame:
    """Return columns ``mean`` and ``half`` of one series a seed, aligned by their index."""
    table = pd.concat(list(series), axis=1).sort_index()
    mean, half = interval(table.to_numpy(dtype=np.float64).T)
    return pd.DataFrame({"mean": mean, "half": half}, index=table.index)


def spread(half: float, unit: float = 100.0, digits: int = 1) -> str:
    """Return an interval as text, ``±1.2``; empty where there is none."""
    return f"±{unit * half:.{digits}f}" if np.isfinite(half) else ""


def seeds_note(count: int) -> str:
    """Return what a title adds for several seeds."""
    return f"\nmean and 95 % interval of {count} seeds" if count > 1 else ""
