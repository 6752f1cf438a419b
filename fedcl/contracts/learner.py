"""What a local continual learner is made of: plugins, and the context they share.

A learner is a set of plugins around one training loop (:mod:`fedcl.client.loop`). A plugin overrides only the hooks it
needs; hooks that stay untouched are never called. Plugins run in the order of their declared :class:`Phase`, within a
phase in the order of the configuration; they never see each other and share only through the context.
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
from fedcl.contracts.requests import ErasureOutcome, ForgetRequest
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

    ``tensor`` declares what an upload must be, exactly: the core rejects a reply with any other, before a part sees it.
    ``reduction`` says what the server may do with many uploads: ``sum`` allows it to add them up, ``stack`` needs
    each on its own. What answers a question is declared with the question (:class:`~fedcl.contracts.view.Query`).

    Raises
    ------
    ValueError
        If an upload is not declared.
    """

    name: str
    direction: Literal["up", "down"]
    tensor: TensorField | None = None
    reduction: Literal["sum", "stack"] = "sum"

    def __post_init__(self) -> None:
        if self.direction == "up" and self.tensor is None:
            raise ValueError(f"payload {self.name!r}: an upload needs a TensorField, which declares what it must be")


class Batch(NamedTuple):
    """One step's samples: inputs (B, ...), target columns (B,), and the columns allowed: None (all), (C,) or (B, C).

    Its first ``fresh`` samples (None: all) are those of ``ctx.rows``, as they came; the others a plugin put there.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    fresh: int | None = None


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains: ``client.*`` of the configuration.

    SGD with heavy-ball momentum as in PyTorch (v <- momentum v + g; w <- w - lr v), velocity zero at the start of each
    visit; ``weight_decay`` adds weight_decay * w to every gradient. With ``precision`` bfloat16 the products of a step
    are in it, by autocast; weights, gradients and everything outside of steps stay float32. Only the loop does that.
    """

    epochs: int = 1
    batch_size: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    precision: Precision = "float32"


Restore = Callable[[Tensor, dict[str, Any] | None], Tensor]


@dataclass(slots=True)
class TaskData:
    """A client's samples of its present task, on the device: inputs (N, ...) and target columns (N,).

    ``raw`` (N, ...) holds the same inputs as the data set stores them, where that is as uint8. ``restore(raw,
    transform)``, on the CPU, does to such rows what was done to these: with the task's transform it gives their ``x``
    bit for bit. ``positions`` (N,) says where in the client's data source they come from.
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
    """Everything a plugin may use during one visit.

    ``visit`` counts the client's trainings; ``received`` is the model vector (P,) that came with the message;
    ``task_columns`` maps every task this client has met to its logit columns; ``payload`` is what the server sent
    along; ``step`` counts optimizer steps of this visit.
    ``order`` and ``start`` are where the loop is: the epoch's order of the samples, and the place of the present batch.
    ``copy`` gives a second model to hold a teacher; without it one is made at need.
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
    visit: int
    is_new_task: bool
    task_columns: dict[int, tuple[int, ...]]
    num_columns: int
    payload: dict[str, Tensor] = field(default_factory=dict)
    copy_model: Callable[[], FlatModel] | None = None
    step: int = 0
    epoch: int = 0
    order: Tensor | None = None
    start: int = 0
    _mask: Tensor | None = None
    _generators: dict[str, torch.Generator] = field(default_factory=dict)
    _teacher: tuple[Tensor, Output] | None = None
    _copy_model: FlatModel | None = None

    def __post_init__(self) -> None:
        self._mask = self.columns_mask(self.task.mask)

    @property
    def device(self) -> torch.device:
        """Device that model and data are on."""
        return self.model.device

    @property
    def mask(self) -> Tensor | None:
        """Columns the present task may predict, as bool (C,); None when all are allowed."""
        return self._mask

    @property
    def rows(self) -> Tensor | None:
        """Positions in ``data`` of the samples that the present step came with, (B,); None outside the loop."""
        return None if self.order is None else self.order[self.start : self.start + self.batch_size]

    def columns_mask(self, columns: Iterable[int] | None) -> Tensor | None:
        """Return a bool mask (C,) of ``columns``, or None when they are all the columns."""
        return column_mask(columns, self.num_columns, self.device)

    def rng(self, purpose: str) -> torch.Generator:
        """Return this visit's CPU generator for ``purpose``: keyed by (seed, client, visit, purpose)."""
        generator = self._generators.get(purpose)
        if generator is None:
            generator = torch_generator(self.seed, self.client, self.visit, purpose)
            self._generators[purpose] = generator
        return generator

    def set_teacher(self, vector_P: Tensor) -> None:
        """Choose the frozen weights that :meth:`teacher` answers with: one copy, shared by all plugins."""
        if self._copy_model is None:
            self._copy_model = self.model.copy() if self.copy_model is None else self.copy_model()
        self._copy_model.load(vector_P)
        self._copy_model.eval()
        self._teacher = None

    def teacher(self, x: Tensor) -> Output:
        """Return the frozen model's output on ``x``, without gradients; computed once a step however many ask."""
        if self._copy_model is None:
            raise RuntimeError("no teacher has been set for this visit")
        if self._teacher is None or self._teacher[0] is not x:
            with torch.no_grad():
                self._teacher = (x, self._copy_model(x))
        return self._teacher[1]


