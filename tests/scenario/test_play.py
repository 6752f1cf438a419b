"""Streams and schedules in whole runs: who is where, who is told what, and that a run may stop anywhere."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.base.tree import equal
from fedcl.config.compose import compose
from fedcl.results import load
from fedcl.runs.experiment import run
from fedcl.runs.setup import Setup
from fedcl.server.exchange import Exchange
from tests.toy import Choices, Diary, configure, missing, run_toy, write_files

METHODS: Choices = {"learner": "ewc", "strategy/projection": "fot"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("toy"))


def trained(diary: Diary, name: str = "num_examples") -> dict[int, dict[str, tuple[int, float]]]:
    """Return, for each round, client -> (task, value)."""
    table: dict[int, dict[str, tuple[int, float]]] = defaultdict(dict)
    for row in diary.rows:
        if row["phase"] == "train" and row["name"] == name:
            table[row["round"]][row["client"]] = (row["task"], row["value"])
    return dict(table)


@pytest.mark.parametrize("schedule", ["shuffled", "asynchronous", "growing"])
def test_clients_in_different_tasks_conclude_each_their_own(
    schedule: str, files: dict[str, str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, dict[str, int]] = defaultdict(dict)
    tell = Exchange.tell

    def noted(self: Exchange, kind: Any, outgoing: Any, task_of: Any, server_round: int, version: int) -> Any:
        if kind == "task_end":
            told[server_round].update({out.client: task_of(out.client).id for out in outgoing})
        return tell(self, kind, outgoing, task_of, server_round, version)

    monkeypatch.setattr(Exchange, "tell", noted)
    extra = ["scenario.schedule.stay=0.5"] if schedule == "growing" else []
    cfg = configure({**METHODS, "scenario/schedule": schedule}, files, device, *extra)
    plan = Setup.of(cfg).schedule
    whole = run_toy(cfg)
    assert whole.faults == []
    rounds = trained(whole)
    assert any(len({task for task, _ in clients.values()}) > 1 for clients in rounds.values())
    for server_round in range(plan.num_rounds):
        positions = {client: plan.position(client, server_round) for client in "0123"}
        assert {client: task for client, (task, _) in rounds[server_round].items()} == {
            client: position.task_id for client, position in positions.items() if position is not None
        }
        assert told[server_round] == {
            client: position.task_id for client, position in positions.items() if position and position.is_last
        }
    tested = [row for row in whole.rows if (row["phase"], row["name"]) == ("test", "accuracy")]
    last = plan.num_rounds - 1
    assert {(row["task"], row["after"]) for row in tested if row["round"] == last} == {(0, 2), (1, 2), (2, 2)}
    middle = plan.num_rounds // 2
    rest = run_toy(cfg, start=whole.saved[middle])
    assert rest.hashes == whole.hashes[middle:]
    assert equal(rest.saved[-1], whole.saved[-1])


def test_a_late_client_pauses_before_and_an_early_one_after(files: dict[str, str], device: torch.device) -> None:
    cfg = configure({"scenario/schedule": "shifted"}, files, device, "scenario.schedule.max_lag=3")
    rounds = trained(run_toy(cfg))
    assert [len(rounds[r]) for r in range(9)] == [1, 2, 3, 4, 4, 4, 3, 2, 1]


def test_an_online_stream_shows_every_sample_in_one_round(files: dict[str, str], device: torch.device) -> None:
    def shown(choices: Choices, *extra: str) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        for clients in trained(run_toy(configure(choices, files, device, *extra))).values():
            for client, (_, number) in clients.items():
                totals[client] += number
        return totals

    online = shown({"scenario": "class_incremental"}, "scenario.online=true")
    assert online == dict.fromkeys("0123", 24.0)  # of 96 samples
    assert shown({"scenario": "si_blurry"}) == shown({"scenario": "linear_decay"}) == online
    assert shown({"scenario": "overlapping"}) == dict.fromkeys("0123", 48.0)  # in each of two rounds


def test_clients_learn_the_classes_they_have_drawn(files: dict[str, str], device: torch.device) -> None:
    own = ["scenario.increments=[4,1,1]", "scenario.classes_per_client=2"]
    few = trained(run_toy(configure({"learner": "er"}, files, device, *own)))
    every = trained(run_toy(configure({"learner": "er"}, files, device, own[0])))
    assert all(few[0][client][1] < every[0][client][1] for client in "0123")
    assert few[4] == every[4]


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
def test_an_empty_task_costs_nothing_but_its_rounds(scenario: str, files: dict[str, str], device: torch.device) -> None:
    cfg = configure({**METHODS, "scenario": scenario}, files, device, "scenario.increments=[2,0,4]")
    diary = run_toy(cfg)
    assert [(fault["kind"], fault["round"]) for fault in diary.faults] == [("round_skipped", 2), ("round_skipped", 3)]
    assert diary.hashes[1] == diary.hashes[2] == diary.hashes[3] != diary.hashes[4]
    tested = {
        (row["after"], row["task"])
        for row in diary.rows
        if (row["phase"], row["name"]) == ("test", "accuracy") and row["round"] >= 0
    }
    assert {task for _, task in tested} == {0, 2}
    assert {(1, 0), (2, 0), (2, 2)} <= tested


def test_a_run_with_shuffled_tasks_has_its_matrix(tmp_path: Path) -> None:
    small = ["backend=inline", "compare_with=null", "figures=false", "num_clients=4", "rounds_per_task=1"]
    chosen = [*small, "strategy/projection=none", "scenario/schedule=shuffled", f"run_dir={tmp_path / 'run'}"]
    run(compose(chosen), overrides=chosen, config_dirs=(), quiet=True)
    result = load(tmp_path / "run")
    assert result.status == "done"
    assert result.reached_matrix().shape == (5, 5)
    assert not math.isnan(result.summary["accuracy/average"])


SPREADS = [
    "spread_fot",
    "spread_glfc",
    *(pytest.param(f"spread_{n}", marks=pytest.mark.slow) for n in ("fedweit", "target")),
]


@pytest.mark.parametrize("name", SPREADS)
def test_presets_spread_tasks_as_they_say(name: str) -> None:
    if why := missing("data=cifar100_subset"):
        pytest.skip(why)
    cfg = compose([f"experiment={name}", "device=cpu", "data.source.test_limit=100", "rounds_per_task=2"])
    setup = Setup.of(cfg)
    plan, stream = setup.schedule, setup.stream
    last = plan.num_rounds - 1
    seen = {client: plan.seen(client, last) for client in setup.clients}
    diary = run_toy(cfg, until=2)
    assert diary.faults == []
    rounds = trained(diary)
    if name == "spread_fot":
        assert stream.heads == (10,) * 10
        assert {len(clients) for clients in rounds.values()} == {25}
        labels = setup.dataset.train.y
        counts = [len({*labels[part][labels[part] // 10 == 3].tolist()}) for part in setup.partition.train]
        assert max(counts) == 2
        assert min(counts) == 1
    elif name == "spread_glfc":
        present = [sum(plan.position(client, 2 * task) is not None for client in seen) for task in range(10)]
        assert present == list(range(30, 121, 10))
        assert {len(stream.client_task(3, client, {3}).classes) for client in seen} == {6}
        assert {task for task, _ in rounds[2].values()} == {0, 1}
    elif name == "spread_fedweit":
        assert stream.heads == (5,) * 20
        assert [len(tasks) for tasks in seen.values()] == [10] * 5
        assert len(set(seen.values())) == 5
        assert all(len({task for task, _ in clients.values()}) > 1 for clients in rounds.values())
    else:
        assert {tuple(clients) for clients in rounds.values()} == {("0", "1", "2", "3", "4")}
        assert [{task for task, _ in clients.values()} for clients in rounds.values()] == [{0}, {0}, {1}]
