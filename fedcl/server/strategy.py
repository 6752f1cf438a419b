"""The strategy pipeline: staleness -> collaboration -> server optimizer -> projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedcl.contracts.learner import Payload, Plugin
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.strategy import (
    GLOBAL,
    Asking,
    Collaboration,
    Event,
    LocalWork,
    Part,
    Projection,
    ServerOptimizer,
    Staleness,
    Target,
    Update,
)
from fedcl.contracts.view import PastView, Query, Response, ServerView
from fedcl.models.flat import Spec
from fedcl.server.aggregation import Aggregation, PartialSums, Weight, aggregate
from fedcl.server.validation import Expected, uploads


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What one client is to be sent: whose model, its weights (P,), tensors with it, and a Flower strategy's config."""

    client: str
    target: Target
    model: Tensor
    payload: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class Strategy(Asking, ABC):
    """What the round loop needs of a strategy: :class:`Pipeline`, or Flower's behind an adapter.

    ``payloads`` are the tensors that are exchanged with every train message. ``personal`` says that clients have
    targets of their own, ``keeps_updates`` that events must carry a round's updates.
    """

    payloads: tuple[Payload, ...] = ()
    personal: bool = False
    keeps_updates: bool = False

    def initial(self, view: ServerView) -> dict[Target, Tensor]:
        """Return the targets besides the global model that exist from the start."""
        return {}

    @abstractmethod
    def outgoing(self, selected: Sequence[str], view: ServerView) -> list[Outgoing]:
        """Return what to send to each selected client."""

    def aggregation(self, expected: Expected, max_norm: float | None) -> Aggregation | None:
        """Return how fresh updates are summed if the strategy needs no more of them; otherwise None.

        ``expected`` is what a reply must be, ``max_norm`` the largest L2 norm of an accepted change.
        """
        return None

    @abstractmethod
    def aggregate(
        self, positions: Sequence[Update | None], view: ServerView, partial: PartialSums | None = None
    ) -> dict[Target, Tensor]:
        """Turn a round's updates, one place for each selected position, into new models (P,).

        ``partial`` holds the sums of those that were summed where they were made: their places are None.
        """

    def target_of(self, client: str, view: ServerView) -> Target:
        """Return whose model ``client`` uses."""
        return GLOBAL

    @abstractmethod
    def forget(self, request: ForgetRequest) -> list[ErasureOutcome]:
        """Forget the forget set and say, part by part, what became of it."""


def exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b computed in float64 and rounded once to float32."""
    return (a.double() + b.double()).float()


def check_payloads(expected: Sequence[Payload], plugins: Sequence[Plugin]) -> None:
    """Refuse clients that send what the server part does not take, or that need what it does not send.

    Otherwise every reply would be rejected for its payload.

    Raises
    ------
    ValueError
        Naming the payload.
    """
    known = {payload.name: payload for payload in expected}
    owners: dict[str, str] = {}
    for plugin in plugins:
        name = type(plugin).__name__
        for payload in plugin.payloads:
            if known.get(payload.name) != payload:
                raise ValueError(
                    f"{name} exchanges {payload.name!r} ({payload.direction}) with every train message, "
                    "which the strategy's server side declares otherwise, or not at all"
                )
            if payload.direction == "up" and payload.name in owners:
                raise ValueError(f"{owners[payload.name]} and {name} both upload {payload.name!r}")
            owners[payload.name] = name
    missing = [name for name, payload in known.items() if payload.direction == "up" and name not in owners]
    if missing:
        raise ValueError(f"strategy.collaboration.client: nobody uploads {missing[0]!r}, which the server side needs")


class Pipeline(Strategy):
    """Four parts, one after the other. Each is one small object; none knows of the others."""

    def __init__(
        self,
        *,
        collaboration: Collaboration,
        staleness: Staleness | None = None,
        optimizer: ServerOptimizer | None = None,
        projection: Projection | None = None,
    ) -> None:
        self.staleness = staleness or Staleness()
        self.collaboration = collaboration
        self.optimizer = optimizer or ServerOptimizer()
        self.projection = projection or Projection()
        self.payloads: tuple[Payload, ...] = collaboration.payloads + self.projection.payloads
        self.personal = collaboration.personal
        self.keeps_updates = self.projection.keeps_updates
        self._sums = tuple(p.name for p in self.payloads if p.direction == "up" and p.reduction == "sum")
        self._private: Tensor | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The four parts by role."""
        return {
            "staleness": self.staleness,
            "collaboration": self.collaboration,
            "optimizer": self.optimizer,
            "projection": self.projection,
        }

    def setup(self, spec: Spec) -> None:
        for part in self.parts.values():
            part.setup(spec)
        private = torch.zeros(spec.size, dtype=torch.bool)
        for tensor in spec:
            if not self.collaboration.shares(tensor):
                private[tensor.start : tensor.stop] = True
        self._private = private if bool(private.any()) else None

    def bind(self, work: LocalWork) -> None:
        for part in self.parts.values():
            part.bind(work)

    def initial(self, view: ServerView) -> dict[Target, Tensor]:
        return self.collaboration.initial(view)

    def outgoing(self, selected: Sequence[str], view: ServerView) -> list[Outgoing]:
        """Return each client's target model, as the staleness part would send it, and its payload."""
        messages = []
        for client in selected:
            target, payload = self.collaboration.message_for(client, view)
            payload = payload | self.projection.message_for(client, view)
            model = self.staleness.outgoing(view.model_of(client), client, view)
            messages.append(Outgoing(client, target, model, payload))
        return messages

    def target_of(self, client: str, view: ServerView) -> Target:
        return self.collaboration.message_for(client, view)[0]

    def aggregation(self, expected: Expected, max_norm: float | None) -> Aggregation | None:
        """Return the collaboration's sum, unless a part must see each update."""
        part, late = self.collaboration, type(self.staleness)
        looks = late.admit is not Staleness.admit or late.observe is not Staleness.observe or self.keeps_updates
        if looks or part.needs != "sum" or set(uploads(self.payloads)) != set(self._sums):
            return None
        return Aggregation(expected.spec, part.term, self._weight, self._sums, expected, max_norm)

    def aggregate(
        self, positions: Sequence[Update | None], view: ServerView, partial: PartialSums | None = None
    ) -> dict[Target, Tensor]:
        """Run the pipeline over one round and return the new models."""
        kept = positions if partial is not None else self._admitted(positions, view)
        models = {GLOBAL: view.global_model}
        part = self.collaboration
        if part.needs == "sum":
            total = aggregate(kept, part.term, view.spec, self._sums, weight=self._weight, partial=partial)
            changes = part.finish(total, view)
        else:
            combined = part.combine([update for update in kept if update is not None], view)
            models |= {target: view.model_at(target) for target in combined if target != GLOBAL}
            changes = {target: new.double() - models[target].double() for target, new in combined.items()}
        result = {}
        for target, change in changes.items():
            change = self.projection.apply(target, self.optimizer.step(target, change), view)
            if self._private is not None:
                change = change.masked_fill(self._private, 0.0)
            result[target] = exact_sum(models.get(target, view.global_model), change)
        return result

    @property
    def _weight(self) -> Weight | None:
        """What a change weighs, if changes and nothing else are summed."""
        part = self.collaboration
        return part.weight if type(part).term is Collaboration.term else None

    def _admitted(self, positions: Sequence[Update | None], view: ServerView) -> list[Update | None]:
        present = [update for update in positions if update is not None]
        for update in present:
            self.staleness.observe(update, view)
        admitted = {update.client: update for update in self.staleness.admit(present, view)}
        return [admitted.get(update.client) if update is not None else None for update in positions]

    def queries(self, event: Event, view: ServerView) -> list[Query]:
        return self.projection.queries(event, view)

    def consume(self, query: Query, responses: Sequence[Response], view: ServerView) -> None:
        self.projection.consume(query, responses, view)

    def finalize(self, event: Event, view: ServerView) -> dict[Target, Tensor]:
        return self.projection.finalize(event, view)

    def metrics(self) -> dict[str, float]:
        """Return the parts' metrics, each name prefixed by its role."""
        return {f"{role}/{name}": v for role, part in self.parts.items() for name, v in part.metrics().items()}

    def timings(self) -> dict[str, float]:
        """Return the parts' timings, each name prefixed by its role."""
        return {f"{role}/{name}": v for role, part in self.parts.items() for name, v in part.timings().items()}

    def notes(self) -> list[dict[str, Any]]:
        return [note for part in self.parts.values() for note in part.notes()]

    def state_dict(self) -> dict[str, Any]:
        return {role: part.state_dict() for role, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for role, part in self.parts.items():
            part.load_state_dict(state[role])

    def forget(self, request: ForgetRequest) -> list[ErasureOutcome]:
        return [part.forget(request) for part in self.parts.values()]

    def relearn(self, view: PastView) -> None:
        for part in self.parts.values():
            part.relearn(view)
