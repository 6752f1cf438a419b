"""Requests to forget, and messages that are too large, over a real SuperLink and real SuperNodes."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.client.file_state import FileStateStore
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from fedcl.deploy.submit import submit
from fedcl.results import load

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = ["strategy/projection=none", "learner=er", "figures=false", "unlearner=continue_without"]
Fedcl = Callable[..., "subprocess.CompletedProcess[str]"]


@contextmanager
def running(processes: Processes, overrides: list[str], folder: Path) -> Iterator[None]:
    """Play a run beside the test, and cut it short at the test's end by killing the server."""
    faults: list[BaseException] = []

    def run_one() -> None:
        try:
            submit(processes.fleet, [*overrides, f"run_dir={folder}"], quiet=True)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run_one, daemon=True)
    thread.start()
    try:
        yield
    finally:
        processes.stop("server", hard=True)
        thread.join()
    assert [type(fault) for fault in faults] == [ConfigError], faults


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.3)


def newest(folder: Path) -> int:
    return max((int(path.name.split("_")[1]) for path in (folder / "checkpoints").glob("round_*")), default=-1)


def said(folder: Path, kind: str) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [row for row in rows if row["kind"] == kind]


def certificate(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next((folder / "certificates").glob(f"*-{name}.json")).read_text())
    return found


def served(folder: Path, name: str) -> bool:
    return any(name in row["requests"] for row in said(folder, "request_served"))


def rows_in(state: Any) -> list[bytes]:
    """Return every vector of 16 numbers in a client's state, as bytes: what a sample looks like there."""
    if isinstance(state, dict):
        return [row for value in state.values() for row in rows_in(value)]
    if isinstance(state, list | tuple):
        return [row for value in state for row in rows_in(value)]
    if hasattr(state, "numpy") and state.ndim == 2 and state.shape[1] == 16:
        return [row.tobytes() for row in state.numpy()]
    return []


def test_samples_a_class_and_a_client_out_of_reach_are_forgotten_while_a_run_goes_on(
    make_fleet: Callable[..., Fleet],
    up: Callable[[Fleet], Processes],
    split: Callable[[Fleet], None],
    samples: Path,
    fedcl: Fedcl,
) -> None:
    fleet = make_fleet()
    split(fleet)
    processes = up(fleet)
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    folder = fleet.folder / "runs" / "forget"
    overrides = ["data=npz", f"data.root={samples}", "data/partition=local", *SMALL, "scenario=joint"]
    with running(processes, [*overrides, "rounds_per_task=99"], folder):
        wait_for((folder / "checkpoints" / "round_000000").is_dir, "the first round")
        few = fedcl("forget", str(folder), "--samples", "0,1,2", "--client", "0", "--id", "few")
        assert few.returncode == 0, few.stderr
        wait_for(lambda: served(folder, "few"), "few served")
        processes.stop("device-2", hard=True)
        assert fedcl("forget", str(folder), "--client", "2", "--id", "bye").returncode == 0
        assert fedcl("forget", str(folder), "--class", "3", "--id", "c3").returncode == 0
        wait_for(lambda: served(folder, "bye") and served(folder, "c3"), "bye and c3 served")
        assert list((fleet.device("2") / "state").rglob("visit_*.safetensors"))  # nobody could tell it yet
        processes.start_device("2")
        wait_for(lambda: bool(said(folder, "client_told")), "the device that is back is told")
        enough = newest(folder) + 2
        wait_for(lambda: newest(folder) >= enough, "two rounds more")
    checked = fedcl("verify", str(folder))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    remains = [row["why"] for row in certificate(folder, "bye")["erasure"] if row["outcome"] == "retained"]
    assert any(why.startswith("client(s) 2 were not in reach: their devices are notified") for why in remains)
    assert [(row["client"], row["requests"][0]) for row in said(folder, "client_told")] == [("2", "bye")]
    assert not list((fleet.device("2") / "state").rglob("visit_*.safetensors"))
    assert not any("not in reach" in row["why"] for row in certificate(folder, "few")["erasure"])
    _nothing_of_it_is_kept(fleet)


def _nothing_of_it_is_kept(fleet: Fleet) -> None:
    """Look for the samples that device 0 was to forget in all that it keeps, and for others, which it may keep."""
    own = np.load(fleet.device("0") / "own.npz")
    third = own["classes"].tolist().index("3") if "3" in own["classes"].tolist() else -1
    gone = {own["x_train"][k].tobytes() for k in (*(0, 1, 2), *np.flatnonzero(own["y_train"] == third))}
    others = {row.tobytes() for row in own["x_train"]} - gone
    states = fleet.device("0") / "state"
    kept: set[bytes] = set()
    for file in states.rglob("visit_*.safetensors"):
        visit = int(file.stem.removeprefix("visit_"))
        kept |= set(rows_in(FileStateStore(file.parent.parent).load("0", visit)))
    assert others & kept  # that is what they look like there
    assert not gone & kept


def test_messages_and_replies_that_are_too_large_cost_themselves(
    make_fleet: Callable[..., Fleet], up: Callable[[Fleet], Processes], split: Callable[[Fleet], None], samples: Path
) -> None:
    fleet = make_fleet(devices=2)
    split(fleet)
    tight = fleet.device("1") / "client.yaml"
    tight.write_text(tight.read_text() + "max_message_mb: 1\n")
    processes = up(fleet)
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    overrides = ["data=npz", f"data.root={samples}", "data/partition=local", *SMALL, "scenario=joint"]
    overrides += ["rounds_per_task=1", "model.hidden=[600,600]", "round_retries=0"]
    folder = fleet.folder / "runs" / "large"
    submit(fleet, [*overrides, f"run_dir={folder}"], quiet=True)
    failed = said(folder, "client_failed")
    assert {row["client"] for row in failed} == {"1"}
    assert all("max_message_mb=1 in client.yaml" in row["reason"] for row in failed)
    assert load(folder).status == "done"
    other = fleet.folder / "runs" / "larger"
    with pytest.raises(ConfigError, match="the run ended early"):
        submit(fleet, [*overrides, "backend.max_message_mb=1", f"run_dir={other}"], quiet=True)
    reasons = {row["client"]: row["reason"] for row in said(other, "client_failed")}
    assert "larger than backend.max_message_mb=1" in reasons["0"]
