"""Clients that fail, all of them or some, and clients with next to no data."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.cli import main
from fedcl.contracts.learner import Context, Plugin, State
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Trust
from fedcl.runs.experiment import resume
from fedcl.simulation.devices import DeviceProfile

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ["num_clients=3", "rounds_per_task=2", "scenario.num_tasks=2", "strategy/projection=none"]
SMALL += ["checkpoint.min_seconds=0"]

STRIKE = '''
from pathlib import Path

from fedcl.contracts.learner import Context, Phase, Plugin


class Strike(Plugin):
    """From its second visit on, a client does not work while there is a file ``strike`` beside the run."""

    phase = Phase.BOOKKEEPING

    def __init__(self, *, file: str, clients: list) -> None:
        self.file, self.clients = Path(file), {str(client) for client in clients}

    def before_round(self, ctx: Context) -> None:
        if ctx.local_round >= 1 and ctx.client in self.clients and self.file.exists():
            raise RuntimeError("on strike")
'''


@pytest.fixture
def strike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return overrides for clients that strike while ``tmp_path/strike`` is there."""
    folder = tmp_path / "mine"
    (folder / "learner").mkdir(parents=True)
    (folder / "strike.py").write_text(STRIKE)
    (folder / "learner" / "strike.yaml").write_text(
        f"# Clients on strike.\nstrike:\n  _target_: strike.Strike\n  file: {tmp_path / 'strike'}\n  clients: []\n"
    )
    sys.modules.pop("strike", None)  # of an earlier test's folder
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "strike").touch()
    return ["--config-dir", str(folder), "learner=strike", "backend=inline", "compare_with=null", "figures=false"]


@pytest.mark.parametrize(
    ("strikers", "overrides", "attempts"),
    [("[0,1,2]", [], 3), ("[0,1]", ["min_replies=2", "round_retries=1"], 2), ("[2]", ["min_replies=3"], 3)],
    ids=["all", "too-few-left", "one-too-few"],
)
def test_without_enough_replies_the_run_is_retried_fails_and_can_go_on_later(
    strikers: str,
    overrides: list[str],
    attempts: int,
    strike: list[str],
    tmp_path: Path,
    metrics_hash: Hash,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    settings = [*strike, *SMALL, *overrides, f"learner.strike.clients={strikers}"]
    assert main(["run", "--quiet", *settings, f"run_dir={folder}"]) == 1
    error = capsys.readouterr().err
    assert f"in each of {attempts} attempts" in error
    assert "events.jsonl" in error
    run = load(folder)
    assert run.status == "failed"
    assert (run.events["kind"] == "round_retried").sum() == attempts
    failed = run.events[run.events["kind"] == "client_failed"]
    assert set(failed["round"]) == {1}
    assert set(failed["reason"]) == {"RuntimeError: on strike"}
    assert len(failed) == attempts * (strikers.count(",") + 1)
    state, _ = Checkpoints(folder).load()
    assert state["server"]["next_round"] == 1  # what was done before stays
    assert not (folder / "metrics.parquet").exists()

    (tmp_path / "strike").unlink()
    resume(folder, force=False, quiet=True, trust=Trust(everything=True))
    whole = tmp_path / "whole"
    assert main(["run", "--quiet", *settings, f"run_dir={whole}"]) == 0
    assert load(folder).status == "done"
    assert metrics_hash(folder) == metrics_hash(whole)


def test_a_striker_among_enough_others_costs_its_own_updates(strike: list[str], tmp_path: Path) -> None:
    settings = [*strike, *SMALL, "min_replies=2", "learner.strike.clients=[2]"]
    assert main(["run", "--quiet", *settings, f"run_dir={tmp_path / 'run'}"]) == 0
    run = load(tmp_path / "run")
    trained = run.metrics[run.metrics["name"] == "num_examples"].groupby("round")["client"].nunique()
    assert trained.tolist() == [3, 2, 2, 2]
    assert "round_retried" not in set(run.events["kind"])


class Counter(Plugin):
    """Counts its client's committed visits."""

    count = 0

    def before_round(self, ctx: Context) -> None:
        self.count += 1

    def state(self) -> State:
        return {"count": self.count}

    def load(self, state: State) -> None:
        self.count = state.get("count", 0)


def test_a_question_to_a_client_whose_reply_is_still_under_way_costs_it_no_state(build: Any) -> None:
    system = build(
        plugins={"counter": Counter},
        device=lambda client: DeviceProfile(latency=4.5 if client == "1" else 1.0),
        deadline=2.0,
        finished_task="keep",
        personal_evaluation=True,
        evaluate_every=1,
    ).run()
    # every task ends with client 1 on its way, and asks everybody how good its model is
    assert {row["client"] for row in system.notes.rows if row["phase"] == "personal"} == {"0", "1", "2", "3"}
    assert system.notes.events == []
    assert list(system.server.arrivals.flights) == ["1"]
    assert system.store.load("1", system.exchange.committed["1"])["plugins"]["counter"] == {"count": 1}


# -- next to no data --------------------------------------------------------------------------------------------------

SCANT = '''
from fedcl.data.dataset import Partition


def scant(given):
    """Client 0 has one sample, 1 a single class, 2 nothing of the first task, 3 all the rest."""
    import numpy as np
    y_train, y_test = given.y_train, given.y_test
    single = np.flatnonzero(y_train == 0)[:1]
    one_class = np.flatnonzero(y_train == 1)[:7]
    late = np.flatnonzero(y_train >= 6)[:30]
    rest = np.setdiff1d(np.arange(len(y_train)), np.concatenate([single, one_class, late]))
    train = (single, one_class, late, rest)
    test = tuple(np.flatnonzero(np.isin(y_test, np.unique(y_train[part]))) for part in train)
    return Partition(train, test)


class Scant:
    def __call__(self, *args, **kwargs):
        return scant(*args, **kwargs)
'''
NETWORK = '''
import torch
from torch import Tensor, nn

from fedcl.models.networks import Network, Output


class Normed(Network):
    """A hidden layer with batch normalisation, which has no variance to offer for one sample."""

    def __init__(self, *, input_shape, heads) -> None:
        super().__init__()
        inputs = 1
        for side in input_shape:
            inputs *= side
        self.hidden = nn.Linear(inputs, 16)
        self.norm = nn.BatchNorm1d(16)
        self.attach_heads(16, heads)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x.flatten(1)}

    def forward(self, x: Tensor) -> Output:
        return self.classify(torch.relu(self.norm(self.hidden(x.flatten(1)))))
'''


@pytest.fixture
def scant_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    (folder / "data" / "partition").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "scant.py").write_text(SCANT)
    (folder / "normed.py").write_text(NETWORK)
    (folder / "data" / "partition" / "scant.yaml").write_text("# Next to no data.\n_target_: scant.Scant\n")
    (folder / "model" / "normed.yaml").write_text("# Batch normalisation.\n_target_: normed.Normed\n")
    for module in ("scant", "normed"):
        sys.modules.pop(module, None)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
