"""Processing unlearning requests between rounds: exclude, edit, forget everywhere, recover, measure, certify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedcl.base.tree import num_bytes
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest, Forgotten
from fedcl.contracts.strategy import Target, Update
from fedcl.contracts.unlearner import Unlearner
from fedcl.server.state import ServerData
from fedcl.unlearning.certificate import Receipt, model_digest
from fedcl.unlearning.queue import RequestQueue
from fedcl.unlearning.view import RetrainedReference, UnlearningView


@dataclass(frozen=True, slots=True)
class UnlearningOptions:
    """``unlearning.*`` of the configuration.

    ``in_flight`` says what becomes of updates that clients compute from a model older than an edit: ``drop`` them, or
    ``rebase`` those of clients that hold nothing of the forget set onto the edited model. ``recovery_rounds`` are run
    without the forget set after each edit, besides the schedule's. ``reference`` measures against the retrained
    reference.
    """

    in_flight: Literal["drop", "rebase"] = "drop"
    recovery_rounds: int = 0
    reference: bool = True


@dataclass(frozen=True)
class Edit:
    """What unlearning metrics compare: models by target ``before`` and ``after`` processing ``requests``.

    ``reference`` are the models of the retrained reference, if there is one. ``seen`` are the ids of the tasks trained
    by then, ``earlier`` is what requests before these wanted forgotten.
    """

    requests: Sequence[ForgetRequest]
    before: Mapping[Target, Tensor]
    after: Mapping[Target, Tensor]
    reference: Mapping[Target, Tensor] | None
    seen: Sequence[int]
    earlier: Forgotten
    server_round: int


Certify = Callable[[Receipt, ServerData], None]
Measure = Callable[[Edit], dict[str, float]]  # measurements by name
Revival = Callable[[Sequence[ForgetRequest], Tensor, Sequence[int]], dict[str, float]]  # (requests, model, seen tasks)


class Unlearning:
    """The requests of a run, what is forgotten by now, and how requests are processed.

    ``measure`` measures an edit, ``revival`` what a later global model knows of what was forgotten; a simulation has
    both, as it sees all data.
    """

    def __init__(
        self,
        queue: RequestQueue,
        unlearner: Unlearner,
        options: UnlearningOptions | None = None,
        *,
        forgotten: Forgotten | None = None,
        reference: RetrainedReference | None = None,
        measure: Measure | None = None,
        revival: Revival | None = None,
        certify: Certify | None = None,
    ) -> None:
        self.queue, self.unlearner, self.options = queue, unlearner, options or UnlearningOptions()
        self.forgotten = Forgotten() if forgotten is None else forgotten
        self.reference, self._measure, self._revival, self._certify = reference, measure, revival, certify
        self._processed: list[ForgetRequest] = []

    # -- between two rounds -------------------------------------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether the unlearner sees every round's updates."""
        return self.unlearner.observes

    def process(
        self, server: ServerData, server_round: int, recover: Callable[[int], int], *, ends: bool = False
    ) -> bool:
        """Admit the requests that came before ``server_round``, process those that are due; return whether any was.

        ``recover(n)`` runs n rounds besides the schedule and returns how many counted. ``ends`` says that no further
        round comes, so that nothing can wait.
        """
        self._notify(server, server_round)
        self._admit(server, server_round)
        due = self.queue.due(server_round, now=ends)
        if due:
            self._process(server, due, server_round, recover)
        return bool(due)

    def _notify(self, server: ServerData, server_round: int) -> None:
        """Notify clients that were out of reach when they should have forgotten, and are back now."""
        for client in sorted(server.state.pending_notice):
            mine = [one for one in self.forgotten.requests if one.concerns(client)]
            if client not in self.forgotten.clients:
                notified = client in UnlearningView(server, mine, server_round, self.forgotten).notify([client])[0]
            else:
                notified = server.exchange.erase is not None and not server.exchange.erase([client])
            if notified:
                server.state.pending_notice.discard(client)
                self._event(server, "client_told", server_round, client=client, requests=[one.id for one in mine])

    def _admit(self, server: ServerData, server_round: int) -> None:
        taken = self.queue.take(server_round, self.forgotten)
        for request, why in taken:
            kind = "request_admitted" if why is None else "request_refused"
            fields = {} if why is None else {"reason": why}
            self._event(server, kind, server_round, request=request.id, scope=request.scope, **fields)
        if taken:
            server.leave(self.forgotten.clients)

    def _process(
        self, server: ServerData, requests: list[ForgetRequest], server_round: int, recover: Callable[[int], int]
    ) -> None:
        """Edit, recover, measure, record, certify."""
        started, cpu, traffic = time.perf_counter(), time.process_time(), server.exchange.traffic
        before, stored = dict(server.state.models), float(num_bytes(self.unlearner.state_dict()))
        view = UnlearningView(server, requests, server_round, self.forgotten, self.reference)
        measurements, outcomes = self._edit(server, requests, before, view)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        recovered = recover(self.options.recovery_rounds)
        self.queue.remove(requests)
        self._processed += requests
        cost = {
            "seconds": seconds,
            "cpu_seconds": cpu,  # of this process: those of workers come on top
            "bytes": float(server.exchange.traffic - traffic),
            "clients_asked": float(len(view.asked)),
            "steps_asked": float(view.steps),
            "recovery_rounds": float(recovered),
            "stored_bytes": stored,
        }
        measurements |= self._measured(server, requests, before, server_round)
        if self.reference is not None:  # for comparison
            cost |= {f"retraining_{name}": value for name, value in self.reference.spent.items()}
        receipt = Receipt(
            first=len(self._processed) - len(requests) + 1,
            requests=list(requests),
            server_round=server_round,
            promise=self.unlearner.promise(),
            before=model_digest(before),
            after=model_digest(server.state.models),
            model_epoch=server.state.model_epoch,
            outcomes=outcomes,
            measurements=measurements,
            cost=cost,
        )
        self._record(server, receipt)
        if self._certify is not None:
            self._certify(receipt, server)

    def _edit(
        self, server: ServerData, requests: list[ForgetRequest], before: Mapping[Target, Tensor], view: UnlearningView
    ) -> tuple[dict[str, float], list[ErasureOutcome]]:
        """Let the unlearner make new models, put them in place, and let everything else forget."""
        found = self.unlearner.unlearn(requests, dict(before), view)
        removed = Forgotten(requests).clients
        edited = {target: model for target, model in found.items() if target not in removed}
        measurements = {f"unlearner/{name}": value for name, value in self.unlearner.metrics().items()}
        if view.retrained is not None and self.reference is not None:
            self.reference.adopt(server, view.retrained)
        outcomes = self._forget(server, requests, view)
        self._rebase(server, requests, before, edited)
        server.edit(edited)
        if view.retrained is None:
            server.strategy.relearn(view)
        return measurements, outcomes

    def _forget(
        self, server: ServerData, requests: Sequence[ForgetRequest], view: UnlearningView
    ) -> list[ErasureOutcome]:
        """Let every part, store and client drop the forget set."""
        departing_clients = tuple(
            client for request in requests if request.scope == "client" for client in request.clients
        )
        outcomes = server.remove_clients(departing_clients)
        if view.retrained is not None:
            why = "everything is that of a run without the forget set"
            return [*outcomes, ErasureOutcome("run", "recomputed", why)]
        for request in requests:
            outcomes += server.strategy.forget(request)
            outcomes += [server.statistics.forget(request), self.unlearner.forget(request)]
        return outcomes + view.forget(departing_clients)

    def _rebase(
        self,
        server: ServerData,
        requests: Sequence[ForgetRequest],
        before: Mapping[Target, Tensor],
        edited: Mapping[Target, Tensor],
    ) -> None:
        """Move what unconcerned clients are computing onto the edited models; the rest is rejected for its epoch."""
        if self.options.in_flight != "rebase":
            return
        for flight in server.arrivals.flights.values():
            if any(one.scope != "client" and one.concerns(flight.client) for one in requests):
                continue
            old = before.get(flight.out.target)
            if old is not None:
                new = edited.get(flight.out.target, old)
                flight.rebase(new.double() - old.double(), server.state.model_epoch + 1)

    def _measured(
        self, server: ServerData, requests: Sequence[ForgetRequest], before: Mapping[Target, Tensor], server_round: int
    ) -> dict[str, float]:
        if self._measure is None:
            return {}
        reference = None
        if self.unlearner.retrains:
            reference = server.state.models
        elif self.options.reference and self.reference is not None:
            reference = self.reference.run(self.forgotten, server_round)[0]["models"]
        earlier = Forgotten([one for one in self.forgotten.requests if one not in requests])
        seen = server.seen(server_round)
        return self._measure(Edit(requests, before, server.state.models, reference, seen, earlier, server_round))

    def _record(self, server: ServerData, receipt: Receipt) -> None:
        for name, value in receipt.measurements.items():
            _row(server, receipt.server_round - 1, name, value)
        ids = [request.id for request in receipt.requests]
        self._event(server, "request_served", receipt.server_round, requests=ids)
        server.record.timing(receipt.server_round, "unlearn", receipt.cost["seconds"])

    # -- during rounds ------------------------------------------------------------------------------------------------

    def observe(self, updates: Sequence[Update], before: Tensor, server: ServerData) -> None:
        """Show the unlearner a round, if it wants to see them."""
        if self.unlearner.observes and updates:
            self.unlearner.observe(updates, before, server)

    def follow(self, server: ServerData, server_round: int, seen: Sequence[int]) -> None:
        """Record what the global model knows now of what has been forgotten."""
        if self._revival is None or not self._processed:
            return
        for name, value in self._revival(self._processed, server.global_model, seen).items():
            _row(server, server_round, f"revival/{name}", value)

    def _event(self, server: ServerData, kind: str, server_round: int, **fields: Any) -> None:
        server.record.event(kind, round=server_round, virtual_time=server.now, **fields)

    # -- survival -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive."""
        return {
            "queue": self.queue.state_dict(),
            "forgotten": self.forgotten.state(),
            "processed": [request.to_json() for request in self._processed],
            "unlearner": self.unlearner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.queue.load_state_dict(state["queue"])
        self.forgotten.requests[:] = Forgotten.of(state["forgotten"]).requests
        self._processed = [ForgetRequest.from_json(text) for text in state["processed"]]
        self.unlearner.load_state_dict(state["unlearner"])


def _row(server: ServerData, server_round: int, name: str, value: float) -> None:
    server.record.row(round=server_round, phase="unlearning", name=name, value=value, virtual_time=server.now)
