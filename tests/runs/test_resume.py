from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcl.base import files
from fedcl.cli import main
from fedcl.config.compose import compose
from fedcl.results import checkpoint, load, recorder, sums
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.runs.experiment import resume, run
from fedcl.server.exchange import Exchange
from fedcl.server.loop import Server

RunExperiment = Callable[..., Path]
Hash = Callable[[Path], str]
SMALL = ["backend=inline", "compare_with=null", "figures=false", "num_clients=4", "scenario.num_tasks=5"]
SMALL += ["rounds_per_task=2", "data/partition=iid", "checkpoint.min_seconds=0"]
STATEFUL = ["learner=[ewc,er]", "strategy/projection=fot"]
MODES = {
    "sync": ["backend.state=files"],
    "deadline": ["async.deadline=0.2", "devices=lognormal", "devices.sigma=1.0"],
    "buffer": ["async.buffer=2", "devices=lognormal", "async.finished_task=keep"],
    "async": ["async.buffer=1", "devices=tiers", "async.max_age=3"],
    "fedcac": ["async.deadline=0.2", "devices=lognormal", "strategy/collaboration=fedcac", "strategy/projection=none"],
}


TWICE = ["backend=inline", "figures=false", "num_clients=2", "scenario.num_tasks=2", "rounds_per_task=1"]
TWICE += ["strategy/projection=none", "checkpoint.min_seconds=0", "compare_with='client.epochs=2'"]


@pytest.fixture(scope="module")
def uninterrupted_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its reference."""
    folder = tmp_path_factory.mktemp("pair") / "whole"
    assert main(["run", "--quiet", *TWICE, f"run_dir={folder}"]) == 0
    return folder


class Killed(BaseException):
    """Stands for SIGKILL: nothing between here and the test catches it, nothing is tidied up after it."""


def _nth_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, after: bool = False) -> None:
    """Die at the ``number``-th call of ``owner.name``, before it does anything or when it has done it."""
    original = getattr(owner, name)
    count = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        result = original(*args, **kwargs)
        if count == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, counting)


def killed_and_resumed(overrides: list[str], folder: Path, line: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run into ``folder``, die before the ``line``-th row, and resume."""
    overrides = [*overrides, "backend=inline", "compare_with=null", "figures=false", f"run_dir={folder}"]
    overrides.append("checkpoint.min_seconds=0")
    with monkeypatch.context() as patched:
        _nth_call(patched, recorder.Recorder, "_line", line)
        with pytest.raises(Killed):
            run(compose(overrides), overrides, [], quiet=True)
    resume(folder, force=False, quiet=True)


def _kill_at(point: str, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    if point == "line":  # anywhere: each row, timing and event is a line
        _nth_call(monkeypatch, recorder.Recorder, "_line", draw.randrange(2, 150))
    elif point == "checkpoint":  # within the write: some files are there, others not
        _nth_call(monkeypatch, checkpoint, "write_bytes_atomic", draw.randrange(1, 30), after=draw.random() < 0.5)
    elif point == "latest":  # the checkpoint is whole, nothing points to it yet
        _nth_call(monkeypatch, checkpoint, "write_atomic", draw.randrange(1, 9))
    elif point == "commit":  # a visit is staged, the server has not yet said that it counts
        _nth_call(monkeypatch, Exchange, "commit", draw.randrange(4, 12), after=draw.random() < 0.5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function giving the folder of a mode's undisturbed run, played once."""
    folders: dict[str, Path] = {}

    def run_one(mode: str) -> Path:
        if mode not in folders:
            folders[mode] = tmp_path_factory.mktemp("whole") / mode
            overrides = [*SMALL, *STATEFUL, *MODES[mode], f"run_dir={folders[mode]}"]
            run(compose(overrides), overrides, [], quiet=True)
        return folders[mode]

    return run_one


@pytest.mark.parametrize(
    "point", ["line", "checkpoint", *(pytest.param(p, marks=pytest.mark.slow) for p in ("latest", "commit"))]
)
@pytest.mark.parametrize("mode", list(MODES))
def test_resumed_after_dying_anywhere_equals_uninterrupted(
    mode: str,
    point: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics_hash: Hash,
    uninterrupted: Callable[[str], Path],
) -> None:
    whole, draw = uninterrupted(mode), random.Random(f"{mode} {point}")
    overrides = [*SMALL, *STATEFUL, *MODES[mode], f"run_dir={tmp_path / 'cut'}"]
    with monkeypatch.context() as patched:
        _kill_at(point, draw, patched)
        with pytest.raises(Killed):
            run(compose(overrides), overrides, [], quiet=True)
    if point == "line":  # and once more, while the tables are being cut back
        with monkeypatch.context() as patched:
            _nth_call(patched, recorder.os, "truncate", draw.randrange(1, 4), after=True)
            with pytest.raises(Killed):
                resume(tmp_path / "cut", force=False, quiet=True)
    resume(tmp_path / "cut", force=False, quiet=True)
    assert load(tmp_path / "cut").status == "done"
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)
    kept = ("accuracy/average", "bytes/up", "bytes/down", "staleness/mean", "virtual_time")
    ours, theirs = load(tmp_path / "cut").summary, load(whole).summary
    assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}


