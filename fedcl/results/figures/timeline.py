"""A run as it went: tasks, updates, faults and requests on one time axis."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, the_one
from fedcl.results.run import Run
from fedcl.server.selection import client_order

FAULTS = ("client_failed", "reply_rejected", "update_dropped", "round_skipped", "round_retried")
"""Kinds of events that cost a reply or a round."""
_SERVER = "(server)"
_ROUNDS = "server rounds done"
_NAMED_CLIENTS = 30
_TRACED = 2000  # updates up to which each has its line, and is a vector
_NAMED_TASKS = 8


def timeline(runs: Runs) -> Figure:
    """Draw when each client's updates arrived, by task; the faults; and the requests to forget, as they were served.

    Time is the virtual clock where it moves, else server rounds. Where everybody is waited for an update stands at the
    end of its round. A line leads to an update from the moment when its model was the newest, so late ones have long
    lines. A fault stands in the round of its event.

    Raises
    ------
    ValueError
        Nothing was trained, or there are several runs.
    """
    run = the_one(runs, "the timeline")
    table = run.metrics
    trained = table[(table["phase"] == "train") & (table["name"] == "num_examples")]
    if trained.empty:
        raise ValueError("nothing was trained yet")
    clock, unit = _clock(run)
    faults = run.events[run.events["kind"].isin(FAULTS)]
    rows = _rows(trained, faults)
    figure, axes = style.new_axes(8.0, float(np.clip(0.2 * len(rows) + 1.7, 2.6, 9.0)))
    tasks = sorted(int(task) for task in trained["task"].unique())
    shades = dict(zip(tasks, style.colours(len(tasks)), strict=True))
    _draw_updates(axes, _with_arrivals(run, trained, clock, unit), rows, clock, shades)
    _draw_faults(axes, faults, rows, clock)
    requests = _draw_requests(axes, run, clock)
    _name_rows(axes, rows)
    end = max(clock.values())
    axes.set(xlim=(min(clock.values()) - 0.02 * end, 1.02 * end), ylim=(len(rows) - 0.4, -0.6))
    axes.grid(visible=False)
    if unit == _ROUNDS:
        style.whole_numbers(axes)
    style.label(axes, unit, "client")
    style.title(axes, "What happened when", pad=24 if requests else 8)
    _legend(axes, shades, bool(len(faults)), bool(requests))
    figure.set_label(
        f"Timeline of {len(trained)} updates of {trained['client'].nunique()} clients in {len(tasks)} tasks, "
        f"{len(faults)} faults" + (f", requests served: {', '.join(requests)}." if requests else ", no requests.")
    )
    return figure


def _clock(run: Run) -> tuple[dict[int, float], str]:
    """Return round -> when it was over, and the axis's name; round -1 is the beginning."""
    times = run.metrics[run.metrics["round"] >= 0].groupby("round")["virtual_time"].max()
    if len(times) and times.max() > 0:
        return {-1: 0.0} | {int(str(at)): float(time) for at, time in times.items()}, "virtual time (s)"
    return {-1: 0.0} | {int(str(at)): float(str(at)) + 1 for at in times.index}, _ROUNDS


def _rows(trained: pd.DataFrame, faults: pd.DataFrame) -> dict[str, int]:
    """Return client -> its row, the server's last where a fault concerns no client."""
    clients = {str(client) for client in trained["client"]} | set(_clients_of(faults))
    names = sorted(clients - {_SERVER}, key=client_order) + ([_SERVER] if _SERVER in clients else [])
    return {name: row for row, name in enumerate(names)}


def _clients_of(faults: pd.DataFrame) -> list[str]:
    known: Iterable[object] = faults["client"] if "client" in faults else [None] * len(faults)
    return [client if isinstance(client, str) and client else _SERVER for client in known]


