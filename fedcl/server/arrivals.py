"""When replies count: messages in flight, the clock, and the order in which late ones come.

On virtual time a reply's arrival is known when its message is sent, from the device's profile and never from measured
time; replies are released in the order of (arrival, client). The real computation may happen at any moment before, so a
run waits for nothing but its own arithmetic. On a wall clock a reply arrives when it is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from fedcl.messages import Reply, Request
from fedcl.scenario.task import Task
from fedcl.server.aggregation import PartialSums
from fedcl.server.exchange import Exchange, Fault
from fedcl.server.selection import client_order
from fedcl.server.strategy import Outgoing

POLL_SECONDS = 0.2


class VirtualClock:
    """Time that passes only in :meth:`advance`."""

    virtual = True

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    @property
    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._now

    def advance(self, to: float) -> None:
        """Jump to ``to``; never back."""
        self._now = max(self._now, to)


class WallClock:
    """The time on the wall, counted from the run's beginning and on across a resume."""

    virtual = False

    def __init__(self, now: float = 0.0) -> None:
        self._zero = time.monotonic() - now

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._zero

    def advance(self, to: float) -> None:
        """Wait until ``to``."""
        time.sleep(max(0.0, to - self.now))


Clock = VirtualClock | WallClock


class Device(Protocol):
    """What the timeline needs to know of a client's device."""

    def duration(self, steps: int, bytes_down: int, bytes_up: int) -> float:
        """Return the virtual seconds from dispatch to arrival of a train message."""
        ...

    def available_from(self, now: float) -> float:
        """Return the earliest time from ``now`` on at which the device can be reached."""
        ...

    def drops(self, seed: int, client: str, local_round: int) -> bool:
        """Whether the reply of this local round is lost."""
        ...


@dataclass(slots=True)
class Flight:
    """A train message on its way: what was sent, when, and when its reply is due (infinite on a wall clock).

    ``moved`` (P,) float64 is what its base has been edited by since.
    """

    out: Outgoing
    request: Request
    dispatched: float
    arrival: float
    lost: bool = False
    model_epoch: int = 0
    message_id: str = ""
    reply: Reply | Fault | None = None
    moved: Tensor | None = None

    def rebase(self, edit: Tensor, model_epoch: int) -> None:
        """Let the update count from a base that has been edited by ``edit`` (P,) float64 meanwhile."""
        self.moved = edit if self.moved is None else self.moved + edit
        self.model_epoch = model_epoch

    @property
    def client(self) -> str:
        """The client it went to."""
        return self.out.client


