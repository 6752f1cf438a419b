"""What clients get: the spread of their accuracy, and who collaborates with whom."""

# K = clients
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, interval, seeds_note, the_one
from fedcl.results.run import Run
from fedcl.server.selection import client_order

PHASES = {
    "received": "received,\nbefore training",
    "trained": "after its\nown training",
    "personal": "would use after\naggregation",
}
_VIOLIN = 8  # values below which a density says nothing
_SHOWN_ROUNDS = 6
_OVERLAP = "collaboration/overlap/"


def client_violins(runs: Runs) -> Figure:
    """Draw how accuracy spreads over clients, each on its own test samples, by the model that it has.

    Every dot is a client; the worst tenth, ``max(1, floor(K / 10))`` of each run's K clients, is marked, and a line
    shows its mean. A density is drawn from eight clients on, cut at the extremes. Several seeds: all their clients, and
    the 95 % interval of the worst tenth's mean.

    Raises
    ------
    ValueError
        No client was tested.
    """
    found = as_list(runs)
    phases = [phase for phase in PHASES if any(run.by_client(phase) for run in found)]
    if not phases:
        raise ValueError("no client was tested on its own samples: evaluation.personal=false")
    figure, axes = style.new_axes(2.0 * len(phases) + 2.6, 4.2)
    told = []
    for place, phase in enumerate(phases):
        tested = [np.sort(list(run.by_client(phase).values())) for run in found if run.by_client(phase)]
        worst = _violin(axes, place, tested)
        told.append(f"{' '.join(PHASES[phase].split())}: mean {_mean(tested):.1f}, worst tenth {100 * worst:.1f}")
    axes.set_xticks(range(len(phases)), [PHASES[phase] for phase in phases])
    axes.set_xlim(-0.6, len(phases) - 0.4)
    axes.grid(visible=False, axis="x")
    style.percent_axis(axes)
    style.label(axes, "model that the client has", "accuracy on the client's own test samples (%)")
    style.title(axes, f"Accuracy of each client{seeds_note(len(found))}")
    style.legend_outside(axes)
    figure.set_label(f"Distribution over clients, in percent. {'; '.join(told)}.")
    return figure


def _mean(tested: list[NDArray[np.float64]]) -> float:
    return 100 * float(np.mean([values.mean() for values in tested]))


