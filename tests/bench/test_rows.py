"""What the smaller benchmarks measure, on numbers worked by hand, and that their pages show their results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.d_simplex.run import BENCH as D_SIMPLEX
from benchmarks.d_simplex.run import crossed
from benchmarks.pretrained_vit.run import BENCH as PRETRAINED_VIT
from benchmarks.pretrained_vit.run import PRETRAINING
from benchmarks.rows import Bench, text
from benchmarks.scole.run import BENCH as SCOLE
from benchmarks.si_blurry.run import BENCH as SI_BLURRY
from benchmarks.stability_gap.run import BENCH as STABILITY_GAP
from benchmarks.stability_gap.run import gap
from benchmarks.two_phase import run as two_phase
from fedcl.config.compose import compose

BENCHES = (STABILITY_GAP, SCOLE, SI_BLURRY, D_SIMPLEX, PRETRAINED_VIT)
by_name = pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.name)


def test_the_gap_is_the_dip_below_both_ends_of_a_task() -> None:
    nan = float("nan")
    curve = np.array([
        [0.5, nan, nan], [1.0, nan, nan],  # task 0 is learned with row 1
        [0.4, 0.7, nan], [0.8, 0.9, nan],  # below 0.8, where it ends, by 0.4; task 1 is learned with row 3
        [0.9, 0.6, 0.5], [0.7, 0.7, 0.6],  # task 0 does not dip below 0.7; task 1 is below 0.7 by 0.1
    ])  # fmt: skip
    assert gap(curve, [1, 3, 5]) == pytest.approx((0.4 + 0.0 + 0.1) / 3)
    assert gap(curve[:4], [1, 3, -1]) == pytest.approx(0.4)


def test_features_of_one_model_are_searched_among_another_ones() -> None:
    y = torch.tensor([0, 1, 0, 1])  # a gallery of two, two queries
    old = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
    turned = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
    assert crossed([old, turned], y).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_seed_is_held_out_of_what_is_chosen_for_it() -> None:
    tuned = [{"values": [0.9, 0.1, 0.1]}, {"values": [0.2, 0.5, 0.6]}]
    # without seed 0 the second has 0.55 against 0.1; without seed 1 the first has 0.5 against 0.4; without 2: 0.5, 0.35
    assert two_phase.held_out(tuned) == [0.2, 0.1, 0.1]


@by_name
def test_a_page_shows_the_results_beside_it(bench: Bench) -> None:
    results = json.loads((bench.folder / "results.json").read_text(encoding="utf-8"))
    readme = (bench.folder / "README.md").read_text(encoding="utf-8")
    for table in bench.tables:
        assert text(table, results[table.name]) in readme, f"run: python -m benchmarks.{bench.name}.run"
        assert {name: found["settings"] for name, found in results[table.name].items()} == {
            row.name: [*table.overrides, *row.overrides] for row in table.rows
        }
        assert all(len(found["runs"]) == 3 for found in results[table.name].values())


def test_the_page_of_two_phases_shows_the_results_beside_it() -> None:
    results = json.loads((two_phase.HERE / "results.json").read_text(encoding="utf-8"))
    readme = (two_phase.HERE / "README.md").read_text(encoding="utf-8")
    assert list(results) == [method.name for method in two_phase.METHODS]
    assert all(two_phase.table(results, name) in readme for name in two_phase.STREAMS)


@pytest.mark.slow
@by_name
def test_every_row_is_a_sound_configuration(bench: Bench) -> None:
    for table in bench.tables:
        for row in table.rows:
            assert compose([f"experiment={bench.name}", *table.overrides, *row.overrides])["name"] == bench.name


@pytest.mark.slow
def test_what_is_played_beforehand_is_sound() -> None:
    assert compose(list(PRETRAINING))["checkpoint"]["every"] > 0
    for method in two_phase.METHODS:
        for name in two_phase.STREAMS:
            cfg = compose(two_phase.overrides(method, name, two_phase.HERE))
            assert cfg["protocol"]["evaluate_on"] == two_phase.STREAMS[name]
