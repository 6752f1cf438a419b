"""Serving unlearning requests at round boundaries: exclude, edit, forget everywhere, recover, measure, certify."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fedcl.client.unlearner import Unlearner, Value
from fedcl.models.flat import Spec
from fedcl.requests import ForgetNote, ForgetRequest, Forgotten, Residual, residuals_from
from fedcl.scenario.task import Task
from fedcl.server.contracts import Answer, Query, Target, Update
from fedcl.server.queue import RequestQueue
from fedcl.server.statistics import Statistics
from fedcl.server.strategy import Outgoing

if TYPE_CHECKING:
    from fedcl.server.loop import Server

Saved = tuple[dict[str, Any], dict[str, tuple[int, Any]]]  # a server's state, and clients' states by visit


class Replay(Protocol):
    """Trains all over without a forget set, and can put the result in the run's place."""

    def run(self, forgotten: Forgotten, until: int) -> Saved:
        """Return where a run is after ``until`` rounds in which nobody ever held what is ``forgotten``."""
        ...

    def adopt(self, server: Server, saved: Saved) -> None:
        """Let ``server`` and its clients go on from ``saved``."""
        ...


class Panel(Protocol):
    """Measures what serving requests did; a simulation has one, which sees all data."""

    def measure(
        self,
        requests: Sequence[ForgetRequest],
        before: Mapping[Target, Tensor],
        after: Mapping[Target, Tensor],
        reference: Mapping[Target, Tensor] | None,
        met: Sequence[int],
        earlier: Forgotten,
    ) -> dict[str, float]:
        """Return measurements by name; what was forgotten ``earlier`` belongs to none of the sets."""
        ...

    def revival(self, requests: Sequence[ForgetRequest], model: Tensor, met: Sequence[int]) -> dict[str, float]:
        """Return the accuracy of ``model`` (P,) on what each of ``requests`` wanted forgotten, by request id."""
        ...


@dataclass(frozen=True, slots=True)
class UnlearningOptions:
    """``unlearning.*`` of the configuration.

    ``in_flight`` says what becomes of updates that clients compute from a model older than an edit: ``drop`` them, or
    ``rebase`` those of clients that hold nothing of the forget set onto the edited model. ``recovery_rounds`` are
    played without the forget set after each edit, besides the schedule's. ``reference`` measures against training all
    over.
    """

    in_flight: Literal["drop", "rebase"] = "drop"
    recovery_rounds: int = 0
    reference: bool = True


@dataclass
class Receipt:
    """What serving some requests together did: all a certificate says, but for the chain.

    ``first`` is the place of the first of them among all that were ever served, from 1.
    """

    first: int
    requests: list[ForgetRequest]
    server_round: int
    promise: str
    before: str
    after: str
    model_epoch: int
    residuals: list[Residual]
    measurements: dict[str, float]
    cost: dict[str, float]


