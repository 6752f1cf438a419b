"""Data of one's own as a whole run meets them: what is refused before anything is written, and what is said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.cli import main
from fedcl.results import load

SMALL = ["run", "backend=inline", "data=npz", "num_clients=2", "rounds_per_task=1", "figures=false", "model.hidden=[4]"]


def save(folder: Path, y_train: Any, y_test: Any, x: Any = None) -> str:
    rng = np.random.default_rng(0)
    halves = [rng.random((len(y), 3)) if x is None else x for y in (y_train, y_test)]
    np.savez(folder / "own.npz", x_train=halves[0], y_train=y_train, x_test=halves[1], y_test=y_test)
    return f"data.root={folder / 'own.npz'}"


@pytest.mark.parametrize(
    ("y_train", "y_test", "says"),
    [
        ([0, 1, 0, 1], [], "the test half has no samples"),
        ([], [0, 1, 0, 1], "the train half has no samples"),
        ([0, 1, 2, 3], [0, 1, 1, 3], "the test half has no samples of the classes 2"),
        ([0, 1, 1, 3], [0, 1, 2, 3], "the train half has no samples of the classes 2"),
        ([0, 1, 10**9, 1], [0, 1, 0, 1], "label 1000000000: must be below 65536, there being 8 samples"),
    ],
)
def test_half_a_data_set_is_refused(
    y_train: list[int], y_test: list[int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path, np.array(y_train, int), np.array(y_test, int))
    assert main([*SMALL, root, "scenario.num_tasks=2", f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedcl: error: {root}: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_limit_that_cuts_classes_off_is_said_and_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path, np.arange(40) % 4, np.arange(40) % 4)
    limited = [root, "data.source.test_limit=2", "scenario=joint", "compare_with=null", f"run_dir={tmp_path / 'run'}"]
    assert main([*SMALL, *limited]) == 0
    assert "data: the test half has no samples of the classes 2, 3, within" in capsys.readouterr().err


def test_labels_with_gaps_make_no_phantom_classes_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.array([0, 7, 14, 21] * 10)
    root = save(tmp_path, labels, labels)
    sized = [root, "scenario.num_tasks=2", f"run_dir={tmp_path / 'run'}"]
    assert main([*SMALL, *sized]) == 0
    said = capsys.readouterr().err
    assert said.count("no sample has the labels 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, ... (18 in all)") == 1
    run = load(tmp_path / "run")
    assert (tmp_path / "run/reference").is_dir()  # a second run, of which nothing is said again
    (event,) = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()][:1]
    assert event["tasks"] == [[0, 1], [2, 3]]
    assert event["notes"][0].startswith("no sample has the labels 1, 2")
    assert not set(run.events["kind"]) & {"round_skipped", "client_failed"}
