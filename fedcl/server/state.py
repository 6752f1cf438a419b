"""A server's data: what a run is at the end of a round, what its parts may know of it, and how it is edited."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedcl.base.randomness import torch_generator
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ErasureOutcome, Forgotten
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.strategy import GLOBAL, Target, Update
from fedcl.evaluation.evaluator import Evaluator
from fedcl.models.flat import Spec
from fedcl.scenario.task import Schedule, Stream
from fedcl.server.arrivals import Arrivals
from fedcl.server.curriculum import Curriculum
from fedcl.server.exchange import Exchange
from fedcl.server.measurement import Known, Measurement, Record
from fedcl.server.rounds import RoundOptions
from fedcl.server.strategy import Strategy

Compute = Callable[..., Future[Any]]
# what a certificate says of devices that were away; the event comes in events.jsonl
OUT_OF_REACH = "were not in reach: their devices are notified when they reconnect, which is an event `client_told`"


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Settings of the loop: the keys of the configuration that carry the same names.

    ``boundary_visits`` says that some plugin acts at the end of a task, so that clients must be notified of it.
    """

    rounds: RoundOptions
    evaluate_every: int = 1
    personal_evaluation: bool = False
    boundary_visits: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class ServerState:
    """What a run is at the end of a round: models by target, counters, and the next round.

    ``version`` counts changes of the global model; ``model_epoch`` counts edits that bypass the strategy; ``visited``
    are the clients that learned something of their present task; ``pending_task_end`` maps clients that were in flight
    when their task ended to the round that ended it, of which they are notified when they are back; ``late`` are the
    clients of which a late update counted; ``pending_notice`` are those that could not be reached when they should
    forget.
    """

    models: dict[Target, Tensor]
    version: int = 0
    model_epoch: int = 0
    next_round: int = 0
    visited: set[str] = field(default_factory=set)
    pending_task_end: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    pending_notice: set[str] = field(default_factory=set)


