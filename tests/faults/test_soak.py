"""Two hundred rounds in a process of their own: memory, files and shared memory must not grow with the rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "compare_with=null", "figures=false", "num_clients=8", "clients_per_round=4", "scenario.num_tasks=5",
    "rounds_per_task=40", "model.hidden=[8]", "learner=[ewc,er]", "learner.er.budget=20", "evaluation.every=0",
    "strategy/projection=none", "checkpoint.min_seconds=0",
]  # fmt: skip

# Prints, after rounds 50 and 200, what the run's own processes hold: anonymous and shared memory in KiB, open files.
WATCH = """
import gc, json, os, sys
from pathlib import Path
from fedcl.cli import main
from fedcl.results.progress import Progress

def family(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in tasks for child in file.read_text().split()]
    return [pid, *(one for child in children for one in family(child))]

def sample(done):
    found = {"round": done, "anonymous": 0, "shared": 0, "files": 0, "processes": 0}
    for pid in family(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace(chr(0), " ")
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:
            continue  # ended meanwhile
        if pid == os.getpid() or name.startswith("ray::Worker"):
            found["anonymous"] += int(status["RssAnon"].split()[0])
            found["files"] += files
            found["processes"] += 1
        if "raylet/raylet" in name or pid == os.getpid():
            found["shared"] = max(found["shared"], int(status["RssShmem"].split()[0]))
    print(json.dumps(found), flush=True)

update = Progress.update
def watch(self, done, *args):
    update(self, done, *args)
    if done in (50, 100, 150, 200):
        gc.collect()
        sample(done)
Progress.update = watch
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("backend", "processes"),
    [
        (["backend=inline"], 1),
        pytest.param(["backend=ray", "backend.workers=2"], 3, marks=pytest.mark.ray),
    ],
    ids=["inline", "ray"],
)
def test_two_hundred_rounds_hold_no_more_than_fifty(backend: list[str], processes: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, "run", "--quiet", *SETTINGS, *backend, f"run_dir={tmp_path / 'run'}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [sample["round"] for sample in samples] == [50, 100, 150, 200]
    early, late = samples[0], samples[-1]
    assert early["processes"] == late["processes"] == processes
    # shared memory is half a MB, of which five per cent are a few pages; one model a round would be ten times the slack
    slack = {"anonymous": 0, "shared": 128, "files": 0}
    for what, more in slack.items():
        assert late[what] <= 1.05 * early[what] + more, samples
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) < 50  # nothing is left for each round
