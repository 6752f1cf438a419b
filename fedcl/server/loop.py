"""The round loop: a run as a timeline of rounds and task boundaries, resumable after each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedcl.evaluation.evaluator import Evaluator
from fedcl.models.flat import Spec
from fedcl.randomness import torch_generator
from fedcl.scenario.task import Schedule, Stream, Task
from fedcl.server.arrivals import Arrivals
from fedcl.server.contracts import GLOBAL, Event, Target, Update
from fedcl.server.exchange import Exchange
from fedcl.server.measurement import Measurement, Record
from fedcl.server.rounds import Arrived, RoundOptions, Rounds, updates
from fedcl.server.strategy import Outgoing, Strategy


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Settings of the loop: the keys of the configuration that carry the same names.

    ``boundary_visits`` says that some plugin concludes tasks, so that clients must be told of their end.
    """

    rounds: RoundOptions
    evaluate_every: int = 1
    personal_evaluation: bool = False
    boundary_visits: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class ServerState:
    """What a run is at the end of a round: models by target, counters, and the next round to play.

    ``version`` counts changes of the global model; ``model_epoch`` counts edits that bypass the strategy; ``visited``
    are the clients that learned something of the present task; ``owed`` maps clients that were in flight when a task
    ended to that task, which they conclude when they are back.
    """

    models: dict[Target, Tensor]
    version: int = 0
    model_epoch: int = 0
    next_round: int = 0
    visited: set[str] = field(default_factory=set)
    owed: dict[str, int] = field(default_factory=dict)