@pytest.mark.parametrize(
    "method",
    [
        ["learner=finetune"],
        ["learner=ewc"],
        ["learner=er"],
        ["learner=lwf"],
        ["strategy/projection=fot"],
        ["strategy/collaboration=fedcac"],
        ["strategy/collaboration=scaffold"],
        ["strategy/collaboration=fedprox"],
    ],
    ids=lambda settings: settings[0].split("=")[-1],
)
def test_one_sample_one_class_or_an_empty_task_make_no_nan(
    method: list[str], scenario: str, run_experiment: RunExperiment, scant_dir: Path
) -> None:
    settings = ["num_clients=4", "rounds_per_task=1", f"scenario={scenario}", "data/partition=scant"]
    settings += ["evaluation.personal=true", "strategy/projection=none", *method]
    folder = run_experiment("run", *settings, config_dirs=[scant_dir])
    run = load(folder)
    assert (
        run.events["kind"]
        .isin(["partition", "update_outlier", "payload_outlier", "round_mostly_empty", "warning"])
        .all()
    ), run.events
    assert run.metrics["value"].notna().all()
    trained = run.metrics[run.metrics["name"] == "num_examples"].groupby("client")["value"].agg(["sum", "count"])
    assert trained.loc["0", "sum"] == 1
    assert trained.loc["1", "sum"] == 7
    assert 1 <= trained.loc["2", "count"] <= 3 < trained.loc["3", "count"]
    state, _ = Checkpoints(folder).load()
    assert all(bool(torch.isfinite(model).all()) for model in state["server"]["models"].values())


def test_batch_normalisation_of_a_single_sample_is_a_named_failure_or_finite(
    run_experiment: RunExperiment, scant_dir: Path
) -> None:
    settings = ["num_clients=4", "rounds_per_task=2", "data/partition=scant", "model=normed"]
    folder = run_experiment("run", *settings, "strategy/projection=none", config_dirs=[scant_dir])
    run = load(folder)
    failed = run.events[run.events["kind"] == "client_failed"]
    assert {(row["client"], row["round"]) for _, row in failed.iterrows()} == {("0", 0), ("0", 1)}
    assert failed["reason"].str.contains("more than 1 value per channel").all()
    assert run.metrics["value"].notna().all()


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_global_random_state_alone(run_experiment: RunExperiment) -> None:
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    settings = ["scenario.num_tasks=2", "rounds_per_task=1", "learner=[ewc,er]", "model.hidden=[32]"]
    settings.append("model.dropout=[0.2]")
    first = run_experiment("a", *settings, "clients_per_round=5", "devices=lognormal", "evaluation.personal=true")
    after = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    assert after[0] == before[0]
    assert after[1][0] == before[1][0]
    assert np.array_equal(after[1][1], before[1][1])
    assert after[1][2:] == before[1][2:]
    assert torch.equal(after[2], before[2])
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again = run_experiment("b", *settings, "clients_per_round=5", "devices=lognormal", "evaluation.personal=true")
    assert (first / "metrics.parquet").read_bytes() == (again / "metrics.parquet").read_bytes()
