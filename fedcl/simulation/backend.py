"""The grid that ``backend=`` names, opened for one run and closed behind it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fedcl import __version__
from fedcl.assembly import Settings, client_ids, client_runtime, make_aggregation, make_model, make_stream, participants
from fedcl.client.device import Agreement
from fedcl.client.file_state import FileStateStore
from fedcl.client.local_data import PartitionedData
from fedcl.client.state import ClientStateStore, MemoryStateStore
from fedcl.config.checks import is_local
from fedcl.config.value_rules import ConfigError
from fedcl.data.dataset import Dataset, Partition
from fedcl.server.state import Compute, at_once
from fedcl.simulation.compat import identity, quiet_environment
from fedcl.simulation.fleet import FleetGrid
from fedcl.simulation.grid import BaseGrid, InlineGrid
from fedcl.simulation.host import ClientHost
from fedcl.simulation.nodes import owners, refusals

FIRST_NODE = 2  # Flower's node 1 is the server
RUN_ID = 1
FlowerGrid = Grid  # for those that pass a grid through without speaking Flower


@dataclass(frozen=True)
class Backend:
    """An open grid: which node is which client, whether it takes cohort messages, and the client states it keeps.

    ``states`` is None where clients keep their own, as devices do. ``compute`` runs the server's heavy functions,
    ``erase`` drops everything that is kept of clients and returns those whose devices it did not reach, ``release``
    their messages and what workers have copies of; None where their devices must do so. ``listen`` is given the
    function that takes down events of the grid's own: nodes that do not say who they are.
    """

    grid: Grid
    nodes: Mapping[str, int]
    cohorts: bool
    states: ClientStateStore | None
    compute: Compute = at_once
    erase: Callable[[Sequence[str]], Sequence[str] | None] | None = None
    release: Callable[[Sequence[str]], None] | None = None
    listen: Callable[[Callable[..., None]], None] | None = None


@contextmanager
def open_backend(
    cfg: Mapping[str, Any],
    dataset: Dataset,
    partition: Partition,
    grid: Grid | None = None,
    state_folder: Path | None = None,
    *,
    resuming: bool = False,
    left: Collection[str] = (),
) -> Iterator[Backend]:
    """Open the grid of ``backend.name``, or use the one that Flower has given, and close ours however the run ends.

    A run that is resumed goes on with the devices that are there; a new one waits for ``backend.min_clients``. Clients
    that have ``left`` are not waited for.

    With ``backend.state=files`` clients' states are kept under ``state_folder``, which is emptied before: what counts
    of an interrupted run is in its checkpoint.

    Raises
    ------
    ConfigError
        If ``backend=flower`` is asked for outside a Flower run.
    """
    quiet_environment()
    config = dict(cfg)
    if grid is not None:
        fleet = _fleet(config, dataset, grid, resuming=resuming, left=left)
        yield Backend(fleet, fleet.nodes, cohorts=False, states=None, erase=fleet.erase, listen=fleet.listen)
        return
    if Settings.of(config).backend.name == "flower":
        raise ConfigError("backend=flower: Flower starts such a run; use: fedcl deploy run DIR")
    own = _own_grid(config, dataset, partition, _state_store(config, state_folder))
    try:
        with identity(RUN_ID):
            yield Backend(own, own.nodes, True, own.states, own.compute, own.erase, own.release)
    finally:
        own.close()


def _state_store(cfg: dict[str, Any], folder: Path | None) -> ClientStateStore:
    if Settings.of(cfg).backend.state == "memory" or folder is None:
        return MemoryStateStore()
    shutil.rmtree(folder, ignore_errors=True)
    return FileStateStore(folder)


def _own_grid(cfg: dict[str, Any], dataset: Dataset, partition: Partition, states: ClientStateStore) -> BaseGrid:
    clients = client_ids(cfg)
    nodes = {client: FIRST_NODE + i for i, client in enumerate(clients)}
    backend = Settings.of(cfg).backend
    if backend.name == "inline":
        runtime = client_runtime(cfg, PartitionedData(dataset, partition, clients))
        return InlineGrid(
            nodes, ClientHost(runtime, states, make_aggregation(cfg, runtime.model, dataset)), run_id=RUN_ID
        )
    from fedcl.simulation.ray_grid import RayGrid, WorkerClass

    classes = backend.worker_classes
    return RayGrid(
        nodes,
        cfg,
        dataset,
        partition,
        base=_base_digest(cfg, dataset),
        workers=backend.workers,
        address=backend.address,
        gpus_per_worker=backend.gpus_per_worker,
        worker_classes=None if classes is None else [WorkerClass(**kind) for kind in classes],
        client_timeout=backend.client_timeout,
        run_id=RUN_ID,
        states=states,
    )


def _base_digest(cfg: dict[str, Any], dataset: Dataset) -> str:
    return make_model(cfg, dataset, make_stream(cfg, dataset), torch.device("cpu")).base_digest


def _fleet(cfg: dict[str, Any], dataset: Dataset, grid: Grid, *, resuming: bool, left: Collection[str]) -> FleetGrid:
    """Wait for the devices, and agree with each on the run's classes and fixed tensors."""
    agreed = Agreement(dataset.classes, dataset.input_shape, is_local(cfg), _base_digest(cfg, dataset))
    settings, clients = Settings.of(cfg), participants(cfg)
    backend = settings.backend
    fleet = FleetGrid(
        grid,
        clients,
        note=agreed.to_json(),
        code=__version__,
        base=agreed.base,
        timeout=backend.client_timeout,
        max_bytes=backend.max_message_mb << 20,
        owner=owners(),
        say=lambda line: print(f"fleet: {line}", file=sys.stderr, flush=True),
        refusals=refusals,
    )
    wanted = settings.rounds.min_replies if resuming else backend.min_clients or len(clients)
    fleet.join(at_least=wanted, seconds=backend.join_seconds, left=left)
    return fleet
