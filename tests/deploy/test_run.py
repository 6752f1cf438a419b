"""Runs over a real SuperLink and real SuperNodes on loopback, with TLS and keys: what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.deploy.certificates import new_device_key
from fedcl.deploy.layout import Fleet, read_launches
from fedcl.deploy.processes import Processes
from fedcl.deploy.submit import CONNECTION, flwr, submit
from fedcl.results import load

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

SMALL = ["scenario.num_tasks=2", "strategy/projection=none", "learner=er", "figures=false", "client.optimizer.lr=0.1"]
Fedcl = Callable[..., "subprocess.CompletedProcess[str]"]
Up = Callable[[Fleet], Processes]


def start(processes: Processes) -> None:
    processes.start_server()
    for name in processes.fleet.devices:
        processes.start_device(name)


def own(samples: Path) -> list[str]:
    return ["data=npz", f"data.root={samples}", "data/partition=local"]


def test_killed_devices_cost_their_replies_and_come_back_one_as_another_node(
    make_fleet: Callable[..., Fleet], up: Up, split: Callable[[Fleet], None], samples: Path
) -> None:
    fleet = make_fleet()
    split(fleet)
    processes = up(fleet)
    start(processes)
    folder = fleet.folder / "runs" / "killed"
    before: set[str] = set()

    def disturb() -> None:
        wait_for(lambda: rounds_done(folder) >= 1)
        before.update(states_of(fleet, "2"))
        for name in ("1", "2"):
            processes.stop(f"device-{name}", hard=True)
        wait_for(lambda: text_of(folder / "events.jsonl").count("client_failed") >= 2)
        key = fleet.device("2") / "key"
        key.unlink()
        new_device_key(key, fleet.server / "keys" / "2.pub")
        for name in ("1", "2"):
            processes.start_device(name)

    thread = threading.Thread(target=disturb)
    thread.start()
    once = [*SMALL[1:], "scenario=joint", "rounds_per_task=6"]
    submit(fleet, [*own(samples), *once, f"run_dir={folder}"], quiet=True)
    thread.join()
    run = load(folder)
    failed = run.events[run.events["kind"] == "client_failed"]
    assert run.status == "done"
    assert set(failed["client"]) == {"1", "2"}
    for client in ("1", "2"):
        trained = run.metrics[(run.metrics["client"] == client) & (run.metrics["phase"] == "train")]
        assert trained["round"].max() > failed["round"].max()  # it has come back before the end
    assert not failed["reason"].str.contains("no state of visit").any()  # with what it had learned before
    assert before & set(states_of(fleet, "2"))
    answer = json.loads(flwr(fleet, "supernode", "list", CONNECTION, "--format", "json"))
    assert len({node["node-id"] for node in answer["nodes"]}) == 4  # device 2 had two of them


@pytest.mark.slow
def test_a_killed_server_is_resumed_to_the_numbers_of_an_undisturbed_run(
    make_fleet: Callable[..., Fleet],
    up: Up,
    split: Callable[[Fleet], None],
    samples: Path,
    run_experiment: Callable[..., Path],
    metrics_hash: Callable[[Path], str],
    fedcl: Fedcl,
) -> None:
    fleet = make_fleet(devices=2)
    split(fleet)
    mixed = [f"data.root={samples}", "data.partition.alpha=0.3", "num_clients=2", "rounds_per_task=2"]
    inline = run_experiment("inline", "data=npz", *mixed, *SMALL)
    processes = up(fleet)
    start(processes)
    folder = fleet.folder / "runs" / "cut"
    command = [sys.executable, "-m", "fedcl", "deploy", "run", str(fleet.folder), *own(samples), *SMALL]
    command += ["rounds_per_task=2", f"run_dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        wait_for(lambda: rounds_done(folder) >= 2)
        processes.stop("server", hard=True)
        said, _ = running.communicate(timeout=200)
    assert running.returncode == 2, said
    assert f"fedcl deploy resume {fleet.folder}" in said
    processes.start_server()
    done = fedcl("deploy", "resume", str(fleet.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_launches(fleet)[-1].attempt == 1
    assert metrics_hash(folder) == metrics_hash(inline)


@pytest.fixture
def local(
    tmp_path: Path, samples: Path, end_processes: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts ``fedcl deploy local`` in a session of its own, with two devices and their logs."""
    monkeypatch.setenv("FEDCL_TEST_TAG", str(tmp_path))
    monkeypatch.setenv("FEDCL_DATA", str(samples.parent))
    started: list[subprocess.Popen[str]] = []

    def start_local(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fedcl", "deploy", "local", "-n", "2", "--dir", str(tmp_path / "fleet")]
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start_local
    end_processes(f"FEDCL_TEST_TAG={tmp_path}")
    for process in started:
        process.communicate()


def alive(tmp_path: Path) -> list[str]:
    """Return the commands of the processes that inherited this test's mark."""
    found = [pid for pid in Path("/proc").glob("[0-9]*") if int(pid.name) != os.getpid() and tagged(pid, tmp_path)]
    return [(pid / "cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in found]


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a process says until it says ``text``."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} never came:\n{said}")


JOINT = ["scenario=joint", "strategy/projection=none", "learner=er", "figures=false", "client.optimizer.lr=0.1"]
LINES = ["server up at", "2 devices started", "the run's process has started", "1/2 devices joined"]
LINES += ["2/2 devices joined", "first message sent", "first reply"]


def test_a_signal_ends_a_local_fleet_whole_and_says_how_to_go_on(
    tmp_path: Path, local: Callable[..., subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "run"
    process = local(f"run_dir={folder}", "rounds_per_task=50", *JOINT)
    said = read_until(process, "round 1/50")
    told = [line.removeprefix("fleet: ") for line in said.splitlines() if line.startswith("fleet: ")]
    assert [line for line, start in zip(told, LINES, strict=True) if line.startswith(start)] == told
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, rest
    (line,) = [line for line in rest.splitlines() if not line.startswith("round ")]
    assert line == f"fedcl: interrupted; resume with: fedcl deploy local -n 2 --resume --dir {tmp_path / 'fleet'}"
    assert (folder / "STATUS").read_text() == "interrupted\n"
    assert alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("at", ["server up", "the run's process has started", "first message sent"])
def test_a_signal_at_any_time_leaves_no_process(
    tmp_path: Path, local: Callable[..., subprocess.Popen[str]], at: str
) -> None:
    folder = tmp_path / "run"
    process = local(f"run_dir={folder}", "rounds_per_task=2", *JOINT)
    read_until(process, at)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 143, rest
    assert "Traceback" not in rest
    assert alive(tmp_path) == []
    assert not (folder / "STATUS").is_file() or (folder / "STATUS").read_text() == "interrupted\n"
    if at == "first message sent":
        assert f"fedcl deploy local -n 2 --resume --dir {tmp_path / 'fleet'}" in rest
        done = local("--resume")
        _, rest = done.communicate(timeout=500)
        assert done.returncode == 0, rest
        assert load(folder).status == "done"
        assert alive(tmp_path) == []


def tagged(process: Path, tmp_path: Path) -> bool:
    try:
        alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return alive and f"FEDCL_TEST_TAG={tmp_path}".encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def states_of(fleet: Fleet, name: str) -> list[str]:
    return [file.name for file in (fleet.device(name) / "state").rglob("visit_*.safetensors")]


def rounds_done(folder: Path) -> int:
    return max((int(p.name.removeprefix("round_")) + 1 for p in (folder / "checkpoints").glob("round_*")), default=0)


def text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def wait_for(condition: Callable[[], bool], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.3)
