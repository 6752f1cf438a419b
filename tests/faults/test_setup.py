"""What is wrong before a run begins, the device it asks for, and a subspace that has no room left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.assembly import device_of
from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.strategy import GLOBAL
from fedcl.contracts.view import Query, Response
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.results import load
from strategies.projection.fot import FOT

RunExperiment = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]

# -- configurations ---------------------------------------------------------------------------------------------------

HEAVY = {"torch", "ray", "flwr"}
ANSWERS = """
import contextlib, io, json, sys
from fedcl.cli import main
answers = {}
for override in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["run", override])
    answers[override] = status, error.getvalue(), sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(answers))
"""
MALFORMED = {
    "num_client=3": "num_client=3: no such key; did you mean num_clients",
    "num_clients=-3": "num_clients=-3: must be int >= 1",
    "num_clients=three": "num_clients=three: must be int >= 1",
    "client.optimizer.lr=nan": "client.optimizer.lr",
    "data.partition.alpha=0": "data.partition.alpha=0: must be number > 0",
    "rounds_per_task=[]": "rounds_per_task=[]: must be int >= 1",
    "learner=[ewc": "learner=[ewc: not an override",
    "learner=nosuch": "learner=nosuch: no such choice; available:",
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[int, str, list[str]]], Path]:
    """Give each malformed override to the command line of one fresh process; return its answers, and where it ran."""
    folder = tmp_path_factory.mktemp("malformed")
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, *MALFORMED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("override", MALFORMED)
def test_a_malformed_configuration_is_answered_without_torch(override: str, answered: Any) -> None:
    answers, folder = answered
    status, error, modules = answers[override]
    assert status == 2
    assert not HEAVY & set(modules)
    assert MALFORMED[override] in error
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["num_clients=100000"], "num_clients=100000"),
        (["num_clients=100000000"], "num_clients=100000000: must be at most 1438"),
        (["num_clients=1439"], "num_clients=1439: must be in [1, 1438]"),
        (["num_clients=2000", "data.partition.min_samples=0"], "num_clients=2000: must be in [1, 1438]"),
        (["num_clients=100000000", "data/partition=dirichlet_client"], "1000000 where clients share samples"),
        (["scenario=domain_permuted", "scenario.num_tasks=1000000000"], "scenario.num_tasks=1000000000: must be at"),
        (["scenario=scole", "scenario.num_tasks=1439"], "scenario.num_tasks=1439: must be at most 1438"),
        (["client.batch_size=1000000000000"], "client.batch_size=1000000000000: must be at most 65536"),
        (["num_clients=1440", "data/partition=iid"], "num_clients=1440"),
        (["num_clients=5000", "data/partition=shards"], "num_clients=5000"),
        (["scenario.num_tasks=3"], "scenario.num_tasks=3"),
        (["scenario.num_tasks=11"], "scenario.num_tasks=11"),
        (["exclude.samples=[99999]"], "exclude.samples"),
        (["exclude.classes=[0,1,2,3,4,5,6,7,8,9]"], "exclude.classes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_fit_the_data_is_refused_before_anything_is_written(
    overrides: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["run", "backend=inline", "compare_with=null", f"run_dir={tmp_path / 'run'}", *overrides])
    error = capsys.readouterr().err
    assert status == 2, error
    assert names in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_auto_is_the_processor_and_cuda_is_refused(
    run_experiment: RunExperiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["num_clients=2", "rounds_per_task=1", "scenario.num_tasks=2", "strategy/projection=none"]
    auto, cpu = run_experiment("auto", *small, "device=auto"), run_experiment("cpu", *small, "device=cpu")
    assert (auto / "metrics.parquet").read_bytes() == (cpu / "metrics.parquet").read_bytes()
    assert load(auto).env["device"] == "cpu"
    with pytest.raises(ConfigError, match="device=cuda: this machine has no CUDA device; use auto or cpu"):
        device_of(compose(["device=cuda"]))
    assert main(["run", "backend=inline", "device=cuda", *small, f"run_dir={tmp_path / 'cuda'}"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "cuda").exists()


# -- subspaces --------------------------------------------------------------------------------------------------------


def _fot(**options: Any) -> tuple[FOT, FlatModel]:
    model = FlatModel(build_model(lambda: MLP(input_shape=(4,), heads=(2,), hidden=()), seed=0))
    projection = FOT(epsilon=1.0, **options)
    projection.setup(model.spec)
    return projection, model


def _consume(projection: FOT, gram_DD: torch.Tensor) -> None:
    view: Any = SimpleNamespace(device=torch.device("cpu"))  # all that absorbing needs of the server
    projection.consume(Query("subspace", {}, {}), [Response("a", 5, {"head/gram": gram_DD.double()})], view)


def test_a_full_subspace_freezes_its_layer_and_says_so() -> None:
    projection, model = _fot()
    view: Any = None
    _consume(projection, torch.eye(4))
    numbers = projection.metrics()
    assert (numbers["rank/head"], numbers["frozen_share/head"]) == (4.0, 1.0)
    change = torch.ones(model.spec.size, dtype=torch.float64)
    allowed = projection.apply(GLOBAL, change, view)
    weight = model.spec["head.weight"]
    assert float(allowed[weight.start : weight.stop].abs().max()) < 1e-12
    assert bool((allowed[weight.stop :] == 1).all())  # its bias is free
    basis = projection.basis("head").clone()
    for gram in (torch.eye(4), torch.full((4, 4), 3.0)):  # there is no room left: more changes nothing
        _consume(projection, gram)
        assert torch.equal(projection.basis("head"), basis)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_rank_deficient_subspace_gets_no_more_directions_than_it_has(scale: float) -> None:
    projection, _ = _fot()
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]).double()
    _consume(projection, scale * rows.T @ rows)
    basis = projection.basis("head")
    assert 2 <= basis.shape[1] <= 4
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)
    assert float((rows - rows @ basis @ basis.T).abs().max()) < 1e-9
    _consume(projection, torch.zeros(4, 4))
    assert torch.equal(projection.basis("head"), basis)


@pytest.mark.parametrize("variant", ["corrected", "official"])
def test_a_run_goes_on_when_every_layer_is_frozen(variant: str, run_experiment: RunExperiment) -> None:
    settings = ["num_clients=3", "rounds_per_task=2", "scenario.num_tasks=5", "model.hidden=[4]"]
    settings += ["strategy/projection=fot", "strategy.projection.server.epsilon=1.0"]
    run = load(run_experiment("run", *settings, f"strategy.projection.server.variant={variant}"))
    assert run.status == "done"
    server = run.metrics[run.metrics["phase"] == "server"]
    shares = server[server["name"].str.startswith("projection/frozen_share/")]["value"]
    assert 0.8 < shares.max() <= 1.0
    assert run.metrics["value"].notna().all()
    assert set(run.events["kind"]) <= {"partition", "update_outlier", "subspace_nearly_full"}
