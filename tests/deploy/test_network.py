"""A slow link and a cut one, through a proxy that really delays and drops what devices send and receive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from fedcl.deploy.submit import submit
from fedcl.results import load
from tests.deploy.link import Link

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def links() -> Iterator[Callable[[Fleet, str], Link]]:
    opened: list[Link] = []

    def through(fleet: Fleet, name: str) -> Link:
        link = Link(fleet.port)
        opened.append(link)
        script = fleet.device(name) / "start.sh"
        script.write_text(script.read_text().replace(fleet.where, f"127.0.0.1:{link.port}"))
        return link

    yield through
    for link in opened:
        link.close()


def test_a_slow_link_makes_updates_late_and_a_cut_one_comes_back(
    make_fleet: Callable[..., Fleet],
    up: Callable[[Fleet], Processes],
    split: Callable[[Fleet], None],
    samples: Path,
    links: Callable[[Fleet, str], Link],
) -> None:
    fleet = make_fleet()
    split(fleet)
    slow, fragile = links(fleet, "1"), links(fleet, "2")
    processes = up(fleet)
    processes.start_server()
    for name in fleet.devices:
        processes.start_device(name)
    folder = fleet.folder / "runs" / "late"

    def disturb() -> None:
        while not (folder / "checkpoints" / "round_000000").is_dir():
            time.sleep(0.3)
        slow.delay = 1.0
        fragile.interrupt(15.0)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    overrides = ["data=npz", f"data.root={samples}", "data/partition=local", "scenario=joint", "rounds_per_task=7"]
    overrides += ["learner=er", "strategy/projection=none", "strategy/staleness=fedasync", "async.buffer=2"]
    submit(fleet, [*overrides, "figures=false", f"run_dir={folder}"], quiet=True)
    run = load(folder)
    assert run.status == "done"
    assert run.summary["staleness/max"] >= 1
    failed = run.events[run.events["kind"] == "client_failed"]
    assert set(failed["client"] if len(failed) else ()) <= {"2"}
    back = run.metrics[(run.metrics["client"] == "2") & (run.metrics["phase"] == "train")]
    assert back["round"].max() >= 2
    log = processes.log("device-2").read_text(errors="replace")
    assert "Connection attempt failed" in log
    assert "Connection successful" in log