def _die_at_write(monkeypatch: pytest.MonkeyPatch, place: str, *, after: bool) -> None:
    """Die at the first write of the file ``place`` of a run's folder, before it or when it is there."""
    original = files.write_bytes_atomic

    def write(path: Path, data: bytes) -> None:
        here = path.as_posix().endswith(f"/cut/{place}")
        if here and not after:
            raise Killed
        original(path, data)
        if here:
            raise Killed

    monkeypatch.setattr(files, "write_bytes_atomic", write)
    monkeypatch.setattr(sums, "write_bytes_atomic", write)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "place",
    [
        "env.json",
        "config.yaml",
        "STATUS",
        "summary.json",
        "reference/config.yaml",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "overrides.yaml",
                "SHA256SUMS",
                "reference/env.json",
                "reference/STATUS",
                "reference/summary.json",
            )
        ),
    ],
)
def test_killed_between_any_two_files_a_run_begins_or_is_begun_again(
    place: str,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted_pair: Path,
) -> None:
    line = ["run", "--quiet", *TWICE, f"run_dir={tmp_path / 'cut'}"]
    with monkeypatch.context() as patched:
        _die_at_write(patched, place, after=after)
        with pytest.raises(Killed):
            main(line)
    if (tmp_path / "cut" / "config.yaml").exists():
        assert main(["resume", "--quiet", str(tmp_path / "cut")]) == 0
    else:
        capsys.readouterr()
        assert main(["resume", "--quiet", str(tmp_path / "cut")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"start it again with run_dir={tmp_path / 'cut'}" in error
        assert main(line) == 0  # what little is there is in nobody's way
    ours, whole = load(tmp_path / "cut"), load(uninterrupted_pair)
    for one, other in ((ours, whole), (ours.reference, whole.reference)):
        assert one is not None
        assert other is not None
        assert one.status == "done"
        assert one.metrics.equals(other.metrics)
    numbers = [key for key in whole.summary if not key.endswith(("wall_time", "clients_per_second"))]
    assert {key: ours.summary[key] for key in numbers} == {key: whole.summary[key] for key in numbers}


def _started(folder: Path, overrides: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a run in a process of its own and wait for its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcl", "run", "--quiet", *overrides, f"run_dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "LATEST").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


LONG = [*SMALL, "rounds_per_task=40", "strategy/projection=none"]


@pytest.mark.slow
def test_a_process_killed_by_the_system_is_resumed(tmp_path: Path, metrics_hash: Hash) -> None:
    whole = tmp_path / "whole"
    run(compose([*LONG, f"run_dir={whole}"]), [*LONG, f"run_dir={whole}"], [], quiet=True)
    process = _started(tmp_path / "cut", LONG)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "cut" / "STATUS").read_text() == "running\n"
    resume(tmp_path / "cut", force=False, quiet=True)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes it started through /proc")
def test_a_ray_run_killed_by_the_system_is_resumed(
    tmp_path: Path, metrics_hash: Hash, end_processes: Callable[[str], None]
) -> None:
    overrides = [*LONG, "learner=er", "backend=ray", "backend.workers=2"]
    whole = tmp_path / "whole"
    inline = [*overrides, "backend=inline", f"run_dir={whole}"]
    run(compose(inline), inline, [], quiet=True)
    process = _started(tmp_path / "cut", overrides, FEDCL_TEST=str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end_processes(f"FEDCL_TEST={tmp_path}")  # Ray's own, whose driver is gone
    resume(tmp_path / "cut", force=False, quiet=True)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_round_and_says_so(signum: int, status: int, tmp_path: Path) -> None:
    process = _started(tmp_path / "a", [*LONG, "checkpoint.every=3"])
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    read = load(tmp_path / "a")
    assert read.status == "interrupted"
    state, _ = Checkpoints(tmp_path / "a").load()
    assert state["server"]["next_round"] == read.metrics["round"].max() + 1
    assert "finishing the round" in stderr


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def insist(self: Server, server_round: int, counted: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the run went on")

    monkeypatch.setattr(Server, "_finalize", insist)
    overrides = [*SMALL, f"run_dir={tmp_path / 'a'}", "strategy/projection=none"]
    assert main(["run", *overrides]) == 130
    assert load(tmp_path / "a").status == "interrupted"


def test_a_changed_configuration_is_refused_with_a_diff(
    run_experiment: RunExperiment, capsys: pytest.CaptureFixture[str], metrics_hash: Hash
) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    before = metrics_hash(folder)
    (folder / "STATUS").write_text("interrupted\n")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.3", "lr: 0.2"))
    assert main(["resume", str(folder), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "client.optimizer.lr: 0.2 -> 0.3" in error
    assert len(error.strip().splitlines()) == 1
    assert main(["resume", str(folder), "--quiet", "--force"]) == 0
    assert metrics_hash(folder) == before  # it was done already


def test_another_version_is_refused(run_experiment: RunExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    env = folder / "env.json"
    env.write_text(env.read_text().replace('"torch": "', '"torch": "0.'))
    assert main(["resume", str(folder), "--quiet"]) == 2
    assert "env.json: damaged" in capsys.readouterr().err
    sums.accept(folder)  # as if another torch had been here
    assert main(["resume", str(folder), "--quiet"]) == 2
    assert "torch: 0." in capsys.readouterr().err


def _newest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    tensors = _newest(folder) / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        state, _ = Checkpoints(folder).load()
    assert state["server"]["next_round"] == 9


@pytest.mark.parametrize("damage", ["empty", "truncated", "missing"])
def test_no_whole_checkpoint_is_an_error(damage: str, run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none", "checkpoint.keep=1")
    state = _newest(folder) / "state.json"
    data = state.read_bytes()
    state.unlink()
    if damage != "missing":
        state.write_bytes(b"" if damage == "empty" else data[:-5])
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        Checkpoints(folder).load()


def test_old_checkpoints_and_unused_client_files_go(run_experiment: RunExperiment) -> None:
    folder = run_experiment("a", *SMALL, "learner=er", "strategy/projection=none", "checkpoint.keep=2")
    assert len(list((folder / "checkpoints").glob("round_*"))) == 2
    assert len(list((folder / "checkpoints" / "clients").iterdir())) <= 2 * 4


def test_a_finished_run_is_only_summarised_again(run_experiment: RunExperiment, metrics_hash: Hash) -> None:
    folder = run_experiment("a", *SMALL, "strategy/projection=none")
    before = metrics_hash(folder)
    resume(folder, force=False, quiet=True)
    assert metrics_hash(folder) == before
