from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread

from fedcl.results import figures
from fedcl.results.recorder import Recorder
from fedcl.results.run import Run, load

MakeRun = Callable[..., Path]
ALWAYS = ["accuracy_matrix", "accuracy_by_task", "accuracy_by_task_time", "forgetting_bars", "accuracy_against_cost"]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return load(make_run())


def test_the_heat_map_prints_every_accuracy_in_percent(run: Run) -> None:
    axes = figures.accuracy_matrix(run).axes[0]
    printed = {text.get_position(): text.get_text() for text in axes.texts}
    matrix = run.accuracy_matrix().to_numpy()
    assert printed == {(j, i): f"{100 * v:.1f}" for (i, j), v in np.ndenumerate(matrix)}
    assert axes.get_xlabel() == "evaluated on task"
    assert axes.get_ylabel() == "after task"


def test_a_picture_is_opaque_for_dark_notebooks_and_a_vector_is_not(run: Run) -> None:
    figure = figures.forgetting_bars(run)
    for made in (figures.render(figure, "svg"), figures.render(figure, "svg")):  # one file changes nothing for others
        assert b'id="patch_1"' in made
        assert b"fill: #ffffff" not in made
    shown = io.BytesIO()
    figure.savefig(shown)  # as a notebook does
    for data in (shown.getvalue(), figures.render(figure, "png")):
        corner = imread(io.BytesIO(data))[0, 0]
        assert corner.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_the_heat_map_marks_what_was_not_measured(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.row(round=0, phase="test", name="accuracy", value=0.5, task=0, after=0, virtual_time=0.0)
        recorder.row(round=1, phase="test", name="accuracy", value=0.5, task=1, after=1, virtual_time=0.0)
    texts = [text.get_text() for text in figures.accuracy_matrix(load(tmp_path)).axes[0].texts]
    assert texts == ["50.0", "\N{EN DASH}", "\N{EN DASH}", "50.0"]


@pytest.mark.parametrize(("over", "boundaries"), [("round", [4, 8, 12, 16]), ("virtual_time", [10, 20, 30, 40])])
def test_accuracy_curves_hold_every_task_the_mean_and_the_boundaries(
    run: Run, over: str, boundaries: list[int]
) -> None:
    axes = figures.accuracy_by_task(run, over=over).axes[0]  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"task {i}" for i in range(5)] + [
        "mean of tasks\nreached"
    ]
    mean = next(line for line in axes.lines if str(line.get_label()).startswith("mean"))
    last = run.accuracy_matrix().to_numpy()[-1].mean()
    assert np.asarray(mean.get_xdata())[-1] == {"round": 20, "virtual_time": 50.0}[over]
    assert np.asarray(mean.get_ydata())[-1] == pytest.approx(last)
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == boundaries


def test_forgetting_bars_are_the_three_definitions_or_the_reference_beside_the_run(make_run: MakeRun) -> None:
    path = make_run("run", decay=0.8)
    alone = load(path)
    bars = figures.forgetting_bars(alone).axes[0].containers
    heights = [[patch.get_height() for patch in container] for container in bars]
    np.testing.assert_allclose(heights, [alone.forgetting(k) for k in ("chaudhry", "first", "peak")])
    assert len({tuple(row) for row in heights}) == 3
    make_run("run/reference", decay=0.9)
    compared = load(path)
    assert compared.reference is not None
    bars = figures.forgetting_bars(compared).axes[0].containers
    heights = [[patch.get_height() for patch in container] for container in bars]
    np.testing.assert_allclose(heights, [compared.forgetting(), compared.reference.forgetting()])


