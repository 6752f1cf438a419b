"""How a round is filled: who is sent a message, which replies it waits for, and which of them count.

One rule serves every mode. A round tops up the messages in flight and closes when ``buffer`` sound replies came, or
``deadline`` seconds have passed, or nothing is in flight any more. Without both that is the synchronous round; with a
deadline late replies come into later rounds; with a buffer of K it is FedBuff's (Nguyen et al., AISTATS 2022), and with
a buffer of one FedAsync's (Xie et al., 2019).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedcl.config.value_rules import RunFailed
from fedcl.contracts.strategy import GLOBAL, Update
from fedcl.contracts.view import ServerView
from fedcl.messages import Reply
from fedcl.server.aggregation import BLOCK, PartialSums, update_of
from fedcl.server.arrivals import Arrivals, Flight
from fedcl.server.curriculum import Curriculum
from fedcl.server.exchange import EventLog, Exchange, Fault
from fedcl.server.selection import client_order, select
from fedcl.server.strategy import Outgoing, exact_sum
from fedcl.server.validation import change_norm, outliers, payload_norms, payload_outliers


class RoundFailed(RunFailed):
    """Too few sound replies, again and again: the run stops, its last checkpoint stays."""


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """Settings of a round: the keys of the configuration that carry the same names, ``async.*`` among them.

    ``max_age`` is in versions of the global model. ``finished_task`` says what becomes of an update for a task that is
    over. ``retries`` is how often a round with fewer than ``min_replies`` sound replies is repeated.
    """

    seed: int
    clients_per_round: int | None = None
    min_replies: int = 1
    retries: int = 2
    buffer: int | None = None
    deadline: float | None = None
    max_age: int | None = None
    finished_task: Literal["drop", "keep"] = "drop"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message that came back: its sound reply, or why there is none, and its update if that counts by itself."""

    flight: Flight
    reply: Reply | None = None
    fault: Fault | None = None
    update: Update | None = None

    @property
    def counts(self) -> bool:
        """Whether the client's update enters the aggregate: by itself or in a partial sum."""
        return self.update is not None or (self.reply is not None and self.reply.summed is not None)


@dataclass(frozen=True, slots=True)
class Round:
    """What a round brought: its arrivals in canonical client order, and the sums of those in partial sums."""

    arrivals: list[Arrival] = field(default_factory=list)
    partial: PartialSums | None = None

    @property
    def positions(self) -> list[Update | None]:
        """One entry for each arrival: its update, or None if it has none or is in a partial sum."""
        return [one.update for one in self.arrivals]

    @property
    def updates(self) -> list[Update]:
        """The updates that count by themselves: all that count, unless the strategy needs their sum alone."""
        return [one.update for one in self.arrivals if one.update is not None]

    @property
    def counted(self) -> list[Arrival]:
        """The arrivals whose update counts."""
        return [one for one in self.arrivals if one.counts]


