"""The round loop: a run as a timeline of rounds and task boundaries, resumable after each round."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from fedcl.contracts.strategy import GLOBAL, Event, Target
from fedcl.contracts.view import Query, Response
from fedcl.scenario.task import Stage, Task
from fedcl.server.rounds import Round, Rounds
from fedcl.server.state import ServerData
from fedcl.server.strategy import Outgoing


class Server(ServerData):
    """Runs the rounds of a schedule, and ``unlearning`` between them."""

    @functools.cached_property
    def rounds(self) -> Rounds:
        """What sends a round's messages and takes in its replies."""
        options, enough = self.options.rounds, self._sums_suffice
        return Rounds(self.outgoing, self.exchange, self.arrivals, self.record, options, self.curriculum, enough)

    # -- the timeline -----------------------------------------------------------------------------------------------

    def run(self, after_round: Callable[[int], None], until: int | None = None) -> None:
        """Run all remaining rounds; after each, call ``after_round`` with its number.

        ``until`` stops before that round. Requests that come after the last round are processed at the end of it.

        Raises
        ------
        RoundFailed
            If a round cannot be filled.
        """
        if self.state.next_round == 0:
            self.state.models.update(self.strategy.initial(self))
            self.measurement.initial(self.global_model, self.now)
        while self.state.next_round < (self.schedule.num_rounds if until is None else until):
            server_round = self.state.next_round
            started = time.perf_counter()
            self.process_requests(server_round)
            round_ = self.rounds.run(server_round, self, self.state.model_epoch)
            self._aggregate(server_round, round_)
            self._finalize(server_round, round_)
            self.state.next_round += 1
            if self.state.next_round == self.schedule.num_rounds:
                self.process_requests(self.state.next_round, ends=True)
            self.record.timing(server_round, "round", time.perf_counter() - started)
            after_round(server_round)

    def process_requests(self, server_round: int, *, ends: bool = False) -> bool:
        """Process the unlearning requests that are due before ``server_round``; return whether any was.

        ``ends`` says that no round follows, so that nothing can wait.
        """
        done = self.unlearning is not None and self.unlearning.process(self, server_round, self.recover, ends=ends)
        if done:
            self.measurement.edited()
        return done

    def _aggregate(self, server_round: int, round_: Round) -> None:
        self._finish_pending([one.flight.client for one in round_.arrivals], server_round)
        counted = round_.counted
        self.state.visited |= {one.flight.client for one in counted}
        self.state.late |= {update.client for update in round_.updates if update.age}
        options = self.options.rounds
        late = options.buffer is not None or options.deadline is not None
        self.measurement.training(counted, server_round, self.now, late=late)
        if not counted:
            replies = len(round_.arrivals)
            self.record.event("round_skipped", round=server_round, virtual_time=self.now, replies=replies)
            return
        started = time.perf_counter()
        self._apply(round_)
        self.record.timing(server_round, "aggregate", time.perf_counter() - started)

    def _apply(self, round_: Round) -> None:
        before = self.global_model
        self._replace(self.strategy.aggregate(round_.positions, self, round_.partial))
        if self.unlearning is not None:
            self.unlearning.observe(round_.updates, before, self)

    def _sums_suffice(self) -> bool:
        """Whether the sum of the next round's updates is all that anybody needs of them."""
        if self.unlearning is not None and self.unlearning.observes:
            return False
        return self.strategy.aggregation(self.exchange.expected("train"), self.exchange.max_update_norm) is not None

    def _finalize(self, server_round: int, round_: Round) -> None:
        """Do what follows a round: finish tasks that end, ask questions, measure."""
        stage = self.curriculum.stage(server_round)
        ended = tuple(self.curriculum.ended(self._clients, server_round))
        if ended and self.options.boundary_visits:
            self._end_tasks(ended, server_round)
        self._ask(stage.index, ended, server_round, round_)
        self._measure(stage, server_round)
        self.state.visited.difference_update(ended)
        traffic = {"bytes_up": float(self.exchange.bytes_up), "bytes_down": float(self.exchange.bytes_down)}
        self.measurement.server(self.strategy.metrics() | traffic, server_round, self.now, stage.index)
        for name, seconds in self.strategy.timings().items():
            self.record.timing(server_round, name, seconds)
        for note in self.strategy.notes():
            self.record.event(**{"round": server_round, "virtual_time": self.now, **note})

    def _measure(self, stage: Stage, server_round: int) -> None:
        """Evaluate the global model when that is due, and at the end of a stage each client's own."""
        every = self.options.evaluate_every
        if stage.ends or (every and (server_round + 1) % every == 0):
            seen = self.curriculum.seen(self._clients, server_round)
            self.measurement.test(self.global_model, server_round, self.now, stage, seen)
            if server_round == self.schedule.num_rounds - 1:
                self.measurement.classes(self.global_model, server_round, self.now, stage, seen)
            if self.unlearning is not None:
                self.unlearning.follow(self, server_round, seen)
            if self.state.late:
                late = self.state.late
                self.measurement.stale_classes(self.global_model, server_round, self.now, stage, seen, late)
        if stage.ends and (self.strategy.personal or self.options.personal_evaluation):
            everybody = self._outgoing(self._clients)
            tasks = {client: self.schedule.seen(client, server_round) for client in self._clients}
            self.measurement.personal(
                self.exchange, everybody, server_round, self.version, self.now, stage.index, tasks
            )

    def _whole_task(self, client: str, server_round: int) -> Task:
        task = self.curriculum.whole_task(client, server_round)
        assert task is not None  # only for clients that take part
        return task

    def _outgoing(self, clients: Sequence[str]) -> list[Outgoing]:
        return [Outgoing(client, self.strategy.target_of(client, self), self.model_of(client)) for client in clients]

    def outgoing(self, selected: Sequence[str]) -> list[Outgoing]:
        """Return what to send to each selected client: the strategy's message, and the sums of clients' statistics."""
        sums = self.statistics.message()
        messages = self.strategy.outgoing(selected, self)
        return [replace(out, payload=out.payload | sums) for out in messages] if sums else messages

    # -- task boundaries --------------------------------------------------------------------------------------------

    def _end_tasks(self, ended: Sequence[str], server_round: int) -> None:
        """Notify every client that has trained its task that it ended, with the model it ended with.

        A client in flight is notified when it is back: two messages at once would race for its state.
        """
        flights = self.arrivals.flights
        self.state.pending_task_end.update({client: server_round for client in ended if client in flights})
        present = [client for client in ended if client in self.state.visited and client not in flights]
        self._notify_end(present, server_round, server_round)

    def _finish_pending(self, clients: Sequence[str], server_round: int) -> None:
        """Notify clients that have come back of the tasks that ended meanwhile."""
        for client in clients:
            ended_in = self.state.pending_task_end.pop(client, None)
            if ended_in is not None:
                self._notify_end([client], ended_in, server_round)

    def _notify_end(self, clients: Sequence[str], ended_in: int, server_round: int) -> None:
        def task_of(client: str) -> Task:
            return self._whole_task(client, ended_in)

        self.exchange.tell("task_end", self._outgoing(clients), task_of, server_round, self.version)

    def _ask(self, stage: int, ended: tuple[str, ...], server_round: int, round_: Round) -> None:
        """Ask the strategy's and the learner's questions, and replace the models that the responses change."""
        kept = tuple(round_.updates) if self.strategy.keeps_updates else ()
        last = server_round == self.schedule.num_rounds - 1
        event = Event("task_end" if ended else "round_end", stage, server_round, last, kept, ended)
        for query in self.strategy.queries(event, self):
            self.strategy.consume(query, self._responses(query, server_round), self)
        models = {client: self.model_of(client) for client in ended}
        tasks = {client: self._whole_task(client, server_round) for client in ended}
        for query in self.statistics.queries(models):
            self.statistics.consume(query, self._responses(query, server_round), tasks)
        self._replace(self.strategy.finalize(event, self))
        if ended:
            self._replace(self.statistics.solve(self.state.models))

    def _responses(self, query: Query, server_round: int) -> list[Response]:
        """Return the responses of the clients that take part in this round, each with its present task's data."""
        active = set(self.curriculum.active(self._clients, server_round))
        models = {client: model for client, model in query.models.items() if client in active}

        def task_of(client: str) -> Task:
            return self._whole_task(client, server_round)

        return self.exchange.ask(replace(query, models=models), task_of, server_round, self.version)

    def _replace(self, models: dict[Target, Tensor]) -> None:
        self.state.models.update(models)
        self.state.version += GLOBAL in models

    # -- rounds besides the schedule --------------------------------------------------------------------------------

    def recover(self, rounds: int) -> int:
        """Run ``rounds`` rounds of the task that was trained last, besides the schedule's; return how many counted."""
        at, visited = max(self.state.next_round - 1, 0), set(self.state.visited)
        counted = 0
        for _ in range(rounds):
            round_ = self.rounds.run(at, self, self.state.model_epoch)
            if round_.counted:
                self._apply(round_)
                counted += 1
        self.state.visited = visited
        return counted
