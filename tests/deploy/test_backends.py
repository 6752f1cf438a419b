"""One seed, one metrics file: inline, on Ray, in Flower's simulation, and on devices over SuperLink and SuperNodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from fedcl.results import load

pytestmark = [pytest.mark.deployment, pytest.mark.ray, pytest.mark.flower, pytest.mark.timeout(900)]

SMALL = ["scenario.num_tasks=2", "strategy/projection=none", "learner=er", "client.optimizer.lr=0.1"]
SMALL += ["rounds_per_task=1", "num_clients=3", "figures=false", "compare_with=null"]
Fedcl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def flower_home(tmp_path: Path, end_processes: Callable[[str], None]) -> Iterator[Path]:
    home = tmp_path / "flower"
    home.mkdir()
    yield home
    end_processes(f"FLWR_HOME={home}")


def in_flowers_simulation(app: Path, overrides: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    nodes = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "--stream", "--federation-config", nodes]
    command += ["--run-config", f'overrides="{" ".join(overrides)}"']
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_four_backends_give_one_metrics_file(
    tmp_path: Path,
    make_fleet: Callable[..., Fleet],
    up: Callable[[Fleet], Processes],
    split: Callable[[Fleet], None],
    samples: Path,
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
    flower_home: Path,
    fedcl: Fedcl,
) -> None:
    fleet = make_fleet()
    split(fleet)  # three files, with the classes that each device has, in an order of its own
    data = ["data=npz", f"data.root={samples}"]
    dealt = [*data, "data.partition.alpha=0.3", *SMALL]
    inline = run_experiment("inline", *dealt)

    on_ray = fedcl("run", *dealt, "backend=ray", "backend.workers=2", f"run_dir={tmp_path / 'ray'}")
    assert on_ray.returncode == 0, on_ray.stderr
    assert metrics_hash(tmp_path / "ray") == metrics_hash(inline)

    flowers = in_flowers_simulation(fleet.server / "app", [*dealt, f"run_dir={tmp_path / 'flowers'}"], flower_home)
    assert (tmp_path / "flowers" / "STATUS").is_file(), flowers.stdout + flowers.stderr
    assert load(tmp_path / "flowers").status == "done", flowers.stdout
    assert metrics_hash(tmp_path / "flowers") == metrics_hash(inline)

    processes = up(fleet)
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    deployed = fedcl("deploy", "run", str(fleet.folder), *data, "data/partition=local", *SMALL)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    folder = Path(deployed.stdout.splitlines()[-1])
    assert metrics_hash(folder) == metrics_hash(inline)
    assert "accuracy/average" in deployed.stdout
    assert "round 2/2" in deployed.stderr
    for name in fleet.devices:
        assert list((fleet.device(name) / "state").rglob("visit_*.safetensors"))
