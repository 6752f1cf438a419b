"""The round loop: a run as a timeline of rounds and task boundaries, written down and resumable after each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedcl.evaluation.evaluator import Evaluator
from fedcl.models.flat import Spec
from fedcl.randomness import torch_generator
from fedcl.scenario.task import Schedule, Stream, Task
from fedcl.server.contracts import GLOBAL, Event, Target, Update
from fedcl.server.exchange import Exchange
from fedcl.server.selection import select
from fedcl.server.strategy import Outgoing, Strategy


class Record(Protocol):
    """Where the run is written down; :class:`fedcl.results.recorder.Recorder` is one."""

    def row(
        self,
        *,
        round: int,
        phase: str,
        name: str,
        value: float,
        client: str = "",
        task: int = -1,
        after: int = -1,
        virtual_time: float = 0.0,
    ) -> None:
        """Record one value."""
        ...

    def event(self, kind: str, *, round: int = -1, virtual_time: float = 0.0, **fields: Any) -> None:
        """Record that something happened."""
        ...

    def timing(self, round: int, name: str, seconds: float) -> None:
        """Record measured seconds."""
        ...


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Settings of the loop: the root keys of the configuration that carry the same names."""

    seed: int
    clients_per_round: int | None = None
    evaluate_every: int = 1
    personal_evaluation: bool = False
    min_replies: int = 1
    boundary_visits: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class ServerState:
    """What a run is at the end of a round: models by target, counters, and the next round to play.

    ``version`` counts changes of the global model; ``model_epoch`` counts edits that bypass the strategy.
    """

    models: dict[Target, Tensor]
    version: int = 0
    model_epoch: int = 0
    next_round: int = 0
    now: float = 0.0
    visited: set[str] = field(default_factory=set)


