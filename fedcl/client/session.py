"""A client at work on one message: its learner with its state loaded, and the context of its plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedcl.base.tree import clone, num_bytes
from fedcl.client.local_data import PartitionedData
from fedcl.client.loop import owner
from fedcl.client.moves import optimizer_of
from fedcl.client.state import ClientStateStore
from fedcl.contracts.learner import EXCLUSIVE, Context, LocalTraining, Plugin, State
from fedcl.messages import Request
from fedcl.models.flat import FlatModel
from fedcl.models.networks import RandomLayer
from fedcl.scenario.task import Task

PluginFactories = Mapping[str, Callable[[], Plugin]]
Learner = dict[str, Plugin]  # plugins by name, in the order in which they are called


@dataclass
class Sessions:
    """Opens and closes sessions. Keeps nothing of a client between two of them: that is the state store's.

    ``plugins`` builds the learner again for each message, so nothing can leak from one client to the next.
    ``lr_schedule`` gives the learning rate of a client in a 0-based round; None: always that of ``training``.
    """

    model: FlatModel
    plugins: PluginFactories
    data: PartitionedData
    training: LocalTraining
    seed: int
    num_columns: int
    lr_schedule: Callable[[str, int], float] | None = None
    _copy: FlatModel | None = field(default=None, init=False, repr=False)
    _task_states: dict[tuple[tuple[int, tuple[int, ...]], ...], State] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self._remembers = bool(self.plugins) or self.training.keep
        self._draws = any(isinstance(layer, RandomLayer) for layer in self.model.module.modules())

    def enter(self, request: Request, store: ClientStateStore) -> tuple[Learner, Context]:
        """Load the model and the client's state; return its learner, set up, and the context.

        Raises
        ------
        ValueError
            If the message has no model or no task, or the model does not fit.
        """
        if request.model is None or request.task is None:
            raise ValueError(f"a message of kind {request.kind!r} needs a model and a task")
        self.model.load(request.model)
        built = {name: build() for name, build in self.plugins.items()}
        learner = dict(sorted(built.items(), key=lambda item: item[1].phase))
        state = store.load(request.client, request.committed) if self._remembers else {}
        ctx = self._context(request, request.task, request.model, state)
        if self.training.keep:
            ctx.optimizer = optimizer_of(self.training)
            ctx.optimizer.load(clone(state.get("optimizer", {}), self.model.device))
        if self._draws:
            self._seed_layers(ctx.rng("dropout"))
        for name, plugin in learner.items():
            plugin.load(clone(state.get("plugins", {}).get(name, {}), self.model.device))
            plugin.setup(ctx)
        return learner, ctx

    def stage(self, request: Request, store: ClientStateStore, learner: Learner, ctx: Context) -> int:
        """Stage what must survive and return its size in bytes."""
        if not self._remembers:
            return 0
        plugins = {name: plugin.state() for name, plugin in learner.items()}
        tasks = {str(id_): list(columns) for id_, columns in ctx.task_columns.items()}
        moments = {} if ctx.optimizer is None else {"optimizer": ctx.optimizer.state()}
        if any(plugins.values()) or any(moments.values()):
            kept = clone({"tasks": tasks, "plugins": plugins, **moments}, torch.device("cpu"))
            store.stage(request.client, request.visit, kept)
            return num_bytes(kept)
        # ten thousand clients that remember nothing but their seen tasks share one state
        shared = self._task_states.setdefault(tuple(ctx.task_columns.items()), {"tasks": tasks, "plugins": plugins})
        store.stage(request.client, request.visit, shared)
        return 0

    def _context(self, request: Request, task: Task, model: Tensor, state: State) -> Context:
        seen = {int(id_): tuple(columns) for id_, columns in state.get("tasks", {}).items()}
        is_new = task.id not in seen
        seen[task.id] = task.columns
        return Context(
            model=self.model,
            task=task,
            data=self.data.train(request.client, task, self.model.device),
            received=model.to(self.model.device),
            epochs=self.training.epochs,
            batch_size=self.training.batch_size,
            lr=self.training.lr if self.lr_schedule is None else self.lr_schedule(request.client, request.server_round),
            seed=self.seed,
            client=request.client,
            local_round=request.visit if request.local_round < 0 else request.local_round,
            is_new_task=is_new,
            task_columns=seen,
            num_columns=self.num_columns,
            payload=request.payload,
            copy_model=self._copy_model,
            augmentation=self.training.augment,
        )

    def _copy_model(self) -> FlatModel:
        # building a module costs as much as a short local round: all clients use one
        if self._copy is None:
            self._copy = self.model.copy()
        return self._copy

    def _seed_layers(self, generator: torch.Generator) -> None:
        device = self.model.device
        if device.type != "cpu":
            generator = torch.Generator(device).manual_seed(generator.initial_seed())
        self.model.set_generator(generator)


def check_learner(plugins: PluginFactories) -> None:
    """Reject a learner whose plugins contradict each other, before anything runs.

    Raises
    ------
    ValueError
        Naming the plugins and what both of them define.
    """
    instances = [build() for build in plugins.values()]
    for hook in EXCLUSIVE:
        owner(instances, hook)
    responding: dict[str, str] = {}
    for plugin in instances:
        name = type(plugin).__name__
        for query in plugin.queries:
            if query in responding:
                raise ValueError(f"learner: {responding[query]} and {name} both respond to {query!r}")
            responding[query] = name
