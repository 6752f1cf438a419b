"""Accuracy of the global model: the matrix, the curve of each task, and what was forgotten."""

# T = tasks
from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedcl.evaluation.metrics import KINDS
from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, interval, over_seeds, seeds_note, spread
from fedcl.results.run import Run

_PRINTED_TASKS = 25
_NAMES = {
    "chaudhry": "Chaudhry: from the best\nbefore the last task",
    "first": "first: from just learned",
    "peak": "peak: from the best of all",
}


def accuracy_matrix(runs: Runs) -> Figure:
    """Draw the heat map of the global test accuracy after each task (row) on each task (column), in percent.

    The diagonal, where a task has just been learned, is framed. A cell that was not measured is grey. Several seeds:
    the mean, and in each cell half the width of its 95 % interval.

    Raises
    ------
    ValueError
        A run has no global test accuracy.
    """
    matrix, half = _matrices(runs)
    num_tasks = len(matrix)
    side = float(np.clip(0.62 * num_tasks + 1.4, 3.4, 12.0))
    figure, axes = style.new_axes(side + 1.2, side)
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=style.shades(), vmin=0.0, vmax=1.0)
    for task in range(num_tasks):
        axes.add_patch(Rectangle((task - 0.5, task - 0.5), 1, 1, fill=False, edgecolor=style.INK, linewidth=1.2))
    if num_tasks <= _PRINTED_TASKS:
        _print_cells(axes, matrix, half, size=11.0 if num_tasks <= 12 else 7.5)
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=min(num_tasks, 20), min_n_ticks=1))
    style.label(axes, "evaluated on task", "after task")
    style.title(axes, f"Global test accuracy (%){seeds_note(len(as_list(runs)))}", size=12 if side > 4 else 10)
    style.colour_bar(figure, image, axes)
    last = ", ".join(f"{100 * value:.1f}" for value in matrix[-1] if np.isfinite(value))
    figure.set_label(f"Heat map, {num_tasks} by {num_tasks} tasks. After the last one, in percent by task: {last}.")
    return figure


def accuracy_by_task(runs: Runs, *, over: Literal["round", "virtual_time"] = "round") -> Figure:
    """Draw the global test accuracy on each task, and the mean over the tasks reached, over rounds or virtual time.

    Dashed lines mark where the stream of the first run went on to the next task. A task's curve is thin before the task
    is learned. Several seeds: means with 95 % bands, aligned by round; a round's time is then the mean of its times.

    Raises
    ------
    ValueError
        A run has no global test accuracy, or its virtual clock stood still.
    """
    found = as_list(runs)
    num_tasks = max(len(_matrix(run)) for run in found)
    tables = [run.accuracy[run.accuracy["task"] >= 0] for run in found]
    place = _places(tables, over)
    figure, axes = style.new_axes(8.0, 4.2)
    for task, colour in enumerate(style.colours(num_tasks)):
        table = over_seeds([_by_round(rows[rows["task"] == task]) for rows in tables])
        start = _learned_at(tables[0], task, table.index)
        x = table.index.map(place).to_numpy(dtype=np.float64)
        style.curve(axes, x, table, colour, name=f"task {task}", start=start)
    if num_tasks > 1:
        means = over_seeds([reached_mean(run) for run in found])
        x = means.index.map(place).to_numpy(dtype=np.float64)
        axes.plot(x, means["mean"], color=style.INK, linewidth=3.0, zorder=1.9, label="mean of tasks\nreached")
    _mark_boundaries(axes, tables[0], place)
    style.percent_axis(axes)
    end = max(place.values()) or 1.0  # nothing but the untrained model has been tested
    axes.set(xlim=(-0.02 * end, 1.02 * end), ylim=(-0.02, 1.02))
    axes.grid(visible=False, axis="x")
    if over == "round":
        style.whole_numbers(axes)
    style.label(axes, "server rounds done" if over == "round" else "virtual time (s)", "global test accuracy (%)")
    style.title(axes, f"Accuracy by task{seeds_note(len(found))}", pad=20)
    style.legend_outside(axes, columns=1 + num_tasks // 14)
    figure.set_label(_told(found, num_tasks, "rounds" if over == "round" else "seconds of virtual time", end))
    return figure


def forgetting_bars(runs: Runs) -> Figure:
    """Draw what was forgotten of each task but the last, in percentage points; negative where a task improved.

    With a reference run: Chaudhry's definition, the reference beside the run. Without: the three definitions. Several
    seeds: means with their 95 % intervals.

    Raises
    ------
    ValueError
        A run has not reached a second task.
    """
    found = as_list(runs)
    for run in found:
        if len(run.reached_matrix()) < 2:
            raise ValueError(f"{run.path}: has reached no second task, so nothing can be forgotten yet")
    series = _forgetting_series(found)
    tasks = sorted(set().union(*(table.index for table in series.values())))
    figure, axes = style.new_axes(float(np.clip(0.5 * len(tasks) + 4.2, 5.6, 14.0)), 4.0)
    width = 0.8 / len(series)
    for place, (name, table) in enumerate(series.items()):
        table = table.reindex(tasks)
        x = np.arange(len(tasks)) + (place - (len(series) - 1) / 2) * width
        axes.bar(x, table["mean"].to_numpy(), width * 0.92, color=style.PALETTE[place], label=name)
        if table["half"].notna().any():
            axes.errorbar(x, table["mean"], table["half"], fmt="none", ecolor=style.INK, elinewidth=1.1, capsize=2.5)
    axes.axhline(0.0, color=style.INK, linewidth=0.9)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(tasks)), [str(task) for task in tasks])
    centre, half = (len(tasks) - 1) / 2, max(len(tasks), 2) / 2 + 0.1
    axes.set_xlim(centre - half, centre + half)
    style.percent_axis(axes)
    style.label(axes, "task", "forgotten (percentage points)")
    style.title(axes, f"Forgetting of each task{seeds_note(len(found))}")
    style.legend_outside(axes)
    name, table = next(iter(series.items()))
    told = ", ".join(f"task {task} {100 * value:.1f}" for task, value in table["mean"].dropna().items())
    figure.set_label(f"Bars in percentage points. {' '.join(name.split())}: {told}.")
    return figure


