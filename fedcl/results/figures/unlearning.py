"""What a model that was asked to forget still knows, next to one that was trained all over."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, interval, over_seeds, seeds_note
from fedcl.results.run import Run

MEASURES = {
    "forget_train_accuracy": "accuracy, forget set",
    "forget_test_accuracy": "accuracy, tests like it",
    "retain_train_accuracy": "accuracy, retain set",
    "retain_test_accuracy": "accuracy, other tests",
    "test_accuracy": "accuracy, all tests",
    "mia_entropy": "called member (entropy)",
    "auc_loss": "attack AUC (loss)",
    "linear_probe": "linear probe",
}
"""Measure of the unlearning panel -> how a figure calls it; all are rates."""
_PANELS = 6
_REVIVAL = "revival/"


def unlearning_gaps(runs: Runs) -> Figure:
    """Draw the unlearning panel as differences to the retrained model, one column for each time requests were served.

    Zero is what training all over without the forget set gives: on either side of it something can be told. The hollow
    mark is the model before the request, the filled one after it. Several seeds: means with 95 % intervals.

    Raises
    ------
    ValueError
        No retrained model was measured.
    """
    found = as_list(runs)
    tables = [_gaps(run) for run in found]
    served = list(dict.fromkeys(name for table in tables for name in table))
    if not served:
        raise ValueError("nothing was measured next to a retrained model: no request was served, or none was trained")
    shown = served[-_PANELS:]
    measures = [m for m in MEASURES if any(m in table[name] for table in tables for name in shown if name in table)]
    figure, panels = style.new_row(len(shown), 2.3 + 1.75 * len(shown) + 0.6, 0.36 * len(measures) + 1.9)
    told = []
    for axes, name in zip(panels, shown, strict=True):
        frames = [table[name] for table in tables if name in table]
        last = _draw_gaps(axes, frames, measures)
        style.title(axes, style.plain(name, most=22), size=10)
        told.append(f"{name}: {last}")
    # inverted, and shared: the first measure is at the top
    panels[0].set_yticks(range(len(measures)), [MEASURES[measure] for measure in measures])
    panels[0].set_ylim(len(measures) - 0.5, -0.5)
    _same_width(panels)
    figure.supxlabel("difference to the retrained model (percentage points)", color=style.INK, fontsize=10)
    missing = f", the last {len(shown)} of {len(served)}" if len(shown) < len(served) else ""
    figure.suptitle(f"Unlearning against retraining{missing}{seeds_note(len(found))}", color=style.INK, fontsize=12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9.5,
                  labelcolor=style.INK)  # fmt: skip
    figure.set_label(f"Differences to the retrained model in percentage points, before and after. {'; '.join(told)}.")
    return figure


def revival_curve(runs: Runs) -> Figure:
    """Draw what the global model knows of each forgotten set while training goes on after the request.

    A curve for each request: accuracy on the tests like its forget set, or on the set itself where there are none. The
    dashed line of the same colour is the retrained model at the time of the request, the hollow mark the model before
    it. Several seeds: means with 95 % bands.

    Raises
    ------
    ValueError
        No request was served before a test.
    """
    found = as_list(runs)
    tables = [run.metrics[run.metrics["phase"] == "unlearning"] for run in found]
    names = list(dict.fromkeys(name for table in tables for name in table["name"] if name.startswith(_REVIVAL)))
    if not names:
        raise ValueError("no request was served before a test of the model")
    served = [_served(run) for run in found]
    figure, axes = style.new_axes(8.0, 4.0)
    end = max(int(table["round"].max()) for table in tables) + 1
    told = []
    for name, colour in zip(names, style.colours(len(names)), strict=True):
        curve = over_seeds([table[table["name"] == name].groupby("round")["value"].last() for table in tables])
        request = name.removeprefix(_REVIVAL)
        style.curve(axes, curve.index.to_numpy(dtype=np.float64) + 1, curve, colour, name=style.plain(request, most=20))
        before, ideal, when = _levels(tables, served, request)
        if np.isfinite(ideal):
            axes.hlines(ideal, when, end, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
        if np.isfinite(before):
            axes.plot([when], [before], "o", markerfacecolor="none", color=colour, markersize=6)
        told.append(f"{request} {100 * curve['mean'].iloc[-1]:.1f}")
    style.percent_axis(axes)
    axes.set(ylim=(-0.03, 1.03))
    style.whole_numbers(axes)
    axes.plot([], [], color=style.GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="retrained")
    axes.plot([], [], "o", markerfacecolor="none", color=style.GREY, markersize=6, label="before the\nrequest")
    style.label(axes, "server rounds done", "accuracy on what was forgotten (%)")
    style.title(axes, f"Accuracy on what was forgotten{seeds_note(len(found))}")
    style.legend_outside(axes, columns=1 + len(names) // 14)
    figure.set_label(f"Accuracy on what was forgotten, in percent at the end: {', '.join(told)}.")
    return figure


def _served(run: Run) -> dict[int, list[str]]:
    """Return round that was over when they were served -> ids of requests."""
    events = run.events[run.events["kind"] == "request_served"]
    return {int(event["round"]) - 1: [str(name) for name in event["requests"]] for _, event in events.iterrows()}


def _gaps(run: Run) -> dict[str, pd.DataFrame]:
    """Return ids served together -> measure by row, columns ``before`` and ``after``: differences to the retrained."""
    served = _served(run)
    table = run.metrics[run.metrics["phase"] == "unlearning"]
    found = {}
    for server_round, rows in table.groupby("round"):
        values = rows.groupby("name")["value"].last()
        gaps = {
            measure: {
                "after": values[measure] - values[f"reference/{measure}"],
                "before": values.get(f"original/{measure}", np.nan) - values[f"reference/{measure}"],
            }
            for measure in MEASURES
            if {measure, f"reference/{measure}"} <= set(values.index)
        }
        if gaps:
            names = served.get(int(str(server_round)), [f"round {int(str(server_round)) + 1}"])
            found[", ".join(names)] = pd.DataFrame(gaps)
    return found


def _draw_gaps(axes: Axes, frames: list[pd.DataFrame], measures: list[str]) -> str:
    axes.axvline(0.0, color=style.INK, linewidth=1.1, zorder=1)
    forget_rows = sum(measure.startswith("forget") for measure in measures)
    axes.axhspan(-0.5, forget_rows - 0.5, color=style.GREY, alpha=0.10, linewidth=0)
    words = []
    for kind in ("before", "after"):
        values_SN = np.stack([frame.reindex(columns=measures).loc[kind].to_numpy(dtype=np.float64) for frame in frames])
        mean, half = interval(values_SN)
        y = np.arange(len(measures))
        if kind == "before":
            axes.plot(mean, y, "o", markerfacecolor="none", color=style.PALETTE[1], markersize=8, ls="", label="before")
        else:
            axes.errorbar(mean, y, xerr=None if np.isnan(half).all() else np.nan_to_num(half), fmt="o",
                          color=style.PALETTE[0], markersize=5, capsize=2.5, label="after")  # fmt: skip
            words = [f"{MEASURES[m]} {100 * v:+.1f}" for m, v in zip(measures, mean, strict=True) if np.isfinite(v)]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):+g}" if value else "0"))
    return ", ".join(words)


def _same_width(panels: list[Axes]) -> None:
    """Give all columns the same scale, zero in its middle."""
    reach = 1.08 * max(0.05, *(abs(limit) for axes in panels for limit in axes.get_xlim()))
    # one round number each way, well inside, so that neighbours' labels keep apart
    size = 10.0 ** np.floor(np.log10(0.75 * reach))
    tick = size * max(step for step in (1, 2, 5) if step * size <= 0.75 * reach)
    for axes in panels:
        axes.set_xlim(-reach, reach)
        axes.set_xticks([-tick, 0.0, tick])
        axes.tick_params(axis="x", labelsize=8.5)


def _levels(tables: list[pd.DataFrame], served: list[dict[int, list[str]]], request: str) -> tuple[float, float, float]:
    """Return mean accuracy before the request and of the retrained model, and the rounds done when it was served."""
    before, ideal, when = [], [], []
    for table, rounds in zip(tables, served, strict=True):
        for server_round, names in rounds.items():
            if request not in names:
                continue
            when.append(server_round + 1)
            # measured for all that were served together: it is this request's own only where it was served alone
            values = table[table["round"] == server_round].groupby("name")["value"].last()
            measure = "forget_test_accuracy" if "forget_test_accuracy" in values else "forget_train_accuracy"
            if len(names) == 1:
                before.append(float(values.get(f"original/{measure}", np.nan)))
                ideal.append(float(values.get(f"reference/{measure}", np.nan)))
    return _mean(before), _mean(ideal), _mean(when)


def _mean(values: list[float] | list[int]) -> float:
    return float(np.mean(values)) if values else float("nan")
