"""Does one run give the same bits wherever and however it runs? Inline, on Ray workers, and after a kill."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedcl.bench.result import Result
from fedcl.config.compose import compose
from fedcl.runs.experiment import resume, run

# Every kind of state at once: replay, Fisher matrices, bases, messages in flight. 19 clients are more than a block.
SETTINGS = (
    "num_clients=19", "scenario.num_tasks=5", "rounds_per_task=3", "learner=[ewc,er]", "strategy/projection=fot",
    "strategy.projection.server.epsilon=0.8", "devices=lognormal", "devices.sigma=1.0", "async.deadline=0.05",
    "async.finished_task=keep", "evaluation.personal=true", "checkpoint.min_seconds=0",
    "compare_with=null", "figures=false",
)  # fmt: skip
WORKERS = (1, 2, 3)
KILL_AFTER = 5  # rounds
START_SECONDS = 120.0


def repro() -> Result:
    """Run the same experiment inline, on 1, 2 and 3 Ray workers, and resumed from a SIGKILL; compare the metrics.

    Returns
    -------
    Result
        One row a run; ``ratio`` is the share of runs whose ``metrics.parquet`` has the inline run's SHA-256.
    """
    ways: dict[str, Callable[[Path], Path]] = {"inline": lambda folder: _run(folder, "backend=inline")}
    for count in WORKERS:
        ways[f"ray, workers={count}"] = _on_ray(count)
    ways[f"inline, killed after round {KILL_AFTER} and resumed"] = _killed_and_resumed
    rows: list[dict[str, str | int | float | bool]] = []
    with tempfile.TemporaryDirectory(prefix="fedcl-repro-") as folder:
        for number, (name, run_rounds) in enumerate(ways.items()):
            started = time.perf_counter()
            run_dir = run_rounds(Path(folder) / str(number))
            digest = hashlib.sha256((run_dir / "metrics.parquet").read_bytes()).hexdigest()
            rows.append(
                {
                    "backend": name,
                    "rounds": _rounds(run_dir),
                    "SHA-256 of metrics.parquet": digest,
                    "equal": not rows or digest == rows[0]["SHA-256 of metrics.parquet"],
                    "seconds": time.perf_counter() - started,
                }
            )
    ratio = sum(bool(row["equal"]) for row in rows) / len(rows)
    return Result("repro", ratio, ratio == 1.0, rows)


def _on_ray(count: int) -> Callable[[Path], Path]:
    return lambda folder: _run(folder, "backend=ray", f"backend.workers={count}")


def _run(folder: Path, *overrides: str) -> Path:
    settings = [*SETTINGS, *overrides, f"run_dir={folder}"]
    return run(compose(settings), settings, [], quiet=True)


def _killed_and_resumed(folder: Path) -> Path:
    settings = [*SETTINGS, "backend=inline", f"run_dir={folder}"]
    _kill_when(_start(settings), folder / "checkpoints" / "LATEST")
    if (folder / "STATUS").read_text() != "running\n":
        raise RuntimeError(f"{folder}: the run was over before it was killed")
    return resume(folder, force=False, quiet=True)


def _start(settings: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedcl", "run", "--quiet", *settings]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def _kill_when(process: subprocess.Popen[bytes], latest: Path) -> None:
    """Kill the process once it has written the checkpoint of round ``KILL_AFTER``."""
    deadline = time.monotonic() + START_SECONDS
    try:
        while not (latest.is_file() and latest.read_text() >= f"round_{KILL_AFTER - 1:06d}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run to be killed ended or never came so far: status {process.poll()}")
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _rounds(run_dir: Path) -> int:
    import pyarrow.parquet

    rounds = pyarrow.parquet.read_table(run_dir / "metrics.parquet", columns=["round"])["round"]
    return int(max(rounds.to_pylist())) + 1
