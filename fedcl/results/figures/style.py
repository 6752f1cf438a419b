"""How every figure looks: colours, axes, legends. Made without pyplot and without touching ``rcParams``.

A style context changes ``rcParams`` for every thread; so nothing here does, and figures can be drawn from any thread
and without a screen. Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

# Okabe and Ito, "Color Universal Design", 2008; yellow left out, it is too faint for lines on white
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A5C00")
INK, GREY, GRID, MISSING = "#222222", "#767676", "#E3E3E3", "#EEEEEE"
ON_LIGHT, ON_DARK = "#111111", "#FFFFFF"
"""Text upon a coloured cell: the cell keeps its colour in a dark theme, and so does the text."""
HEAT = "YlGnBu"  # light to dark: told apart with a colour deficiency and in grey print
BAD = PALETTE[3]
MARKED_POINTS = 40
"""Points of a curve up to which each is marked."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches.

    It is white, so that its dark words can be read in a dark notebook, too; only SVG files are not
    (:func:`fedcl.results.figures.render`), which the report shows in the colours of its theme.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, sizes in inches."""
    figure = new_figure(width, height)
    return figure, dress(figure.add_subplot())


def new_row(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` pairs of axes side by side that share their vertical axis."""
    figure = new_figure(width, height)
    grid = figure.subplots(1, count, sharey=True, squeeze=False)
    return figure, [dress(axes) for axes in grid[0]]


def dress(axes: Axes) -> Axes:
    """Give axes the common look and return them."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=10)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def title(axes: Axes, text: str, *, pad: float = 8.0, size: float = 12.0) -> None:
    """Write what the axes show above them."""
    # at a given height: matplotlib would measure every tick to find one, and no axes here have ticks above
    axes.set_title(text, color=INK, fontsize=size, pad=pad, y=1.0)


def label(axes: Axes, x: str, y: str = "") -> None:
    """Name the axes' directions."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def plain(text: str, most: int = 12) -> str:
    """Return a name as it is written in a figure: cut short, and no mathematics however many dollars it has."""
    short = text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return short.replace("$", r"\$")


def colours(count: int) -> list[str]:
    """Return ``count`` colours: the palette's, or of an ordered scale where there are more."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    scale = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, count))
    return [matplotlib.colors.to_hex(colour) for colour in scale]


def percent_axis(axes: Axes) -> None:
    """Write the vertical axis, whose values are rates, in percent."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def whole_numbers(axes: Axes) -> None:
    """Put ticks of the horizontal axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def shades() -> Colormap:
    """Return the scale of heat maps; what is missing is grey."""
    return matplotlib.colormaps[HEAT].with_extremes(bad=MISSING)


def colour_bar(
    figure: Figure, image: AxesImage, axes: Axes | list[Axes], text: str = "", *, rates: bool = True
) -> None:
    """Put the key to a heat map's colours beside it, in percent where they are ``rates``."""
    ticks = PercentFormatter(1.0) if rates else None
    bar = figure.colorbar(image, ax=axes, format=ticks, fraction=0.046 if rates else 0.03, pad=0.03)
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    bar.ax.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    if text:
        bar.set_label(text, color=INK)


def legend_outside(axes: Axes, columns: int = 1) -> None:
    """Put the legend to the right of the axes, where no data are."""
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5, ncols=columns, labelcolor=INK
    )
    legend.set_in_layout(True)


def curve(
    axes: Axes,
    x: NDArray[np.float64],
    table: pd.DataFrame,
    colour: str,
    *,
    name: str = "",
    width: float = 1.6,
    line: str = "-",
    start: int = 0,
    marks: bool = True,
    zorder: float = 2.0,
) -> None:
    """Draw a mean with its 95 % band from row ``start`` on; ``table`` has columns ``mean`` and ``half``.

    The rows up to ``start`` are drawn thin.
    """
    marker = "o" if marks and len(x) <= MARKED_POINTS else ""
    mean, half = table["mean"].to_numpy(), table["half"].to_numpy()
    if start:
        axes.plot(x[: start + 1], mean[: start + 1], color=colour, linewidth=0.8, alpha=0.45)
    axes.plot(
        x[start:], mean[start:], line, color=colour, linewidth=width, marker=marker, markersize=3.5, label=name or None,
        zorder=zorder,
    )  # fmt: skip
    if np.isfinite(half[start:]).any():
        low, high = (mean - half)[start:], (mean + half)[start:]
        axes.fill_between(x[start:], low, high, color=colour, alpha=0.18, linewidth=0, zorder=zorder - 0.5)