def reached_mean(run: Run) -> pd.Series[float]:
    """Return round -> mean global test accuracy over the tasks reached by then."""
    rows = run.accuracy
    reached = rows[(rows["task"] >= 0) & (rows["task"] <= rows["after"])]
    return reached.drop_duplicates(["round", "task"], keep="last").groupby("round")["value"].mean()


def _matrix(run: Run) -> pd.DataFrame:
    matrix = run.accuracy_matrix()
    if matrix.empty:
        raise ValueError(f"{run.path}: has no global test accuracy (phase=test, name=accuracy, no client)")
    return matrix


def _matrices(runs: Runs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    matrices = [_matrix(run) for run in as_list(runs)]
    size = range(max(len(matrix) for matrix in matrices))
    flat_SN = np.stack([matrix.reindex(index=size, columns=size).to_numpy().ravel() for matrix in matrices])
    mean, half = interval(flat_SN)
    return mean.reshape(len(size), -1), half.reshape(len(size), -1)


def _by_round(rows: pd.DataFrame) -> pd.Series[float]:
    return rows.drop_duplicates("round", keep="last").set_index("round")["value"]


def _places(tables: list[pd.DataFrame], over: str) -> dict[int, float]:
    """Return round -> where it stands on the horizontal axis."""
    rows = pd.concat(tables)
    if over == "round":
        return {int(server_round): int(server_round) + 1 for server_round in rows["round"].unique()}
    times = rows.groupby("round")["virtual_time"].mean()
    if not times.max() > 0:
        raise ValueError("the virtual clock stood still: devices=ideal takes no time")
    return {int(str(server_round)): float(time) for server_round, time in times.items()}


def _learned_at(rows: pd.DataFrame, task: int, index: pd.Index) -> int:
    """Return the row of ``index`` at which the stream had reached ``task``."""
    reached = rows[(rows["task"] == task) & (rows["after"] >= task)]["round"]
    return int(np.flatnonzero(index == reached.min())[0]) if len(reached) else len(index) - 1


def _told(runs: list[Run], num_tasks: int, unit: str, end: float) -> str:
    curve = over_seeds([reached_mean(run) for run in runs])["mean"]
    last = f" The mean over the tasks reached ends at {100 * curve.iloc[-1]:.1f} percent." if len(curve) else ""
    return f"Curves of {num_tasks} tasks over {end:.4g} {unit}.{last}"


def _forgetting_series(runs: list[Run]) -> dict[str, pd.DataFrame]:
    """Return label -> forgetting by task: the run and its reference, or the run by each definition."""
    references = [run.reference for run in runs if run.reference and len(run.reference.reached_matrix()) > 1]
    if len(references) == len(runs):
        return {
            "this run (Chaudhry)": over_seeds([run.forgetting() for run in runs]),
            "reference (Chaudhry)": over_seeds([run.forgetting() for run in references]),
        }
    return {_NAMES[kind]: over_seeds([run.forgetting(kind) for run in runs]) for kind in KINDS}


def _print_cells(axes: Axes, matrix: NDArray[np.float64], half: NDArray[np.float64], size: float) -> None:
    for (after, task), value in np.ndenumerate(matrix):
        known = bool(np.isfinite(value))
        around = spread(float(half[after, task]))
        text = f"{100 * value:.1f}" + (f"\n{around}" if around else "") if known else "\N{EN DASH}"
        colour = style.GREY if not known else style.ON_LIGHT if value < 0.55 else style.ON_DARK
        axes.text(task, after, text, ha="center", va="center", color=colour, fontsize=size * (0.75 if around else 1))


def _mark_boundaries(axes: Axes, rows: pd.DataFrame, place: dict[int, float]) -> None:
    """Draw a dashed line where a task begins and write the task above the rounds that it lasted."""
    trained = rows[rows["after"] >= 0]
    ends = trained.groupby("after")["round"].max()
    start = 0.0
    every = 1 + len(ends) // 15
    for task, last in ends.items():
        end = place[int(last)]
        if start:
            axes.axvline(start, color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        if int(str(task)) % every == 0:
            axes.annotate(
                f"task {task}" if len(ends) <= 8 else str(task), ((start + end) / 2, 1.0), (0, 4),
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", fontsize=9,
                color=style.GREY,
            )  # fmt: skip
        start = end