class Server:
    """Plays the rounds of a schedule. It is also the :class:`~fedcl.server.contracts.ServerView` that parts see."""

    def __init__(
        self,
        *,
        strategy: Strategy,
        exchange: Exchange,
        arrivals: Arrivals,
        schedule: Schedule,
        stream: Stream,
        spec: Spec,
        initial: Tensor,
        clients: Sequence[str],
        record: Record,
        options: LoopOptions,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.strategy, self.exchange, self.arrivals = strategy, exchange, arrivals
        self.schedule, self.stream, self.record, self.options = schedule, stream, record, options
        self.measurement = Measurement(record, stream, evaluator)
        self.rounds = Rounds(strategy, exchange, arrivals, record, options.rounds, self._task_of)
        self.state = ServerState({GLOBAL: initial.detach().cpu().clone()})
        self._spec = spec
        self._clients = tuple(clients)

    # -- what parts may know (ServerView) ---------------------------------------------------------------------------

    @property
    def global_model(self) -> Tensor:
        """Global weights, float32 (P,)."""
        return self.state.models[GLOBAL]

    @property
    def version(self) -> int:
        """Number of changes the global model has seen."""
        return self.state.version

    @property
    def now(self) -> float:
        """Time on the run's clock, in seconds."""
        return self.arrivals.clock.now

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        return self._spec

    @property
    def clients(self) -> tuple[str, ...]:
        """Every client, in canonical order."""
        return self._clients

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        return self.options.device

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now."""
        return self.state.models.get(self.strategy.target_of(client, self), self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        return torch_generator(self.options.rounds.seed, "server", self.state.version, purpose)

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``fn`` here and now; its exception, if any, waits in the future."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    # -- the timeline -----------------------------------------------------------------------------------------------

    def run(self, after_round: Callable[[int], None]) -> None:
        """Play every round that is still to come and call ``after_round`` with each one's number when it is over.

        Raises
        ------
        RoundFailed
            If a round cannot be filled.
        """
        if self.state.next_round == 0:
            self.measurement.initial(self.global_model)
        while self.state.next_round < self.schedule.num_rounds:
            server_round = self.state.next_round
            started = time.perf_counter()
            arrived = self.rounds.play(server_round, self, self.state.model_epoch)
            self._aggregate(server_round, arrived)
            self._conclude(server_round, updates(arrived))
            self.state.next_round += 1
            self.record.timing(server_round, "round", time.perf_counter() - started)
            after_round(server_round)

    def _aggregate(self, server_round: int, arrived: Sequence[Arrived]) -> None:
        self._settle([one.flight.client for one in arrived], server_round)
        counted = updates(arrived)
        self.state.visited |= {update.client for update in counted}
        options = self.options.rounds
        ages = options.buffer is not None or options.deadline is not None
        self.measurement.training(counted, server_round, self.now, ages=ages)
        if not counted:
            self.record.event("round_skipped", round=server_round, virtual_time=self.now, replies=len(arrived))
            return
        started = time.perf_counter()
        changed = self.strategy.aggregate([one.update for one in arrived], self)
        self.record.timing(server_round, "aggregate", time.perf_counter() - started)
        self.state.models.update(changed)
        self.state.version += GLOBAL in changed

    def _conclude(self, server_round: int, counted: list[Update]) -> None:
        """Do what follows a round: tell clients of a task's end, ask questions, measure."""
        ended = self.schedule.boundary(server_round)
        reached = self._task_of(self._clients[0], server_round).id if ended is None else ended
        if ended is not None and self.options.boundary_visits:
            self._end_task(ended, server_round)
        last = ended is not None and ended == self.stream.num_tasks - 1
        kept = tuple(counted) if self.strategy.keeps_updates else ()
        self._ask(Event("round_end" if ended is None else "task_end", reached, server_round, last, kept))
        every = self.options.evaluate_every
        if ended is not None or (every and (server_round + 1) % every == 0):
            self.measurement.test(self.global_model, server_round, self.now, reached, all_tasks=ended is not None)
        if ended is not None:
            if self.strategy.personal or self.options.personal_evaluation:
                everybody = self._outgoing(self._clients)
                self.measurement.personal(self.exchange, everybody, server_round, self.version, self.now, reached)
            self.state.visited.clear()
        self.measurement.server(self.strategy.metrics(), server_round, self.now, reached)

    def _task_of(self, client: str, server_round: int) -> Task:
        return self.stream.train_task(self.schedule.position(client, server_round).task_id)

    def _outgoing(self, clients: Sequence[str]) -> list[Outgoing]:
        return [Outgoing(client, self.strategy.target_of(client, self), self.model_of(client)) for client in clients]

    # -- task boundaries --------------------------------------------------------------------------------------------

    def _end_task(self, task_id: int, server_round: int) -> None:
        """Let every client that learned the task conclude it, with the global model the task ended with.

        A client in flight does so when it is back: two messages at once would race for its state.
        """
        flights = self.arrivals.flights
        learned = [client for client in self._clients if client in self.state.visited or client in flights]
        self.state.owed.update({client: task_id for client in learned if client in flights})
        present = [client for client in learned if client not in flights]
        task = self.stream.train_task(task_id)
        self.exchange.tell("task_end", self._outgoing(present), task, server_round, self.version)

    def _settle(self, clients: Sequence[str], server_round: int) -> None:
        """Let clients that have come back conclude the tasks that ended meanwhile."""
        for client in clients:
            task_id = self.state.owed.pop(client, None)
            if task_id is not None:
                task = self.stream.train_task(task_id)
                self.exchange.tell("task_end", self._outgoing([client]), task, server_round, self.version)

    def _ask(self, event: Event) -> None:
        for query in self.strategy.queries(event, self):
            answers = self.exchange.ask(
                query, lambda client: self._task_of(client, event.server_round), event.server_round, self.version
            )
            self.strategy.absorb(query, answers, self)

    # -- edits and survival -----------------------------------------------------------------------------------------

    def edit(self, models: dict[Target, Tensor]) -> None:
        """Replace models past optimizer and projection, as unlearning does, and open a new model epoch.

        Raises
        ------
        ValueError
            If a model does not have the run's layout or is not finite.
        """
        for target, model in models.items():
            if tuple(model.shape) != (self._spec.size,) or not bool(torch.isfinite(model).all()):
                raise ValueError(f"edit of {target!r}: must be a finite vector of shape {(self._spec.size,)}")
        self.state.models.update({target: model.detach().float().cpu().clone() for target, model in models.items()})
        self.state.version += GLOBAL in models
        self.state.model_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the server that must survive."""
        state = self.state
        return {
            "models": dict(state.models),
            "version": state.version,
            "model_epoch": state.model_epoch,
            "next_round": state.next_round,
            "visited": sorted(state.visited),
            "owed": dict(state.owed),
            "visits": dict(self.exchange.visits),
            "committed": dict(self.exchange.committed),
            "bytes": [self.exchange.bytes_up, self.exchange.bytes_down],
            "strategy": self.strategy.state_dict(),
            "arrivals": self.arrivals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; clients' states must be in their store by now."""
        self.state = ServerState(
            models=dict(state["models"]),
            version=state["version"],
            model_epoch=state["model_epoch"],
            next_round=state["next_round"],
            visited=set(state["visited"]),
            owed=dict(state["owed"]),
        )
        self.strategy.load_state_dict(state["strategy"])
        self.exchange.visits = dict(state["visits"])
        self.exchange.committed = dict(state["committed"])
        self.arrivals.load_state_dict(state["arrivals"])
        self.exchange.bytes_up, self.exchange.bytes_down = state["bytes"]
