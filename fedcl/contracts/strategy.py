"""What a server strategy is made of: four kinds of parts in a pipeline, and what flows between them.

    admit (Staleness) -> combine (Collaboration) -> step (ServerOptimizer) -> apply (Projection)

Model vectors are flat float32 tensors of shape (P,); changes are flat float64 tensors of shape (P,), rounded
once, when the core adds them to a model. A :class:`~fedcl.models.flat.Spec` gives the slices. Parts never see the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcl.contracts.learner import LocalTraining, Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.contracts.view import PastView, Query, Response, ServerView
from fedcl.models.flat import FlatModel, Spec, TensorSpec
from fedcl.scenario.task import Stream

# P = parameters
Target = str
GLOBAL: Target = "*"  # not a possible client id, so the two can share one mapping


@dataclass
class Update:
    """A client's accepted reply.

    ``base`` (P,) is the vector that was sent, ``model`` (P,) the one that came back, ``visit`` the client's message
    number. ``base_version`` is the version of the global model at dispatch, ``age`` how many versions have passed
    since. ``weight`` starts as ``num_examples``; staleness may change it. ``task`` is the id of the task that the
    client trained, ``head`` the index of that task's head.
    """

    client: str
    visit: int
    target: Target
    base_version: int
    base: Tensor
    model: Tensor
    num_examples: int
    weight: float
    task: int
    head: int
    age: int = 0
    payload: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @cached_property
    def delta(self) -> Tensor:
        """Return ``model - base`` in float64 (P,), where the difference of two float32 is exact."""
        return self.model.double() - self.base.double()

    def other_heads(self, spec: Spec) -> list[TensorSpec]:
        """Return the heads the client did not train: weight decay may have moved them, which is no contribution."""
        return [tensor for tensor in spec if tensor.task is not None and tensor.task != self.head]


@dataclass(frozen=True)
class Event:
    """The end of a round, or of a task with it.

    With ``task_end``, ``clients`` have ended a task with this round: all of them if the schedule is synchronous,
    otherwise perhaps a few, each its own task. ``task`` is the index of the furthest stage. ``is_last_task`` says that
    the run ends here. ``updates`` is filled only for parts that declare ``keeps_updates``.
    """

    kind: Literal["round_end", "task_end"]
    task: int
    server_round: int
    is_last_task: bool
    updates: tuple[Update, ...] = ()
    clients: tuple[str, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """The weighted sum of a round's updates.

    ``total`` (P,) float64 is the sum of weight x vector, ``weight`` (P,) float64 the sum of weights of the clients that
    trained each coordinate, ``payload`` the sums of uploads that are declared with reduction ``sum``; ``clients`` are
    those whose updates are in the sum.
    """

    total: Tensor
    weight: Tensor
    payload: dict[str, Tensor]
    clients: tuple[str, ...]

    def mean(self) -> Tensor:
        """Return total / weight, and zero where nobody trained the coordinate."""
        return torch.where(self.weight > 0, self.total / self.weight.clamp_min(1e-300), torch.zeros_like(self.total))


@dataclass(frozen=True)
class LocalWork:
    """How clients train, for a part that repeats their training: the run's model (to be copied), settings, tasks.

    ``input_shape`` is that of one sample as the model sees it, ``num_rounds`` the number of the run's rounds.
    ``plain_loss`` says that clients minimise cross-entropy alone, so that the server can compute the same loss.
    """

    model: FlatModel
    training: LocalTraining
    stream: Stream
    input_shape: tuple[int, ...]
    num_rounds: int = 1
    plain_loss: bool = True


class Stateful:
    """State that survives, and numbers to record: what a part and a whole strategy have in common."""

    def setup(self, spec: Spec) -> None:
        """Learn the layout of model vectors; called once, before anything else.

        Raises
        ------
        ValueError
            If the model cannot be used.
        """

    def bind(self, work: LocalWork) -> None:
        """Learn how clients train; called once, after :meth:`setup` and before the first round."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive: nested dicts of tensors, numbers, strings and lists of numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def relearn(self, view: PastView) -> None:
        """Learn again, without the forget set, what ``forget`` promised: called when the models are edited."""

    def metrics(self) -> dict[str, float]:
        """Return numbers worth recording after a round or a task (names become rows with phase ``server``)."""
        return {}

    def timings(self) -> dict[str, float]:
        """Return measured seconds by name since the last call; they go to the timings, never to the metrics."""
        return {}

    def notes(self) -> list[dict[str, Any]]:
        """Return events, each once: ``kind`` and whatever fields the event is to have."""
        return []


