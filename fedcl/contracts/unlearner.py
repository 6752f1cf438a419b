"""The contract of an unlearner: a client half, which sees data, a server half, which sees models, and a promise.

A request is processed between two rounds. The server half asks clients, in as many steps as it likes, and returns the
models to put in place of the run's. The core commits them past optimizer and projection, lets every part, store and
device forget, runs recovery rounds and writes the certificate (:mod:`fedcl.unlearning.service`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.fields import Form
from fedcl.contracts.learner import Batch, LocalTraining
from fedcl.contracts.requests import NAMES, ErasureOutcome, ForgetRequest, Scope
from fedcl.contracts.view import PresentView
from fedcl.models.flat import FlatModel, Spec
from fedcl.scenario.task import Task

if TYPE_CHECKING:
    from fedcl.contracts.statistics import Statistics
    from fedcl.contracts.strategy import LocalWork, Target, Update
    from fedcl.contracts.view import Response, ServerView

# P = parameters, N = samples, C = logit columns
Guarantee = Literal["exact", "certified", "approximate", "none"]
Value = bool | int | float | str | list[int] | list[float] | list[str]
EVERYWHERE: frozenset[Scope] = frozenset(NAMES)


@dataclass(slots=True)
class Samples:
    """Samples of several tasks: inputs (N, ...), target columns (N,), allowed columns bool (N, C) or None for all.

    ``task`` (N,) is the id of the task in which the client has seen each sample, where that is known.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    task: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def at(self, rows: Tensor) -> Samples:
        """Return the samples at the positions ``rows``, or where a bool mask (N,) says so."""
        mask, task = (None if part is None else part[rows] for part in (self.mask, self.task))
        return Samples(self.x[rows], self.y[rows], mask, task)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield all samples in batches of at most ``size``: in one drawn from ``generator``, or in their order.

        In their order they are views of these tensors, not copies.
        """
        places: Sequence[Tensor | slice] = [slice(start, start + size) for start in range(0, len(self), size)]
        if generator is not None:
            places = self.drawn(size, generator)
        for rows in places:
            yield Batch(self.x[rows], self.y[rows], None if self.mask is None else self.mask[rows])

    def drawn(self, size: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Return the positions of all samples, drawn from ``generator``, in batches of at most ``size``."""
        order = torch.randperm(len(self), generator=generator).to(self.y.device)
        return torch.split(order, size) if len(self) else ()

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of all ``parts`` in one (at least one part; of one, it is that part itself)."""
        if len(parts) == 1:
            return parts[0]
        mask = None
        if any(part.mask is not None for part in parts):
            width = next(part.mask.shape[1] for part in parts if part.mask is not None)
            full = [part.y.new_ones(len(part), width, dtype=torch.bool) for part in parts]
            mask = torch.cat([f if part.mask is None else part.mask for f, part in zip(full, parts, strict=True)])
        tasks = [part.task for part in parts if part.task is not None]
        task = torch.cat(tasks) if len(tasks) == len(parts) else None
        return cls(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]), mask, task)


@dataclass
class UnlearnContext:
    """What the client half may use in one step.

    ``model`` holds the weights ``received`` (P,) that came with the message; ``forget`` and ``retain`` are the client's
    samples of all tasks it has seen, to be read only; ``tensors`` and ``args`` came with the message.
    """

    model: FlatModel
    received: Tensor
    forget: Samples
    retain: Samples
    requests: tuple[ForgetRequest, ...]
    training: LocalTraining
    client: str
    seed: int
    local_round: int
    num_columns: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    copy_model: Callable[[], FlatModel] | None = None

    @property
    def device(self) -> torch.device:
        """Device that model and samples are on."""
        return self.model.device

    def rng(self, purpose: str) -> torch.Generator:
        """Return a new CPU generator keyed by (seed, client, how often it trained, request, purpose)."""
        ids = ",".join(request.id for request in self.requests)
        return torch_generator(self.seed, self.client, self.local_round, "unlearn", ids, purpose)

    def other_model(self) -> FlatModel:
        """Return a second model, for a teacher; its weights are arbitrary."""
        return self.model.copy() if self.copy_model is None else self.copy_model()


class Local(NamedTuple):
    """A client's response to a step: its number of samples (0: the response is left out), and tensors."""

    num_examples: int
    tensors: dict[str, Tensor]