class BetweenRounds(Protocol):
    """What a run does between two rounds besides its schedule; :class:`~fedcl.unlearning.service.Unlearning` is one."""

    @property
    def forgotten(self) -> Forgotten:
        """The requests admitted so far: what no round may use any more."""
        ...

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` must see every update of a round by itself."""
        ...

    def process(
        self, server: ServerData, server_round: int, recover: Callable[[int], int], *, ends: bool = False
    ) -> bool:
        """Do what is due before ``server_round``; return whether anything was.

        ``recover(n)`` runs n rounds besides the schedule and returns how many counted. ``ends`` says that no round
        follows, so that nothing can wait.
        """
        ...

    def observe(self, updates: Sequence[Update], before: Tensor, server: ServerData) -> None:
        """See a round's updates that counted, and the global model ``before`` (P,) they were applied."""
        ...

    def follow(self, server: ServerData, server_round: int, seen: Sequence[int]) -> None:
        """See the global model that was just tested; ``seen`` are the ids of the tasks trained by then."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


class ServerData:
    """A server without its timeline.

    Parts see it as a :class:`~fedcl.contracts.view.ServerView`, unlearning edits it, a checkpoint holds it.
    ``everybody`` are the clients the run began with, ``initial`` the weights (P,), ``base_digest`` names the model's
    fixed tensors, which no checkpoint holds.
    """

    def __init__(
        self,
        *,
        strategy: Strategy,
        exchange: Exchange,
        arrivals: Arrivals,
        schedule: Schedule,
        stream: Stream,
        spec: Spec,
        initial: Tensor,
        clients: Sequence[str],
        base_digest: str = "",
        record: Record,
        options: LoopOptions,
        evaluator: Evaluator | None = None,
        statistics: Statistics | None = None,
        known: Known | None = None,
        compute: Compute | None = None,
        unlearning: BetweenRounds | None = None,
    ) -> None:
        self.strategy, self.exchange, self.arrivals, self.schedule = strategy, exchange, arrivals, schedule
        self.curriculum = Curriculum(stream, schedule, Forgotten() if unlearning is None else unlearning.forgotten)
        self.measurement = Measurement(record, stream, evaluator, known)
        self.record, self.options, self.unlearning = record, options, unlearning
        self.statistics = statistics or Statistics()
        self.compute_in = compute or at_once
        self._base_digest = base_digest
        self.initial = initial.detach().cpu().clone()
        self.state = ServerState({GLOBAL: self.initial.clone()})
        self._spec = spec
        self.everybody = self._clients = tuple(clients)
        exchange.when = self.when

    def when(self) -> dict[str, Any]:
        """Return the fields of every event: the round that is running or comes next, and the run's time."""
        return {"round": self.state.next_round, "virtual_time": self.now}

    # -- what parts see -----------------------------------------------------------------------------------------------

    @property
    def global_model(self) -> Tensor:
        """Global weights, float32 (P,)."""
        return self.state.models[GLOBAL]

    @property
    def version(self) -> int:
        """Number of changes the global model has seen."""
        return self.state.version

    @property
    def now(self) -> float:
        """Time on the run's clock, in seconds."""
        return self.arrivals.clock.now

    @property
    def spec(self) -> Spec:
        """Layout of a model vector."""
        return self._spec

    @property
    def clients(self) -> tuple[str, ...]:
        """Every client that has not left, in canonical order."""
        return self._clients

    @property
    def device(self) -> torch.device:
        """Device for heavy server mathematics."""
        return self.options.device

    def model_of(self, client: str) -> Tensor:
        """Return the weights that would be sent to ``client`` now."""
        return self.model_at(self.strategy.target_of(client, self))

    def model_at(self, target: Target) -> Tensor:
        """Return the weights of ``target``, the global ones where it has none of its own yet."""
        return self.state.models.get(target, self.global_model)

    def rng(self, purpose: str) -> torch.Generator:
        """Return a generator keyed by (seed, version, purpose)."""
        return torch_generator(self.options.rounds.seed, "server", self.state.version, purpose)

    def compute(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``fn`` where the backend computes: here, or in a worker; its exception, if any, waits in the future."""
        return self.compute_in(fn, *args)

    def seen(self, server_round: int) -> list[int]:
        """Return the ids of the tasks that were trained before ``server_round``."""
        return self.curriculum.seen(self._clients, server_round - 1) if server_round else []

    # -- edits --------------------------------------------------------------------------------------------------------

    def edit(self, models: dict[Target, Tensor]) -> None:
        """Replace models past optimizer and projection, as unlearning does, and open a new model epoch.

        Raises
        ------
        ValueError
            If a model does not have the run's layout or is not finite.
        """
        for target, model in models.items():
            if tuple(model.shape) != (self._spec.size,) or not bool(torch.isfinite(model).all()):
                raise ValueError(f"edit of {target!r}: must be a finite vector of shape {(self._spec.size,)}")
        self.state.models.update({target: model.detach().float().cpu().clone() for target, model in models.items()})
        self.state.version += GLOBAL in models
        self.state.model_epoch += 1

    def remove_clients(self, departing_clients: Sequence[str]) -> list[ErasureOutcome]:
        """Drop everything that server and backend keep of departing clients."""
        if not departing_clients:
            return []
        state, cancelled = self.state, 0
        for client in departing_clients:
            cancelled += self.arrivals.flights.pop(client, None) is not None
            for kept in (state.models, state.pending_task_end, self.exchange.committed):
                kept.pop(client, None)
        state.visited.difference_update(departing_clients)
        state.late.difference_update(departing_clients)
        if self.exchange.erase is None:
            return [
                ErasureOutcome("devices", "retained", "the client's own device keeps its state: it was not notified")
            ]
        away = self.exchange.erase(departing_clients)
        state.pending_notice.difference_update(departing_clients)
        if away:
            state.pending_notice.update(away)
            return [ErasureOutcome("devices", "retained", f"client(s) {', '.join(away)} {OUT_OF_REACH}")]
        return [ErasureOutcome("client states, queues", "erased", f"{cancelled} message(s) in flight among them")]

    def cancel(self, clients: Sequence[str]) -> None:
        """Cancel what ``clients`` are computing; workers keep no copy of their states and samples."""
        for client in clients:
            self.arrivals.flights.pop(client, None)
        if self.exchange.release is not None:
            self.exchange.release(clients)

    def leave(self, departed: Collection[str]) -> None:
        """Leave the clients in ``departed`` out of everything that follows."""
        self._clients = tuple(client for client in self.everybody if client not in departed)

    # -- survival -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the server that must survive."""
        plain: dict[type, Callable[[Any], Any]] = {set: sorted, dict: dict, int: int}
        return {
            **{name: plain[type(value)](value) for name, value in vars(self.state).items()},
            "visits": dict(self.exchange.visits),
            "local_rounds": dict(self.exchange.local_rounds),
            "committed": dict(self.exchange.committed),
            "base": self._base_digest,
            "bytes": [self.exchange.bytes_up, self.exchange.bytes_down],
            "strategy": self.strategy.state_dict(),
            "statistics": self.statistics.state_dict(),
            "arrivals": self.arrivals.state_dict(),
            **({} if self.unlearning is None else {"unlearning": self.unlearning.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; clients' states must be in their store by now.

        Raises
        ------
        ConfigError
            If the model's fixed tensors are others than the checkpoint's.
        """
        known = state.get("base", self._base_digest)  # an earlier fedcl did not write it
        if known != self._base_digest or len(state["models"][GLOBAL]) != self._spec.size:
            raise ConfigError(
                "model: its fixed tensors are not those of the checkpoint; model.pretrained must be the file that the "
                "run began with, and an earlier fedcl's runs with model.freeze cannot be resumed"
            )
        self.state = ServerState(**{name: type(old)(state[name]) for name, old in vars(self.state).items()})
        self.strategy.load_state_dict(state["strategy"])
        self.statistics.load_state_dict(state["statistics"])
        self.exchange.visits = dict(state["visits"])
        self.exchange.local_rounds = dict(state["local_rounds"])
        self.exchange.committed = dict(state["committed"])
        if self.unlearning is not None and "unlearning" in state:
            self.unlearning.load_state_dict(state["unlearning"])
            self.leave(self.unlearning.forgotten.clients)
        self.arrivals.load_state_dict(state["arrivals"])
        self.exchange.bytes_up, self.exchange.bytes_down = state["bytes"]


def at_once(fn: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run ``fn`` here and now; its exception, if any, waits in the future."""
    future: Future[Any] = Future()
    try:
        future.set_result(fn(*args))
    except Exception as error:
        future.set_exception(error)
    return future
