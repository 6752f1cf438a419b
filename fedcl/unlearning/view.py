"""What an unlearner may know and ask while it serves requests, and how clients are told to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedcl.contracts.fields import Form
from fedcl.contracts.requests import ErasureOutcome, ForgetNote, ForgetRequest, Forgotten, outcomes_from
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
    """Trains all over without a forget set, and can put the result in the run's place.

    ``spent`` is what the last such training took when it was played: seconds, rounds, bytes, clients.
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
    trainer: RetrainedReference | None
    replayed: Saved | None = None
    asked: set[str] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        earlier = [one for one in self.forgotten.requests if one not in self.requests]
        self._before = Forgotten(earlier)

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        return self.server.spec

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that stay."""
        return self.server.clients

    @property
    def owners(self) -> tuple[str, ...]:
        """The clients that may hold some of the forget set, those that leave among them."""
        leaving = Forgotten(list(self.requests)).clients
        mine = [one for one in self.requests if one.scope != "client"]
        return tuple(
            client
            for client in self.server.everybody
            if client in leaving or (client in self.clients and any(one.concerns(client) for one in mine))
        )

    @property
    def initial(self) -> Tensor:
        """The weights the run began with."""
        return self.server.initial

    @property
    def statistics(self) -> Statistics:
        """What the server has added up of clients' statistics."""
        return self.server.statistics

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        return self.server.device

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        return self.server.rng(purpose)

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now."""
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
        """Let clients do a step of the unlearner."""
        self.asked |= models.keys()
        self.steps += 1
        query = Query(step, dict(models), response, dict(tensors or {}))
        return self.server.exchange.ask(
            query,
            lambda _: None,
            self.server_round,
            self.server.version,
            kind="unlearn",
            note_of=lambda client: self._note(client, dict(args), None if tasks is None else tasks[client]),
        )

    def ask_past(self, query: Query, server_round: int) -> list[Response]:
        """Put ``query`` to clients with what they may still use of the tasks they had in ``server_round``."""
        tasks = {c: self.server.curriculum.whole_task(c, server_round) for c in query.models if c in self.clients}
        present = {client: model for client, model in query.models.items() if tasks.get(client) is not None}
        self.asked |= present.keys()
        self.steps += 1
        return self.server.exchange.ask(
            replace(query, models=present), lambda c: tasks[c], self.server_round, self.server.version
        )

    def replay(self) -> dict[Target, Tensor]:
        """Return the models of a run without the forget set."""
        if self.trainer is None:
            raise RuntimeError("unlearner: training all over needs a simulation, or a new run with `exclude`")
        self.replayed = self.trainer.run(self.forgotten, self.server_round)
        return dict(self.replayed[0]["models"])

    def forget(self, departing_clients: Sequence[str]) -> list[ErasureOutcome]:
        """Tell the clients that stay and may hold some of the forget set to drop it."""
        replies, silent = self.tell([client for client in self.owners if client not in departing_clients])
        found: dict[ErasureOutcome, int] = {}
        for reply in replies.values():
            for residual in outcomes_from(reply.note):
                found[residual] = found.get(residual, 0) + 1
        outcomes = [
            ErasureOutcome(f"{residual.part} at {count} client(s)", residual.outcome, residual.why)
            for residual, count in found.items()
            if residual.outcome != "none"
        ]
        return [*outcomes, *self._begin_anew(silent)]

    def tell(self, clients: Sequence[str]) -> tuple[dict[str, Reply], list[str]]:
        """Tell ``clients`` to drop the forget set; return the replies by client, and the clients that gave none."""
        self.server.cancel(clients)  # what they are computing comes from the forget set
        rounds = max(self.server_round - 1, 0)
        tasks = {client: self._last_task(client, rounds) for client in clients}
        present = [client for client in clients if tasks[client] is not None]
        outgoing = [Outgoing(client, "", self.server.model_of(client)) for client in present]
        replies = self.server.exchange.tell(
            "forget", outgoing, lambda client: tasks[client], rounds, self.server.version, lambda c: self._note(c, {})
        )
        self.server.cancel(clients)  # a worker may still have the state as it was before
        return replies, [client for client in present if client not in replies]

    def _begin_anew(self, silent: Sequence[str]) -> list[ErasureOutcome]:
        """Never use again the state of clients that could not be told: it may hold some of the forget set."""
        if not silent:
            return []
        exchange, names = self.server.exchange, ", ".join(silent)
        for client in silent:
            exchange.committed.pop(client, None)
        if exchange.commit_state is not None and exchange.erase is not None:  # their states lie on this side
            exchange.erase(silent)
            return [ErasureOutcome("client states", "reset", f"client(s) {names} gave no answer, and begin again")]
        self.server.state.pending_notice.update(silent)
        return [ErasureOutcome("devices", "remains", f"client(s) {names} {OUT_OF_REACH}; they begin again")]

    def _last_task(self, client: str, server_round: int) -> Task | None:
        """Return the task a client is in or, if it takes no part just now, the last that it met."""
        curriculum = self.server.curriculum
        task, seen = curriculum.whole_task(client, server_round), curriculum.schedule.seen(client, server_round)
        return curriculum.seen_task(client, seen[-1], server_round) if task is None and seen else task

    def _note(self, client: str, args: dict[str, Any], tasks: Sequence[Task] | None = None) -> str:
        if tasks is None:
            tasks = self._seen(client)
        return ForgetNote(tuple(self.requests), tuple(tasks), args).to_json()

    def _seen(self, client: str) -> list[Task]:
        curriculum, last = self.server.curriculum, self.server_round - 1
        seen = curriculum.schedule.seen(client, last) if last >= 0 else ()
        return [self._before.task(client, curriculum.plain_task(client, task_id, last)) for task_id in seen]
