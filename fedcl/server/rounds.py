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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedcl.config.value_rules import RunFailed
from fedcl.contracts.strategy import GLOBAL, ServerView, Update
from fedcl.messages import Reply
from fedcl.scenario.task import Task
from fedcl.server.arrivals import Arrivals, Flight
from fedcl.server.curriculum import Curriculum
from fedcl.server.exchange import EventLog, Exchange
from fedcl.server.fold import BLOCK, Contribution, Folded, RunningFold
from fedcl.server.folding import update_of
from fedcl.server.selection import client_order, select
from fedcl.server.strategy import Outgoing, exact_sum
from fedcl.server.validation import change_norm, outliers, payload_norms, payload_outliers


class RoundFailed(RunFailed):
    """Too few sound replies, again and again: the run stops, its last checkpoint stays."""


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """Settings of a round: the keys of the configuration that carry the same names, ``async.*`` among them.

    ``max_age`` is in versions of the global model. ``finished_task`` says what becomes of an update for a task that is
    over. ``retries`` is how often a round with fewer than ``min_replies`` sound replies is played again.
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
class Arrived:
    """One message that came back: its sound reply, or None, and the update it makes, unless it must not count."""

    flight: Flight
    reply: Reply | None
    update: Contribution | None


@dataclass
class Rounds:
    """Plays rounds over the messages in flight.

    ``folds`` says whether a round needs no more of its updates than their sum, so that they may be folded in blocks
    where they are made.
    """

    outgoing: Callable[[Sequence[str]], list[Outgoing]]
    exchange: Exchange
    arrivals: Arrivals
    log: EventLog
    options: RoundOptions
    curriculum: Curriculum
    folds: Callable[[], bool] = lambda: False

    def run(self, server_round: int, view: ServerView, model_epoch: int) -> list[Arrived]:
        """Return what arrived in this round, in canonical client order, with the clients' states committed.

        Raises
        ------
        RoundFailed
            If ``retries`` further attempts bring too few sound replies too, or no client will ever be available.
        """
        for attempt in range(self.options.retries + 1):
            if not self.arrivals.flights and not self.curriculum.active(view.clients, server_round):
                return []
            arrived = self._attempt(server_round, view, model_epoch)
            sound = sum(one.reply is not None for one in arrived)
            if sound >= self.options.min_replies:
                self._commit(arrived)
                self._note_outliers(arrived, server_round)
                self._note_empty(arrived, server_round)
                return arrived
            if all(one.reply is not None for one in arrived):
                # nobody failed: the deadline came first, and what did come is too little to count
                return [Arrived(one.flight, None, None) for one in arrived]
            self._note("round_retried", server_round, replies=sound, attempt=attempt)
        raise RoundFailed(
            f"round {server_round}: {sound} sound replies in each of {self.options.retries + 1} attempts, "
            f"min_replies={self.options.min_replies}: {shared_reason(self.exchange.reasons, len(arrived))}"
        )

    def _commit(self, arrived: Sequence[Arrived]) -> None:
        """Let the clients go on from this visit, unless their update was refused."""
        for one in arrived:
            if one.reply is not None and (one.update is not None or one.reply.num_examples == 0):
                self.exchange.commit(one.flight.request)

    def _attempt(self, server_round: int, view: ServerView, model_epoch: int) -> list[Arrived]:
        self.exchange.reasons.clear()
        self._top_up(server_round, view, model_epoch)
        clock, options = self.arrivals.clock, self.options
        deadline = math.inf if options.deadline is None else clock.now + options.deadline
        arrived: list[Arrived] = []
        missing = options.buffer
        while self.arrivals.flights and clock.now <= deadline:
            flights = self.arrivals.collect(count=missing, deadline=deadline)
            arrived += [self._judge(flight, server_round, view, model_epoch) for flight in flights]
            if not flights or missing is None:
                break
            missing = options.buffer - sum(one.update is not None for one in arrived) if options.buffer else None
            if missing is not None and missing <= 0:
                break
        return sorted(arrived, key=lambda one: client_order(one.flight.client))

    def _top_up(self, server_round: int, view: ServerView, model_epoch: int) -> None:
        """Send messages to idle clients until as many are in flight as a round selects."""
        arrivals, wanted = self.arrivals, self.options.clients_per_round or len(view.clients)
        self.exchange.running = None
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
            return
        selected = select(idle, free, seed=self.options.seed, server_round=server_round)
        outgoing = self.outgoing(selected)
        folds = self._may_fold(outgoing)
        recipients = []
        for place, out in enumerate(outgoing):
            task = self.curriculum.task(out.client, server_round)
            assert task is not None  # only clients that take part were selected
            block = place // BLOCK if folds else -1
            request = self.exchange.request("train", out, task, server_round, view.version, block=block)
            recipients.append((out, request))
        if folds:
            self.exchange.running = RunningFold(range(-(-len(recipients) // BLOCK)))
        arrivals.dispatch(recipients, model_epoch)

    def _may_fold(self, outgoing: Sequence[Outgoing]) -> bool:
        """Whether all that is sent now comes back in this round, to be added to the one global model and no more."""
        waits = self.options.buffer is None and self.options.deadline is None and not self.arrivals.flights
        return waits and self.exchange.cohorts and self.folds() and all(out.target == GLOBAL for out in outgoing)

    def _judge(self, flight: Flight, server_round: int, view: ServerView, model_epoch: int) -> Arrived:
        reply = self.exchange.sound(flight.request, flight.reply)
        if reply is None or reply.num_examples == 0 or flight.request.task is None:
            return Arrived(flight, reply, None)
        task = flight.request.task
        if reply.folded is not None:
            left = (reply.folded.norm, reply.folded.payload)
            return Arrived(flight, reply, Folded(flight.client, reply.num_examples, task.id, reply.metrics, *left))
        update = _update(flight, reply, task, view.version)
        refused = self._refusal(flight, update, server_round, model_epoch)
        if refused is None:
            return Arrived(flight, reply, update)
        self._note("update_dropped", server_round, client=flight.client, age=update.age, reason=refused)
        return Arrived(flight, reply, None)

    def _refusal(self, flight: Flight, update: Update, server_round: int, model_epoch: int) -> str | None:
        """Return why a sound update must not count any more, if it must not."""
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

    def _note_outliers(self, arrived: Sequence[Arrived], server_round: int) -> None:
        """Name updates, and uploads with them, far larger than the others; they count all the same.

        ``max_update_norm`` rejects updates.
        """
        counted = updates(arrived)
        found = {u.client: u.norm if isinstance(u, Folded) else change_norm(u.model, u.base) for u in counted}
        median, far = outliers(found)
        for client in far:
            self._note("update_outlier", server_round, client=client, norm=found[client], median=median)
        if not self.exchange.payloads:
            return
        each = {u.client: u.payload_norms if isinstance(u, Folded) else payload_norms(u.payload) for u in counted}
        for fields in payload_outliers(each):
            self._note("payload_outlier", server_round, **fields)

    def _note_empty(self, arrived: Sequence[Arrived], server_round: int) -> None:
        """Say that most of the clients hold nothing of their task: the round is one of the few others alone."""
        empty = sum(one.reply is not None and one.reply.num_examples == 0 for one in arrived)
        if 2 * empty > len(arrived):
            self._note("round_mostly_empty", server_round, clients=len(arrived), empty=empty)

    def _note(self, kind: str, server_round: int, **fields: Any) -> None:
        self.log.event(kind, round=server_round, virtual_time=self.arrivals.clock.now, **fields)


def _update(flight: Flight, reply: Reply, task: Task, version: int) -> Update:
    base, model = flight.out.model, reply.model
    if flight.moved is not None and model is not None:
        base, model = exact_sum(base, flight.moved), exact_sum(model, flight.moved)
    age = version - flight.request.version
    return update_of(flight.request, reply, task, base, model=model, target=flight.out.target, age=age)


_DIVERGED = re.compile(r"(?:metric (loss) is|(?:tensor \S+|model) holds) (-?inf|nan|\S*)")


def shared_reason(reasons: Mapping[str, str], clients: int) -> str:
    """Return what most replies of a round failed for, and for how many of its ``clients``; ``reasons`` are by client.

    Loss and weights that are no sound numbers are one reason, whichever shows it first: training has diverged.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason in reasons.values():
        # others are alike where only their numbers differ
        kinds["" if _DIVERGED.match(reason) else re.sub(r"[-+.\d]+", "#", reason)].append(reason)
    if not kinds:
        return f"none of {clients} clients failed"
    kind, alike = max(kinds.items(), key=lambda item: len(item[1]))
    others = "" if len(kinds) == 1 else f", and {len(kinds) - 1} other reason(s)"
    if kind:
        return f"{len(alike)} of {clients} clients: {alike[0]}{others}"
    found = [match for match in map(_DIVERGED.match, alike) if match is not None]
    parts = {"loss" if match[1] else "weights" for match in found}
    values = {match[2] for match in found}
    value = "nan" if "nan" in values else "infinite" if values & {"inf", "-inf"} else "too large"
    verb = "is" if parts == {"loss"} else "are"
    what = " or ".join(sorted(parts))
    return f"the {what} of {len(alike)} of {clients} clients {verb} {value}; lower client.optimizer.lr{others}"


def updates(arrived: Sequence[Arrived]) -> list[Contribution]:
    """Return the updates that count, in canonical client order."""
    return [one.update for one in arrived if one.update is not None]
