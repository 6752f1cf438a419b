"""Serving unlearning requests at round boundaries: exclude, edit, forget everywhere, recover, measure, certify."""

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
from fedcl.unlearning.queue import RequestQueue
from fedcl.unlearning.receipt import Panel, Receipt, model_digest
from fedcl.unlearning.view import RetrainedReference, Saved, UnlearningView


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


class Unlearning:
    """The requests of a run, what is forgotten by now, and how requests are served."""

    def __init__(
        self,
        queue: RequestQueue,
        unlearner: Unlearner,
        options: UnlearningOptions | None = None,
        *,
        forgotten: Forgotten | None = None,
        replay: RetrainedReference | None = None,
        panel: Panel | None = None,
        certify: Callable[[Receipt], None] | None = None,
    ) -> None:
        self.queue, self.unlearner, self.options = queue, unlearner, options or UnlearningOptions()
        self.forgotten = Forgotten() if forgotten is None else forgotten
        self.replay, self._panel, self.certify = replay, panel, certify
        self._served: list[ForgetRequest] = []

    # -- before a round -----------------------------------------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether the unlearner sees every round's updates."""
        return self.unlearner.observes

    def begin(
        self, server: ServerData, server_round: int, recover: Callable[[int], int], *, ends: bool = False
    ) -> bool:
        """Admit the requests that came before ``server_round``, serve those that are due; return whether any was.

        ``recover(n)`` plays n rounds besides the schedule and returns how many counted. ``ends`` says that no round
        comes any more, so that nothing can wait.
        """
        self._remind(server, server_round)
        taken = self.queue.take(server_round, self.forgotten)
        for request, why in taken:
            kind = "request_admitted" if why is None else "request_refused"
            fields = {} if why is None else {"reason": why}
            self._note(server, kind, server_round, request=request.id, scope=request.scope, **fields)
        if taken:
            server.leave(self.forgotten.clients)
        due = self.queue.due(server_round, now=ends)
        if due:
            self._serve(server, due, server_round, recover)
        return bool(due)

    def _remind(self, server: ServerData, server_round: int) -> None:
        """Tell clients that were out of reach when they were to forget, and now are back."""
        for client in sorted(server.state.pending_notice):
            mine = [one for one in self.forgotten.requests if one.concerns(client)]
            if client not in self.forgotten.clients:
                told = client in UnlearningView(server, mine, server_round, self.forgotten, None).tell([client])[0]
            else:
                told = server.exchange.erase is not None and not server.exchange.erase([client])
            if told:
                server.state.pending_notice.discard(client)
                self._note(server, "client_told", server_round, client=client, requests=[one.id for one in mine])

    def _serve(
        self,
        server: ServerData,
        requests: list[ForgetRequest],
        server_round: int,
        recover: Callable[[int], int],
    ) -> None:
        started, cpu, traffic = time.perf_counter(), time.process_time(), server.exchange.traffic
        before, stored = dict(server.state.models), float(num_bytes(self.unlearner.state_dict()))
        view = UnlearningView(server, requests, server_round, self.forgotten, self.replay)
        measurements, outcomes = self._edit(server, requests, before, view)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        recovered = recover(self.options.recovery_rounds)
        self.queue.served(requests)
        self._served += requests
        cost = {
            "seconds": seconds,
            "cpu_seconds": cpu,  # of this process: with workers, theirs come on top
            "bytes": float(server.exchange.traffic - traffic),
            "clients_asked": float(len(view.asked)),
            "steps_asked": float(view.steps),
            "recovery_rounds": float(recovered),
            "stored_bytes": stored,
        }
        measurements |= self._measure(server, requests, before, server_round)
        if self.replay is not None:  # to hold the above against
            cost |= {f"retraining_{name}": value for name, value in self.replay.spent.items()}
        self._record(server, requests, server_round, measurements, seconds)
        if self.certify is not None:
            receipt = Receipt(
                len(self._served) - len(requests) + 1,
                list(requests),
                server_round,
                self.unlearner.promise(),
                model_digest(before),
                model_digest(server.state.models),
                server.state.model_epoch,
                outcomes,
                measurements,
                cost,
            )
            self.certify(receipt)

    def _edit(
        self, server: ServerData, requests: list[ForgetRequest], before: Mapping[Target, Tensor], view: UnlearningView
    ) -> tuple[dict[str, float], list[ErasureOutcome]]:
        """Let the unlearner make new models, put them in place, and let everything else forget."""
        found = self.unlearner.unlearn(requests, dict(before), view)
        gone = Forgotten(requests).clients
        edited = {target: model for target, model in found.items() if target not in gone}
        measurements = {f"unlearner/{name}": value for name, value in self.unlearner.metrics().items()}
        if view.replayed is not None:
            self._adopt(server, view.replayed)
        outcomes = self._forget(server, requests, view)
        self._rebase(server, requests, before, edited)
        server.edit(edited)
        if view.replayed is None:
            server.strategy.relearn(view)
        return measurements, outcomes

    def _record(
        self,
        server: ServerData,
        requests: Sequence[ForgetRequest],
        server_round: int,
        measurements: Mapping[str, float],
        seconds: float,
    ) -> None:
        for name, value in measurements.items():
            server.record.row(
                round=server_round - 1, phase="unlearning", name=name, value=value, virtual_time=server.now
            )
        self._note(server, "request_served", server_round, requests=[request.id for request in requests])
        server.record.timing(server_round, "unlearn", seconds)

    def _adopt(self, server: ServerData, saved: Saved) -> None:
        assert self.replay is not None  # it is where `saved` comes from
        self.replay.adopt(server, saved)

    def _forget(
        self, server: ServerData, requests: Sequence[ForgetRequest], view: UnlearningView
    ) -> list[ErasureOutcome]:
        """Let every part, store and client drop the forget set."""
        departing_clients = tuple(
            client for request in requests if request.scope == "client" for client in request.clients
        )
        outcomes = server.remove_clients(departing_clients)
        if view.replayed is not None:
            return [
                *outcomes,
                ErasureOutcome("run", "recomputed", "everything is that of a run without the forget set"),
            ]
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
        """Move what innocent clients are computing onto the edited models; the rest is refused for its epoch."""
        if self.options.in_flight != "rebase":
            return
        for flight in server.arrivals.flights.values():
            if any(one.scope != "client" and one.concerns(flight.client) for one in requests):
                continue
            old = before.get(flight.out.target)
            if old is not None:
                new = edited.get(flight.out.target, old)
                flight.rebase(new.double() - old.double(), server.state.model_epoch + 1)

    def _measure(
        self, server: ServerData, requests: Sequence[ForgetRequest], before: Mapping[Target, Tensor], server_round: int
    ) -> dict[str, float]:
        if self._panel is None:
            return {}
        reference = None
        if self.options.reference and self.replay is not None and not self.unlearner.replays:
            reference = self.replay.run(self.forgotten, server_round)[0]["models"]
        elif self.unlearner.replays:
            reference = server.state.models
        seen = server.seen(server_round)
        earlier = Forgotten([one for one in self.forgotten.requests if one not in requests])
        return self._panel.measure(requests, before, server.state.models, reference, seen, earlier, server_round)

    # -- while rounds are played --------------------------------------------------------------------------------------

    def observe(self, updates: Sequence[Update], before: Tensor, server: ServerData) -> None:
        """Show the unlearner a round, if it wants to see them."""
        if self.unlearner.observes and updates:
            self.unlearner.observe(updates, before, server)

    def follow(self, server: ServerData, server_round: int, seen: Sequence[int]) -> None:
        """Record what the global model knows by now of what has been forgotten."""
        if self._panel is None or not self._served:
            return
        for name, value in self._panel.revival(self._served, server.global_model, seen).items():
            server.record.row(
                round=server_round, phase="unlearning", name=f"revival/{name}", value=value, virtual_time=server.now
            )

    def _note(self, server: ServerData, kind: str, server_round: int, **fields: Any) -> None:
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
