"""All figures of a run by name: what each shows, which of them the run has data for, and their files."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedcl.results.figures.accuracy import accuracy_by_task, accuracy_matrix, forgetting_bars
from fedcl.results.figures.clients import client_violins, collaboration
from fedcl.results.figures.efficiency import accuracy_against_cost
from fedcl.results.figures.lateness import estimation_error, staleness_histogram
from fedcl.results.figures.seeds import Runs
from fedcl.results.figures.stability import stability_gap
from fedcl.results.figures.subspace import subspace_rank
from fedcl.results.figures.timeline import timeline
from fedcl.results.figures.unlearning import revival_curve, unlearning_gaps

_DPI = 150
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class Entry:
    """A figure: its name, a title, what it shows in a sentence, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Runs], Figure]


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn; ``figure.get_label()`` tells it in words."""

    entry: Entry
    figure: Figure


CATALOGUE = (
    Entry(
        "accuracy_matrix",
        "Accuracy matrix",
        "Test accuracy of the global model on every task (column) after every task (row); framed where the task has "
        "just been learned.",
        accuracy_matrix,
    ),
    Entry(
        "accuracy_by_task",
        "Accuracy by task over rounds",
        "Test accuracy of the global model on each task; thin before the task is learned. Dashed lines "
        "mark task changes.",
        accuracy_by_task,
    ),
    Entry(
        "accuracy_by_task_time",
        "Accuracy by task over virtual time",
        "The same curves over virtual time, in which slow devices take longer.",
        functools.partial(accuracy_by_task, over="virtual_time"),
    ),
    Entry(
        "forgetting_bars",
        "Forgetting",
        "Forgetting of each task but the last; below zero, the accuracy rose after the task was learned.",
        forgetting_bars,
    ),
    Entry(
        "accuracy_against_cost",
        "Accuracy against cost",
        "Mean accuracy over the tasks reached against traffic, training FLOPs and virtual time so far.",
        accuracy_against_cost,
    ),
    Entry(
        "client_violins",
        "Accuracy of each client",
        "Each dot is a client on its own test samples, by the model that it has; red is the worst tenth.",
        client_violins,
    ),
    Entry(
        "collaboration",
        "Collaboration",
        "Overlap of critical parameters between clients (FedCAC); a dot marks whose parameters (column) a client (row) "
        "takes into its own model. The colour scale spans the lowest to the highest overlap.",
        collaboration,
    ),
    Entry(
        "subspace_rank",
        "Protected subspace",
        "Rank of the subspace that updates may not touch any more, by layer and task (FOT); the colour is its share of "
        "the layer's inputs.",
        subspace_rank,
    ),
    Entry(
        "staleness_histogram",
        "Age of updates",
        "How many versions of the global model passed between an update's start and its use.",
        staleness_histogram,
    ),
    Entry(
        "estimation_error",
        "Error of late updates",
        "How far a late change, and what gradient inversion made of it, were from the client's next true one.",
        estimation_error,
    ),
    Entry(
        "timeline",
        "Timeline",
        "When each client's updates arrived (where all are waited for: when they counted), coloured by task; lines "
        "lead back to when the model they started from was the newest; crosses are faults, dotted lines unlearning "
        "requests.",
        timeline,
    ),
    Entry(
        "unlearning_gaps",
        "Unlearning against retraining",
        "Each unlearning metric minus that of the retrained reference: hollow before the request, filled after it. "
        "Zero is the aim; the shaded rows are about the forget set.",
        unlearning_gaps,
    ),
    Entry(
        "revival_curve",
        "Revival",
        "Accuracy on the forget set as training continues; dashed is the retrained reference, the hollow mark the "
        "model before the request.",
        revival_curve,
    ),
    Entry(
        "stability_gap",
        "Stability gap",
        "Accuracy of the clients' own models by local step; triangles mark each task's lowest point since it was "
        "learned, the dotted line is min-ACC.",
        stability_gap,
    ),
)


def draw_all(runs: Runs) -> tuple[list[Drawn], dict[str, str]]:
    """Draw every figure that the runs have data for; return them, and title -> reason of the others."""
    drawn, absent = [], {}
    for entry in CATALOGUE:
        try:
            drawn.append(Drawn(entry, entry.draw(runs)))
        except ValueError as error:
            absent[entry.title] = _reason(error)
    return drawn, absent


def render(figure: Figure, kind: str) -> bytes:
    """Return the figure as the bytes of a ``svg``, ``pdf`` or ``png`` (150 dpi) file.

    They are the same for the same figure, but for the ids in an SVG file.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")  # the places hold for every file
    buffer = io.BytesIO()
    shown, background, dots = figure.canvas, figure.get_facecolor(), figure.dpi
    try:
        figure.set(dpi=_DPI, facecolor="none" if kind == "svg" else "white")
        # savefig would draw everything once more, to find places that are found already
        getattr(_canvas(kind)(figure), f"print_{kind}")(buffer, metadata=_METADATA[kind])
    finally:
        figure.set(dpi=dots, facecolor=background)
        figure.set_canvas(shown)
    return buffer.getvalue()


def _canvas(kind: str) -> type[FigureCanvasBase]:
    """Return what draws into a kind of file, imported when it is asked for: a page needs no PDF."""
    if kind == "svg":
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        return FigureCanvasSVG
    if kind == "pdf":
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        return FigureCanvasPdf
    return FigureCanvasAgg


def save_all(runs: Runs, folder: Path | str, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every figure that there are data for and return the files.

    Parameters
    ----------
    runs
        A run, finished or not, or several seeds of it.
    folder
        Where to write; made when missing.
    kinds
        Of ``png`` (150 dpi), ``svg`` and ``pdf``.

    Returns
    -------
    list of Path
        The files; empty before the first evaluation.
    """
    return write(draw_all(runs)[0], folder, kinds)


def write(drawn: Sequence[Drawn], folder: Path | str, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write figures that were drawn as files named after them, and return the files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = []
    for one in drawn:
        for kind in kinds:
            file = Path(folder) / f"{one.entry.name}.{kind}"
            file.write_bytes(render(one.figure, kind))
            files.append(file)
    return files


def _reason(error: ValueError) -> str:
    """Return why there is no figure, without the path of the run."""
    text = str(error)
    place, found, rest = text.partition(": has ")
    return f"has {rest}" if found and "/" in place else text
