"""The stability gap: what happens to earlier tasks step by step while a client learns."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcl.results.curves import client_curves
from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, over_seeds, seeds_note
from fedcl.results.run import Run


def stability_gap(runs: Runs) -> Figure:
    """Draw the accuracy of clients' own models on each task by local step, and min-ACC (De Lange et al., ICLR 2023).

    A curve is the mean over clients; steps count through all rounds, and a dashed line marks where the present task of
    most clients changes. A triangle is the lowest point since a task was learned. min-ACC, the dotted line, is the mean
    over clients of each one's own lowest points. Several seeds: means with 95 % bands.

    Raises
    ------
    ValueError
        Nothing was tested between two steps.
    """
    found = as_list(runs)
    tables = [_mean_curves(run) for run in found]
    if any(table.empty for table in tables):
        raise ValueError("no client was tested between two of its steps: evaluation.iterations=0")
    tasks = sorted({int(task) for table in tables for task in table.columns})
    place = _places(tables)
    figure, axes = style.new_axes(8.0, 4.2)
    ends = _changes(found[0], place)
    told = []
    for task, colour in zip(tasks, style.colours(len(tasks)), strict=True):
        table = over_seeds([curves[task].dropna() for curves in tables if task in curves])
        x = np.array([place[key] for key in table.index], dtype=np.float64)
        style.curve(axes, x, table, colour, name=f"task {task}", width=1.2, marks=False)
        since = next((end for last, end in ends if last == task), np.inf)
        later = table["mean"].to_numpy()[x > since]
        if len(later):
            at = int(np.argmin(later))
            axes.plot(
                [x[x > since][at]], [later[at]], "v", color=colour, markeredgecolor=style.INK, markersize=7, zorder=4
            )
            told.append(f"task {task} {100 * later[at]:.1f}")
    for _, end in ends[:-1]:
        axes.axvline(end, color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    lowest = _draw_min_accuracy(axes, found)
    style.percent_axis(axes)
    axes.set(ylim=(-0.03, 1.03))
    style.label(axes, "local steps", "accuracy of the client's model (%)")
    style.title(axes, f"Stability gap{seeds_note(len(found))}")
    style.legend_outside(axes, columns=1 + len(tasks) // 14)
    figure.set_label(f"Mean over clients of accuracy by local step. Lowest since learned: {', '.join(told)}{lowest}.")
    return figure


def _mean_curves(run: Run) -> pd.DataFrame:
    """Return mean accuracy over the round's clients, index (round, step), a column for each task.

    A client whose visit is shorter than others' counts with its last value until the round is over.
    """
    rows = run.metrics[run.metrics["phase"] == "iteration"]
    if rows.empty:
        return pd.DataFrame()
    wide = rows.pivot_table(index=["round", "step"], columns=["task", "client"], values="value", aggfunc="last")
    return wide.groupby(level="round").ffill().T.groupby(level="task").mean().T


def _places(tables: list[pd.DataFrame]) -> dict[tuple[int, int], int]:
    """Return (round, step) -> steps since the beginning, a round as long as its longest visit."""
    keys = sorted({(int(key[0]), int(key[1])) for table in tables for key in table.index})
    longest: dict[int, int] = {}
    for server_round, step in keys:
        longest[server_round] = max(step, longest.get(server_round, 0))
    before, total = {}, 0
    for server_round, steps in longest.items():
        before[server_round], total = total, total + steps
    return {(server_round, step): before[server_round] + step for server_round, step in keys}


def _changes(run: Run, place: dict[tuple[int, int], int]) -> list[tuple[int, float]]:
    """Return (task, last step at which most clients trained it), in order."""
    rows = run.metrics[run.metrics["phase"] == "iteration"]
    present = rows.groupby("round")["after"].agg(lambda tasks: tasks.mode().iloc[0])
    ends = {}
    for (server_round, _), x in place.items():
        if server_round in present.index:
            ends[int(present[server_round])] = float(x)
    return list(ends.items())


def _draw_min_accuracy(axes: Axes, runs: list[Run]) -> str:
    values = [run.summary.get("stability/iteration/min_accuracy") for run in runs]
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    if not known or not any(client_curves(run) for run in runs):
        return ""
    lowest = float(np.mean(known))
    axes.axhline(lowest, color=style.INK, linewidth=1.2, linestyle=(0, (1, 1.5)), label="min-ACC")
    return f"; min-ACC {100 * lowest:.1f}"
