"""The figures of a run: one public function each, from a ``Run`` or several seeds of one to a matplotlib ``Figure``.

A function raises ValueError, saying what is missing, where the runs lack its data. ``figure.get_label()`` tells what a
figure shows in words.
"""

from __future__ import annotations

from fedcl.results.figures.accuracy import accuracy_by_task, accuracy_matrix, forgetting_bars
from fedcl.results.figures.catalogue import CATALOGUE, Drawn, Entry, draw_all, render, save_all, write
from fedcl.results.figures.clients import client_violins, collaboration
from fedcl.results.figures.efficiency import accuracy_against_cost
from fedcl.results.figures.lateness import estimation_error, staleness_histogram
from fedcl.results.figures.stability import stability_gap
from fedcl.results.figures.style import HEAT, INK, PALETTE
from fedcl.results.figures.subspace import subspace_rank
from fedcl.results.figures.timeline import timeline
from fedcl.results.figures.unlearning import revival_curve, unlearning_gaps

__all__ = [
    "CATALOGUE",
    "HEAT",
    "INK",
    "PALETTE",
    "Drawn",
    "Entry",
    "accuracy_against_cost",
    "accuracy_by_task",
    "accuracy_matrix",
    "client_violins",
    "collaboration",
    "draw_all",
    "estimation_error",
    "forgetting_bars",
    "render",
    "revival_curve",
    "save_all",
    "stability_gap",
    "staleness_histogram",
    "subspace_rank",
    "timeline",
    "unlearning_gaps",
    "write",
]