def _violin(axes: Axes, place: int, tested: list[NDArray[np.float64]]) -> float:
    """Draw one violin at ``place`` and return the worst tenth's mean."""
    everyone = np.concatenate(tested)
    if len(everyone) >= _VIOLIN:
        parts = axes.violinplot([everyone], [place], widths=0.75, showextrema=False)
        for body in parts["bodies"]:  # type: ignore[attr-defined, unused-ignore]
            body.set(facecolor=style.PALETTE[5], alpha=0.35, edgecolor="none")
    first = place == 0
    tenths = [values[: max(1, len(values) // 10)] for values in tested]
    others = np.concatenate([values[len(tenth) :] for values, tenth in zip(tested, tenths, strict=True)])
    worst = np.concatenate(tenths)
    axes.plot(_beside(place, others), others, "o", color=style.PALETTE[0], markersize=4, alpha=0.8, ls="",
              label="client" if first else None)  # fmt: skip
    axes.plot(_beside(place, worst), worst, "D", color=style.BAD, markersize=5, ls="",
              label="worst tenth" if first else None)  # fmt: skip
    means = np.asarray([[tenth.mean() for tenth in tenths]]).T
    mean, half = (float(value[0]) for value in interval(means))
    axes.hlines(mean, place - 0.3, place + 0.3, color=style.BAD, linewidth=1.6,
                label="mean of the\nworst tenth" if first else "")  # fmt: skip
    if np.isfinite(half):
        axes.errorbar(place + 0.3, mean, half, fmt="none", ecolor=style.BAD, elinewidth=1.4, capsize=3)
    middle = float(np.mean([values.mean() for values in tested]))
    axes.hlines(middle, place - 0.3, place + 0.3, color=style.INK, linewidth=1.6, label="mean" if first else "")
    return mean


def _beside(place: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where dots stand so that neighbours do not hide each other: in turns to the left and to the right."""
    steps = np.array([0.0, -0.08, 0.08, -0.16, 0.16])
    return place + steps[np.arange(len(values)) % len(steps)]


def collaboration(runs: Runs) -> Figure:
    """Draw how much the critical parameters of clients overlap (FedCAC), at up to six rounds from first to last.

    Row i, column j: O_ij. A dot: j is at or above the round's threshold, so i's customised model takes it in. The
    colour scale goes from the lowest to the highest overlap of any pair, not from 0 to 1.

    Raises
    ------
    ValueError
        No overlap was recorded (another strategy, or too many clients), or there are several runs.
    """
    run = the_one(runs, "the collaboration heat map")
    table = run.metrics[(run.metrics["phase"] == "server") & run.metrics["name"].str.startswith(_OVERLAP)]
    if table.empty:
        raise ValueError("no overlap of critical parameters was recorded: strategy/collaboration=fedcac records it")
    rounds = np.unique(table["round"])
    shown = [int(rounds[i]) for i in np.unique(np.linspace(0, len(rounds) - 1, _SHOWN_ROUNDS).round().astype(int))]
    pairs = table["name"].str.removeprefix(_OVERLAP).str.split("/", n=1, expand=True)
    clients = sorted(set(pairs[0]), key=client_order)
    table = table.assign(one=pairs[0], other=pairs[1])
    low, high = float(table["value"].min()), float(table["value"].max())
    figure, panels = _panels(len(shown), len(clients))
    told = []
    for axes, server_round in zip(panels, shown, strict=True):
        overlap = _square(table[table["round"] == server_round], clients)
        image = axes.imshow(np.ma.masked_invalid(overlap), cmap=style.shades(), vmin=low, vmax=max(high, low + 1e-9))
        taken = _mark_collaborators(axes, overlap, _threshold(run, server_round), low, high)
        _name_clients(axes, clients)
        style.title(axes, f"round {server_round + 1}: {taken} pairs", size=10, pad=5)
        told.append(f"round {server_round + 1} {taken}")
    style.colour_bar(figure, image, panels, "overlap of critical parameters", rates=False)
    title = "Who takes in whom (dots)" if len(shown) > 1 else "Who takes\nin whom (dots)"
    figure.suptitle(title, color=style.INK, fontsize=12)
    figure.set_label(f"Heat maps of {len(clients)} clients. Ordered pairs that collaborate: {', '.join(told)}.")
    return figure


def _panels(count: int, clients: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    side = float(np.clip(0.17 * clients + 1.1, 2.2, 4.0))
    figure = style.new_figure(side * columns + 1.0, side * lines + 0.6)
    return figure, [style.dress(figure.add_subplot(lines, columns, i + 1)) for i in range(count)]


def _square(rows: pd.DataFrame, clients: list[str]) -> NDArray[np.float64]:
    wide = rows.pivot_table(index="one", columns="other", values="value", aggfunc="last")
    return wide.reindex(index=clients, columns=clients).to_numpy(dtype=np.float64)


def _threshold(run: Run, server_round: int) -> float:
    table = run.metrics
    rows = table[(table["name"] == "collaboration/threshold") & (table["round"] == server_round)]
    return float(rows["value"].iloc[-1]) if len(rows) else float("nan")


def _mark_collaborators(axes: Axes, overlap: NDArray[np.float64], threshold: float, low: float, high: float) -> int:
    taken = np.argwhere(overlap >= threshold)
    for row, column in taken:
        dark = overlap[row, column] > low + 0.55 * (high - low)
        colour = style.ON_DARK if dark else style.ON_LIGHT
        axes.plot(column, row, "o", color=colour, markersize=3.5 if len(overlap) <= 20 else 2)
    return len(taken)


def _name_clients(axes: Axes, clients: list[str]) -> None:
    every = 1 + len(clients) // 16
    places = range(0, len(clients), every)
    names = [style.plain(clients[i], most=6) for i in places]
    turned = 90 if any(len(name) > 2 for name in names) else 0
    axes.set_xticks(list(places), names, rotation=turned, fontsize=8)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.grid(visible=False)