def _with_arrivals(run: Run, trained: pd.DataFrame, clock: dict[int, float], unit: str) -> pd.DataFrame:
    """Return each update with its age and when it came, which runs of old and synchronous ones did not write down."""
    table, keys = trained[["round", "client", "task"]], ["round", "client", "task"]
    for name in ("age", "arrival"):
        told = run.metrics[(run.metrics["phase"] == "train") & (run.metrics["name"] == name)]
        table = table.merge(told[[*keys, "value"]].rename(columns={"value": name}), how="left", on=keys)
    counted = table["round"].map(clock)
    came = counted if unit == _ROUNDS else table["arrival"].fillna(counted)
    return table.assign(age=table["age"].fillna(0.0), arrival=came)


def _draw_updates(
    axes: Axes, updates: pd.DataFrame, rows: dict[str, int], clock: dict[int, float], shades: dict[int, str]
) -> None:
    many = len(updates) > _TRACED
    size = 3.0 if len(updates) > 400 else 4.5
    for task, group in updates.groupby("task"):
        colour = shades[int(str(task))]
        x = group["arrival"].to_numpy(dtype=np.float64)
        y = group["client"].map(rows).to_numpy(dtype=np.float64)
        if not many:
            since = (group["round"] - group["age"] - 1).clip(lower=-1).astype("int64").map(lambda at: _at(clock, at))
            ends = np.stack([np.stack([since.to_numpy(dtype=np.float64), y], 1), np.stack([x, y], 1)], 1)
            axes.add_collection(LineCollection(list(ends), colors=colour, linewidths=1.2, alpha=0.45))
        axes.plot(x, y, "o", color=colour, markersize=size, ls="", rasterized=many)


def _draw_faults(axes: Axes, faults: pd.DataFrame, rows: dict[str, int], clock: dict[int, float]) -> None:
    if len(faults):
        x = [_at(clock, int(at)) for at in faults["round"]]
        y = [rows[client] for client in _clients_of(faults)]
        axes.plot(x, y, "x", color=style.INK, markersize=7, markeredgewidth=1.8, ls="", zorder=4)


def _draw_requests(axes: Axes, run: Run, clock: dict[int, float]) -> list[str]:
    """Draw a line where requests were served and return their ids."""
    served = run.events[run.events["kind"] == "request_served"]
    ids: list[str] = []
    before = -np.inf
    for _, event in served.iterrows():
        # an event's round is the one that would have come next
        x = _at(clock, int(event["round"]) - 1)
        names = [str(name) for name in event["requests"]]
        axes.axvline(x, color=style.INK, linewidth=1.2, linestyle=(0, (1, 1.5)), zorder=3)
        text = ", ".join(map(style.plain, names))
        # neighbours too close for one line of text take turns
        higher = (x - before) < 0.16 * max(clock.values()) and len(ids) % 2 == 1
        axes.annotate(
            text, (x, 1.0), (0, 14 if higher else 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", color=style.INK, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
        before = x
        ids += names
    return ids


def _at(clock: dict[int, float], server_round: int) -> float:
    """Return when a round was over; of one in which nothing was measured, when the last before it was."""
    known = [at for at in clock if at <= server_round]
    return clock[max(known)] if known else 0.0


def _name_rows(axes: Axes, rows: dict[str, int]) -> None:
    if len(rows) <= _NAMED_CLIENTS:
        axes.set_yticks(list(rows.values()), [style.plain(name) for name in rows])
        axes.tick_params(axis="y", labelsize=9)
    else:
        axes.set_yticks([])


def _legend(axes: Axes, shades: dict[int, str], faults: bool, requests: bool) -> None:
    def dot(colour: str, name: str) -> Line2D:
        return Line2D([], [], marker="o", ls="-", lw=1.2, color=colour, label=name)

    shown = list(shades.items())
    if len(shown) > _NAMED_TASKS:
        shown = [shown[0], shown[-1]]
    entries = [dot(colour, f"task {task}") for task, colour in shown]
    if faults:
        entries.append(Line2D([], [], marker="x", ls="", color=style.INK, markeredgewidth=1.8, label="fault"))
    if requests:
        entries.append(Line2D([], [], ls=(0, (1, 1.5)), color=style.INK, label="request\nserved"))
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5,
                labelcolor=style.INK)  # fmt: skip
