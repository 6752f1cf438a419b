"""The figures of a run: one pure function each, from a ``Run`` to a matplotlib ``Figure``.

Made without pyplot and without touching ``rcParams`` (a style context changes them for every thread), so figures can be
drawn from any thread and without a screen. Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedcl.evaluation.metrics import KINDS
from fedcl.results.run import Run

# Okabe and Ito, "Color Universal Design", 2008; yellow left out, it is too faint for lines on white
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A5C00")
INK, GREY, MISSING = "#222222", "#8C8C8C", "#EEEEEE"
HEAT = "YlGnBu"  # light to dark: told apart with a colour deficiency and in grey print

_MARKED_POINTS = 40
_PRINTED_TASKS = 25


def accuracy_matrix(run: Run) -> Figure:
    """Draw the heat map of the global test accuracy after each task (row) on each task (column), in percent.

    The diagonal, where a task has just been learned, is framed. A cell that was not measured is grey.

    Raises
    ------
    ValueError
        The run has no global test accuracy.
    """
    matrix = _matrix(run).to_numpy()
    num_tasks = len(matrix)
    side = float(np.clip(0.62 * num_tasks + 1.4, 3.4, 12.0))
    figure, axes = _axes(side + 1.2, side)
    colours = matplotlib.colormaps[HEAT].with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=colours, vmin=0.0, vmax=1.0)
    for task in range(num_tasks):
        axes.add_patch(Rectangle((task - 0.5, task - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.2))
    if num_tasks <= _PRINTED_TASKS:
        _print_cells(axes, matrix, size=11.0 if num_tasks <= 12 else 7.5)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(num_tasks, 20), min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(num_tasks, 20), min_n_ticks=1))
    axes.set(xlabel="evaluated on task", ylabel="after task")
    axes.set_title("Global test accuracy (%)", color=INK, fontsize=12)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GREY)
    return figure


def accuracy_by_task(run: Run) -> Figure:
    """Draw the global test accuracy on each task, and the mean over the tasks reached, over the server rounds.

    Dashed lines mark where the stream went on to the next task. A task's curve is thin before the task is learned.

    Raises
    ------
    ValueError
        The run has no global test accuracy.
    """
    num_tasks = len(_matrix(run))
    rows = run.accuracy[run.accuracy["task"] >= 0]
    figure, axes = _axes(8.6, 4.4)
    markers = "o" if rows["round"].nunique() <= _MARKED_POINTS else ""
    for task, colour in enumerate(_colours(num_tasks)):
        _plot_task(axes, rows[rows["task"] == task].drop_duplicates("round", keep="last"), task, colour, markers)
    if num_tasks > 1:
        reached = rows[rows["task"] <= rows["after"]].drop_duplicates(["round", "task"], keep="last")
        mean = reached.groupby("round")["value"].mean()
        axes.plot(mean.index + 1, mean, color=INK, linewidth=3.0, zorder=1.9, label="mean of tasks\nreached")
    _mark_boundaries(axes, rows)
    _percent_axis(axes)
    rounds = int(rows["round"].max()) + 1
    axes.set(xlim=(-0.02 * rounds, 1.02 * rounds), ylim=(-0.02, 1.02))
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="server rounds done", ylabel="global test accuracy (%)")
    axes.set_title("Accuracy by task", color=INK, fontsize=12, pad=20)
    _legend_outside(axes, columns=1 + num_tasks // 14)
    return figure


def forgetting_bars(run: Run) -> Figure:
    """Draw what was forgotten of each task but the last, in percentage points; negative where a task improved.

    With a reference run: Chaudhry's definition, the reference beside the run. Without: the three definitions.

    Raises
    ------
    ValueError
        The run has not reached a second task.
    """
    if len(run.reached_matrix()) < 2:
        raise ValueError(f"{run.path}: has reached no second task, so nothing can be forgotten yet")
    series = _forgetting_series(run)
    tasks = sorted(set().union(*(values.index for values in series.values())))
    figure, axes = _axes(float(np.clip(0.5 * len(tasks) + 4.2, 5.6, 14.0)), 4.0)
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        offset = (place - (len(series) - 1) / 2) * width
        heights = values.reindex(tasks).to_numpy()
        axes.bar(np.arange(len(tasks)) + offset, heights, width * 0.92, color=PALETTE[place], label=label)
    axes.axhline(0.0, color=INK, linewidth=0.9)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(tasks)), [str(task) for task in tasks])
    centre, half = (len(tasks) - 1) / 2, max(len(tasks), 2) / 2 + 0.1
    axes.set_xlim(centre - half, centre + half)
    _percent_axis(axes)
    axes.set(xlabel="task", ylabel="forgotten (percentage points)")
    axes.set_title("Forgetting of each task", color=INK, fontsize=12)
    _legend_outside(axes)
    return figure


def save_all(run: Run, folder: Path | str) -> list[Path]:
    """Draw every figure that the run has data for, as PNG (150 dpi) and SVG, and return the files.

    Parameters
    ----------
    run
        The run, finished or not.
    folder
        Where to write; made when missing.

    Returns
    -------
    list of Path
        The files; empty before the first evaluation, without ``forgetting_bars`` before a second task.
    """
    num_tasks = len(run.reached_matrix())
    drawn: list[Callable[[Run], Figure]] = []
    if num_tasks:
        drawn += [accuracy_matrix, accuracy_by_task]
    if num_tasks > 1:
        drawn.append(forgetting_bars)
    files: list[Path] = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for draw in drawn:
        figure = draw(run)
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            file = Path(folder) / f"{draw.__name__}.{suffix}"
            figure.savefig(file, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.1, metadata=metadata)
            files.append(file)
    return files


def _matrix(run: Run) -> pd.DataFrame:
    matrix = run.accuracy_matrix()
    if matrix.empty:
        raise ValueError(f"{run.path}: has no global test accuracy (phase=test, name=accuracy, no client)")
    return matrix


def _forgetting_series(run: Run) -> dict[str, pd.Series[float]]:
    """Return label -> forgetting by task: the run and its reference, or the run by each definition."""
    if run.reference is not None and len(run.reference.reached_matrix()) > 1:
        return {"this run (Chaudhry)": run.forgetting(), "reference (Chaudhry)": run.reference.forgetting()}
    names = {
        "chaudhry": "Chaudhry: from the best\nbefore the last task",
        "first": "first: from just learned",
        "peak": "peak: from the best of all",
    }
    return {names[kind]: run.forgetting(kind) for kind in KINDS}


def _plot_task(axes: Axes, rows: pd.DataFrame, task: int, colour: str, markers: str) -> None:
    learned = (rows["after"] >= task).to_numpy()
    first = int(np.argmax(learned)) if learned.any() else len(rows)
    done, value = rows["round"] + 1, rows["value"]
    axes.plot(done[: first + 1], value[: first + 1], color=colour, linewidth=0.8, alpha=0.45)
    axes.plot(
        done[first:], value[first:], color=colour, linewidth=1.6, marker=markers, markersize=3.5, label=f"task {task}"
    )


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=10)
    axes.grid(visible=True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _print_cells(axes: Axes, matrix: np.ndarray[tuple[int, ...], np.dtype[np.float64]], size: float) -> None:
    for (after, task), value in np.ndenumerate(matrix):
        known = bool(np.isfinite(value))
        text = f"{100 * value:.1f}" if known else "\N{EN DASH}"
        colour = GREY if not known else INK if value < 0.55 else "white"
        axes.text(task, after, text, ha="center", va="center", color=colour, fontsize=size)


def _colours(count: int) -> list[str]:
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    scale = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, count))
    return [matplotlib.colors.to_hex(colour) for colour in scale]


def _mark_boundaries(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw a dashed line where a task begins and write the task above the rounds that it lasted."""
    trained = rows[rows["after"] >= 0]
    ends = trained.groupby("after")["round"].max() + 1
    start = 0
    every = 1 + len(ends) // 15
    for task, end in ends.items():
        if start:
            axes.axvline(start, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        if int(str(task)) % every == 0:
            axes.annotate(
                f"task {task}" if len(ends) <= 8 else str(task), ((start + end) / 2, 1.0), (0, 4),
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", color=GREY, fontsize=9,
            )  # fmt: skip
        start = int(end)


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def _legend_outside(axes: Axes, columns: int = 1) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5, ncols=columns)
