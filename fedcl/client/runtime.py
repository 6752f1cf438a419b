"""A client's side of every message: what it does with each kind, and how it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from fedcl.base.interruption import client_fault
from fedcl.client.engines import Engine, stack_size, stacks
from fedcl.client.forgetting import joined, part, samples
from fedcl.client.local_evaluation import LocalEvaluation, LocalEvaluationOf, accuracy
from fedcl.client.loop import fit
from fedcl.client.moves import optimizer_of
from fedcl.client.session import Learner, Sessions
from fedcl.client.stacked import fit_stacked
from fedcl.client.state import NEVER, ClientStateStore
from fedcl.contracts.learner import Context, Plugin, TaskData, overrides
from fedcl.contracts.requests import ErasureOutcome, ForgetInstruction, outcomes_json
from fedcl.contracts.unlearner import UnlearnContext, Unlearner
from fedcl.messages import Reply, Request
from fedcl.models.chain import chain_of

_BEFORE = ("setup", "before_task", "before_round")  # hooks that may change the received weights


@dataclass(slots=True)
class _LocalRound:
    """A local round that has begun: its learner, and the weights (P,) it starts from, for clients trained together."""

    request: Request
    learner: Learner
    ctx: Context
    test: TaskData | None
    local_evaluation: LocalEvaluation | None
    metrics: dict[str, float]
    start: Tensor | None = None

    @property
    def plugins(self) -> list[Plugin]:
        return list(self.learner.values())


@dataclass
class ClientRuntime(Sessions):
    """Executes messages to clients, one client at a time.

    ``engine`` says how clients train: ``loop`` one after another; ``fused`` the same, with written-out steps where
    model and learner allow them; ``stack`` together where these allow it, else as ``fused``; ``auto`` as ``stack`` on
    plain linear networks and as ``loop`` on others. With ``personal_evaluation`` a client tests the model on its own
    test samples before and after training.
    """

    personal_evaluation: bool = False
    local_evaluation: LocalEvaluationOf | None = None
    unlearner: Callable[[], Unlearner] = Unlearner
    engine: Engine = "loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        plugins = [build() for build in self.plugins.values()]
        self._together = stack_size(self.model)
        watched = self.training.precision != "float32" or self.local_evaluation is not None
        self._stacks = not watched and stacks(self.engine, self.model, plugins, self.training) is None
        # copying a model costs as much as a step: no copy is made that no plugin can notice
        self._moves = any(overrides(plugin, hook) for plugin in plugins for hook in _BEFORE)
        self._ends = any(overrides(plugin, "after_round") for plugin in plugins)

    def visit(self, request: Request, store: ClientStateStore) -> Reply:
        """Execute ``request`` and stage the resulting state.

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
        kinds = {
            "task_end": self._task_end,
            "query": self._query,
            "evaluate": self._evaluate,
            "unlearn": self._unlearn,
            "forget": self._forget,
        }
        if request.kind not in kinds:
            raise ValueError(f"a client cannot respond to a message of kind {request.kind!r}")
        return kinds[request.kind](request, store)

    def train(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
        """Train the clients of ``requests``, all of kind ``train``; yield the reply of each, or its fault."""
        if self._stacks:
            for members in self._stacked(requests):
                yield from self._train_together(members, store)
            return
        for request in requests:
            yield self._train_alone(request, store)

    def _train_alone(self, request: Request, store: ClientStateStore) -> Reply | Exception:
        try:
            begun = self._begin(request, store)
            if isinstance(begun, Reply):
                return begun
            plugins = begun.plugins if begun.local_evaluation is None else [*begun.plugins, begun.local_evaluation]
            begun.metrics.update(fit(begun.ctx, plugins, self.training, fused=self.engine != "loop"))
            return self._finish(begun, store)
        except BaseException as error:
            return client_fault(error)

    def _stacked(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Cut requests into stacks, within blocks if a client's bits depend on the others of its stack."""
        runs = [list(requests)]
        if chain_of(self.model.module) is None:
            runs = [list(run) for _, run in groupby(requests, key=lambda request: request.block)]
        for run in runs:
            for start in range(0, len(run), self._together):
                yield run[start : start + self._together]

    def _train_together(self, requests: Sequence[Request], store: ClientStateStore) -> Iterator[Reply | Exception]:
        begun: list[_LocalRound | Reply | Exception] = []
        for request in requests:
            try:
                entry = self._begin(request, store)
                if isinstance(entry, _LocalRound):
                    entry.start = self.model.vector() if self._moves else entry.ctx.received
                begun.append(entry)
            except BaseException as error:
                begun.append(client_fault(error))
        rounds = [one for one in begun if isinstance(one, _LocalRound)]
        starts = [one.start for one in rounds if one.start is not None]
        try:
            trained = iter(fit_stacked([one.ctx for one in rounds], starts, self.training) if rounds else [])
        except BaseException as error:
            fault = client_fault(error)
            if len(requests) == 1:
                yield fault
            else:  # trained one by one, the clients show whose fault it is
                for request in requests:
                    yield from self._train_together([request], store)
            return
        for one in begun:
            yield self._finalize(one, *next(trained), store) if isinstance(one, _LocalRound) else one

    def _finalize(
        self, begun: _LocalRound, vector: Tensor, metrics: dict[str, float], store: ClientStateStore
    ) -> Reply | Exception:
        try:
            begun.metrics.update(metrics)
            if self._ends or begun.test is not None:
                self.model.load(vector)
            return self._finish(begun, store, vector)
        except BaseException as error:
            return client_fault(error)

    def _begin(self, request: Request, store: ClientStateStore) -> _LocalRound | Reply:
        """Do everything before the first step; return the reply of a client without samples of the task."""
        learner, ctx = self.enter(request, store)
        if len(ctx.data) == 0:
            self.stage(request, store, learner, ctx)
            return Reply(0, {}, self.model.vector())
        begun = _LocalRound(request, learner, ctx, self._own_test(request), None, {})
        if begun.test is not None:
            begun.metrics["accuracy_received"] = accuracy(ctx, begun.plugins, begun.test, ctx.mask)
        if self.local_evaluation is not None:
            begun.local_evaluation = self.local_evaluation(request.client, request.server_round, begun.plugins)
            begun.local_evaluation.before_round(ctx)
        for plugin in begun.plugins:
            if ctx.is_new_task:
                plugin.before_task(ctx)
            plugin.before_round(ctx)
        return begun

    def _finish(self, begun: _LocalRound, store: ClientStateStore, trained: Tensor | None = None) -> Reply:
        """Do everything after the last step. Without ``trained`` (P,) the model holds the trained weights.

        With it, the model holds them if a plugin or the evaluation reads them.
        """
        ctx, metrics, plugins = begun.ctx, begun.metrics, begun.plugins
        if begun.local_evaluation is not None:
            begun.local_evaluation.after_round(ctx)
            metrics.update(begun.local_evaluation.metrics)
        if begun.test is not None:
            metrics["accuracy_trained"] = accuracy(ctx, plugins, begun.test, ctx.mask)
        payload: dict[str, Tensor] = {}
        for plugin in plugins:
            payload.update(plugin.after_round(ctx))
        state_bytes = self.stage(begun.request, store, begun.learner, ctx)
        if state_bytes:
            metrics["state_bytes"] = float(state_bytes)
        model = self.model.vector() if self._ends or trained is None else trained
        return Reply(len(ctx.data), metrics, model, payload)

    def _task_end(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self.enter(request, store)
        if len(ctx.data):
            for plugin in learner.values():
                plugin.after_task(ctx)
        self.stage(request, store, learner, ctx)
        return Reply(len(ctx.data))

    def _query(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self.enter(request, store)
        for plugin in learner.values():
            if request.name in plugin.queries:
                response = plugin.respond(ctx, request.name, request.payload) if len(ctx.data) else {}
                return Reply(len(ctx.data), {}, None, response)
        raise ValueError(f"no plugin of this client responds to {request.name!r}")

    def _evaluate(self, request: Request, store: ClientStateStore) -> Reply:
        learner, ctx = self.enter(request, store)
        test = self._own_test(request, always=True)
        if test is None:
            return Reply(0)
        return Reply(len(test), {"accuracy": accuracy(ctx, list(learner.values()), test, ctx.mask)})

    def _unlearn(self, request: Request, store: ClientStateStore) -> Reply:
        """Execute one step of the unlearner on the client's samples; it leaves no state here."""
        if request.model is None:
            raise ValueError("a message of kind 'unlearn' needs a model")
        note, device = ForgetInstruction.from_json(request.note), self.model.device
        self.model.load(request.model)
        parts = part(self.data, request.client, note, device)
        ctx = UnlearnContext(
            model=self.model,
            received=request.model.to(device),
            forget=samples([(task, removed) for task, removed, _ in parts], self.num_columns, device),
            retain=samples([(task, retained) for task, _, retained in parts], self.num_columns, device),
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
        self._seed_layers(ctx.rng("dropout"))
        done = self.unlearner().local(ctx, request.name)
        return Reply(done.num_examples, {}, None, {name: tensor.cpu() for name, tensor in done.tensors.items()})

    def _forget(self, request: Request, store: ClientStateStore) -> Reply:
        """Let the learner forget, or erase everything about a departing client."""
        note = ForgetInstruction.from_json(request.note)
        if note.leaves(request.client):
            store.drop(request.client)
            self.data.drop(request.client)
            return Reply(0, note=outcomes_json([ErasureOutcome("client state", "erased", "the client has left")]))
        if request.committed == NEVER:
            self.data.drop(request.client)
            if self._remembers:
                store.stage(request.client, request.visit, {})  # from now on the server names this message
            return Reply(0)
        learner, ctx = self.enter(request, store)
        removed = joined([removed for _, removed, _ in part(self.data, request.client, note, self.model.device)])
        self.data.drop(request.client)
        collected = []
        for name, plugin in learner.items() if len(removed) else ():
            outcomes = [plugin.forget(ctx, one, removed) for one in note.requests if one.concerns(request.client)]
            if any(outcome.outcome == "reset" for outcome in outcomes):
                learner[name] = self.plugins[name]()
                learner[name].load({})
            collected += outcomes
        if ctx.optimizer is not None and len(removed):
            ctx.optimizer = optimizer_of(self.training)
            collected.append(ErasureOutcome("client optimizer", "reset", "its state is a mean over gradients"))
        if ctx.is_new_task:
            del ctx.task_columns[ctx.task.id]  # it has not been trained
        self.stage(request, store, learner, ctx)
        return Reply(len(removed), note=outcomes_json(collected))

    def _own_test(self, request: Request, always: bool = False) -> TaskData | None:
        if not (always or self.personal_evaluation) or request.task is None:
            return None
        test = self.data.test(request.client, request.task, self.model.device)
        return test if len(test) else None