class Server:
    """Plays the rounds of a schedule. It is also the :class:`~fedcl.server.contracts.ServerView` that parts see."""

    def __init__(
        self,
        *,
        strategy: Strategy,
        exchange: Exchange,
        schedule: Schedule,
        stream: Stream,
        spec: Spec,
        initial: Tensor,
        clients: Sequence[str],
        record: Record,
        options: LoopOptions,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.strategy, self.exchange, self.schedule, self.stream = strategy, exchange, schedule, stream
        self.record, self.options, self.evaluator = record, options, evaluator
        self.state = ServerState({GLOBAL: initial.detach().cpu().clone()})
        self.headline = ""
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
        return self.state.now

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
        return torch_generator(self.options.seed, "server", self.state.version, purpose)

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
        """Play every round that is still to come and call ``after_round`` with each one's number when it is over."""
        if self.state.next_round == 0:
            self._evaluate_initial()
        while self.state.next_round < self.schedule.num_rounds:
            server_round = self.state.next_round
            started = time.perf_counter()
            updates = self._train(server_round)
            self._finish_round(server_round, updates)
            self.state.next_round += 1
            self.record.timing(server_round, "round", time.perf_counter() - started)
            after_round(server_round)

    def _train(self, server_round: int) -> list[Update]:
        selected = select(
            self._clients, self.options.clients_per_round, seed=self.options.seed, server_round=server_round
        )
        outgoing = self.strategy.outgoing(selected, self)
        positions = self.exchange.train(
            outgoing,
            lambda client: self._task_of(client, server_round),
            server_round,
            self.version,
            min_replies=self.options.min_replies,
        )
        updates = [update for update in positions if update is not None]
        self.state.visited |= {update.client for update in updates}
        self._record_training(server_round, updates)
        if len(updates) < self.options.min_replies:
            self.record.event(
                "round_skipped", round=server_round, replies=len(updates), min_replies=self.options.min_replies
            )
            return []
        started = time.perf_counter()
        changed = self.strategy.aggregate(positions, self)
        self.record.timing(server_round, "aggregate", time.perf_counter() - started)
        self.state.models.update(changed)
        self.state.version += GLOBAL in changed
        return updates

    def _finish_round(self, server_round: int, updates: list[Update]) -> None:
        ended = self.schedule.boundary(server_round)
        reached = self._task_of(self._clients[0], server_round).id if ended is None else ended
        kept = tuple(updates) if self.strategy.keeps_updates else ()
        if ended is not None and self.options.boundary_visits:
            self._end_task_at_clients(ended, server_round)
        last = ended is not None and ended == self.stream.num_tasks - 1
        self._ask(Event("round_end" if ended is None else "task_end", reached, server_round, last, kept))
        every = self.options.evaluate_every
        if ended is not None or (every and (server_round + 1) % every == 0):
            self._evaluate(server_round, reached, all_tasks=ended is not None)
        if ended is not None:
            if self.strategy.personal or self.options.personal_evaluation:
                self._evaluate_personal(server_round, reached)
            self.state.visited.clear()
        for name, value in self.strategy.metrics().items():
            self.record.row(round=server_round, phase="server", name=name, value=value, task=reached, after=reached)

    def _task_of(self, client: str, server_round: int) -> Task:
        return self.stream.train_task(self.schedule.position(client, server_round).task_id)

    # -- task boundaries --------------------------------------------------------------------------------------------

    def _end_task_at_clients(self, task_id: int, server_round: int) -> None:
        """Let every client that learned the task conclude it, with the global model the task ended with."""
        outgoing = [
            Outgoing(client, self.strategy.target_of(client, self), self.model_of(client))
            for client in self._clients
            if client in self.state.visited
        ]
        self.exchange.tell("task_end", outgoing, self.stream.train_task(task_id), server_round, self.version)

    def _ask(self, event: Event) -> None:
        for query in self.strategy.queries(event, self):
            answers = self.exchange.ask(
                query, lambda client: self._task_of(client, event.server_round), event.server_round, self.version
            )
            self.strategy.absorb(query, answers, self)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate_initial(self) -> None:
        if self.evaluator is not None:
            tasks = list(range(self.stream.num_tasks))
            for task, value in self.evaluator.accuracy(self.global_model, tasks, after=0).items():
                self.record.row(round=-1, phase="test", name="accuracy", value=value, task=task)

    def _evaluate(self, server_round: int, reached: int, *, all_tasks: bool) -> None:
        if self.evaluator is None:
            return
        tasks = list(range(self.stream.num_tasks if all_tasks else reached + 1))
        accuracy = self.evaluator.accuracy(self.global_model, tasks, after=reached)
        seen = [value for task, value in accuracy.items() if task <= reached]
        self.headline = f"accuracy {sum(seen) / max(len(seen), 1):.3f}"
        for task, value in accuracy.items():
            self.record.row(round=server_round, phase="test", name="accuracy", value=value, task=task, after=reached)

    def _evaluate_personal(self, server_round: int, reached: int) -> None:
        """Test what each client would use after aggregation, on its own test samples of every task so far."""
        outgoing = [
            Outgoing(client, self.strategy.target_of(client, self), self.model_of(client)) for client in self._clients
        ]
        for task_id in range(reached + 1):
            task = self.stream.test_task(task_id, after=reached)
            for client, reply in self.exchange.tell("evaluate", outgoing, task, server_round, self.version).items():
                if reply.num_examples:
                    self.record.row(
                        round=server_round,
                        phase="personal",
                        name="accuracy",
                        value=reply.metrics["accuracy"],
                        client=client,
                        task=task_id,
                        after=reached,
                    )

    def _record_training(self, server_round: int, updates: Sequence[Update]) -> None:
        phases = {"accuracy_received": ("received", "accuracy"), "accuracy_trained": ("trained", "accuracy")}
        for update in updates:
            values = {"num_examples": float(update.num_examples), **update.metrics}
            for key, value in values.items():
                phase, name = phases.get(key, ("train", key))
                self.record.row(
                    round=server_round,
                    phase=phase,
                    name=name,
                    value=value,
                    client=update.client,
                    task=update.task,
                    after=update.task,
                )

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
            "now": state.now,
            "visited": sorted(state.visited),
            "visits": dict(self.exchange.visits),
            "committed": dict(self.exchange.committed),
            "bytes": [self.exchange.bytes_up, self.exchange.bytes_down],
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.state = ServerState(
            models=dict(state["models"]),
            version=state["version"],
            model_epoch=state["model_epoch"],
            next_round=state["next_round"],
            now=state["now"],
            visited=set(state["visited"]),
        )
        self.exchange.visits = dict(state["visits"])
        self.exchange.committed = dict(state["committed"])
        self.exchange.bytes_up, self.exchange.bytes_down = state["bytes"]
        self.strategy.load_state_dict(state["strategy"])
