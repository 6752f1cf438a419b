"""Late updates: how late they were, and how far off what was made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedcl.results.figures import style
from fedcl.results.figures.seeds import Runs, as_list, over_seeds, seeds_note

_GUESSES = {"late": "the late change as it came", "inverted": "what inversion made of it"}
_BARS = 60


def staleness_histogram(runs: Runs) -> Figure:
    """Draw how many updates counted at each age, in versions of the global model.

    Several seeds: means and their 95 % intervals.

    Raises
    ------
    ValueError
        No update was late, or could be.
    """
    found = as_list(runs)
    ages = [run.staleness() for run in found]
    if not any(len(counts) for counts in ages):
        raise ValueError("no update could be late: every round waited for everybody (async.buffer, async.deadline)")
    oldest = max(int(counts.index.max()) for counts in ages if len(counts))
    if oldest == 0:
        raise ValueError("no update was late: all came before their round closed (devices, async.deadline)")
    whole = range(oldest + 1)
    width = 1 + oldest // _BARS
    table = over_seeds([_binned(counts.reindex(whole, fill_value=0), width) for counts in ages])
    figure, axes = style.new_axes(6.4, 3.8)
    x = table.index.to_numpy(dtype=np.float64) * width + (width - 1) / 2
    axes.bar(x, table["mean"], 0.85 * width, color=style.PALETTE[0])
    if table["half"].notna().any():
        axes.errorbar(x, table["mean"], table["half"], fmt="none", ecolor=style.INK, elinewidth=1.1, capsize=2.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.7, max(oldest, 3) + 0.7)
    style.whole_numbers(axes)
    if len(found) == 1:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.label(axes, "age (versions of the global model)", "updates")
    total = float(table["mean"].sum())
    late = 1 - float(ages[0].get(0, 0)) / max(int(ages[0].sum()), 1)
    share = f": {100 * late:.0f} % late" if len(found) == 1 else ""
    style.title(axes, f"Age of the updates that counted{share}{seeds_note(len(found))}")
    figure.set_label(f"Histogram of {total:.0f} updates; the oldest was {oldest} versions late{share}.")
    return figure


def estimation_error(runs: Runs) -> Figure:
    """Draw how far a late change, and what inversion made of it, were from the client's next true one, by age.

    Error: L1 distance by the L1 norm of the true change, told when the client's next fresh update came. A dot is a
    comparison; the line is the mean at each age, with its 95 % interval over seeds where there are several runs.

    Raises
    ------
    ValueError
        Nothing was compared.
    """
    found = as_list(runs)
    told = [run.events[run.events["kind"] == "hindsight"] for run in found]
    if not any(len(rows) for rows in told):
        raise ValueError("no late update was compared with a later one: strategy/staleness=gradient_inversion does it")
    figure, axes = style.new_axes(6.8, 3.9)
    words = []
    for place, (name, text) in enumerate(_GUESSES.items()):
        colour, shift = style.PALETTE[(3, 0)[place]], (-0.09, 0.09)[place]
        everything = pd.concat([rows[["age", name]].astype("float64") for rows in told if len(rows)])
        axes.plot(
            everything["age"] + shift, everything[name], "x+"[place], color=colour, markersize=5, ls="", alpha=0.55
        )
        means = over_seeds([rows.astype({"age": "float64", name: "float64"}).groupby("age")[name].mean()
                            for rows in told if len(rows)])  # fmt: skip
        style.curve(axes, means.index.to_numpy(dtype=np.float64) + shift, means, colour, name=text)
        words.append(f"{text} {everything[name].mean():.2f}")
    axes.axhline(1.0, color=style.GREY, linewidth=1.1, linestyle=(0, (4, 3)), label="no change at all")
    axes.set_ylim(bottom=0.0)
    style.whole_numbers(axes)
    style.label(axes, "age of the late update (versions)", "relative L1 error")
    style.title(axes, f"Error of late updates, told in hindsight{seeds_note(len(found))}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=9.5, ncols=3,
                labelcolor=style.INK)  # fmt: skip
    figure.set_label(f"Mean relative error over all ages: {'; '.join(words)}.")
    return figure


def _binned(counts: pd.Series[int], width: int) -> pd.Series[float]:
    return counts.groupby(counts.index // width).sum().astype("float64")