@dataclass
class Arrivals:
    """The train messages in flight, at most one a client.

    ``device`` gives a client's device, ``steps`` the optimizer steps its task will take: both decide the arrival on
    virtual time, and neither matters on a wall clock.
    """

    exchange: Exchange
    clock: Clock
    seed: int
    device: Callable[[str], Device]
    steps: Callable[[str, Task], int]
    flights: dict[str, Flight] = field(default_factory=dict)

    def idle(self, clients: Iterable[str]) -> list[str]:
        """Return the clients that could be sent a message now: not in flight, and available."""
        now = self.clock.now
        return [c for c in clients if c not in self.flights and self.device(c).available_from(now) <= now]

    def next_available(self, clients: Iterable[str]) -> float:
        """Return when the first client that is not in flight will be available."""
        now = self.clock.now
        return min((self.device(c).available_from(now) for c in clients if c not in self.flights), default=math.inf)

    def dispatch(self, recipients: Sequence[tuple[Outgoing, Request]], model_epoch: int) -> None:
        """Send train messages that start from models of ``model_epoch``.

        Raises
        ------
        ValueError
            If a client already has a message in flight.
        """
        flights = [self._flight(out, request, model_epoch) for out, request in recipients]
        for flight in flights:
            if flight.client in self.flights:
                raise ValueError(f"client {flight.client} already has a message in flight")
            self.flights[flight.client] = flight
        self._push(flights)

    def _flight(self, out: Outgoing, request: Request, model_epoch: int) -> Flight:
        now = self.clock.now
        if not self.clock.virtual or request.task is None:
            return Flight(out, request, now, math.inf, model_epoch=model_epoch)
        device = self.device(out.client)
        size = out.model.numel() * 4
        down = size + sum(tensor.nbytes for tensor in out.payload.values())
        seconds = device.duration(self.steps(out.client, request.task), down, size)
        lost = device.drops(self.seed, out.client, request.local_round)
        return Flight(out, request, now, now + seconds, lost, model_epoch)

    def _push(self, flights: Sequence[Flight]) -> None:
        """Hand messages to the grid; a reply that will be lost is not even computed."""
        present = [flight for flight in flights if not flight.lost]
        ids = self.exchange.push([(flight.out, flight.request) for flight in present])
        for flight, message_id in zip(present, ids, strict=True):
            flight.message_id = message_id

    def collect(self, *, count: int | None, deadline: float, partial: PartialSums | None = None) -> list[Flight]:
        """Return the next flights to arrive, in order: up to ``count`` (None: all), none after ``deadline``.

        Afterwards the clock is at the last arrival, or at ``deadline`` if that is earlier. ``partial`` takes the sums
        of replies that were summed where they were made.
        """
        if not self.clock.virtual:
            return self._collect_wall(count, deadline, partial)
        due = sorted(self.flights.values(), key=lambda flight: (flight.arrival, client_order(flight.client)))
        taken = [flight for flight in due if flight.arrival <= deadline][:count]
        if len(taken) < len(due) and (count is None or len(taken) < count):
            self.clock.advance(deadline)
        elif taken:
            self.clock.advance(taken[-1].arrival)
        for flight in taken:
            if flight.lost:
                flight.reply = Fault("client_failed", "the device dropped out")
        self._fetch(taken, partial)
        return self._release(taken)

    def _fetch(self, wanted: Sequence[Flight], partial: PartialSums | None) -> None:
        """Wait until every wanted reply has been computed."""
        missing = {flight.message_id for flight in wanted if flight.reply is None}
        while missing:
            came = self._pull(missing, partial)
            if not came and not self.exchange.cohorts:
                time.sleep(POLL_SECONDS)  # a grid of ours waits by itself, Flower's returns at once
            missing -= came

    def _pull(self, message_ids: Iterable[str], partial: PartialSums | None) -> set[str]:
        """Take the replies that are there; return the ids of the messages in flight that they reply to."""
        came = set()
        for client, reply in self.exchange.pull(message_ids, partial).items():
            if client in self.flights:
                self.flights[client].reply = reply
                came.add(self.flights[client].message_id)
        return came

    def _collect_wall(self, count: int | None, deadline: float, partial: PartialSums | None) -> list[Flight]:
        taken: list[Flight] = []
        wanted = len(self.flights) if count is None else min(count, len(self.flights))
        while len(taken) < wanted and self.clock.now < deadline:
            missing = {flight.message_id for flight in self.flights.values() if flight.reply is None}
            came = self._pull(missing, partial)
            arrived = [flight for flight in self.flights.values() if flight.reply is not None]
            arrived.sort(key=lambda flight: client_order(flight.client))
            for flight in arrived[: wanted - len(taken)]:
                flight.arrival = self.clock.now
                taken += self._release([flight])
            if not came and len(taken) < wanted:
                time.sleep(POLL_SECONDS)
        return taken

    def _release(self, flights: Sequence[Flight]) -> list[Flight]:
        for flight in flights:
            del self.flights[flight.client]
        return list(flights)

    # -- survival ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return every dispatch in flight; replies are not kept, they are computed again."""
        models: dict[int, Tensor] = {}
        flights = []
        for flight in self.flights.values():
            models.setdefault(id(flight.out.model), flight.out.model)
            flights.append(_flight_state(flight, list(models).index(id(flight.out.model))))
        return {"now": self.clock.now, "models": list(models.values()), "flights": flights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the clock and send every dispatch in flight again: the same request gives the same bits."""
        self.clock.advance(state["now"])
        flights = [_flight_from(row, state["models"]) for row in state["flights"]]
        self.flights = {flight.client: flight for flight in flights}
        self._push(flights)


def _flight_state(flight: Flight, model: int) -> dict[str, Any]:
    request = flight.request
    return {
        "client": flight.client,
        "target": flight.out.target,
        "model": model,
        "payload": dict(flight.out.payload),
        "visit": request.visit,
        "local_round": request.local_round,
        "committed": request.committed,
        "round": request.server_round,
        "version": request.version,
        "task": request.task.to_json() if request.task is not None else "",
        "dispatched": flight.dispatched,
        "arrival": flight.arrival if math.isfinite(flight.arrival) else -1.0,
        "lost": flight.lost,
        "model_epoch": flight.model_epoch,
        **({} if flight.moved is None else {"moved": flight.moved}),
    }


def _flight_from(row: dict[str, Any], models: Sequence[Tensor]) -> Flight:
    model = models[row["model"]]
    out = Outgoing(row["client"], row["target"], model, dict(row["payload"]))
    request = Request(
        kind="train",
        client=row["client"],
        visit=row["visit"],
        local_round=row["local_round"],
        committed=row["committed"],
        server_round=row["round"],
        version=row["version"],
        task=Task.from_json(row["task"]) if row["task"] else None,
    )
    arrival = row["arrival"] if row["arrival"] >= 0 else math.inf
    request = replace(request, model=model, payload=out.payload)
    return Flight(out, request, row["dispatched"], arrival, row["lost"], row["model_epoch"], moved=row.get("moved"))