class Asking(Stateful):
    """Questions to clients and what follows from the responses: what a projection and a strategy have in common."""

    def queries(self, event: Event, view: ServerView) -> list[Query]:
        """Return what to ask clients at ``event``."""
        return []

    def consume(self, query: Query, responses: Sequence[Response], view: ServerView) -> None:
        """Learn from the responses to a query of :meth:`queries`."""

    def finalize(self, event: Event, view: ServerView) -> dict[Target, Tensor]:
        """Return models (P,) that replace their targets' at ``event``, past optimizer and projection.

        All responses have been consumed by then.
        """
        return {}


class Part(Stateful):
    """What all four kinds share."""

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop what this part remembers of the forget set and say what became of it."""
        return ErasureOutcome(type(self).__name__, "not applicable", "keeps nothing about clients")


class Staleness(Part):
    """What to do with an update that started from an older model. Updates of age 0 are never changed."""

    def outgoing(self, model: Tensor, client: str, view: ServerView) -> Tensor:
        """Return the weights to send in place of ``model``: weight prediction overrides this."""
        return model

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Replace, re-weight, hold back or drop updates."""
        return updates

    def observe(self, update: Update, view: ServerView) -> None:
        """Learn from an update before :meth:`admit`, to compare it with what was estimated for its client."""


class Collaboration(Part):
    """How clients' updates become changes of the global model and, where kept, of personal models.

    With ``needs == "sum"`` the core adds up :meth:`term` and calls :meth:`finish`; with ``"stack"`` it passes all
    updates to :meth:`combine`.
    """

    needs: ClassVar[Literal["sum", "stack"]] = "sum"
    payloads: ClassVar[tuple[Payload, ...]] = ()
    personal: ClassVar[bool] = False  # whether the server keeps a model of its own for each client

    def shares(self, tensor: TensorSpec) -> bool:
        """Whether ``tensor`` is the server's to change; one that is not stays as initialised in every target."""
        return True

    def initial(self, view: ServerView) -> dict[Target, Tensor]:
        """Return the targets besides the global model that exist from the start, and their models (P,)."""
        return {}

    def weight(self, update: Update) -> float:
        """Return the weight of the update's change: pure, as :meth:`term`."""
        return update.weight

    def term(self, update: Update) -> tuple[Tensor, float]:
        """Return (vector (P,) float64, weight): pure, may run where the update was made.

        To change the weight alone, override :meth:`weight`: that is faster, since no change is then made as a whole.
        """
        return update.delta, self.weight(update)

    def finish(self, aggregate: Aggregate, view: ServerView) -> dict[Target, Tensor]:
        """Turn the sum of the terms into changes (P,) float64."""
        return {GLOBAL: aggregate.mean()}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Turn all updates, in client order, into new models (P,)."""
        raise TypeError(f"{type(self).__name__} needs a sum, not a stack")

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        """Return whose model ``client`` trains from, and the tensors that are sent with it."""
        return GLOBAL, {}


class ServerOptimizer(Part):
    """What the server makes of a combined change before it is applied: the change is its negative gradient."""

    def step(self, target: Target, change: Tensor) -> Tensor:
        """Return the change to apply, float64 (P,)."""
        return change


class Projection(Asking, Part):
    """A constraint on every change of a model, and what it must learn from clients to know the constraint."""

    keeps_updates: ClassVar[bool] = False
    payloads: ClassVar[tuple[Payload, ...]] = ()  # what `message_for` sends along: direction `down`

    def message_for(self, client: str, view: ServerView) -> dict[str, Tensor]:
        """Return the tensors that are sent with ``client``'s train message."""
        return {}

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        """Return the change that is allowed, float64 (P,)."""
        return change
