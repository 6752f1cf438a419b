"""How long a run is, and how fast it learns: target accuracy, and learning rates over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fedcl.assembly import Settings
from fedcl.cli import main
from fedcl.client.lr_schedule import TaskDecay
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.target import TargetAccuracy
from fedcl.runs.experiment import resume
from fedcl.scenario.schedule import Listed, Span, Synchronous, chained

RunExperiment = Callable[..., Path]
SMALL = ("num_clients=2", "scenario.num_tasks=2", "strategy/projection=none", "model.hidden=[8]")


def row(server_round: int, task: int, value: float, after: int = 1) -> dict[str, object]:
    return {"phase": "test", "name": "accuracy", "client": "", "round": server_round, "task": task, "after": after,
            "value": value}  # fmt: skip


def test_the_target_counts_once_all_tasks_are_met() -> None:
    target = TargetAccuracy(0.8, 2)
    for record in (row(0, 0, 0.99, after=0), row(0, 1, 0.99, after=0)):
        target.follow(record)
    assert target.reached(0) is None
    target.follow(row(1, 0, 0.7))
    assert target.reached(1) is None  # the second task has not been tested
    target.follow(row(1, 1, 0.88))
    assert target.reached(1) is None  # 0.79
    for record in (row(2, 0, 0.7), row(2, 1, 0.9), {**row(2, 1, 0.1), "client": "3"}):
        target.follow(record)
    assert target.reached(2) == pytest.approx(0.8)
    assert target.reached(3) is None  # nothing was tested in that round


@pytest.mark.slow
def test_it_stops_and_stays_stopped(run_experiment: RunExperiment, metrics_hash: Callable[[Path], str]) -> None:
    whole = run_experiment("whole", *SMALL, "rounds_per_task=4")
    accuracy = load(whole).accuracy
    means = accuracy[accuracy["after"] == 1].groupby("round")["value"].mean()
    stops = int(means.index[1])
    target = float(means.iloc[1])
    assert means.iloc[0] < target  # of the four rounds of the last task the second is the first so good
    folder = run_experiment("early", *SMALL, "rounds_per_task=4", f"target_accuracy={target!r}")
    early = load(folder)
    assert early.summary["target/reached"] == 1.0
    assert early.summary["target/rounds"] == early.summary["rounds"] == stops + 1
    assert early.summary["target/bytes"] == early.summary["bytes/up"] + early.summary["bytes/down"]
    assert early.summary["accuracy/average"] == pytest.approx(target)
    before = metrics_hash(folder)
    (folder / "STATUS").write_text("interrupted\n")  # killed after its last checkpoint: it must not go on
    resume(folder, force=False, quiet=True)
    assert metrics_hash(folder) == before
    never = load(run_experiment("never", *SMALL, "rounds_per_task=1", "target_accuracy=1.0"))
    assert never.summary["target/reached"] == 0.0
    assert "target/rounds" not in never.summary


class LastTaskFirst(Listed):
    def itineraries(self, rounds: Sequence[int]) -> dict[str, list[Span]]:
        return {client: chained([2, 0], [rounds[2], rounds[0]]) for client in self.clients}


def test_rates_by_task() -> None:
    tasks = Synchronous(num_tasks=3, rounds_per_task=[2, 1, 1])
    rates = TaskDecay(0.4, 0.5, tasks)
    assert [rates("0", r) for r in range(4)] == [0.4, 0.4, 0.2, 0.1]
    # a client that starts with the last task takes the full rate there
    own = TaskDecay(0.4, 0.5, LastTaskFirst(num_tasks=3, rounds_per_task=[3, 1, 1], clients=["0"], seed=0))
    assert [own("0", r) for r in range(4)] == [0.4, 0.2, 0.2, 0.2]


@pytest.mark.slow
def test_a_decayed_rate_is_the_rate_that_trains(run_experiment: RunExperiment) -> None:
    # one step of plain SGD moves the weights by lr * gradient: half the rate, half the way
    one_step = (*SMALL, "rounds_per_task=1", "client.batch_size=4096", "num_clients=1")
    moves = []
    for decay in ("1.0", "0.5"):
        folder = run_experiment(
            f"d{decay}", *one_step, f"client.optimizer.task_decay={decay}", "checkpoint.min_seconds=0"
        )
        kept = Checkpoints(folder)
        after_both = kept.load()[0]["server"]["models"]["*"]
        first = sorted(path.name for path in kept.folder.glob("round_*"))[0]
        (kept.folder / "LATEST").write_text(first + "\n")
        moves.append(after_both - kept.load()[0]["server"]["models"]["*"])
    assert float(moves[0].abs().max()) > 0
    assert torch.allclose(moves[1], moves[0] / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target_accuracy=1.5"], "target_accuracy=1.5: must be number in (0, 1]"),
        (["target_accuracy=0.5", "unlearning.requests=[{scope: client, clients: [1], at: end}]"], "cannot promise"),
        (["client.optimizer.task_decay=0"], "client.optimizer.task_decay=0: must be number > 0"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_part_that_assumes_one_rate_refuses_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = ["strategy/staleness=gradient_inversion", "async.buffer=2", "scenario=class_incremental", "num_clients=4"]
    line = [
        "run",
        *late,
        "backend=inline",
        "strategy/projection=none",
        f"run_dir={tmp_path / 'x'}",
        "compare_with=null",
    ]
    assert main([*line, "client.optimizer.task_decay=0.5"]) == 2
    assert "which assumes one learning rate" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert Settings.of(compose(["client.optimizer.task_decay=0.5"])).training.lr == 0.3
