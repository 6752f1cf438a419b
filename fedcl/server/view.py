"""What parts of a strategy may know of the server, and how its state survives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedcl.models.flat import Spec
from fedcl.randomness import torch_generator
from fedcl.server.arrivals import Arrivals
from fedcl.server.contracts import GLOBAL, Target
from fedcl.server.exchange import Exchange
from fedcl.server.state import Compute, ServerState
from fedcl.server.statistics import Statistics
from fedcl.server.strategy import Strategy
from fedcl.server.unlearning import Unlearning

if TYPE_CHECKING:
    from fedcl.server.loop import LoopOptions


class View:
    """A server as its parts see it (:class:`~fedcl.server.contracts.ServerView`), and as a checkpoint does.

    ``everybody`` are the clients the run began with, ``initial`` the weights (P,).
    """

    strategy: Strategy
    exchange: Exchange
    arrivals: Arrivals
    statistics: Statistics
    unlearning: Unlearning | None
    options: LoopOptions
    state: ServerState
    initial: Tensor
    everybody: tuple[str, ...]
    compute_in: Compute
    _spec: Spec
    _clients: tuple[str, ...]

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

    def when(self) -> dict[str, Any]:
        """Return the round that is being played, or comes next, and the time on the run's clock: what an event has."""
        return {"round": self.state.next_round, "virtual_time": self.now}

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

    # -- survival -----------------------------------------------------------------------------------------------------

    def leave(self, gone: Collection[str]) -> None:
        """Send nothing more to the clients in ``gone``, and take no part of theirs into account."""
        self._clients = tuple(client for client in self.everybody if client not in gone)

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the server that must survive."""
        state = self.state
        return {
            "models": dict(state.models),
            "version": state.version,
            "model_epoch": state.model_epoch,
            "next_round": state.next_round,
            "visited": sorted(state.visited),
            "owed": dict(state.owed),
            "late": sorted(state.late),
            "untold": sorted(state.untold),
            "visits": dict(self.exchange.visits),
            "turns": dict(self.exchange.turns),
            "committed": dict(self.exchange.committed),
            "bytes": [self.exchange.bytes_up, self.exchange.bytes_down],
            "strategy": self.strategy.state_dict(),
            "statistics": self.statistics.state_dict(),
            "arrivals": self.arrivals.state_dict(),
            **({} if self.unlearning is None else {"unlearning": self.unlearning.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; clients' states must be in their store by now."""
        self.state = ServerState(
            models=dict(state["models"]),
            version=state["version"],
            model_epoch=state["model_epoch"],
            next_round=state["next_round"],
            visited=set(state["visited"]),
            owed=dict(state["owed"]),
            late=set(state["late"]),
            untold=set(state.get("untold", ())),
        )
        self.strategy.load_state_dict(state["strategy"])
        self.statistics.load_state_dict(state["statistics"])
        self.exchange.visits = dict(state["visits"])
        self.exchange.turns = dict(state["turns"])
        self.exchange.committed = dict(state["committed"])
        if self.unlearning is not None and "unlearning" in state:
            self.unlearning.load_state_dict(state["unlearning"])
            self.leave(self.unlearning.forgotten.clients)
        self.arrivals.load_state_dict(state["arrivals"])
        self.exchange.bytes_up, self.exchange.bytes_down = state["bytes"]