def test_several_seeds_are_their_mean_and_its_95_percent_interval(make_run: MakeRun) -> None:
    runs = [load(make_run(f"s{seed}", seed=seed, num_tasks=3, rounds_per_task=2)) for seed in range(3)]
    last = np.array([run.accuracy_matrix().to_numpy()[2, 0] for run in runs])
    half = 4.302653 * last.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    texts = {text.get_position(): text.get_text() for text in figures.accuracy_matrix(runs).axes[0].texts}
    assert texts[0, 2] == f"{100 * last.mean():.1f}\n±{100 * half:.1f}"

    axes = figures.accuracy_by_task(runs).axes[0]
    first = next(line for line in axes.lines if line.get_label() == "task 0")
    assert np.asarray(first.get_ydata())[-1] == pytest.approx(last.mean())
    band = axes.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 6.0][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((last.mean() - half, last.mean() + half), abs=1e-4)
    assert "3 seeds" in axes.get_title()

    bars = figures.forgetting_bars(runs).axes[0]
    forgotten = np.array([run.forgetting().to_numpy() for run in runs])
    assert [patch.get_height() for patch in bars.containers[0]] == pytest.approx(list(forgotten.mean(0)))
    assert sum(isinstance(container, ErrorbarContainer) for container in bars.containers) == 3


@pytest.mark.parametrize(
    "num_tasks", [5, pytest.param(2, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.slow)]
)
def test_legends_and_texts_stay_inside_the_figure_and_off_the_data(make_run: MakeRun, num_tasks: int) -> None:
    run = load(make_run(num_tasks=num_tasks))
    for draw in (figures.accuracy_matrix, figures.accuracy_by_task, figures.forgetting_bars):
        figure = draw(run)
        figure.draw_without_rendering()
        bounds = figure.bbox.padded(1.0)
        axes = figure.axes[0]
        legend = axes.get_legend()
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else ())]
        for text in texts:
            box = text.get_window_extent()
            assert text.get_text()
            assert bounds.x0 <= box.x0, (draw.__name__, text.get_text())
            assert box.x1 <= bounds.x1, (draw.__name__, text.get_text())
            assert bounds.y0 <= box.y0, (draw.__name__, text.get_text())
            assert box.y1 <= bounds.y1, (draw.__name__, text.get_text())
        if legend is not None:
            assert legend.get_window_extent().x0 >= axes.get_window_extent().x1


@pytest.mark.slow
def test_save_all_writes_pngs_and_vectors_from_a_thread_and_leaves_rcparams_alone(run: Run, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    saved: list[Path] = []
    kinds = ("png", "svg", "pdf")
    thread = threading.Thread(target=lambda: saved.extend(figures.save_all(run, tmp_path / "figures", kinds)))
    thread.start()
    thread.join()
    names = [*ALWAYS, "client_violins"]
    assert [path.name for path in saved] == [f"{name}.{kind}" for name in names for kind in kinds]
    for path in saved:
        if path.suffix == ".png":
            pixels = imread(path)
            assert pixels.shape[1] > 500
            assert pixels[..., :3].std() > 0.05
        else:
            assert {".svg": b"<svg", ".pdf": b"%PDF"}[path.suffix] in path.read_bytes()[:1000]
    assert dict(matplotlib.rcParams) == before


def test_what_a_run_lacks_is_not_drawn_and_the_reason_is_told(make_run: MakeRun, tmp_path: Path) -> None:
    one = load(make_run("one", num_tasks=1))
    drawn, absent = figures.draw_all(one)
    names = {figure.entry.name for figure in drawn}
    assert names == {*ALWAYS, "client_violins"} - {"forgetting_bars"}
    assert {entry.title for entry in figures.CATALOGUE} == absent.keys() | {figure.entry.title for figure in drawn}
    assert absent["Forgetting"] == "has reached no second task, so nothing can be forgotten yet"
    assert "evaluation.iterations=0" in absent["Stability gap"]
    assert all(figure.figure.get_label() for figure in drawn)
    empty = tmp_path / "empty"
    empty.mkdir()
    Recorder(empty).close()
    drawn, absent = figures.draw_all(load(empty))
    assert (drawn, len(absent)) == ([], len(figures.CATALOGUE))
    with pytest.raises(ValueError, match="no global test accuracy"):
        figures.accuracy_matrix(load(empty))
    with pytest.raises(ValueError, match="no run"):
        figures.accuracy_matrix([])
