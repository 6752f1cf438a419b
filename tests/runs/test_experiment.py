from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.results import load
from fedcl.runs.experiment import run

RunExperiment = Callable[..., Path]
SMALL = ("num_clients=4", "rounds_per_task=2", "scenario.num_tasks=2", "strategy/projection=none")


def test_two_runs_give_one_metrics_file(run_experiment: RunExperiment, metrics_hash: Callable[[Path], str]) -> None:
    first = run_experiment("a", *SMALL)
    second = run_experiment("b", *SMALL)
    other = run_experiment("c", *SMALL, "seed=1")
    assert metrics_hash(first) == metrics_hash(second)
    assert metrics_hash(first) != metrics_hash(other)


def test_the_folder_holds_what_the_design_promises(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "figures=true")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "overrides.yaml", "env.json", "STATUS", "metrics.parquet", "timings.parquet"} <= names
    assert {"events.jsonl", "summary.json", "checkpoints", "figures", "report.html"} <= names
    assert (folder / "STATUS").read_text() == "done\n"
    drawn = {"accuracy_matrix", "accuracy_by_task", "forgetting_bars", "accuracy_against_cost", "timeline"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{name}.svg" for name in drawn}
    read = load(folder)
    assert read.config["num_clients"] == 4
    assert read.summary["rounds"] == 4
    assert read.summary["accuracy/average"] > 0.6


def test_the_reference_has_the_same_seed_and_lands_in_the_summary(tmp_path: Path) -> None:
    overrides = ["backend=inline", "figures=false", *SMALL, "seed=3", f"run_dir={tmp_path / 'a'}"]
    overrides += ["compare_with='client.epochs=3'"]
    folder = run(compose(overrides), overrides, [], quiet=True)
    summary = json.loads((folder / "summary.json").read_text())
    reference = load(folder / "reference")
    assert summary["reference/accuracy/average"] == reference.summary["accuracy/average"]
    assert reference.config["seed"] == 3
    assert reference.config["client"]["epochs"] == 3


def test_a_run_that_is_its_own_reference_is_not_repeated(tmp_path: Path) -> None:
    overrides = ["backend=inline", "figures=false", *SMALL, f"run_dir={tmp_path / 'a'}"]
    folder = run(compose(overrides), overrides, [], quiet=True)
    assert not (folder / "reference").exists()


def test_an_excluded_client_moves_nobody_else(run_experiment: RunExperiment) -> None:
    whole = load(run_experiment("a", *SMALL, "clients_per_round=2")).metrics
    without = load(run_experiment("b", *SMALL, "clients_per_round=2", "exclude.clients=[3]")).metrics

    def trained(table: pd.DataFrame) -> set[tuple[int, str, float]]:
        rows = table[table["name"] == "num_examples"]
        return set(zip(rows["round"], rows["client"], rows["value"], strict=True))

    others = {row for row in trained(whole) if row[1] != "3"}
    assert others < trained(without)
    assert "3" not in {client for _, client, _ in trained(without)}


def test_excluded_samples_and_classes_are_not_trained_on(run_experiment: RunExperiment) -> None:
    whole = load(run_experiment("a", *SMALL)).metrics
    fewer = load(run_experiment("b", *SMALL, "exclude.samples=[0,1,2]", "exclude.classes=[9]")).metrics

    def trained(table: pd.DataFrame) -> float:
        rows = table[(table["name"] == "num_examples") & (table["round"].isin([0, 2]))]
        return float(rows["value"].sum())

    from fedcl.data.sources import digits

    y = digits().train.y
    gone = int((y == 9).sum()) + int((y[:3] != 9).sum())
    assert trained(whole) - trained(fewer) == gone


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scenario.num_tasks=3", "scenario.num_tasks=3"),
        ("num_clients=100000", "num_clients=100000"),
        ("exclude.clients=[77]", "exclude.clients"),
        ("data=npz data.root=nowhere", "data.root"),
        ("model=lenet", "model=lenet"),
        ("rounds_per_task=[1,2]", "rounds_per_task"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "never"
    status = main(["run", "backend=inline", "strategy/projection=none", f"run_dir={folder}", *override.split()])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("fedcl: error: ")
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not folder.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("mine")
    status = main(["run", "backend=inline", "strategy/projection=none", f"run_dir={tmp_path / 'full'}"])
    assert status == 2
    assert "run_dir" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["something"]


def test_a_client_without_samples_of_a_task_takes_part_in_the_others(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "data/partition=shards", "scenario.num_tasks=5", "num_clients=10")
    run_ = load(folder)
    trained = run_.metrics[run_.metrics["name"] == "num_examples"]
    assert trained.groupby("round")["client"].nunique().max() < 10
    assert run_.events[run_.events["kind"].isin(["client_failed", "reply_rejected"])].empty
