"""Unlearning requests on their way: admitted or refused, then waiting to be processed together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedcl.contracts.requests import NAMES, ForgetRequest, Forgotten, Scope
from fedcl.unlearning.sources import RequestSource

_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")  # a part of a certificate's file name


@dataclass(frozen=True)
class Bounds:
    """What a request may name: the run's clients, its numbers of classes and tasks, and the scopes of its unlearner.

    ``num_samples`` is None where only the clients know how many they hold.
    """

    clients: tuple[str, ...]
    num_classes: int
    num_tasks: int
    scopes: frozenset[Scope]
    num_samples: int | None = None

    def refusal(self, request: ForgetRequest) -> str | None:
        """Return why ``request`` can never be processed in this run, naming what is allowed, or None."""
        if not _ID.fullmatch(request.id):
            return f"id={request.id[:80]}: must be 1 to 64 of A-Z a-z 0-9 . _ -"
        if request.scope not in NAMES:
            return f"scope={request.scope}: must be one of {', '.join(NAMES)}"
        if request.scope not in self.scopes:
            return f"scope={request.scope}: this unlearner supports {', '.join(sorted(self.scopes)) or 'none'}"
        key = NAMES[request.scope]
        if not getattr(request, key):
            return f"{key}: names nothing to forget"
        narrowed = {key, "clients"} if request.scope in ("sample", "task") else {key}
        others = [name for name in NAMES.values() if name not in narrowed and getattr(request, name)]
        if others:
            return f"{others[0]}: has no meaning with scope={request.scope}"
        unknown = [client for client in request.clients if client not in self.clients]
        if unknown:
            return f"clients={unknown}: must be among the run's clients"
        for name, count in (("classes", self.num_classes), ("tasks", self.num_tasks), ("samples", self.num_samples)):
            beyond = [value for value in getattr(request, name) if value < 0 or (count is not None and value >= count)]
            if beyond:
                return f"{name}={beyond}: must be in 0..{'' if count is None else count - 1}"
        return None


@dataclass
class RequestQueue:
    """Requests in the order of their arrival from ``sources``.

    A request waits up to ``window`` rounds for others, to be processed together with them.
    """

    bounds: Bounds
    sources: Sequence[RequestSource] = ()
    window: int = 0
    _answered: dict[str, str] = field(default_factory=dict)  # request as text -> why it was refused ("": admitted)
    _ids: set[str] = field(default_factory=set)
    _waiting: list[tuple[int, ForgetRequest]] = field(default_factory=list)

    def take(self, server_round: int, forgotten: Forgotten) -> list[tuple[ForgetRequest, str | None]]:
        """Return the requests that came since the last call, each with why it is refused (None: it is admitted)."""
        taken = []
        for request, fault in (found for source in self.sources for found in source(server_round)):
            if self.knows(request):
                continue
            why = fault or self._refusal(request, forgotten)
            self._answered[request.to_json()] = why or ""
            if why is None:
                self._ids.add(request.id)
                self._waiting.append((server_round, request))
                forgotten.add([request])
            taken.append((request, why))
        return taken

    def knows(self, request: ForgetRequest) -> bool:
        """Whether ``request`` has been admitted or refused before."""
        return request.to_json() in self._answered

    def _refusal(self, request: ForgetRequest, forgotten: Forgotten) -> str | None:
        if request.id in self._ids:
            return f"id={request.id}: another request has it"
        why = self.bounds.refusal(request)
        if why is not None:
            return why
        removed = [client for client in request.clients if client in forgotten.clients]
        if removed:
            return f"clients={removed}: have left, and all they held is forgotten"
        if request.scope == "client":
            if set(self.bounds.clients) <= forgotten.clients | set(request.clients):
                return f"clients={list(request.clients)}: would leave no client"
        elif request.scope == "class":
            removed_classes = {label for one in forgotten.requests for label in one.classes} | set(request.classes)
            if len(removed_classes) >= self.bounds.num_classes:
                return f"classes={list(request.classes)}: would leave no class"
        return None

    def due(self, server_round: int, *, now: bool = False) -> list[ForgetRequest]:
        """Return the admitted requests to process before ``server_round``: none while the first may still wait."""
        if not self._waiting or not (now or server_round - self._waiting[0][0] >= self.window):
            return []
        return [request for _, request in self._waiting]

    def remove(self, requests: Iterable[ForgetRequest]) -> None:
        """Take ``requests``, which have been processed, off the queue."""
        done = set(requests)
        self._waiting = [(at, request) for at, request in self._waiting if request not in done]

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive: a request is processed once, however often a run is stopped."""
        return {
            "answered": dict(self._answered),
            "ids": sorted(self._ids),
            "waiting": [[at, request.to_json()] for at, request in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._answered, self._ids = dict(state["answered"]), set(state["ids"])
        self._waiting = [(at, ForgetRequest.from_json(text)) for at, text in state["waiting"]]
