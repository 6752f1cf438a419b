"""How much of each layer a projection has set aside for earlier tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, over_seeds, seeds_note, spread
from fedcl.results.run import Run

_RANK, _SHARE = "projection/rank/", "projection/frozen_share/"


def subspace_rank(runs: Runs) -> Figure:
    """Draw the rank of the protected subspace by layer (row) and task (column), at the end of each task.

    The number is the rank, the colour its share of the layer's inputs. Several seeds: means, and half the width of
    the rank's 95 % interval.

    Raises
    ------
    ValueError
        A run recorded no rank.
    """
    found = as_list(runs)
    layers = list(dict.fromkeys(layer for run in found for layer in _layers(run)))
    if not layers:
        raise ValueError("no rank was recorded: strategy/projection=fot records it")
    ranks = [over_seeds([_at_task_ends(run, _RANK + layer) for run in found]) for layer in layers]
    shares = [over_seeds([_at_task_ends(run, _SHARE + layer) for run in found])["mean"] for layer in layers]
    tasks = sorted(set().union(*(table.index for table in ranks)))
    share = np.stack([column.reindex(tasks).to_numpy(dtype=np.float64) for column in shares])
    figure, axes = style.new_axes(
        float(np.clip(0.75 * len(tasks) + 3.4, 5.2, 12)), float(np.clip(0.42 * len(layers) + 1.6, 2.4, 12))
    )
    image = axes.imshow(np.ma.masked_invalid(share), cmap=style.shades(), vmin=0.0, vmax=1.0, aspect="auto")
    for row, table in enumerate(ranks):
        for column, task in enumerate(tasks):
            if task in table.index and np.isfinite(table.loc[task, "mean"]):
                text = f"{table.loc[task, 'mean']:.3g}{spread(float(table.loc[task, 'half']), unit=1.0)}"
                colour = style.ON_DARK if share[row, column] > 0.55 else style.ON_LIGHT
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(tasks)), [str(task) for task in tasks])
    axes.set_yticks(range(len(layers)), [style.plain(layer, most=24) for layer in layers])
    axes.grid(visible=False)
    style.label(axes, "after task", "layer")
    style.title(axes, f"Rank of the protected subspace{seeds_note(len(found))}")
    style.colour_bar(figure, image, axes, "share of the layer's inputs")
    last = (f"{layer} {table['mean'].iloc[-1]:.4g}" for layer, table in zip(layers, ranks, strict=True))
    figure.set_label(f"Heat map of {len(layers)} layers and {len(tasks)} tasks. Rank at the end: {', '.join(last)}.")
    return figure


def _layers(run: Run) -> list[str]:
    names = run.metrics.loc[run.metrics["phase"] == "server", "name"]
    return [str(name).removeprefix(_RANK) for name in names[names.str.startswith(_RANK)].unique()]


def _at_task_ends(run: Run, name: str) -> pd.Series[float]:
    rows = run.metrics[(run.metrics["phase"] == "server") & (run.metrics["name"] == name)]
    return rows.groupby("after")["value"].last()
