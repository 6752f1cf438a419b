"""Trackers get what the metrics table gets, and cost a run nothing when they fail; real ones where installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedcl.config.value_rules import ConfigError
from fedcl.results import load
from fedcl.results.recorder import Recorder
from fedcl.results.trackers import Trackers, check, scalars
from fedcl.results.tracking import MLflow, TensorBoard, WandB
from fedcl.runs.experiment import resume

RunExperiment = Callable[..., Path]
SMALL = ("num_clients=2", "rounds_per_task=2", "scenario.num_tasks=2", "strategy/projection=none", "model.hidden=[8]")


class Diary:
    """A tracker that keeps what it is told, and breaks in a round if it is asked to."""

    needs = ()

    def __init__(self, breaks_in: int | None = None) -> None:
        self.breaks_in = breaks_in
        self.told: list[Any] = []

    def start(self, run_dir: Path, cfg: Mapping[str, Any], first_round: int) -> None:
        self.told.append(("start", first_round))

    def log(self, server_round: int, numbers: Mapping[str, float]) -> None:
        if server_round == self.breaks_in:
            raise ConnectionError("the server is gone")
        self.told.append((server_round, dict(numbers)))

    def finish(self, summary: Mapping[str, Any], status: str) -> None:
        self.told.append(status)


def test_scalars_are_means_over_clients_and_lines_by_task() -> None:
    def row(phase: str, name: str, value: float | None, **more: Any) -> dict[str, Any]:
        place = {"round": 3, "virtual_time": 7.5, "client": "", "task": -1, "after": 1, "step": -1}
        return {**place, "phase": phase, "name": name, "value": value, **more}

    numbers = scalars([
        row("train", "loss", 1.0, client="0", task=1),
        row("train", "loss", 3.0, client="1", task=1),
        row("train", "loss", None, client="2", task=1),
        row("test", "accuracy", 0.5, task=0),
        row("test", "accuracy", 0.9, task=1),
        row("test", "accuracy", 0.1, task=2),
        row("iteration", "accuracy", 0.3, step=4),
    ])  # fmt: skip
    assert numbers == {
        "train/loss": 2.0, "test/accuracy": 0.7, "test/accuracy_task_0": 0.5, "test/accuracy_task_1": 0.9,
        "test/accuracy_task_2": 0.1, "virtual_time": 7.5,
    }  # fmt: skip
    assert scalars([]) == {}


def test_one_that_fails_is_left_out_and_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, broken = Diary(), Diary(breaks_in=1)
    with Recorder(tmp_path) as recorder:
        when = {"round": 1, "virtual_time": 2.5}
        trackers = Trackers({"sound": sound, "broken": broken}, recorder, lambda: when)
        trackers.start(tmp_path, {}, 0)
        for server_round in range(3):
            # is not of this round
            recorder.row(round=server_round - 1, phase="server", name="rank", value=-1.0, virtual_time=0.0)
            recorder.row(round=server_round, phase="server", name="rank", value=float(server_round), virtual_time=0.0)
            trackers.round_over(server_round)
        trackers.finish({}, "done")
    numbers = [{"server/rank": float(r), "virtual_time": 0.0} for r in range(3)]
    assert sound.told == [("start", 0), *enumerate(numbers), "done"]
    assert broken.told == [("start", 0), (0, numbers[0])]
    events = load(tmp_path).events
    assert events[["kind", "round", "virtual_time", "tracker", "error"]].to_numpy().tolist() == [
        ["tracker_failed", 1, 2.5, "broken", "ConnectionError: the server is gone"]
    ]
    assert capsys.readouterr().err.count("trackers=broken failed") == 1


def test_a_missing_package_is_said_before_the_run() -> None:
    class Absent(Diary):
        needs = ("no_such_package",)

    with pytest.raises(ConfigError, match=r"needs the package 'no_such_package'; pip install 'fedcl\[tracking\]'"):
        check({"absent": Absent()})


def needing(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (extra: tracking)")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # whoever tries to get out does not
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    warnings.simplefilter("ignore")  # these libraries have deprecations of their own


def accuracies(folder: Path) -> list[float]:
    run = load(folder)
    accuracy = run.accuracy[(run.accuracy["task"] == 0) & (run.accuracy["round"] >= 0)]
    return [float(value) for value in accuracy["value"]]


@pytest.mark.slow
@needing("tensorboard")
@pytest.mark.usefixtures("offline")
def test_tensorboard(run_experiment: RunExperiment) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_experiment("a", *SMALL, "trackers=tensorboard")
    assert "tracker_failed" not in set(load(folder).events["kind"])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    points = events.Scalars("test/accuracy_task_0")
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.value for point in points] == pytest.approx(accuracies(folder))
    assert "summary/accuracy/average" in events.Tags()["scalars"]


@pytest.mark.slow
@needing("mlflow")
@pytest.mark.usefixtures("offline")
def test_mlflow_goes_on_with_the_same_run(run_experiment: RunExperiment) -> None:
    from mlflow.tracking import MlflowClient

    folder = run_experiment("a", *SMALL, "trackers=mlflow", "checkpoint.min_seconds=0")
    assert "tracker_failed" not in set(load(folder).events["kind"])
    client = MlflowClient((folder / "mlruns").as_uri())
    known = (folder / "mlflow_run").read_text().strip()
    points = client.get_metric_history(known, "test/accuracy_task_0")
    assert [point.value for point in points] == pytest.approx(accuracies(folder))
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params["num_clients"] == "2"
    assert run.data.metrics["summary/accuracy/average"] == load(folder).summary["accuracy/average"]
    (folder / "STATUS").write_text("interrupted\n")
    resume(folder, force=False, quiet=True)
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
@needing("wandb")
@pytest.mark.usefixtures("offline")
def test_wandb_stays_offline(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "trackers=wandb")
    assert "tracker_failed" not in set(load(folder).events["kind"])
    known = (folder / "wandb_run").read_text().strip()
    files = list((folder / "wandb").glob(f"offline-run-*-{known}/*.wandb"))
    assert len(files) == 1
    assert b"test/accuracy_task_0" in files[0].read_bytes()


def test_their_settings_are_stored_and_nothing_else_happens() -> None:
    assert (MLflow(uri="x").uri, WandB(project="p").project, TensorBoard.needs) == ("x", "p", ("tensorboard",))
