"""Figures of what only some runs have: each checked against the numbers that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcl.results import figures
from fedcl.results.recorder import Recorder
from fedcl.results.run import Run, load
from tests.results.rich_run import NAMES, write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run with rows of every kind that figures look at, with names that are not harmless."""
    write_run(tmp_path)
    return load(tmp_path)


def _points(axes: Axes, label: str) -> list[tuple[float, float]]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


@pytest.mark.slow
def test_every_figure_is_drawn_with_its_texts_inside(run: Run) -> None:
    drawn, absent = figures.draw_all(run)
    assert absent == {}
    for one in drawn:
        figure = one.figure
        figure.draw_without_rendering()
        bounds = figure.bbox.padded(1.5)
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible()):
            box = text.get_window_extent()  # type: ignore[attr-defined]
            words = text.get_text()  # type: ignore[attr-defined]
            if words.strip() and _is_shown(figure, text):
                assert bounds.x0 <= box.x0 <= box.x1 <= bounds.x1, (one.entry.name, words, box, bounds)
                assert bounds.y0 <= box.y0 <= box.y1 <= bounds.y1, (one.entry.name, words, box, bounds)
        assert figure.get_label()


def _is_shown(figure: Figure, text: Any) -> bool:
    """Whether a tick's label is one of those within its axis's limits."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            if any(text in (tick.label1, tick.label2) for tick in ticks):
                low, high = sorted(axis.get_view_interval())
                places = [tick.get_loc() for tick in ticks if text in (tick.label1, tick.label2)]
                return all(low <= place <= high for place in places)
    return True


def test_costs_are_sums_up_to_each_round(run: Run) -> None:
    panels = figures.accuracy_against_cost(run).axes
    means = [0.5, 0.6, (0.7 + 0.65) / 2, (0.8 + 0.75) / 2]
    expected = {
        "bytes sent and received": [2000, 4000, 6000, 8000],
        "FLOPs of training": [6000, 12000, 18000, 24000],  # 3 clients, 20 samples, 100 a sample
        "virtual time": [1.5, 3.0, 4.5, 6.0],
    }
    assert [axes.get_xlabel() for axes in panels] == list(expected)
    for axes, costs in zip(panels, expected.values(), strict=True):
        np.testing.assert_allclose(_points(axes, "this run"), np.stack([costs, means], 1))


def test_the_worst_tenth_of_the_clients_is_marked(run: Run) -> None:
    axes = figures.client_violins(run).axes[0]
    assert _points(axes, "worst tenth") == [(0.0, pytest.approx(0.2))]
    assert sorted(y for _, y in _points(axes, "client")) == pytest.approx([0.5, 0.8])


def test_collaborators_are_the_pairs_above_the_threshold(run: Run) -> None:
    panel = figures.collaboration(run).axes[0]
    marks = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in panel.lines}
    order = [label.get_text() for label in panel.get_yticklabels()]
    others = [i for i, name in enumerate(order) if name != "late"]
    assert marks == {(others[0], others[1]), (others[1], others[0])}
    assert "2 pairs" in panel.get_title()
    with pytest.raises(ValueError, match="one run, not 2"):
        figures.collaboration([run, run])


def test_ranks_are_those_at_the_end_of_each_task(run: Run) -> None:
    axes = figures.subspace_rank(run).axes[0]
    printed = {text.get_position(): text.get_text() for text in axes.texts}
    assert printed == {(0, 0): "4", (1, 0): "6", (0, 1): "2", (1, 1): "2"}


def test_ages_are_counted_and_errors_are_means_by_age(run: Run) -> None:
    bars = figures.staleness_histogram(run).axes[0].containers[0]
    # round by round: 0 0 0, 0 1 1, 0 1 2, 0 1 2
    assert [patch.get_height() for patch in bars] == [6, 4, 2]
    axes = figures.estimation_error(run).axes[0]
    assert [y for _, y in _points(axes, "the late change as it came")] == [1.0]
    assert [y for _, y in _points(axes, "what inversion made of it")] == [0.5]


def test_nobody_late_is_told_and_not_drawn(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.row(round=0, phase="train", name="age", value=0, client="0", task=0, after=0, virtual_time=0.0)
    with pytest.raises(ValueError, match="no update was late"):
        figures.staleness_histogram(load(tmp_path))


def test_the_timeline_places_updates_faults_and_requests_on_the_clock(run: Run) -> None:
    axes = figures.timeline(run).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(rows) == sorted([*(name.replace("$", r"\$") for name in NAMES), "(server)"])
    faults = next(line for line in axes.lines if line.get_marker() == "x")
    assert list(faults.get_xdata()) == [3.0, 4.5]
    assert [rows[int(y)] for y in faults.get_ydata()] == [NAMES[2], "(server)"]
    assert [text.get_text() for text in axes.texts] == ["bob"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [sorted(set(line.get_xdata())) for line in dots] == [[1.5, 3.0], [4.5, 6.0]]


def test_the_timeline_shows_when_a_reply_came_where_that_was_written_down(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for server_round, came in ((0, (0.5, 2.0)), (1, (3.0, 2.5))):
            for client, arrival in zip("ab", came, strict=True):
                values = {"num_examples": 5.0, "age": float(server_round), "arrival": arrival}
                for name, value in values.items():
                    at = {"round": server_round, "virtual_time": max(came), "client": client, "task": 0, "after": 0}
                    recorder.row(phase="train", name=name, value=value, **at)  # type: ignore[arg-type]
    axes = figures.timeline(load(tmp_path)).axes[0]
    [dots] = [line for line in axes.lines if line.get_marker() == "o"]
    assert sorted(dots.get_xdata()) == [0.5, 2.0, 2.5, 3.0]
    [since] = [collection for collection in axes.collections if hasattr(collection, "get_segments")]
    assert sorted(segment[0][0] for segment in since.get_segments()) == [0.0, 0.0, 0.0, 0.0]  # all from the first model


def test_the_unlearning_panel_is_the_difference_to_the_retrained_model(run: Run) -> None:
    axes = figures.unlearning_gaps(run).axes[0]
    before = next(line for line in axes.lines if line.get_label() == "before")
    np.testing.assert_allclose(np.asarray(before.get_xdata()), [0.2, 0.2, 0.2])
    after = axes.containers[0].lines[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(after.get_xdata(), [-0.1, -0.1, -0.1])
    assert axes.get_title() == "bob"
    low, high = axes.get_xlim()
    assert low == -high
    revived = figures.revival_curve(run).axes[0]
    np.testing.assert_allclose(_points(revived, "bob"), [(3, 0.4), (4, 0.6)])


def test_the_stability_gap_is_the_mean_over_clients_with_its_lowest_point(run: Run) -> None:
    axes = figures.stability_gap(run).axes[0]
    curve = _points(axes, "task 0")
    assert [x for x, _ in curve] == [0, 5, 10, 10, 15, 20, 20, 25, 30, 30, 35, 40]
    assert curve[-1][1] == pytest.approx(0.9 - 0.3 - 0.1)
    lowest = next(line for line in axes.lines if line.get_marker() == "v")
    assert list(lowest.get_ydata()) == [pytest.approx(0.5)]
    dotted = next(line for line in axes.lines if line.get_label() == "min-ACC")
    assert dotted.get_ydata()[0] == 0.35
