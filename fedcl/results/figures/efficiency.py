"""Accuracy against what it took: traffic, arithmetic, time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from fedcl.results.curves import cost_by_round
from fedcl.results.figures import style
from fedcl.results.figures.accuracy import reached_mean
from fedcl.results.figures.seeds import Runs, as_list, over_seeds, seeds_note
from fedcl.results.run import Run

AXES = {
    "bytes": ("bytes sent and received", "B"),
    "flops": ("FLOPs of training", ""),
    "virtual_time": ("virtual time", "s"),
}


def accuracy_against_cost(runs: Runs) -> Figure:
    """Draw the mean accuracy over the tasks reached against traffic, training FLOPs and virtual time so far.

    A panel for each that was recorded and moved. Where every run has a reference, it is the dashed grey curve. Several
    seeds: aligned by round, the cost is the mean of theirs.

    Raises
    ------
    ValueError
        A run has no global test accuracy, or no cost was recorded.
    """
    found = as_list(runs)
    curves = [reached_mean(run) for run in found]
    if any(curve.empty for curve in curves):
        raise ValueError("has no global test accuracy after training began")
    costs = _mean_costs(found)
    kinds = [kind for kind in AXES if kind in costs and costs[kind].max() > 0]
    if not kinds:
        raise ValueError("no cost was recorded: neither traffic, nor FLOPs, nor virtual time")
    references = [run.reference for run in found if run.reference is not None]
    figure, panels = style.new_row(len(kinds), 2.6 * len(kinds) + 1.4, 3.5)
    told = []
    for axes, kind in zip(panels, kinds, strict=True):
        if len(references) == len(found):
            table, x = over_seeds([reached_mean(run) for run in references]), _mean_costs(references).get(kind)
            if x is not None:
                style.curve(axes, _at(x, table), table, style.GREY, name="reference", width=1.3, line="--")
        table = over_seeds(curves)
        style.curve(axes, _at(costs[kind], table), table, style.PALETTE[0], name="this run")
        name = _dress(axes, kind)
        told.append(f"{name} {costs[kind].max():.4g}")
    style.label(panels[0], AXES[kinds[0]][0], "mean accuracy of the\ntasks reached (%)")
    style.percent_axis(panels[0])
    panels[0].set_ylim(-0.02, 1.02)
    figure.suptitle(f"Accuracy against cost{seeds_note(len(found))}", color=style.INK, fontsize=12)
    if len(references) == len(found):
        panels[0].legend(loc="lower right", frameon=False, fontsize=9, labelcolor=style.INK)
    last = 100 * float(over_seeds(curves)["mean"].iloc[-1])
    figure.set_label(f"Curves that end at {last:.1f} percent, having taken: {', '.join(told)}.")
    return figure


def _dress(axes: Axes, kind: str) -> str:
    """Write the horizontal axis and return what it shows."""
    name, unit = AXES[kind]
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep="\N{NO-BREAK SPACE}"))
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlim(left=0.0)
    style.label(axes, name)
    return name


def _mean_costs(runs: list[Run]) -> pd.DataFrame:
    """Return the costs so far by round, the mean over seeds."""
    return pd.concat([cost_by_round(run) for run in runs]).groupby(level=0).mean()


def _at(cost: pd.Series[float], table: pd.DataFrame) -> NDArray[np.float64]:
    return np.asarray(cost.reindex(table.index), dtype=np.float64)