class Unlearning:
    """The requests of a run, what is forgotten by now, and how requests are served."""

    def __init__(
        self,
        queue: RequestQueue,
        unlearner: Unlearner,
        options: UnlearningOptions | None = None,
        *,
        forgotten: Forgotten | None = None,
        replay: Replay | None = None,
        panel: Panel | None = None,
        certify: Callable[[Receipt], None] | None = None,
    ) -> None:
        self.queue, self.unlearner, self.options = queue, unlearner, options or UnlearningOptions()
        self.forgotten = Forgotten() if forgotten is None else forgotten
        self.replay, self._panel, self.certify = replay, panel, certify
        self._served: list[ForgetRequest] = []

    # -- before a round -----------------------------------------------------------------------------------------------

    def begin(self, server: Server, server_round: int, *, ends: bool = False) -> bool:
        """Admit the requests that came before ``server_round``, serve those that are due; say whether any was.

        ``ends`` says that no round comes any more, so that nothing can wait.
        """
        for request, why in self.queue.take(server_round, self.forgotten):
            kind = "request_admitted" if why is None else "request_refused"
            fields = {} if why is None else {"reason": why}
            self._note(server, kind, server_round, request=request.id, scope=request.scope, **fields)
        server.leave(self.forgotten.clients)
        due = self.queue.due(server_round, now=ends)
        if due:
            self._serve(server, due, server_round)
        return bool(due)

    def _serve(self, server: Server, requests: list[ForgetRequest], server_round: int) -> None:
        started, bytes_before = time.perf_counter(), server.exchange.bytes_up + server.exchange.bytes_down
        before = dict(server.state.models)
        view = ServingView(server, requests, server_round, self)
        edited = self.unlearner.unlearn(requests, dict(before), view)
        measurements = {f"unlearner/{name}": value for name, value in self.unlearner.metrics().items()}
        if view.replayed is not None:
            self._adopt(server, view.replayed)
        residuals = self._forget(server, requests, view)
        self._rebase(server, requests, before, edited)
        server.edit(edited)
        if view.replayed is None:
            server.strategy.relearn(view)
        seconds = time.perf_counter() - started
        recovered = server.recover(self.options.recovery_rounds)
        self.queue.served(requests)
        self._served += requests
        cost = {
            "seconds": seconds,
            "bytes": float(server.exchange.bytes_up + server.exchange.bytes_down - bytes_before),
            "clients_asked": float(len(view.asked)),
            "steps_asked": float(view.steps),
            "recovery_rounds": float(recovered),
        }
        measurements |= self._measure(server, requests, before, server_round)
        for name, value in measurements.items():
            server.record.row(
                round=server_round - 1, phase="unlearning", name=name, value=value, virtual_time=server.now
            )
        self._note(server, "request_served", server_round, requests=[request.id for request in requests])
        server.record.timing(server_round, "unlearn", seconds)
        if self.certify is not None:
            self.certify(
                Receipt(
                    len(self._served) - len(requests) + 1,
                    list(requests),
                    server_round,
                    self.unlearner.promise(),
                    model_digest(before),
                    model_digest(server.state.models),
                    server.state.model_epoch,
                    residuals,
                    measurements,
                    cost,
                )
            )

    def _adopt(self, server: Server, saved: Saved) -> None:
        assert self.replay is not None  # it is where `saved` comes from
        self.replay.adopt(server, saved)

    def _forget(self, server: Server, requests: Sequence[ForgetRequest], view: ServingView) -> list[Residual]:
        """Let every part, store and client drop the forget set."""
        leavers = tuple(client for request in requests if request.scope == "client" for client in request.clients)
        residuals = server.expel(leavers)
        if view.replayed is not None:
            return [*residuals, Residual("run", "recomputed", "everything is that of a run without the forget set")]
        for request in requests:
            residuals += server.strategy.forget(request)
            residuals += [server.statistics.forget(request), self.unlearner.forget(request)]
        return residuals + view.forget(leavers)

    def _rebase(
        self,
        server: Server,
        requests: Sequence[ForgetRequest],
        before: Mapping[Target, Tensor],
        edited: Mapping[Target, Tensor],
    ) -> None:
        """Move what innocent clients are computing onto the edited models; the rest is refused for its epoch."""
        if self.options.in_flight != "rebase":
            return
        for flight in server.arrivals.flights.values():
            old, new = before.get(flight.out.target), edited.get(flight.out.target)
            if any(one.scope != "client" and one.concerns(flight.client) for one in requests):
                continue
            if old is not None and new is not None:
                flight.rebase(new.double() - old.double(), server.state.model_epoch + 1)

    def _measure(
        self, server: Server, requests: Sequence[ForgetRequest], before: Mapping[Target, Tensor], server_round: int
    ) -> dict[str, float]:
        if self._panel is None:
            return {}
        reference = None
        if self.options.reference and self.replay is not None and not self.unlearner.replays:
            reference = self.replay.run(self.forgotten, server_round)[0]["models"]
        elif self.unlearner.replays:
            reference = server.state.models
        met = server.met(server_round)
        earlier = Forgotten([one for one in self.forgotten.requests if one not in requests])
        return self._panel.measure(requests, before, server.state.models, reference, met, earlier)

    # -- while rounds are played --------------------------------------------------------------------------------------

    def observe(self, updates: Sequence[Update], before: Tensor, server: Server) -> None:
        """Show the unlearner a round, if it wants to see them."""
        if self.unlearner.observes and updates:
            self.unlearner.observe(updates, before, server)

    def follow(self, server: Server, server_round: int, met: Sequence[int]) -> None:
        """Record what the global model knows by now of what has been forgotten."""
        if self._panel is None or not self._served:
            return
        for name, value in self._panel.revival(self._served, server.global_model, met).items():
            server.record.row(
                round=server_round, phase="unlearning", name=f"revival/{name}", value=value, virtual_time=server.now
            )

    def _note(self, server: Server, kind: str, server_round: int, **fields: Any) -> None:
        server.record.event(kind, round=server_round, virtual_time=server.now, **fields)

    # -- survival -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive."""
        return {
            "queue": self.queue.state_dict(),
            "forgotten": self.forgotten.state(),
            "served": [request.to_json() for request in self._served],
            "unlearner": self.unlearner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.queue.load_state_dict(state["queue"])
        self.forgotten.requests[:] = Forgotten.of(state["forgotten"]).requests
        self._served = [ForgetRequest.from_json(text) for text in state["served"]]
        self.unlearner.load_state_dict(state["unlearner"])


@dataclass
class ServingView:
    """What an unlearner may know and do while it serves ``requests`` (:class:`~fedcl.client.unlearner.UnlearnView`)."""

    server: Server
    requests: Sequence[ForgetRequest]
    server_round: int
    unlearning: Unlearning
    replayed: Saved | None = None
    asked: set[str] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        earlier = [one for one in self.unlearning.forgotten.requests if one not in self.requests]
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
        tensors: Mapping[str, Tensor] | None = None,
        tasks: Mapping[str, Sequence[Task]] | None = None,
        **args: Value,
    ) -> list[Answer]:
        """Let clients do a step of the unlearner."""
        self.asked |= models.keys()
        self.steps += 1
        query = Query(step, dict(models), dict(tensors or {}))
        return self.server.exchange.ask(
            query,
            lambda _: None,
            self.server_round,
            self.server.version,
            kind="unlearn",
            note_of=lambda client: self._note(client, dict(args), None if tasks is None else tasks[client]),
        )

    def ask_past(self, query: Query, server_round: int) -> list[Answer]:
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
        if self.unlearning.replay is None:
            raise RuntimeError("unlearner: training all over needs a simulation, or a new run with `exclude`")
        self.replayed = self.unlearning.replay.run(self.unlearning.forgotten, self.server_round)
        return dict(self.replayed[0]["models"])

    def forget(self, leavers: Sequence[str]) -> list[Residual]:
        """Tell the clients that stay and may hold some of the forget set to drop it."""
        told = [client for client in self.owners if client not in leavers]
        self.server.cancel(told)  # what they are computing comes from the forget set
        rounds = max(self.server_round - 1, 0)
        tasks = {client: self._last_task(client, rounds) for client in told}
        present = [client for client in told if tasks[client] is not None]
        outgoing = [Outgoing(client, "", self.server.model_of(client)) for client in present]
        replies = self.server.exchange.tell(
            "forget", outgoing, lambda client: tasks[client], rounds, self.server.version, lambda c: self._note(c, {})
        )
        self.server.cancel(told)  # a worker may still have the state as it was before
        found: dict[Residual, int] = {}
        for reply in replies.values():
            for residual in residuals_from(reply.note):
                found[residual] = found.get(residual, 0) + 1
        return [
            Residual(f"{residual.part} at {count} client(s)", residual.outcome, residual.why)
            for residual, count in found.items()
            if residual.outcome != "none"
        ]

    def _last_task(self, client: str, server_round: int) -> Task | None:
        """Return the task a client is in or, if it takes no part just now, the last that it met."""
        curriculum = self.server.curriculum
        task, met = curriculum.whole_task(client, server_round), curriculum.schedule.met(client, server_round)
        return curriculum.met_task(client, met[-1], server_round) if task is None and met else task

    def _note(self, client: str, args: dict[str, Any], tasks: Sequence[Task] | None = None) -> str:
        if tasks is None:
            tasks = self._met(client)
        return ForgetNote(tuple(self.requests), tuple(tasks), args).to_json()

    def _met(self, client: str) -> list[Task]:
        curriculum, last = self.server.curriculum, self.server_round - 1
        met = curriculum.schedule.met(client, last) if last >= 0 else ()
        return [self._before.task(client, curriculum.plain_task(client, task_id, last)) for task_id in met]


def model_digest(models: Mapping[Target, Tensor]) -> str:
    """Return the SHA-256 of models, target by target: what a certificate names a state of the run by."""
    digest = hashlib.sha256()
    for target in sorted(models):
        digest.update(target.encode() + b"\0" + models[target].contiguous().numpy().tobytes())
    return digest.hexdigest()
