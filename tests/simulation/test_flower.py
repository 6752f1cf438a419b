"""The same apps under Flower's own simulation engine, through ``flwr run``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.results import load

pytestmark = [pytest.mark.slow, pytest.mark.flower]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["num_clients=4", "rounds_per_task=2", "scenario.num_tasks=2"]


@pytest.fixture
def flower_home(tmp_path: Path, end_processes: Callable[[str], None]) -> Iterator[Path]:
    """Return a Flower home of this test's own; whatever was started with it is ended by process id."""
    home = tmp_path / "flower"
    home.mkdir()
    yield home
    end_processes(f"FLWR_HOME={home}")


def _checkout(folder: Path) -> Path:
    """Copy what belongs to the app: Flower wants a folder name of letters, digits and hyphens."""
    target = folder / "fedcl-app"
    target.mkdir()
    for name in ("fedcl", "strategies", "clients", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes it started through /proc")
def test_flwr_run_gives_the_inline_numbers(
    tmp_path: Path, flower_home: Path, run_experiment: Callable[..., Path], metrics_hash: Callable[[Path], str]
) -> None:
    overrides = [*SMALL, "learner=[ewc,er]", "strategy/projection=fot", "figures=false"]
    inline = run_experiment("inline", *overrides)
    folder = tmp_path / "flower-run"
    command = [
        str(Path(sys.executable).parent / "flwr"),
        "run",
        str(_checkout(tmp_path)),
        "--stream",
        "--federation-config",
        "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2",
        "--run-config",
        f'overrides="{" ".join(overrides)} run_dir={folder}"',
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "FLWR_HOME": str(flower_home), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (folder / "STATUS").is_file(), done.stdout + done.stderr
    assert load(folder).status == "done", done.stdout
    assert load(folder).events["kind"].tolist() == ["partition"]
    assert metrics_hash(folder) == metrics_hash(inline)