class Plugin:
    """One behaviour of a local learner. Constructors take keyword-only hyper-parameters and store them, no more.

    State that must survive the visit goes through :meth:`state` and :meth:`load`: clients are rebuilt between messages.

    ``payloads``, ``queries`` and ``sums`` are read from the instance, so a constructor may make them depend on its
    parameters. ``sums`` are those of the queries that the core itself asks and adds up (see :meth:`solve`), each with
    a declaration of every tensor of an answer, which is held against it. ``stackable`` says that what the plugin does
    within a step is tensor operations alone, the same whatever the values (no branch on a number in a tensor, no
    ``item()``, no random draw, no loop over samples), so that an engine may do it for many clients at once; hooks
    around the steps are always called client by client.
    """

    phase: ClassVar[Phase] = Phase.REGULARISER
    payloads: ClassVar[tuple[Payload, ...]] = ()
    queries: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[Mapping[str, Form]] = {}
    stackable: ClassVar[bool] = False

    def check(self, model: FlatModel) -> None:
        """Refuse a model that this plugin cannot work with; called once, before a run begins.

        Raises
        ------
        ValueError
            Naming the configuration key and what is allowed.
        """

    def setup(self, ctx: Context) -> None:
        """Prepare for a visit; state has been loaded, the received weights are in the model."""

    def before_task(self, ctx: Context) -> None:
        """First visit of a task."""

    def after_task(self, ctx: Context) -> None:
        """Conclude a task: the model holds the global weights the task ended with, ``ctx.data`` the task's samples."""

    def before_round(self, ctx: Context) -> None:
        """Before the first step of a visit."""

    def after_round(self, ctx: Context) -> dict[str, Tensor]:
        """After the last step of a visit; returns the declared upload payloads."""
        return {}

    def indices(self, ctx: Context, order: Tensor) -> Tensor:
        """Return the positions in ``ctx.data`` of the epoch's samples, in the order of training: (M,), perhaps none.

        ``order`` (N,), on the CPU, is the random permutation of all of them that is used otherwise. At most one plugin
        of a learner may own it.
        """
        raise TypeError(f"{type(self).__name__} does not choose samples")

    def before_step(self, ctx: Context, batch: Batch) -> Batch:
        """Return the batch to train on: replay, mixing, views."""
        return batch

    def objective(self, ctx: Context, batch: Batch, out: Output) -> Tensor:
        """Return the main loss (scalar) in place of cross-entropy. At most one plugin of a learner may own it."""
        raise TypeError(f"{type(self).__name__} does not define an objective")

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | None:
        """Return a scalar to add to the loss, already weighted; None adds nothing."""
        return None

    def after_backward(self, ctx: Context, grads: list[Tensor]) -> None:
        """Edit the gradients in place; one per trainable parameter, in the model's order."""

    def after_step(self, ctx: Context) -> None:
        """After the optimizer has moved the weights."""

    def predict(self, ctx: Context, x: Tensor) -> Tensor:
        """Return logits (B, C) in place of the model's own. At most one plugin of a learner may own it."""
        raise TypeError(f"{type(self).__name__} does not define a prediction")

    def respond(self, ctx: Context, name: str, request: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answer the server's question ``name`` (one of :attr:`queries`) with tensors."""
        raise TypeError(f"{type(self).__name__} does not answer {name!r}")

    def solve(self, model: FlatModel, sums: dict[str, Tensor]) -> None:
        """Write into ``model`` what the sums over all clients and tasks so far determine; called at the server.

        For each name in :attr:`sums`, every client that learned a task is asked when the task ends, with the model the
        task ended with; equally named tensors of the answers are added up in float64, over clients in canonical order
        and then over tasks, and ``sums`` holds them by tensor name. So a learner whose answers are plain sums over
        samples is solved exactly as if one client held all the data. A name that is also declared as a ``down``
        payload rides along with every later train message, as float32, under ``<query>/<tensor>`` in
        ``ctx.payload``.
        """

    def forget(self, ctx: Context, request: ForgetRequest, gone: TaskData) -> ErasureOutcome:
        """Drop what this plugin keeps of the forget set, and say what became of it.

        Called at a client that holds some of it, with the samples ``gone`` of all tasks met so far; ``ctx.data`` holds
        what is left of the present task. An outcome ``reset`` makes the core drop the plugin's whole state of the
        client: right where a sum over samples cannot be taken apart, and therefore the default.
        """
        name = type(self).__name__
        if not overrides(self, "state"):
            return ErasureOutcome(name, "not applicable", "keeps nothing between visits")
        return ErasureOutcome(name, "reset", "its state mixed all samples of the client: it starts over")

    def state(self) -> State:
        """Return everything that must survive: nested dicts of tensors, numbers, strings, lists of numbers."""
        return {}

    def load(self, state: State) -> None:
        """Restore what :meth:`state` returned; an empty dict is a client that has never been visited.

        The tensors are on the model's device and a copy: the plugin's to keep and to write to.
        """


EXCLUSIVE = ("indices", "objective", "predict")  # hooks that at most one plugin of a learner may own


def overrides(plugin: Plugin, hook: str) -> bool:
    """Whether ``plugin`` defines ``hook`` itself (untouched hooks are never bound)."""
    return getattr(type(plugin), hook) is not getattr(Plugin, hook)
