"""The retrained reference: the same rounds in a run in which nobody ever held the forget set."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl.assembly import make_queue, make_unlearner
from fedcl.base.tree import clone
from fedcl.client.state import NEVER
from fedcl.config.compose import Config
from fedcl.contracts.requests import ForgetRequest, Forgotten
from fedcl.contracts.strategy import GLOBAL
from fedcl.contracts.unlearner import Unlearner
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.runs.setup import Setup, make_server
from fedcl.server.arrivals import VirtualClock
from fedcl.server.state import ServerData
from fedcl.simulation.backend import Backend, open_backend
from fedcl.unlearning.queue import Bounds, RequestQueue
from fedcl.unlearning.service import Unlearning, UnlearningOptions
from fedcl.unlearning.sources import PlannedRequests
from fedcl.unlearning.view import Saved

# settings without influence on the models: runs that differ in nothing else share references
_IRRELEVANT = (
    "name",
    "run_dir",
    "backend",
    "unlearner",
    "unlearning",
    "evaluation",
    "checkpoint",
    "figures",
    "compare_with",
)


def inline(cfg: Config, **changes: Any) -> Config:
    """Return the configuration for a run inside this process that keeps nothing."""
    return {**cfg, **changes, "backend": {**cfg["backend"], "name": "inline", "state": "memory"}}


class SilentRecord:
    """Records nothing: what a reference does is not part of the run."""

    def row(self, *args: Any, **fields: Any) -> None:
        """Ignore it."""

    event = timing = row


@dataclass
class SimulatedReference:
    """Runs references in this process, and keeps them under ``cache`` by what they depend on."""

    cfg: Config
    setup: Setup
    backend: Backend
    cache: Path
    spent: dict[str, float] = field(default_factory=dict, init=False)

    def run(self, forgotten: Forgotten, until: int) -> Saved:
        """Return where a run is after ``until`` rounds in which nobody ever held what is ``forgotten``."""
        kept = Checkpoints(self.cache / self._key(forgotten, until), keep=1)
        saved, states = self._kept(kept)
        if saved is None:
            started, cpu = time.perf_counter(), time.process_time()
            state, clients = self._run(forgotten, until)
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            stay = len(set(self.setup.clients) - forgotten.clients)
            spent |= {"rounds": float(until), "bytes": float(sum(state["bytes"])), "clients": float(stay)}
            visits = {client: visit for client, (visit, _) in clients.items()}
            kept.save(until, {"server": state, "spent": spent}, visits, lambda client, visit: clients[client][1])
            saved, states = kept.load()
        self.spent = {name: float(value) for name, value in saved.get("spent", {}).items()}
        return saved["server"], states

    @staticmethod
    def _kept(kept: Checkpoints) -> tuple[Any, dict[str, tuple[int, Any]]]:
        """Return a reference that was run before, or None: a damaged one is run again."""
        try:
            return kept.load() if kept.begun() else (None, {})
        except CheckpointError:
            warnings.warn(f"{kept.folder.parent}: a damaged reference is run again", stacklevel=3)
            return None, {}

    def prune(self, forgotten: Forgotten, until: int) -> None:
        """Remove all references but the one after ``until`` rounds without what is ``forgotten``."""
        kept = self._key(forgotten, until)
        for folder in list(self.cache.iterdir()) if self.cache.is_dir() else ():
            if folder.name != kept:
                shutil.rmtree(folder)

    def adopt(self, server: ServerData, saved: Saved) -> None:
        """Let ``server`` and its clients go on from ``saved``, on that run's clock."""
        state, clients = saved
        if self.backend.erase is None or self.backend.states is None:
            raise RuntimeError("unlearner: clients that keep their own state cannot be given another run's")
        self.backend.erase(server.everybody)
        server.arrivals.flights.clear()
        for client, (visit, tree) in clients.items():
            self.backend.states.stage(client, visit, clone(tree, torch.device("cpu")))
        own = {"bytes": [server.exchange.bytes_up, server.exchange.bytes_down], "model_epoch": server.state.model_epoch}
        if server.arrivals.clock.virtual:
            server.arrivals.clock = VirtualClock()
        rest = {name: value for name, value in state.items() if name != "unlearning"}
        server.load_state_dict({**clone(rest, torch.device("cpu")), **own})

    def _run(self, forgotten: Forgotten, until: int) -> Saved:
        cfg = inline(self.cfg)
        queue = RequestQueue(Bounds((), 0, 0, frozenset()))
        record: Any = SilentRecord()
        dataset, partition = self.setup.dataset, self.setup.partition
        with open_backend(cfg, dataset, partition) as backend:
            unlearning = Unlearning(queue, Unlearner(), forgotten=Forgotten(list(forgotten.requests)))
            server = make_server(cfg, self.setup, backend, record, unlearning=unlearning, evaluate=False)
            server.leave(forgotten.clients)
            server.run(lambda _: None, until)
            states = backend.states
            assert states is not None  # ours keeps them
            committed = {c: v for c, v in server.exchange.committed.items() if v != NEVER and states.has(c, v)}
            return server.state_dict(), {
                client: (visit, states.load(client, visit)) for client, visit in committed.items()
            }

    def _key(self, forgotten: Forgotten, until: int) -> str:
        relevant = {name: value for name, value in self.cfg.items() if name not in _IRRELEVANT}
        relevant["data/content"] = self._content()
        requests = [_anonymous(text) for text in forgotten.state()]
        text = json.dumps([relevant, sorted(requests), until, torch.__version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _content(self) -> str:
        """Return a hash of the samples and of who holds which: data sets of one name may differ."""
        digest = hashlib.sha256()
        half = self.setup.dataset.train
        for array in (half.x, half.y, *self.setup.partition.train):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _anonymous(request: str) -> str:
    """Return a request's text without its id: what it is called does not change the reference."""
    raw: Mapping[str, Any] = json.loads(request)
    return json.dumps({name: value for name, value in raw.items() if name != "id"}, sort_keys=True)


@dataclass
class SimulatedEnsemble:
    """The run and its references from other seeds: same samples, clients and requests, other draws.

    ``count`` is the number of models of each kind for comparing distributions, including the run's own; ``shadows`` is
    the number of references for attacks, without the run's own. References that both need are run once.
    """

    cfg: Config
    setup: Setup
    cache: Path
    count: int = 0
    shadows: int = 0
    _processed: list[tuple[int, ForgetRequest]] = field(default_factory=list, init=False)

    def others(
        self, requests: Sequence[ForgetRequest], earlier: Forgotten, until: int
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return other seeds' global models (P,) after ``requests`` before round ``until``: unlearned, retrained.

        None without ``count``, or if an earlier request was processed before this process began: the round is unknown.
        """
        known = {request.to_json() for _, request in self._processed}
        if not self.count or any(request.to_json() not in known for request in earlier.requests):
            return None
        self._processed += [(until, request) for request in requests]
        forgotten = Forgotten([*earlier.requests, *requests])
        unlearned, retrained = [], []
        for more in range(1, self.count):
            with self._other(more) as (cfg, backend, reference):
                retrained.append(reference.run(forgotten, until)[0]["models"][GLOBAL])
                unlearned.append(self._unlearned(cfg, backend, reference, until))
        return unlearned, retrained

    def references(self, forgotten: Forgotten, until: int) -> list[Tensor]:
        """Return ``shadows`` global models (P,) of other seeds that never held what is ``forgotten``."""
        found = []
        for more in range(1, self.shadows + 1):
            with self._other(more) as (_, _, reference):
                found.append(reference.run(forgotten, until)[0]["models"][GLOBAL])
        return found

    @contextmanager
    def _other(self, more: int) -> Iterator[tuple[Config, Backend, SimulatedReference]]:
        """Open the run with a seed ``more`` further, and without requests."""
        options = {**self.cfg["unlearning"], "requests": [], "window": 0}
        cfg = inline(self.cfg, seed=self.cfg["seed"] + more, unlearning=options)
        with open_backend(cfg, self.setup.dataset, self.setup.partition) as backend:
            yield cfg, backend, SimulatedReference(cfg, self.setup, backend, self.cache)

    def _unlearned(self, cfg: Config, backend: Backend, reference: SimulatedReference, until: int) -> Tensor:
        requests, setup = PlannedRequests(list(self._processed)), self.setup
        queue = make_queue(cfg, setup.stream, setup.schedule, setup.dataset, requests)
        record: Any = SilentRecord()
        settings = cfg["unlearning"]
        options = UnlearningOptions(settings["in_flight"], settings["recovery_rounds"], reference=False)
        unlearning = Unlearning(queue, make_unlearner(cfg), options, reference=reference)
        server = make_server(cfg, setup, backend, record, unlearning=unlearning, evaluate=False)
        server.run(lambda _: None, until)
        server.process_requests(until, ends=True)
        return server.global_model
