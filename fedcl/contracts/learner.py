"""What a local continual learner is made of: plugins, and the context they share.

A learner is a set of plugins around one training loop (:mod:`fedcl.client.loop`). A plugin overrides only the hooks it
needs; a hook that is not overridden is never called. Plugins run in the order of their declared :class:`Phase`, within
a phase in the order of the configuration. They never see each other and share only through the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.contracts.fields import Form, TensorField
from fedcl.contracts.optimizer import LocalOptimizer, RateSchedule
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
from fedcl.data.augmentation import Augmentation
from fedcl.data.dataset import Indices
from fedcl.models.flat import FlatModel
from fedcl.models.masks import column_mask
from fedcl.models.networks import Output
from fedcl.scenario.task import Task

# P = parameters, B = batch, C = logit columns
State = dict[str, Any]
Precision = Literal["float32", "bfloat16"]


class Phase(IntEnum):
    """When, within one hook, a plugin is called: the order of plugins never depends on how they are listed."""

    DATA = 0
    OBJECTIVE = 1
    REGULARISER = 2
    GRADIENT = 3
    WEIGHT = 4
    BOOKKEEPING = 5


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor a method exchanges besides the model, with every train message or every reply to one.

    ``tensor`` declares the exact form of an upload; a reply with any other is rejected before a part sees it.
    ``reduction`` says what the server needs of many clients' uploads: their ``sum``, or each on its own (``stack``).
    Responses to a query are declared with the query (:class:`~fedcl.contracts.view.Query`).
    """

    name: str
    direction: Literal["up", "down"]
    tensor: TensorField | None = None
    reduction: Literal["sum", "stack"] = "sum"

    def __post_init__(self) -> None:
        if self.direction == "up" and self.tensor is None:
            raise ValueError(f"payload {self.name!r}: an upload needs a TensorField that declares its form")


class Batch(NamedTuple):
    """One step's samples: inputs (B, ...), target columns (B,), and the columns allowed: None (all), (C,) or (B, C).

    Its first ``fresh`` samples (None: all) are those of ``ctx.rows``, unchanged; plugins added the others.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    fresh: int | None = None


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains: ``client.*`` of the configuration.

    SGD with heavy-ball momentum as in PyTorch (v <- momentum v + g; w <- w - lr v); the velocity is zero at the start
    of each local round. ``weight_decay`` adds weight_decay * w to every gradient. With ``precision`` bfloat16 the
    products of a step are computed in bfloat16 by autocast, in the loop engine alone; everything else stays float32.

    ``optimizer`` makes another optimizer, which has its own settings but for ``lr``; ``keep`` says that its state, or
    SGD's velocity, is kept between local rounds. ``schedule`` changes the rate over the steps of a local round. A
    step's gradient is the mean over ``accumulate`` batches, cut to the L2 norm ``clip_norm``. ``augment`` changes the
    samples of each step: ``data.augment`` of the configuration.
    """

    epochs: int = 1
    batch_size: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    precision: Precision = "float32"
    optimizer: Callable[[], LocalOptimizer] | None = None
    keep: bool = False
    schedule: RateSchedule | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    augment: Augmentation | None = None


Restore = Callable[[Tensor, dict[str, Any] | None], Tensor]


@dataclass(slots=True)
class TaskData:
    """A client's samples of its current task, on the device: inputs (N, ...) and target columns (N,).

    ``raw`` (N, ...) holds the same inputs as the data set stores them, if it stores uint8. ``restore(raw, transform)``
    normalises and transforms such rows on the CPU: with the task's transform it gives ``x`` bit for bit.
    ``positions`` (N,) are the samples' places in the client's data source.
    """

    x: Tensor
    y: Tensor
    raw: Tensor | None = None
    restore: Restore | None = None
    positions: Indices | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(slots=True)
class Context:
    """Everything a plugin may use during one local round.

    ``local_round`` counts the client's local rounds, from 0; ``received`` is the model vector (P,) of the message;
    ``task_columns`` maps every task this client has seen to its logit columns; ``payload`` holds the tensors that the
    server sent with the model; ``step`` counts the optimizer steps of this local round. ``order`` (N,) is the epoch's
    order of the samples, ``start`` the place of the current batch in it. ``copy_model`` returns a second model for a
    teacher; without it the context copies its own. ``mask`` (C,) is true for the columns that the current task may
    predict; None allows all. ``optimizer`` is the client's, where it is kept; ``lr`` is the present step's rate.
    """

    model: FlatModel
    task: Task
    data: TaskData
    received: Tensor
    epochs: int
    batch_size: int
    lr: float
    seed: int
    client: str
    local_round: int
    is_new_task: bool
    task_columns: dict[int, tuple[int, ...]]
    num_columns: int
    payload: dict[str, Tensor] = field(default_factory=dict)
    copy_model: Callable[[], FlatModel] | None = None
    optimizer: LocalOptimizer | None = None
    augmentation: Augmentation | None = None
    step: int = 0
    epoch: int = 0
    order: Tensor | None = None
    start: int = 0
    mask: Tensor | None = field(init=False)
    _generators: dict[str, torch.Generator] = field(default_factory=dict)
    _teacher: tuple[Tensor, Output] | None = None
    _copy_model: FlatModel | None = None

    def __post_init__(self) -> None:
        self.mask = self.columns_mask(self.task.mask)

    @property
    def device(self) -> torch.device:
        """Device of the model and the data."""
        return self.model.device

    @property
    def rows(self) -> Tensor | None:
        """Positions (B,) in ``data`` of the current step's incoming samples; None outside the loop."""
        return None if self.order is None else self.order[self.start : self.start + self.batch_size]

    def columns_mask(self, columns: Iterable[int] | None) -> Tensor | None:
        """Return a bool mask (C,) of ``columns``, or None when they are all the columns."""
        return column_mask(columns, self.num_columns, self.device)

    def rng(self, purpose: str) -> torch.Generator:
        """Return this local round's CPU generator for ``purpose``, keyed by (seed, client, local round, purpose)."""
        if purpose not in self._generators:
            self._generators[purpose] = torch_generator(self.seed, self.client, self.local_round, purpose)
        return self._generators[purpose]

    def augment(self, x: Tensor) -> Tensor:
        """Return the samples (B, ...) as a training step sees them: changed at random by ``data.augment``, if set."""
        return x if self.augmentation is None else self.augmentation(x, self.rng("augment"))

    def set_teacher(self, vector_P: Tensor) -> None:
        """Set the frozen weights (P,) of :meth:`teacher`; all plugins share one teacher."""
        if self._copy_model is None:
            self._copy_model = self.model.copy() if self.copy_model is None else self.copy_model()
        self._copy_model.load(vector_P)
        self._copy_model.eval()
        self._teacher = None

    def teacher(self, x: Tensor) -> Output:
        """Return the frozen model's output on ``x``, without gradients; computed once per batch."""
        if self._copy_model is None:
            raise RuntimeError("no teacher has been set for this local round")
        if self._teacher is None or self._teacher[0] is not x:
            with torch.no_grad():
                self._teacher = (x, self._copy_model(x))
        return self._teacher[1]