class UnlearnView(PresentView, Protocol):
    """What the server half may know and do."""

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        ...

    @property
    def owners(self) -> tuple[str, ...]:
        """The clients that may hold some of the forget set and can still be asked, in canonical order."""
        ...

    @property
    def initial(self) -> Tensor:
        """The weights the run began with, float32 (P,)."""
        ...

    @property
    def server_round(self) -> int:
        """The next round."""
        ...

    @property
    def statistics(self) -> Statistics:
        """What the server has added up of clients' statistics, for unlearners that can take sums apart."""
        ...

    def ask(
        self,
        step: str,
        models: Mapping[str, Tensor],
        response: Form,
        tensors: Mapping[str, Tensor] | None = None,
        tasks: Mapping[str, Sequence[Task]] | None = None,
        **args: Value,
    ) -> list[Response]:
        """Let the clients in ``models``, each with its vector (P,), do ``step`` of :meth:`Unlearner.local`.

        ``response`` declares every tensor of a response; any other response is rejected. Each client sees its samples
        of ``tasks``, by client; None stands for all tasks it has seen, as they were before the requests. Returns the
        responses whose ``num_examples`` is not zero, in the order of ``models``. A client that fails is left out, with
        an event.
        """
        ...

    def retrain(self) -> dict[Target, Tensor]:
        """Return the models of the retrained reference: the run in which nobody ever held the forget set.

        Everything else the run keeps (moments, bases, personal models, clients' states) takes its value from there too.
        """
        ...


class Unlearner:
    """Makes models as if a forget set had never been there, or nearly. Keyword-only constructors, nothing more.

    ``scopes`` are the requests it supports, ``guarantee`` what it promises. ``observes``: it must see every round from
    the first, so it cannot be chosen for a run that began without it. ``retrains``: it returns the models of
    :meth:`UnlearnView.retrain`, and nothing else has to forget. ``takes_apart`` names the sums over clients
    (:attr:`fedcl.contracts.learner.Plugin.sums`) that the run's learner must have.
    """

    scopes: ClassVar[frozenset[Scope]] = EVERYWHERE
    guarantee: ClassVar[Guarantee] = "approximate"
    observes: ClassVar[bool] = False
    retrains: ClassVar[bool] = False
    takes_apart: ClassVar[tuple[str, ...]] = ()

    def check(self, model: FlatModel) -> None:
        """Refuse a model that this unlearner cannot work with; called once, before a run begins.

        Raises
        ------
        ValueError
            Naming the configuration key and what is allowed.
        """

    def bind(self, work: LocalWork) -> None:
        """Learn how clients train, the architecture, and of which shape one sample is.

        Called once at the server, before the first round. The model's weights are arbitrary and must not be changed.
        """

    def promise(self) -> str:
        """Return the guarantee in words, for the certificate."""
        return PROMISES[self.guarantee]

    # -- at a client --------------------------------------------------------------------------------------------------

    def local(self, ctx: UnlearnContext, step: str) -> Local:
        """Do one step of the method on the client's own samples. Pure but for ``ctx.model``, which is scratch."""
        raise TypeError(f"{type(self).__name__} has no step {step!r}")

    # -- at the server ------------------------------------------------------------------------------------------------

    def observe(self, updates: Sequence[Update], before: Tensor, view: ServerView) -> None:
        """See a round's accepted updates and the global model ``before`` (P,); ``view`` has the new one already."""

    def unlearn(
        self, requests: Sequence[ForgetRequest], models: Mapping[Target, Tensor], view: UnlearnView
    ) -> dict[Target, Tensor]:
        """Return the models (P,) to put in place of ``models``; a target that is left out keeps its model."""
        raise TypeError(f"{type(self).__name__} processes no request")

    def metrics(self) -> dict[str, float]:
        """Return numbers on the last request (selected share, steps) for the certificate."""
        return {}

    def forget(self, request: ForgetRequest) -> ErasureOutcome:
        """Drop what the server half remembers of the forget set."""
        return ErasureOutcome(type(self).__name__, "not applicable", "keeps nothing about clients")

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the server half that must survive: nested dicts of tensors, numbers, strings, lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


PROMISES: dict[Guarantee, str] = {
    "exact": "exact: the models are those of a run in which nobody ever held the forget set",
    "certified": "certified: see the bound",
    "approximate": "approximate: nothing is proven; the measurements below are evidence, not proof",
    "none": "none: the forget set is left out of further training, and nothing is done to the models",
}
