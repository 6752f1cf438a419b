"""What a server strategy is made of: four kinds of parts in a pipeline, and what flows between them.

    admit (Staleness) -> combine (Collaboration) -> step (ServerOptimizer) -> apply (Projection)

Model vectors are flat float32 tensors of shape (P,); changes are flat float64 tensors of shape (P,), rounded
once, when the core adds them to a model. A :class:`~fedcl.models.flat.Spec` gives the slices. Parts never see the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedcl.contracts.fields import Form
from fedcl.contracts.learner import LocalTraining, Payload
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.models.flat import FlatModel, Spec, TensorSpec
from fedcl.scenario.task import Stream

# P = parameters
Target = str
GLOBAL: Target = "*"  # not a possible client id, so the two can share one mapping


@dataclass
class Update:
    """A client's accepted reply.

    ``base`` (P,) is the vector that was sent, ``model`` (P,) the vector that came back; ``base_version`` the version of
    the global model at dispatch, ``age`` how many versions have passed since. ``weight`` starts as ``num_examples`` and
    is what staleness may change. ``task`` is what the client trained, ``head`` the index of the head of that task.
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


class ServerView(Protocol):
    """What a part may know of the server."""

    @property
    def global_model(self) -> Tensor:
        """Global weights, float32 (P,)."""
        ...

    @property
    def version(self) -> int:
        """Number of changes the global model has seen."""
        ...

    @property
    def now(self) -> float:
        """Time on the run's clock, in seconds."""
        ...

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        ...

    @property
    def clients(self) -> tuple[str, ...]:
        """Every client of the run, in canonical order."""
        ...

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        ...

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now, float32 (P,)."""
        ...

    def model_at(self, target: Target) -> Tensor:
        """Return the weights of ``target``, float32 (P,): the global ones where it has none of its own yet."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        ...

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a pure function, perhaps in another process."""
        ...


class PastView(Protocol):
    """What a part may know and ask once the run's models have been edited: for what it must learn again."""

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that stay, in canonical order."""
        ...

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        ...

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now, float32 (P,)."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        ...

    def ask_past(self, query: Query, server_round: int) -> list[Response]:
        """Put ``query`` to clients that took part in ``server_round``.

        Each answers with what it may still use of the task that it had then.
        """
        ...


@dataclass(frozen=True)
class Event:
    """Something that happened on the timeline.

    ``task_end`` says that ``clients`` have ended a task with this round: all of them where the schedule is synchronous,
    else perhaps a few, each its own task. ``task`` is the furthest stage reached. ``is_last_task`` says that the run
    ends here. ``updates`` is filled only for parts that declare ``keeps_updates``.
    """

    kind: Literal["round_end", "task_end"]
    task: int
    server_round: int
    is_last_task: bool
    updates: tuple[Update, ...] = ()
    clients: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """A question to clients: the model each should answer it with, and tensors to go along.

    ``models`` maps client to a vector (P,); the order of the mapping is the order of the replies. ``response`` declares
    every tensor of an answer, by name: one that is anything else is rejected before the part that asks sees it.
    """

    name: str
    models: dict[str, Tensor]
    response: Form
    request: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A client's reply to a :class:`Query`."""

    client: str
    num_examples: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Fold:
    """The weighted sum of a round's terms.

    ``total`` (P,) float64 is the sum of weight x vector, ``weight`` (P,) float64 the sum of weights of the clients that
    trained each coordinate; ``payload`` holds the sums of uploads declared with reduction ``sum``; ``clients`` lists
    the contributors.
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
    """How clients train, for a part that plays it through: the run's model (take a twin), settings, tasks, inputs.

    ``input_shape`` is that of one sample as the model sees it; ``num_rounds`` how many rounds the run has.
    ``plain_loss`` says that clients descend on cross-entropy alone, so that a server can play their loss through.
    """

    model: FlatModel
    training: LocalTraining
    stream: Stream
    input_shape: tuple[int, ...]
    num_rounds: int = 1
    plain_loss: bool = True


class Part:
    """What all four kinds share: state that survives, and forgetting."""

    def setup(self, spec: Spec) -> None:
        """Learn the layout of model vectors; called once, before anything else.

        Raises
        ------
        ValueError
            If the part cannot work with the model.
        """

    def bind(self, work: LocalWork) -> None:
        """Learn how clients train; called once, after :meth:`setup` and before the first round."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive: nested dicts of tensors, numbers, strings and lists of numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop what this part remembers of the forget set and say what became of it."""
        return ErasureOutcome(type(self).__name__, "not applicable", "keeps nothing about clients")

    def relearn(self, view: PastView) -> None:
        """Learn again, without the forget set, what :meth:`forget` promised: called when the models are edited."""

    def metrics(self) -> dict[str, float]:
        """Return numbers worth recording after a round or a task (names become rows with phase ``server``)."""
        return {}

    def timings(self) -> dict[str, float]:
        """Return measured seconds by name since the last call; they go to the timings, never to the metrics."""
        return {}

    def notes(self) -> list[dict[str, Any]]:
        """Return what a person should know, once each: ``kind`` and whatever fields the event is to have."""
        return []


