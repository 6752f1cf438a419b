"""What an unlearner may know and ask while requests are processed, and how clients are made to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedcl.contracts.fields import Form
from fedcl.contracts.requests import ErasureOutcome, ForgetInstruction, ForgetRequest, Forgotten, outcomes_from
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.strategy import Target
from fedcl.contracts.unlearner import Value
from fedcl.contracts.view import Query, Response
from fedcl.messages import Reply
from fedcl.models.flat import Spec
from fedcl.scenario.task import Task
from fedcl.server.state import OUT_OF_REACH, ServerData
from fedcl.server.strategy import Outgoing

Saved = tuple[dict[str, Any], dict[str, tuple[int, Any]]]  # a server's state, and clients' states by visit


class RetrainedReference(Protocol):
    """Retrains without a forget set, and can put the result in the run's place.

    ``spent`` is what the last such training took when it was run: seconds, rounds, bytes, clients.
    """

    spent: dict[str, float]

    def run(self, forgotten: Forgotten, until: int) -> Saved:
        """Return where a run is after ``until`` rounds in which nobody ever held what is ``forgotten``."""
        ...

    def adopt(self, server: ServerData, saved: Saved) -> None:
        """Let ``server`` and its clients go on from ``saved``."""
        ...


@dataclass
class UnlearningView:
    """The :class:`~fedcl.contracts.unlearner.UnlearnView` of ``requests`` that are being processed."""

    server: ServerData
    requests: Sequence[ForgetRequest]
    server_round: int
    forgotten: Forgotten
    reference: RetrainedReference | None = None
    retrained: Saved | None = None
    asked: set[str] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        earlier = [one for one in self.forgotten.requests if one not in self.requests]
        self._before = Forgotten(earlier)

    @property
    def spec(self) -> Spec:
        return self.server.spec

    @property
    def clients(self) -> tuple[str, ...]:
        return self.server.clients

    @property
    def owners(self) -> tuple[str, ...]:
        """The clients that may hold some of the forget set, including those that leave."""
        leaving = Forgotten(list(self.requests)).clients
        mine = [one for one in self.requests if one.scope != "client"]
        return tuple(
            client
            for client in self.server.everybody
            if client in leaving or (client in self.clients and any(one.concerns(client) for one in mine))
        )

    @property
    def initial(self) -> Tensor:
        return self.server.initial

    @property
    def statistics(self) -> Statistics:
        return self.server.statistics

    @property
    def device(self) -> torch.device:
        return self.server.device

    def rng(self, purpose: str) -> torch.Generator:
        return self.server.rng(purpose)

    def model_of(self, client: str) -> Tensor:
        return self.server.model_of(client)

    def ask(
        self,
        step: str,
        models: Mapping[str, Tensor],
        response: Form,
        tensors: Mapping[str, Tensor] | None = None,
        tasks: Mapping[str, Sequence[Task]] | None = None,
        **args: Value,
    ) -> list[Response]:
        self.asked |= models.keys()
        self.steps += 1
        query = Query(step, dict(models), response, dict(tensors or {}))
        return self.server.exchange.ask(
            query,
            lambda _: None,
            self.server_round,
            self.server.version,
            kind="unlearn",
            note_of=lambda client: self._instruction(client, dict(args), None if tasks is None else tasks[client]),
        )

    def ask_past(self, query: Query, server_round: int) -> list[Response]:
        """Query clients on what they may still use of the tasks they had in ``server_round``."""
        tasks = {c: self.server.curriculum.whole_task(c, server_round) for c in query.models if c in self.clients}
        present = {client: model for client, model in query.models.items() if tasks.get(client) is not None}
        self.asked |= present.keys()
        self.steps += 1
        return self.server.exchange.ask(
            replace(query, models=present), lambda c: tasks[c], self.server_round, self.server.version
        )

    def retrain(self) -> dict[Target, Tensor]:
        """Return the models of a run without the forget set."""
        if self.reference is None:
            raise RuntimeError("unlearner: retraining needs a simulation, or a new run with `exclude`")
        self.retrained = self.reference.run(self.forgotten, self.server_round)
        return dict(self.retrained[0]["models"])

    def forget(self, departing_clients: Sequence[str]) -> list[ErasureOutcome]:
        """Make the clients that stay and may hold some of the forget set drop it."""
        replies, silent = self.notify([client for client in self.owners if client not in departing_clients])
        found: dict[ErasureOutcome, int] = {}
        for reply in replies.values():
            for outcome in outcomes_from(reply.note):
                found[outcome] = found.get(outcome, 0) + 1
        outcomes = [
            ErasureOutcome(f"{one.part} at {count} client(s)", one.outcome, one.why)
            for one, count in found.items()
            if one.outcome != "not applicable"
        ]
        return [*outcomes, *self._reset(silent)]

    def notify(self, clients: Sequence[str]) -> tuple[dict[str, Reply], list[str]]:
        """Make ``clients`` drop the forget set; return the replies by client, and the clients without one."""
        self.server.cancel(clients)  # what they are computing comes from the forget set
        rounds = max(self.server_round - 1, 0)
        tasks = {client: self._last_task(client, rounds) for client in clients}
        present = [client for client in clients if tasks[client] is not None]
        outgoing = [Outgoing(client, "", self.server.model_of(client)) for client in present]
        replies = self.server.exchange.tell(
            "forget",
            outgoing,
            lambda client: tasks[client],
            rounds,
            self.server.version,
            lambda c: self._instruction(c, {}),
        )
        self.server.cancel(clients)  # a worker may still have the state as it was before
        return replies, [client for client in present if client not in replies]

    def _reset(self, silent: Sequence[str]) -> list[ErasureOutcome]:
        """Discard the state of clients that could not be notified: it may hold some of the forget set."""
        if not silent:
            return []
        exchange, names = self.server.exchange, ", ".join(silent)
        for client in silent:
            exchange.committed.pop(client, None)
        if exchange.commit_state is not None and exchange.erase is not None:  # their states are on this side
            exchange.erase(silent)
            return [ErasureOutcome("client states", "reset", f"client(s) {names} did not reply, and begin again")]
        self.server.state.pending_notice.update(silent)
        return [ErasureOutcome("devices", "retained", f"client(s) {names} {OUT_OF_REACH}; they begin again")]

    def _last_task(self, client: str, server_round: int) -> Task | None:
        """Return the present task of a client or, if it takes no part now, the last one that it has seen."""
        curriculum = self.server.curriculum
        task, seen = curriculum.whole_task(client, server_round), curriculum.schedule.seen(client, server_round)
        return curriculum.seen_task(client, seen[-1], server_round) if task is None and seen else task

    def _instruction(self, client: str, args: dict[str, Any], tasks: Sequence[Task] | None = None) -> str:
        if tasks is None:
            tasks = self._seen(client)
        return ForgetInstruction(tuple(self.requests), tuple(tasks), args).to_json()

    def _seen(self, client: str) -> list[Task]:
        curriculum, last = self.server.curriculum, self.server_round - 1
        seen = curriculum.schedule.seen(client, last) if last >= 0 else ()
        return [self._before.task(client, curriculum.plain_task(client, task_id, last)) for task_id in seen]