@dataclass
class Rounds:
    """Runs rounds over the messages in flight.

    ``sums_suffice`` says whether the sum of the updates is all that is needed of a round, so that they may be summed
    where they are made.
    """

    outgoing: Callable[[Sequence[str]], list[Outgoing]]
    exchange: Exchange
    arrivals: Arrivals
    log: EventLog
    options: RoundOptions
    curriculum: Curriculum
    sums_suffice: Callable[[], bool] = lambda: False

    def run(self, server_round: int, view: ServerView, model_epoch: int) -> Round:
        """Run a round, commit the states of the clients that count, and return it.

        Raises
        ------
        RoundFailed
            If ``retries`` further attempts bring too few sound replies too, or no client will ever be available.
        """
        for attempt in range(self.options.retries + 1):
            if not self.arrivals.flights and not self.curriculum.active(view.clients, server_round):
                return Round()
            round_ = self._attempt(server_round, view, model_epoch)
            arrivals = round_.arrivals
            sound = sum(one.reply is not None for one in arrivals)
            if sound >= self.options.min_replies:
                self._commit(arrivals)
                self._note_outliers(round_.counted, server_round)
                self._note_empty(arrivals, server_round)
                return round_
            if all(one.reply is not None for one in arrivals):
                # nobody failed: the deadline came first, and too few replies came to count
                return Round([Arrival(one.flight) for one in arrivals])
            self._note("round_retried", server_round, replies=sound, attempt=attempt)
        raise RoundFailed(
            f"round {server_round}: {sound} sound replies in each of {self.options.retries + 1} attempts, "
            f"min_replies={self.options.min_replies}: {shared_reason(arrivals)}"
        )

    def _commit(self, arrivals: Sequence[Arrival]) -> None:
        """Let the clients go on from the state of this message, unless their update was refused."""
        for one in arrivals:
            if one.counts or (one.reply is not None and one.reply.num_examples == 0):
                self.exchange.commit(one.flight.request)

    def _attempt(self, server_round: int, view: ServerView, model_epoch: int) -> Round:
        partial = self._top_up(server_round, view, model_epoch)
        clock, options = self.arrivals.clock, self.options
        deadline = math.inf if options.deadline is None else clock.now + options.deadline
        arrived: list[Arrival] = []
        missing = options.buffer
        while self.arrivals.flights and clock.now <= deadline:
            flights = self.arrivals.collect(count=missing, deadline=deadline, partial=partial)
            arrived += [self._judge(flight, server_round, view, model_epoch) for flight in flights]
            if not flights or missing is None:
                break
            missing = options.buffer - sum(one.update is not None for one in arrived) if options.buffer else None
            if missing is not None and missing <= 0:
                break
        return Round(sorted(arrived, key=lambda one: client_order(one.flight.client)), partial)

    def _top_up(self, server_round: int, view: ServerView, model_epoch: int) -> PartialSums | None:
        """Send messages to idle clients until as many are in flight as a round selects.

        Returns what adds up their replies, if these may be summed where they are made.
        """
        arrivals, wanted = self.arrivals, self.options.clients_per_round or len(view.clients)
        present = self.curriculum.active(view.clients, server_round)
        idle = arrivals.idle(present)
        while not idle and not arrivals.flights:
            until = arrivals.next_available(present)
            if math.isinf(until):
                raise RoundFailed(f"round {server_round}: no client will ever be available")
            arrivals.clock.advance(until)
            idle = arrivals.idle(present)
        free = wanted - len(arrivals.flights)
        if free <= 0 or not idle:
            return None
        selected = select(idle, free, seed=self.options.seed, server_round=server_round)
        outgoing = self.outgoing(selected)
        summed = self._may_sum(outgoing)
        recipients = []
        for place, out in enumerate(outgoing):
            task = self.curriculum.task(out.client, server_round)
            assert task is not None  # only clients that take part were selected
            block = place // BLOCK if summed else -1
            request = self.exchange.request("train", out, task, server_round, view.version, block=block)
            recipients.append((out, request))
        arrivals.dispatch(recipients, model_epoch)
        return PartialSums(range(-(-len(recipients) // BLOCK))) if summed else None

    def _may_sum(self, outgoing: Sequence[Outgoing]) -> bool:
        """Whether all that is sent now comes back in this round, to be added to the one global model and no more."""
        waits = self.options.buffer is None and self.options.deadline is None and not self.arrivals.flights
        return waits and self.exchange.cohorts and self.sums_suffice() and all(out.target == GLOBAL for out in outgoing)

    def _judge(self, flight: Flight, server_round: int, view: ServerView, model_epoch: int) -> Arrival:
        reply = self.exchange.sound(flight.request, flight.reply)
        if isinstance(reply, Fault):
            return Arrival(flight, fault=reply)
        if reply.num_examples == 0 or flight.request.task is None or reply.summed is not None:
            return Arrival(flight, reply)
        update = _update(flight, reply, view.version)
        refused = self._refusal(flight, update, server_round, model_epoch)
        if refused is None:
            return Arrival(flight, reply, update=update)
        self._note("update_dropped", server_round, client=flight.client, age=update.age, reason=refused)
        return Arrival(flight, reply)

    def _refusal(self, flight: Flight, update: Update, server_round: int, model_epoch: int) -> str | None:
        """Return why a sound update cannot count any more; None if it counts."""
        options = self.options
        if flight.model_epoch != model_epoch:
            return "the model was edited since"
        if options.max_age is not None and update.age > options.max_age:
            return f"older than async.max_age={options.max_age}"
        if options.finished_task == "drop":
            task = self.curriculum.task(flight.client, server_round)
            if task is None or task.id != update.task:
                return f"task {update.task} is over"
        return None

    def _note_outliers(self, counted: Sequence[Arrival], server_round: int) -> None:
        """Name updates and uploads that are far larger than the others. They count: ``max_update_norm`` rejects."""
        norms = {}
        payloads = {}
        for one in counted:
            if one.update is not None:
                norms[one.flight.client] = change_norm(one.update.model, one.update.base)
                payloads[one.flight.client] = payload_norms(one.update.payload)
            elif one.reply is not None and one.reply.summed is not None:
                norms[one.flight.client] = one.reply.summed.norm
                payloads[one.flight.client] = one.reply.summed.payload_norms
        median, far = outliers(norms)
        for client in far:
            self._note("update_outlier", server_round, client=client, norm=norms[client], median=median)
        for fields in payload_outliers(payloads):
            self._note("payload_outlier", server_round, **fields)

    def _note_empty(self, arrivals: Sequence[Arrival], server_round: int) -> None:
        """Note that most of the clients hold no sample of their task, so that few others make the round."""
        empty = sum(one.reply is not None and one.reply.num_examples == 0 for one in arrivals)
        if 2 * empty > len(arrivals):
            self._note("round_mostly_empty", server_round, clients=len(arrivals), empty=empty)

    def _note(self, kind: str, server_round: int, **fields: Any) -> None:
        self.log.event(kind, round=server_round, virtual_time=self.arrivals.clock.now, **fields)


def _update(flight: Flight, reply: Reply, version: int) -> Update:
    base, model = flight.out.model, reply.model
    if flight.moved is not None and model is not None:
        base, model = exact_sum(base, flight.moved), exact_sum(model, flight.moved)
    age = version - flight.request.version
    return update_of(flight.request, reply, base, model=model, target=flight.out.target, age=age)


def shared_reason(arrivals: Sequence[Arrival]) -> str:
    """Return what most replies of a round failed for, and for how many of its clients.

    A loss and weights that are not sound numbers are one reason, whichever shows it first: training has diverged.
    """
    faults: dict[str, list[Fault]] = defaultdict(list)
    for fault in (one.fault for one in arrivals if one.fault is not None):
        # other reasons are alike if only their numbers differ
        faults["" if fault.diverged is not None else re.sub(r"[-+.\d]+", "#", fault.reason)].append(fault)
    if not faults:
        return f"none of {len(arrivals)} clients failed"
    alike = max(faults.values(), key=len)
    others = "" if len(faults) == 1 else f", and {len(faults) - 1} other reason(s)"
    diverged = [fault.diverged for fault in alike if fault.diverged is not None]
    if not diverged:
        return f"{len(alike)} of {len(arrivals)} clients: {alike[0].reason}{others}"
    value = "too large"
    if any(math.isnan(one.value) for one in diverged):
        value = "nan"
    elif any(math.isinf(one.value) for one in diverged):
        value = "infinite"
    parts = sorted({one.of for one in diverged})
    verb = "is" if parts == ["loss"] else "are"
    what = f"the {' or '.join(parts)} of {len(alike)} of {len(arrivals)} clients {verb} {value}"
    return f"{what}; lower client.optimizer.lr{others}"
