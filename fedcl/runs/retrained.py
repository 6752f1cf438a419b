"""Training all over without a forget set: the retrained reference, the same rounds in a run that never held it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcl.assembly import make_queue, make_unlearner
from fedcl.base.tree import clone
from fedcl.client.state import NEVER
from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ForgetRequest, Forgotten
from fedcl.contracts.strategy import GLOBAL
from fedcl.contracts.unlearner import Unlearner
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning_metrics import SimulatedPanel, marked
from fedcl.server.arrivals import VirtualClock
from fedcl.server.state import ServerData
from fedcl.simulation.backend import Backend, open_backend
from fedcl.unlearning.queue import Bounds, RequestQueue
from fedcl.unlearning.service import Unlearning, UnlearningOptions
from fedcl.unlearning.view import Saved

# what does not change a run's models: references are shared by runs that differ in nothing else
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
    """Takes note of nothing: what a reference does is not part of the run."""

    def row(self, **fields: Any) -> None:
        """Leave out a measurement."""

    def event(self, kind: str, **fields: Any) -> None:
        """Leave out an event."""

    def timing(self, server_round: int, name: str, seconds: float) -> None:
        """Leave out a timing."""


@dataclass
class SimulatedReference:
    """Plays references in this process, and keeps them under ``cache`` by what they depend on."""

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
        """Return a reference that was played before, or None: one that is damaged is played again."""
        try:
            return kept.load() if kept.begun() else (None, {})
        except CheckpointError:
            warnings.warn(f"{kept.folder.parent}: a reference that is damaged is played again", stacklevel=3)
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
        gone = [_anonymous(text) for text in forgotten.state()]
        text = json.dumps([relevant, sorted(gone), until, torch.__version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _content(self) -> str:
        """Return a hash of the samples and of who holds which: one name of a data set may stand for several."""
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
    """Plays the run and its references from other seeds: same samples, clients and requests, other draws.

    ``count`` models of each kind for comparing distributions, the run's own among them; ``shadows`` references for
    attacks, without the run's own. What both have in common is played once.
    """

    cfg: Config
    setup: Setup
    cache: Path
    count: int = 0
    shadows: int = 0
    _served: list[tuple[int, ForgetRequest]] = field(default_factory=list, init=False)

    def others(
        self, requests: Sequence[ForgetRequest], earlier: Forgotten, until: int
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return other seeds' global models (P,) after ``requests`` before round ``until``: served, retrained.

        None if not asked for, or where an earlier request was served before this process began: it is not known when.
        """
        known = {request.to_json() for _, request in self._served}
        if not self.count or any(request.to_json() not in known for request in earlier.requests):
            return None
        self._served += [(until, request) for request in requests]
        gone = Forgotten([*earlier.requests, *requests])
        unlearned, retrained = [], []
        for more in range(1, self.count):
            cfg = self._other(more)
            with open_backend(cfg, self.setup.dataset, self.setup.partition) as backend:
                replay = SimulatedReference(cfg, self.setup, backend, self.cache)
                retrained.append(replay.run(gone, until)[0]["models"][GLOBAL])
                unlearned.append(self._serve(cfg, backend, replay, until))
        return unlearned, retrained

    def references(self, forgotten: Forgotten, until: int) -> list[Tensor]:
        """Return ``shadows`` global models (P,) of other seeds that never held what is ``forgotten``."""
        found = []
        for more in range(1, self.shadows + 1):
            cfg = self._other(more)
            with open_backend(cfg, self.setup.dataset, self.setup.partition) as backend:
                replay = SimulatedReference(cfg, self.setup, backend, self.cache)
                found.append(replay.run(forgotten, until)[0]["models"][GLOBAL])
        return found

    def _other(self, more: int) -> Config:
        """Return the run with a seed ``more`` further, and no requests."""
        options = {**self.cfg["unlearning"], "requests": [], "window": 0}
        return inline(self.cfg, seed=self.cfg["seed"] + more, unlearning=options)

    def _serve(self, cfg: Config, backend: Backend, replay: SimulatedReference, until: int) -> Tensor:
        queue = make_queue(cfg, self.setup.stream, self.setup.schedule, self.setup.dataset)
        queue.planned = list(self._served)
        record: Any = SilentRecord()
        settings = cfg["unlearning"]
        options = UnlearningOptions(settings["in_flight"], settings["recovery_rounds"], reference=False)
        unlearning = Unlearning(queue, make_unlearner(cfg), options, replay=replay)
        server = make_server(cfg, self.setup, backend, record, unlearning=unlearning, evaluate=False)
        server.run(lambda _: None, until)
        server.process_requests(until, ends=True)
        return server.global_model


def make_unlearning(cfg: Config, setup: Setup, backend: Backend, run_dir: Path) -> Unlearning:
    """Wire what serves unlearning requests in a run.

    Raises
    ------
    ConfigError
        If a planned request cannot be served by the unlearner, or not on this backend, or ``unlearning.klom`` or
        ``unlearning.trigger`` cannot be measured.
    """
    settings, unlearner = cfg["unlearning"], make_unlearner(cfg)
    cache = Path(settings["cache"]) if settings["cache"] else run_dir / "references"
    replay = None if backend.states is None else SimulatedReference(cfg, setup, backend, cache)
    if settings["klom"] == 1:
        raise ConfigError("unlearning.klom=1: must be 0 or >= 2, as one model has no distribution")
    marked(setup.dataset, settings["trigger"])
    queue = make_queue(cfg, setup.stream, setup.schedule, setup.dataset)
    if replay is None and unlearner.replays:
        if queue.planned:
            raise ConfigError("unlearner: training all over needs a simulation; choose another unlearner for devices")
        queue.bounds = replace(queue.bounds, scopes=frozenset())
    options = UnlearningOptions(settings["in_flight"], settings["recovery_rounds"], settings["reference"])
    models = settings["klom"], settings["references"]
    ensemble = SimulatedEnsemble(cfg, setup, cache, *models) if any(models) else None
    panel = None if replay is None else SimulatedPanel(cfg, setup, ensemble)
    return Unlearning(queue, unlearner, options, replay=replay, panel=panel)