class Staleness(Part):
    """What to do with an update that started from an older model. With age 0, every corrector is the identity."""

    def outgoing(self, model: Tensor, client: str, view: ServerView) -> Tensor:
        """Return the weights to send in place of ``model``: weight prediction overrides this."""
        return model

    def admit(self, updates: list[Update], view: ServerView) -> list[Update]:
        """Replace, re-weight, hold back or drop updates."""
        return updates

    def observe(self, update: Update, view: ServerView) -> None:
        """Learn from an update that has come, before :meth:`admit`: what was estimated for its client can be judged."""


class Collaboration(Part):
    """How clients' updates become changes of the global model and, where kept, of personal models.

    With ``needs == "sum"`` the core folds :meth:`term` and calls :meth:`finish`; with ``"stack"`` it hands all updates
    to :meth:`combine`.
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
        """Return what the update's change counts: pure, as :meth:`term`."""
        return update.weight

    def term(self, update: Update) -> tuple[Tensor, float]:
        """Return (vector (P,) float64, weight): pure, may run where the update was made.

        Where only the weight is another, override :meth:`weight`: changes alone are folded without making them whole.
        """
        return update.delta, self.weight(update)

    def finish(self, fold: Fold, view: ServerView) -> dict[Target, Tensor]:
        """Turn the folded terms into changes (P,) float64."""
        return {GLOBAL: fold.mean()}

    def combine(self, updates: list[Update], view: ServerView) -> dict[Target, Tensor]:
        """Turn all updates, in client order, into new models (P,)."""
        raise TypeError(f"{type(self).__name__} needs a sum, not a stack")

    def message_for(self, client: str, view: ServerView) -> tuple[Target, dict[str, Tensor]]:
        """Return whose model ``client`` trains from, and the tensors that ride along."""
        return GLOBAL, {}


class ServerOptimizer(Part):
    """What the server does with a combined change before it is applied: the change is its negative gradient."""

    def step(self, target: Target, change: Tensor) -> Tensor:
        """Return the change to apply, float64 (P,)."""
        return change


class Projection(Part):
    """A constraint on every change of a model, and what it must learn from clients to know the constraint."""

    keeps_updates: ClassVar[bool] = False
    payloads: ClassVar[tuple[Payload, ...]] = ()  # what `message_for` sends along: direction `down`

    def message_for(self, client: str, view: ServerView) -> dict[str, Tensor]:
        """Return the tensors that ride along with ``client``'s train message."""
        return {}

    def apply(self, target: Target, change: Tensor, view: ServerView) -> Tensor:
        """Return the change that is allowed, float64 (P,)."""
        return change

    def queries(self, event: Event, view: ServerView) -> list[Query]:
        """Return what to ask clients at ``event``."""
        return []

    def consume(self, query: Query, responses: Sequence[Response], view: ServerView) -> None:
        """Learn from the answers to a query of :meth:`queries`."""

    def finalize(self, event: Event, view: ServerView) -> dict[Target, Tensor]:
        """Return models (P,) that take the place of their targets' now, past optimizer and projection."""
        return {}
