"""A grid lets go of clients wherever their messages are: queued, being computed, done, or lost with a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from fedcl.config.compose import compose
from fedcl.messages import Reply
from fedcl.runs.retrained import SilentRecord
from fedcl.runs.setup import Setup, make_server
from fedcl.server.exchange import Exchange
from fedcl.server.loop import Server
from fedcl.server.strategy import Outgoing
from fedcl.simulation.backend import open_backend

SMALL = ["compare_with=null", "num_clients=6", "scenario.num_tasks=2", "rounds_per_task=1", "learner=er"]
SMALL += ["strategy/projection=none", "scenario=class_incremental", "model=mlp"]
BACKENDS = ["inline", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]


@dataclass
class Sent:
    """An open grid with a server over it that plays no round."""

    server: Server
    grid: Any

    @property
    def exchange(self) -> Exchange:
        return self.server.exchange

    def send(self, clients: Sequence[str]) -> list[str]:
        """Send one cohort message and return its id."""
        model = self.server.global_model
        recipients = []
        for client in clients:
            out = Outgoing(client, "", model)
            task = self.server.curriculum.task(client, 0)
            recipients.append((out, self.exchange.request("train", out, task, 0, 0)))
        return sorted(set(self.exchange.push(recipients)))

    def replies(self, ids: Sequence[str]) -> set[str]:
        """Wait for what still comes of these messages."""
        found: dict[str, Any] = {}
        while waiting := [message_id for message_id in ids if message_id in self.grid._sent]:
            found |= self.exchange.pull(waiting)
        assert all(isinstance(reply, Reply) for reply in found.values()), found
        return set(found)

    def staged(self, client: str) -> bool:
        return any(self.grid.states.has(client, visit) for visit in range(5))


@pytest.fixture
def sent(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Sent]]:
    with ExitStack() as stack:

        def make(backend: str) -> Sent:
            if backend == "ray":
                request.getfixturevalue("ray_session")
            cfg = compose([*SMALL, f"backend={backend}", *(["backend.workers=2"] if backend == "ray" else [])])
            setup = Setup.of(cfg)
            opened = stack.enter_context(open_backend(cfg, setup.dataset, setup.partition))
            record: Any = SilentRecord()
            return Sent(make_server(cfg, setup, opened, record), opened.grid)

        yield make


@pytest.mark.parametrize("backend", BACKENDS)
def test_queued_or_running(backend: str, sent: Callable[[str], Sent]) -> None:
    system = sent(backend)
    ids = [*system.send(["0", "1"]), *system.send(["2"]), *system.send(["3", "4", "5"])]
    system.grid.release(["1", "2", "4"])
    assert system.replies(ids) == {"0", "3", "5"}
    assert not any(system.staged(client) for client in ("1", "2", "4"))
    assert all(system.staged(client) for client in ("0", "3", "5"))
    assert system.grid._sent == system.grid._done == {}
    assert system.replies(system.send(["1", "2"])) == {"1", "2"}  # who has not left may be asked again
    assert system.staged("1")


@pytest.mark.parametrize("backend", BACKENDS)
def test_done_but_not_delivered(backend: str, sent: Callable[[str], Sent]) -> None:
    system = sent(backend)
    ids = [*system.send(["0", "1"]), *system.send(["2"])]
    while len(system.grid._done) < 2:
        system.grid._progress(None)
    assert system.staged("1")
    system.grid.erase(["1", "2"])
    assert not system.staged("1")
    assert not system.staged("2")
    assert system.replies(ids) == {"0"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_count_outlive_a_release(backend: str, sent: Callable[[str], Sent]) -> None:
    system = sent(backend)
    system.replies(system.send(["0", "1"]))
    system.grid.release(["0"])
    assert system.staged("0")
    system.grid.erase(["0"])
    assert not system.staged("0")
    assert system.staged("1")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2])
def test_with_workers_that_are_lost_and_starting(lost: int, sent: Callable[[str], Sent]) -> None:
    import ray

    system = sent("ray")
    ids = [*system.send(["0", "1"]), *system.send(["2"]), *system.send(["3", "4", "5"])]
    for slot in system.grid._pool.slots[:lost]:
        ray.kill(slot.actor)
    system.grid.release(["1", "2", "4"])
    assert system.replies(ids) == {"0", "3", "5"}
    assert not any(system.staged(client) for client in ("1", "2", "4"))
    system.grid.release(["0"])  # some of them may still be starting
    assert system.replies(system.send(["0", "1"])) == {"0", "1"}
