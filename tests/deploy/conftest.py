from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from tests.deploy.fleets import ended, new_fleet

MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make_fleet(tmp_path: Path) -> MakeFleet:
    """Return a function that writes a fleet on loopback, at a port that is free."""

    def make(devices: int = 3, name: str = "fleet", **options: bool) -> Fleet:
        return new_fleet(tmp_path / name, devices, **options)

    return make


@pytest.fixture
def up(end_processes: Callable[[str], None], tmp_path: Path) -> Iterator[Callable[[Fleet], Processes]]:
    """Return a function that gives a fleet's processes, all ended by id afterwards, and their children too."""
    with ended(tmp_path, end_processes) as open_:
        yield open_


@pytest.fixture
def fedcl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a fedcl command in a process of its own."""

    def call(*arguments: str, timeout: float = 560) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedcl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an npz file with 300 train and 100 test samples of 10 classes: loaded without scikit-learn."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 16)).astype(np.float32)
    halves = {}
    for half, count in (("train", 300), ("test", 100)):
        y = np.arange(count) % 10
        x = centres[y] + 0.3 * rng.normal(size=(count, 16)).astype(np.float32)
        halves |= {f"x_{half}": x.astype(np.float32), f"y_{half}": y.astype(np.int64)}
    file = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(file, **halves)
    return file


@pytest.fixture(scope="session")
def split(samples: Path) -> Callable[[Fleet], None]:
    """Return a function that gives each device a file of its own: its classes by name, in an order of its own."""

    def deal(fleet: Fleet) -> None:
        from fedcl.assembly import load_dataset, split_dataset
        from fedcl.config.compose import compose

        count = len(fleet.devices)
        cfg = compose(["data=npz", f"data.root={samples}", "data.partition.alpha=0.3", f"num_clients={count}"])
        dataset = load_dataset(cfg)
        partition = split_dataset(cfg, dataset)
        for name, train, test in zip(fleet.devices, partition.train, partition.test, strict=True):
            y, y_test = dataset.train.y[train], dataset.test.y[test]
            held = sorted({*y.tolist(), *y_test.tolist()}, reverse=True)
            own = np.full(dataset.num_classes, -1)
            own[held] = np.arange(len(held))
            file = fleet.device(name) / "own.npz"
            np.savez(
                file,
                x_train=dataset.train.x[train],
                y_train=own[y],
                x_test=dataset.test.x[test],
                y_test=own[y_test],
                classes=np.array([dataset.classes[label] for label in held]),
            )
            spec = fleet.device(name) / "client.yaml"
            spec.write_text(f'client: "{name}"\ndata: [data=npz, "data.root={file}"]\nstate: state\n')

    return deal
