from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcl.config import compose
from fedcl.experiment import resume, run
from fedcl.results import load
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.server.loop import Server

Play = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ["backend=inline", "compare_with=null", "figures=false"]
SMALL += ["num_clients=5", "rounds_per_task=2", "scenario.num_tasks=5"]
STATEFUL = ["learner=[ewc,er]", "strategy/projection=fot"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it but the test."""


def _interrupt(monkeypatch: pytest.MonkeyPatch, event: int) -> None:
    """Die at the ``event``-th line that the run writes down."""
    from fedcl.results.recorder import Recorder

    write = Recorder._write
    count = 0

    def counting(self: Recorder, table: str, record: object) -> None:
        nonlocal count
        count += 1
        if count == event:
            raise Killed
        write(self, table, record)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "_write", counting)


@pytest.mark.parametrize("draw", range(4))
def test_resumed_after_dying_anywhere_equals_uninterrupted(
    draw: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics_hash: Hash
) -> None:
    overrides = [*SMALL, *STATEFUL]
    whole = run(compose([*overrides, f"run_dir={tmp_path / 'whole'}"]), overrides, [], quiet=True)
    lines = sum(len((whole / f"{t}.jsonl").read_text().splitlines()) for t in ("metrics", "timings", "events"))
    event = random.Random(draw).randrange(2, lines)
    with monkeypatch.context() as patched:
        _interrupt(patched, event)
        with pytest.raises(Killed):
            run(compose([*overrides, f"run_dir={tmp_path / 'cut'}"]), overrides, [], quiet=True)
    assert load(tmp_path / "cut").status == "failed"
    resume(tmp_path / "cut", force=False, quiet=True)
    assert load(tmp_path / "cut").status == "done"
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


def test_a_process_killed_by_the_system_is_resumed(tmp_path: Path, metrics_hash: Hash) -> None:
    overrides = [*SMALL, "rounds_per_task=20", "strategy/projection=none"]
    whole = run(compose([*overrides, f"run_dir={tmp_path / 'whole'}"]), overrides, [], quiet=True)
    folder = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcl", "run", "--quiet", *overrides, f"run_dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "LATEST").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "STATUS").read_text() == "running\n"
    resume(folder, force=False, quiet=True)
    assert metrics_hash(folder) == metrics_hash(whole)


def test_an_interrupted_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Server, server_round: int, counted: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "_conclude", stop)
    with pytest.raises(KeyboardInterrupt):
        run(compose([*SMALL, f"run_dir={tmp_path / 'a'}", "strategy/projection=none"]), [], [], quiet=True)
    assert load(tmp_path / "a").status == "interrupted"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_experiment: Play) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip()
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        state, _ = Checkpoints(folder).load()
    assert state["server"]["next_round"] == 9


@pytest.mark.parametrize("damage", ["empty", "truncated", "missing"])
def test_no_whole_checkpoint_is_an_error(damage: str, run_experiment: Play) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none", "checkpoint.keep=1")
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip()
    if damage == "missing":
        (newest / "state.json").unlink()
    else:
        data = (newest / "state.json").read_bytes()
        (newest / "state.json").write_bytes(b"" if damage == "empty" else data[:-5])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        Checkpoints(folder).load()


def test_old_checkpoints_and_unused_client_files_go(run_experiment: Play) -> None:
    folder = run_experiment("a", *SMALL, "learner=er", "strategy/projection=none", "checkpoint.keep=2")
    checkpoints = folder / "checkpoints"
    assert len(list(checkpoints.glob("round_*"))) == 2
    assert len(list((checkpoints / "clients").iterdir())) <= 2 * 5


def test_a_finished_run_is_only_summarised_again(run_experiment: Play, metrics_hash: Hash) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    before = metrics_hash(folder)
    resume(folder, force=False, quiet=True)
    assert metrics_hash(folder) == before
