"""Methods and data written outside the repository, used through --config-dir without touching fedcl."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedcl.results import load

README = Path(__file__).resolve().parents[1] / "README.md"
SMALL = ["backend=inline", "num_clients=3", "rounds_per_task=1", "scenario.num_tasks=2", "compare_with=null"]

PART = '''
from torch import Tensor

from fedcl.contracts.strategy import Aggregate, Collaboration, GLOBAL, Target
from fedcl.contracts.view import ServerView


class HalfStep(Collaboration):
    """Go half of the way that the clients agree on."""

    def __init__(self, *, share: float) -> None:
        self.share = share

    def finish(self, aggregate: Aggregate, view: ServerView) -> dict[Target, Tensor]:
        return {GLOBAL: self.share * aggregate.mean()}
'''
SOURCE = '''
import numpy as np

from fedcl.data.dataset import ArrayDataset, Dataset


def stripes(*, num_samples: int) -> Dataset:
    """Four classes of 8x8 images, each with its own bright row."""
    rng = np.random.default_rng(0)
    y = np.arange(num_samples) % 4
    x = rng.normal(0.0, 0.1, (num_samples, 1, 8, 8)).astype(np.float32)
    x[np.arange(num_samples), 0, 2 * y] += 1.0
    half = ArrayDataset(x, y)
    return Dataset(half, half, ("top", "upper", "lower", "bottom"))
'''


def _fedcl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "fedcl"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def _block(marker: str) -> str:
    """Return the fenced block of the README that follows ``marker``."""
    after = README.read_text().split(marker, 1)[1]
    return after.split("```", 2)[1].split("\n", 1)[1]


def test_the_readmes_plugin_runs_and_is_fifteen_lines(tmp_path: Path) -> None:
    code, yaml = _block("`my/shrink.py`"), _block("`my/learner/shrink.yaml`")
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "my" / "learner").mkdir(parents=True)
    (tmp_path / "my" / "shrink.py").write_text(code)
    (tmp_path / "my" / "learner" / "shrink.yaml").write_text(yaml)
    listed = _fedcl(tmp_path, "list", "learner", "--config-dir", "my")
    assert "shrink" in listed.stdout
    arguments = ["--config-dir", "my", "strategy/projection=none", *SMALL]
    plain = _fedcl(tmp_path, "run", "run_dir=plain", *arguments)
    shrunk = _fedcl(tmp_path, "run", "run_dir=shrunk", "learner=shrink", "learner.shrink.weight=0.5", *arguments)
    assert (plain.returncode, shrunk.returncode) == (0, 0), plain.stderr + shrunk.stderr

    def size(name: str) -> float:
        from fedcl.results.checkpoint import Checkpoints

        state, _ = Checkpoints(tmp_path / name).load()
        return float(state["server"]["models"]["*"].norm())

    assert size("shrunk") < size("plain")


def test_a_strategy_part_and_a_data_source(tmp_path: Path) -> None:
    for folder in ("strategy/collaboration", "data"):
        (tmp_path / "my" / folder).mkdir(parents=True)
    (tmp_path / "half_step.py").write_text(PART)
    (tmp_path / "stripes.py").write_text(SOURCE)
    (tmp_path / "my" / "strategy" / "collaboration" / "half_step.yaml").write_text(
        "# Half of FedAvg's step.\nserver:\n  _target_: half_step.HalfStep\n  share: 0.5\n"
        "  _allowed_:\n    share: number > 0\n"
    )
    (tmp_path / "my" / "data" / "stripes.yaml").write_text(
        "# Stripes.\ndefaults:\n  - partition: iid\n  - _self_\n"
        "source:\n  _target_: stripes.stripes\n  num_samples: 120\n"
    )
    arguments = ["--config-dir", "my", "data=stripes", "strategy/collaboration=half_step", "strategy/projection=none"]
    done = _fedcl(tmp_path, "run", *arguments, *SMALL, "run_dir=run", "rounds_per_task=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "run"
    read = load(tmp_path / "run")
    assert read.config["strategy"]["collaboration"]["server"]["share"] == 0.5
    assert read.summary["accuracy/average"] > 0.9


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("torch.load", "shutil.rmtree", "fedcl.cli.sys.exit")),
    ],
)
def test_code_from_elsewhere_is_not_run(target: str, tmp_path: Path) -> None:
    (tmp_path / "my" / "learner").mkdir(parents=True)
    (tmp_path / "my" / "learner" / "evil.yaml").write_text(f"# Evil.\nevil:\n  _target_: {target}\n")
    done = _fedcl(tmp_path, "run", "--config-dir", "my", "learner=evil", *SMALL, "run_dir=run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