class Plugin:
    """One behaviour of a local learner. Constructors take keyword-only hyper-parameters and store them, no more.

    Plugins are built again for every message: whatever must survive goes through :meth:`state` and :meth:`load`.

    ``payloads``, ``queries`` and ``sums`` are read from the instance, so they may depend on constructor parameters.
    ``sums`` are the queries that the core sends by itself and whose responses it adds up (see :meth:`solve`), each
    with the declared form of its response.
    """

    phase: ClassVar[Phase] = Phase.REGULARISER
    payloads: ClassVar[tuple[Payload, ...]] = ()
    queries: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[Mapping[str, Form]] = {}

    def check(self, model: FlatModel) -> None:
        """Raise ValueError, naming the configuration key, for a model that does not fit; called once, before a run."""

    def setup(self, ctx: Context) -> None:
        """Prepare for a message; state has been loaded, the model holds the received weights."""

    def before_task(self, ctx: Context) -> None:
        """Begin the first local round of a task."""

    def after_task(self, ctx: Context) -> None:
        """End a task: the model holds the global weights the task ended with, ``ctx.data`` the task's samples."""

    def before_round(self, ctx: Context) -> None:
        """Act before the first step of a local round."""

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """Act after the last step of a local round; return the declared upload payloads."""
        return {}

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        """Return the positions in ``ctx.data`` of the epoch's samples, in the order of training: (M,), perhaps none.

        ``order`` (N,), on the CPU, is the random permutation that is used without this hook. At most one plugin of a
        learner may define it.
        """
        raise TypeError(f"{type(self).__name__} does not choose samples")

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Return the batch to train on, for instance with replayed samples or augmented views."""
        return batch

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        """Return the main loss (scalar) in place of cross-entropy. At most one plugin of a learner may define it."""
        raise TypeError(f"{type(self).__name__} does not define an objective")

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return a scalar to add to the loss, already weighted; None adds nothing."""
        return None

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Edit the gradients in place; one per trainable parameter, in the model's order."""

    def after_step(self, ctx: Context) -> None:
        """Act after the optimizer has moved the weights."""

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        """Return logits (B, C) in place of the model's own. At most one plugin of a learner may define it."""
        raise TypeError(f"{type(self).__name__} does not define a prediction")

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that respond to the server's query ``name``, one of :attr:`queries`."""
        raise TypeError(f"{type(self).__name__} does not respond to {name!r}")

    def solve(self, model: FlatModel, sums: dict[str, Tensor]) -> None:
        """Write into ``model`` what follows from the sums over all clients and tasks so far; called at the server.

        When a task ends, every client that learned it is queried for each name in :attr:`sums`, with the model the task
        ended with. Equally named tensors are added up in float64, over clients in canonical order and then over tasks;
        ``sums`` holds the totals by tensor name. So a learner whose responses are plain sums over samples is solved
        exactly as if one client held all the data. If the query's name is also a ``down`` payload, the totals travel
        with every later train message, as float32, under ``<query>/<tensor>`` in ``ctx.payload``.
        """

    def forget(self, ctx: Context, request: ForgetRequest, removed: TaskData) -> ErasureOutcome:
        """Erase what this plugin keeps of the forget set, and report the outcome.

        Called at a client that holds some of it: ``removed`` are its samples of all seen tasks, ``ctx.data`` what is
        retained of the current task. The outcome ``reset`` makes the core drop the plugin's whole state of the client.
        It is the default, because a sum over samples cannot be taken apart.
        """
        name = type(self).__name__
        if not overrides(self, "state"):
            return ErasureOutcome(name, "not applicable", "keeps nothing between visits")
        return ErasureOutcome(name, "reset", "its state mixed all samples of the client: it starts over")

    def state(self) -> State:
        """Return everything that must survive: nested dicts of tensors, numbers, strings and lists of numbers."""
        return {}

    def load(self, state: State) -> None:
        """Restore what :meth:`state` returned; it is empty for a client that has never trained.

        The tensors are copies on the model's device: the plugin may keep them and write to them.
        """


EXCLUSIVE = ("indices", "objective", "predict")  # hooks that at most one plugin of a learner may define


def overrides(plugin: Plugin, hook: str) -> bool:
    """Whether ``plugin`` defines ``hook`` itself (other hooks are never called)."""
    return getattr(type(plugin), hook) is not getattr(Plugin, hook)
