"""A slow link and a cut one, through a proxy that really delays and drops what devices send and receive."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes
from fedcl.deploy.submit import register, submit
from fedcl.results import load

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]


class Link:
    """Forwards TCP to a port of this machine; ``delay`` holds each chunk back, ``interrupt`` cuts the line."""

    def __init__(self, target: int) -> None:
        self.target, self.delay, self.cut = target, 0.0, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ends: set[socket.socket] = set()
        self._pumps: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        listener = self._listener
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._ends |= {near, far}
            for source, sink in ((near, far), (far, near)):
                self._pumps.append(threading.Thread(target=self._pump, args=(source, sink), daemon=True))
                self._pumps[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other direction, or a cut, closed it
            while data := source.recv(65536):
                time.sleep(self.delay)
                if self.cut:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._ends.discard(end)

    def interrupt(self, seconds: float) -> None:
        """Lose all connections, and let nobody connect for so many seconds."""
        self.close()
        time.sleep(seconds)
        self.cut = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends.copy():
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for pump in self._pumps:
            pump.join(5)


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
    register(fleet)
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
