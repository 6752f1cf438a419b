"""A client's side of every message: one resident model, one learner, one visit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fedcl.base.interruption import client_fault
from fedcl.base.tree import clone, num_bytes
from fedcl.client.engines import Engine, stack_size, stacks
from fedcl.client.forgetting import joined, part, samples
from fedcl.client.local_data import LocalData
from fedcl.client.local_evaluation import LocalEvaluation, LocalEvaluationOf
from fedcl.client.loop import accuracy, fit, ordered, owner
from fedcl.client.stacked import fit_stacked
from fedcl.client.state import NEVER, ClientStateStore
from fedcl.contracts.learner import EXCLUSIVE, Context, LocalTraining, Plugin, State, TaskData, overrides
from fedcl.contracts.requests import ErasureOutcome, ForgetInstruction, outcomes_json
from fedcl.contracts.unlearner import UnlearnContext, Unlearner
from fedcl.messages import Reply, Request
from fedcl.models.chain import chain_of
from fedcl.models.flat import FlatModel
from fedcl.models.networks import RandomLayer
from fedcl.scenario.task import Task

_BEFORE = ("setup", "before_task", "before_round")  # where a plugin may change the weights that came
PluginFactories = Mapping[str, Callable[[], Plugin]]


@dataclass(slots=True)
class _Visit:
    """A training visit that has begun: its learner, and the weights (P,) it trains from where others come between."""

    request: Request
    learner: dict[str, Plugin]
    ctx: Context
    test: TaskData | None
    local_evaluation: LocalEvaluation | None
    metrics: dict[str, float]
    start: Tensor | None = None


@dataclass
class ClientRuntime:
    """Runs visits. Holds nothing about any client between two of them: that is the state store's.

    ``plugins`` builds the learner afresh for each visit, so nothing can leak from one client to the next. ``engine``
    says how clients train: ``loop`` one after another; ``fused`` likewise, with steps that are written out where model
    and learner allow it; ``stack`` together where these allow it, else as ``fused``; ``auto`` as ``stack`` on plain
    linear networks and as ``loop`` on others. ``lr_schedule`` gives the learning rate of a visit (client, 0-based
    round), if it is not that of ``training`` throughout; clients then train one after another.
    """

    model: FlatModel
    plugins: PluginFactories
    data: LocalData
    training: LocalTraining
    seed: int
    num_columns: int
    personal_evaluation: bool = False
    local_evaluation: LocalEvaluationOf | None = None
    unlearner: Callable[[], Unlearner] = Unlearner
    lr_schedule: Callable[[str, int], float] | None = None
    engine: Engine = "loop"
    _spare: FlatModel | None = field(default=None, init=False, repr=False)
    _notes: dict[tuple[tuple[int, tuple[int, ...]], ...], State] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        plugins = [build() for build in self.plugins.values()]
        self._together = stack_size(self.model)
        exact = self.training.precision == "float32"
        self._stacks = exact and self.local_evaluation is None and stacks(self.engine, self.model, plugins) is None
        # copies of a model cost as much as a step: none is made that no plugin can tell
        self._moves = any(overrides(plugin, hook) for plugin in plugins for hook in _BEFORE)
        self._ends = any(overrides(plugin, "after_round") for plugin in plugins)
        self._draws = any(isinstance(layer, RandomLayer) for layer in self.model.module.modules())

    def visit(self, request: Request, store: ClientStateStore) -> Reply:
        """Do what ``request`` asks and stage the state that results.

        Raises
        ------
        ValueError
            If the request is malformed or its model does not fit.
        """
        if request.kind == "train":
            reply = next(self.train([request], store))
            if isinstance(reply, Exception):
                raise reply
            return reply
        if request.kind == "task_end":
            return self._task_end(request, store)
        if request.kind == "query":
            return self._query(request, store)
        if request.kind == "evaluate":
            return self._evaluate(request, store)
        if request.kind == "unlearn":
            return self._unlearn(request)
        if request.kind == "forget":
            return self._forget(request, store)
        raise ValueError(f"a client cannot answer a message of kind {request.kind!r}")

    def train(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
        """Train the clients that ``requests``, of kind ``train``, address; yield for each its reply or its fault."""
        if self._stacks:
            for members in self._stacked(requests):
                yield from self._train_together(members, store)
            return
        for request in requests:
            yield self._train_alone(request, store)

    def _train_alone(self, request: Request, store: ClientStateStore) -> Reply | Exception:
        try:
            visit = self._begin(request, store)
            if isinstance(visit, Reply):
                return visit
            plugins = [*visit.learner.values(), *(() if visit.local_evaluation is None else (visit.local_evaluation,))]
            visit.metrics.update(fit(visit.ctx, plugins, self.training, fused=self.engine != "loop"))
            return self._finish(visit, store)
        except BaseException as error:
            return client_fault(error)

    def _stacked(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Cut requests into stacks. Where a client's fellows show in its bits no stack has a part of a block."""
        runs = [list(requests)]
        if chain_of(self.model.module) is None:
            runs = [list(run) for _, run in groupby(requests, key=lambda request: request.block)]
        for run in runs:
            for start in range(0, len(run), self._together):
                yield run[start : start + self._together]

    def _train_together(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
        begun: list[_Visit | Reply | Exception] = []
        for request in requests:
            try:
                visit = self._begin(request, store)
                if isinstance(visit, _Visit):
                    visit.start = self.model.vector() if self._moves else visit.ctx.received
                begun.append(visit)
            except BaseException as error:
                begun.append(client_fault(error))
        visits = [visit for visit in begun if isinstance(visit, _Visit)]
        starts = [visit.start for visit in visits if visit.start is not None]
        try:
            trained = iter(fit_stacked([visit.ctx for visit in visits], starts, self.training) if visits else [])
        except BaseException as error:
            fault = client_fault(error)
            if len(requests) == 1:
                yield fault
            else:  # one client's fault must not be the others': each by itself shows whose it is
                for request in requests:
                    yield from self._train_together([request], store)
            return
        for one in begun:
            yield self._finalize(one, *next(trained), store) if isinstance(one, _Visit) else one

    def _finalize(
        self, visit: _Visit, vector: Tensor, metrics: dict[str, float], store: ClientStateStore
    ) -> Reply | Exception:
        try:
            visit.metrics.update(metrics)
            if self._ends or visit.test is not None:
                self.model.load(vector)
            return self._finish(visit, store, vector)
        except BaseException as error:
            return client_fault(error)

    def _begin(self, request: Request, store: ClientStateStore) -> _Visit | Reply:
        """Do all that comes before the first step; a client without samples of the task has answered by then."""
        learner, ctx = self._enter(request, store)
        if len(ctx.data) == 0:
            self._stage(request, store, learner, ctx)
            return Reply(0, {}, self.model.vector())
        metrics: dict[str, float] = {}
        plugins = list(learner.values())
        test = self._own_test(request)
        if test is not None:
            metrics["accuracy_received"] = accuracy(ctx, plugins, test.x, test.y)
        local_evaluation = (
            None
            if self.local_evaluation is None
            else self.local_evaluation(request.client, request.server_round, plugins)
        )
        if local_evaluation is not None:
            local_evaluation.before_round(ctx)
        for plugin in plugins:
            if ctx.is_new_task:
                plugin.before_task(ctx)
            plugin.before_round(ctx)
        return _Visit(request, learner, ctx, test, local_evaluation, metrics)

    def _finish(self, visit: _Visit, store: ClientStateStore, trained: Tensor | None = None) -> Reply:
        """Do all that comes after the last step; the ``trained`` weights (P,) are in the model if not given.

        If they are, they are in the model too where anybody looks at it.
        """
        ctx, metrics, plugins = visit.ctx, visit.metrics, list(visit.learner.values())
        if visit.local_evaluation is not None:
            visit.local_evaluation.after_round(ctx)
            metrics.update(visit.local_evaluation.metrics)
        if visit.test is not None:
            metrics["accuracy_trained"] = accuracy(ctx, plugins, visit.test.x, visit.test.y)
        payload: dict[str, Tensor] = {}
        for plugin in plugins:
            payload.update(plugin.after_round(ctx))
        state_bytes = self._stage(visit.request, store, visit.learner, ctx)
        if state_bytes:
            metrics["state_bytes"] = float(state_bytes)
        model = self.model.vector() if self._ends or trained is None else trained
        return Reply(len(ctx.data), metrics, model, payload)

    def _task_end(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self._enter(request, store)
        if len(ctx.data):
            for plugin in learner.values():
                plugin.after_task(ctx)
        self._stage(request, store, learner, ctx)
        return Reply(len(ctx.data))

    def _query(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self._enter(request, store)
        for plugin in learner.values():
            if request.name in plugin.queries:
                response = plugin.respond(ctx, request.name, request.payload) if len(ctx.data) else {}
                return Reply(len(ctx.data), {}, None, response)
        raise ValueError(f"no plugin of this client answers {request.name!r}")

    def _evaluate(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self._enter(request, store)
        test = self._own_test(request, always=True)
        if test is None:
            return Reply(0)
        return Reply(len(test), {"accuracy": accuracy(ctx, list(learner.values()), test.x, test.y)})

    def _unlearn(self, request: Request) -> Reply:
        """Do one step of the unlearner on the client's samples; nothing of it stays here."""
        if request.model is None:
            raise ValueError("a message of kind 'unlearn' needs a model")
        note, device = ForgetInstruction.from_json(request.note), self.model.device
        self.model.load(request.model)
        parts = part(self.data, request.client, note, device)
        ctx = UnlearnContext(
            model=self.model,
            received=request.model.to(device),
            forget=samples([(task, gone) for task, gone, _ in parts], self.num_columns, device),
            retain=samples([(task, kept) for task, _, kept in parts], self.num_columns, device),
            requests=note.requests,
            training=self.training,
            client=request.client,
            seed=self.seed,
            local_round=request.local_round,
            num_columns=self.num_columns,
            tensors=request.payload,
            args=note.args,
            copy_model=self._copy_model,
        )
        self.model.set_generator(self._layer_generator(ctx.rng("dropout")))
        done = self.unlearner().local(ctx, request.name)
        return Reply(done.num_examples, {}, None, {name: tensor.cpu() for name, tensor in done.tensors.items()})

    def _forget(self, request: Request, store: ClientStateStore) -> Reply:
        """Let the learner forget, or erase everything about a client that leaves."""
        note = ForgetInstruction.from_json(request.note)
        if note.leaves(request.client):
            store.drop(request.client)
            self.data.drop(request.client)
            return Reply(0, note=outcomes_json([ErasureOutcome("client state", "erased", "the client has left")]))
        if request.committed == NEVER:
            self.data.drop(request.client)
            if self.plugins:
                store.stage(request.client, request.visit, {})  # the server will name this visit from now on
            return Reply(0)
        learner, ctx = self._enter(request, store)
        gone = joined([lost for _, lost, _ in part(self.data, request.client, note, self.model.device)])
        self.data.drop(request.client)
        collected = []
        for name, plugin in learner.items() if len(gone) else ():
            outcomes = [plugin.forget(ctx, one, gone) for one in note.requests if one.concerns(request.client)]
            if any(outcome.outcome == "reset" for outcome in outcomes):
                learner[name] = self.plugins[name]()
                learner[name].load({})
            collected += outcomes
        if ctx.is_new_task:
            del ctx.task_columns[ctx.task.id]  # being told is not training
        self._stage(request, store, learner, ctx)
        return Reply(len(gone), note=outcomes_json(collected))

    def _enter(self, request: Request, store: ClientStateStore) -> tuple[dict[str, Plugin], Context]:
        if request.model is None or request.task is None:
            raise ValueError(f"a message of kind {request.kind!r} needs a model and a task")
        self.model.load(request.model)
        instances = {name: build() for name, build in self.plugins.items()}
        names = {id(plugin): name for name, plugin in instances.items()}
        learner = {names[id(plugin)]: plugin for plugin in ordered(list(instances.values()))}
        state = store.load(request.client, request.committed) if learner else {}
        ctx = self._context(request, request.task, request.model, state)
        if self._draws:
            self.model.set_generator(self._layer_generator(ctx.rng("dropout")))
        for name, plugin in learner.items():
            plugin.load(clone(state.get("plugins", {}).get(name, {}), self.model.device))
            plugin.setup(ctx)
        return learner, ctx

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
            visit=request.visit if request.local_round < 0 else request.local_round,
            is_new_task=is_new,
            task_columns=seen,
            num_columns=self.num_columns,
            payload=request.payload,
            copy_model=self._copy_model,
        )

    def _copy_model(self) -> FlatModel:
        # building a module costs as much as a short visit: one serves them all
        if self._spare is None:
            self._spare = self.model.copy()
        return self._spare

    def _layer_generator(self, generator: torch.Generator) -> torch.Generator:
        device = self.model.device
        if device.type == "cpu":
            return generator
        return torch.Generator(device).manual_seed(generator.initial_seed())

    def _own_test(self, request: Request, always: bool = False) -> TaskData | None:
        if not (always or self.personal_evaluation) or request.task is None:
            return None
        test = self.data.test(request.client, request.task, self.model.device)
        return test if len(test) else None

    def _stage(self, request: Request, store: ClientStateStore, learner: dict[str, Plugin], ctx: Context) -> int:
        """Stage what must survive and return its size in bytes."""
        if not learner:
            return 0  # a learner without plugins has nothing to remember
        plugins = {name: plugin.state() for name, plugin in learner.items()}
        if any(plugins.values()):
            kept = clone({"tasks": _columns(ctx), "plugins": plugins}, torch.device("cpu"))
            store.stage(request.client, request.visit, kept)
            return num_bytes(kept)
        # ten thousand clients that remember nothing but which tasks they have met share one note of it
        seen = tuple(ctx.task_columns.items())
        if seen not in self._notes:
            self._notes[seen] = {"tasks": _columns(ctx), "plugins": plugins}
        store.stage(request.client, request.visit, self._notes[seen])
        return 0


def _columns(ctx: Context) -> dict[str, list[int]]:
    return {str(id_): list(columns) for id_, columns in ctx.task_columns.items()}


def check_learner(plugins: PluginFactories) -> None:
    """Refuse a learner whose plugins cannot live together, before anything runs.

    Raises
    ------
    ValueError
        Naming the plugins and what they both claim.
    """
    instances = [build() for build in plugins.values()]
    for hook in EXCLUSIVE:
        owner(instances, hook)
    asked: dict[str, str] = {}
    for plugin in instances:
        for name in plugin.queries:
            if name in asked:
                raise ValueError(f"learner: {asked[name]} and {type(plugin).__name__} both answer {name!r}")
            asked[name] = type(plugin).__name__
