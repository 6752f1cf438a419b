"""Sweeps as a user starts them: processes of their own, a job that fails, one that is killed, a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]
SMALL = (
    "backend=inline", "num_clients=2", "rounds_per_task=1", "scenario.num_tasks=2", "figures=false",
    "strategy/projection=none", "model.hidden=[8]",
)  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedcl", "sweep", *arguments, f"sweep_dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def statuses(folder: Path) -> dict[str, str]:
    return {job["name"]: job["status"] for job in json.loads((folder / "sweep.json").read_text())["jobs"]}


def write_plugin(folder: Path, body: str) -> None:
    (folder / "learner").mkdir(parents=True, exist_ok=True)
    (folder / "fragile.py").write_text(
        "from fedcl.client.plugin import Phase, Plugin\n\n\n"
        "class Fragile(Plugin):\n    phase = Phase.BOOKKEEPING\n\n"
        "    def __init__(self, *, harm: int) -> None:\n        self.harm = harm\n\n"
        f"    def before_round(self, ctx):\n{body}"
    )
    (folder / "learner" / "fragile.yaml").write_text(
        "# Fails.\nfragile:\n  _target_: fragile.Fragile\n  harm: 0\n  _allowed_:\n    harm: int >= 0\n"
    )


FAILING = "        if self.harm:\n            raise RuntimeError(f'harm {self.harm}')\n"


def test_a_failed_job_does_not_lose_the_sweep_and_is_tried_again(tmp_path: Path) -> None:
    folder, own = tmp_path / "out", tmp_path / "own"
    write_plugin(own, FAILING.replace("raise RuntimeError(f'harm {self.harm}')", "import os; os._exit(9)"))
    line = [*SMALL, "learner=fragile", "learner.fragile.harm=1,0", "--config-dir", str(own)]
    code, out, err = finish(start(folder, *line))
    assert code == 1
    assert statuses(folder) == {"harm-1": "failed", "harm-0": "done"}
    assert "fedcl: failed: harm-1: exit status 9" in err
    assert "[2/2] harm-0  done" in err
    assert out.splitlines()[-1] == str(folder)
    assert "left out" in out.lower()
    done = (folder / "harm-0" / "summary.json").stat().st_mtime_ns
    write_plugin(own, "        pass\n")
    code, out, err = finish(start(folder, *line))
    assert (code, statuses(folder)) == (0, {"harm-1": "done", "harm-0": "done"})
    assert "1 of 2 jobs are done already" in err
    assert "learner.fragile.harm=1" in out
    assert (folder / "harm-0" / "summary.json").stat().st_mtime_ns == done


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + 400
    while not (folder / name / "checkpoints" / "LATEST").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = (*SMALL[:2], "rounds_per_task=400", *SMALL[3:], "checkpoint.min_seconds=0", "seed=0,1")


def test_interrupted_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert finish(start(straight, *LONG, "--jobs", "2"))[0] == 0
    process = start(broken, *LONG, "--quiet")
    wait_for(broken, "seed-0")
    process.send_signal(signal.SIGINT)
    code, _, _ = finish(process)
    assert code == 130
    assert statuses(broken)["seed-0"] in ("interrupted", "done")
    assert statuses(broken)["seed-1"] == "waiting"
    code, out, _ = finish(start(broken, "--quiet"))  # the folder alone goes on with what it holds
    assert (code, out) == (0, f"{broken}\n")
    for seed in ("seed-0", "seed-1"):
        assert (broken / seed / "metrics.parquet").read_bytes() == (straight / seed / "metrics.parquet").read_bytes()


def test_a_job_that_outlives_its_killed_sweep_is_not_started_twice(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = start(folder, *LONG, "client.epochs=3")
    wait_for(folder, "seed-0")
    process.kill()
    process.communicate()
    code, _, err = finish(start(folder))
    assert code == 2
    assert "is at work there" in err
    deadline = time.monotonic() + 400
    while (code := finish(start(folder))[0]) == 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (code, set(statuses(folder).values())) == (0, {"done"})
