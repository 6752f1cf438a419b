"""Sweeps as a user starts them: processes of their own, a job that fails, one that is killed, a signal."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    # what a shell starts in the background ignores Ctrl-C, and so would all that these tests start
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def statuses(folder: Path) -> dict[str, str]:
    return {job["name"]: job["status"] for job in json.loads((folder / "sweep.json").read_text())["jobs"]}


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def write_plugin(folder: Path, body: str) -> None:
    (folder / "learner").mkdir(parents=True, exist_ok=True)
    (folder / "fragile.py").write_text(
        "from fedcl.contracts.learner import Phase, Plugin\n\n\n"
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


# With a gate a job waits in the midst of a round, for as long as a test needs it to be at work.
GATED = """\
        import pathlib, time
        gate = pathlib.Path(r'{gate}')
        if ctx.local_round == 3 and gate.parent.is_dir():
            (gate.parent / 'reached').touch()
            while not gate.exists():
                time.sleep(0.01)
"""
LONG = (*SMALL[:2], "rounds_per_task=4", *SMALL[3:], "checkpoint.min_seconds=0", "seed=0,1", "learner=fragile")


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file for which jobs wait once its folder is there."""
    gate = tmp_path / "gate" / "open"
    write_plugin(tmp_path / "own", GATED.format(gate=gate))
    return gate


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_goes_on_to_the_same_bits(signum: signal.Signals, gate: Path, tmp_path: Path) -> None:
    straight, broken, own = tmp_path / "straight", tmp_path / "broken", str(tmp_path / "own")
    assert finish(start(straight, *LONG, "--config-dir", own, "--jobs", "2"))[0] == 0
    gate.parent.mkdir()
    process = start(broken, *LONG, "--config-dir", own, "--quiet")
    wait_for((gate.parent / "reached").exists)
    process.send_signal(signum)
    wait_for(lambda: "finishing the round" in (broken / "logs" / "seed-0.log").read_text())
    gate.touch()
    code, _, _ = finish(process)
    assert code == 128 + signum
    assert statuses(broken) == {"seed-0": "interrupted", "seed-1": "waiting"}
    assert (broken / "seed-0" / "checkpoints" / "LATEST").is_file()
    code, out, _ = finish(start(broken, "--quiet"))  # the folder alone goes on with what it holds
    assert (code, out) == (0, f"{broken}\n")
    for seed in ("seed-0", "seed-1"):
        assert (broken / seed / "metrics.parquet").read_bytes() == (straight / seed / "metrics.parquet").read_bytes()


def test_a_job_that_outlives_its_killed_sweep_is_not_started_twice(gate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    gate.parent.mkdir()
    process = start(folder, *LONG, "--config-dir", str(tmp_path / "own"))
    wait_for((gate.parent / "reached").exists)
    process.kill()
    process.communicate()
    code, _, err = finish(start(folder))
    assert code == 2
    assert "is at work there" in err
    gate.touch()
    wait_for((folder / "seed-0" / "summary.json").is_file)
    deadline = time.monotonic() + 60
    while (code := finish(start(folder))[0]) == 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (code, set(statuses(folder).values())) == (0, {"done"})


def test_a_job_that_somebody_stops_is_told_of_and_gone_on_with(gate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    gate.parent.mkdir()
    process = start(folder, *LONG[:-2], "learner=fragile", "seed=0", "--config-dir", str(tmp_path / "own"))
    wait_for((gate.parent / "reached").exists)
    job = int(*children_of(process.pid))
    os.kill(job, signal.SIGTERM)
    gate.touch()
    code, _, err = finish(process)
    assert (code, statuses(folder)) == (1, {"run": "interrupted"})
    assert "fedcl: interrupted: run: by SIGTERM" in err
    assert finish(start(folder))[0] == 0
