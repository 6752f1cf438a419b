"""The grid that ``backend=`` names, opened for one run and closed behind it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedcl.client.file_state import FileStateStore
from fedcl.client.state import ClientStateStore, MemoryStateStore
from fedcl.data.dataset import Dataset, Partition
from fedcl.messages import MESSAGE_TYPE, hello_content, read_hello
from fedcl.rules import ConfigError
from fedcl.server.selection import client_order
from fedcl.server.state import Compute, at_once
from fedcl.simulation.compat import identity, quiet_environment
from fedcl.simulation.grid import BaseGrid, InlineGrid
from fedcl.simulation.host import ClientHost
from fedcl.wiring import client_ids, client_runtime, simulated_data

FIRST_NODE = 2  # Flower's node 1 is the server
RUN_ID = 1
HELLO_SECONDS = 300.0
POLL_SECONDS = 0.5
FlowerGrid = Grid  # for those that pass a grid through without speaking Flower


@dataclass(frozen=True)
class Backend:
    """An open grid: which node is which client, whether it takes cohort messages, and the client states it keeps.

    ``states`` is None where clients keep their own, as devices do. ``compute`` runs the server's heavy functions,
    ``erase`` drops everything that is kept of clients; None where their devices must do so.
    """

    grid: Grid
    nodes: Mapping[str, int]
    cohorts: bool
    states: ClientStateStore | None
    compute: Compute = at_once
    erase: Callable[[Sequence[str]], None] | None = None


@contextmanager
def open_backend(
    cfg: Mapping[str, Any],
    dataset: Dataset,
    partition: Partition,
    grid: Grid | None = None,
    state_folder: Path | None = None,
) -> Iterator[Backend]:
    """Open the grid of ``backend.name``, or use the one that Flower has given, and close ours however the run ends.

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
        yield Backend(grid, roster(grid, config["num_clients"]), cohorts=False, states=None)
        return
    if config["backend"]["name"] == "flower":
        raise ConfigError("backend=flower: Flower starts such a run; use: flwr run . --run-config 'overrides=\"...\"'")
    own = _own_grid(config, dataset, partition, _state_store(config, state_folder))
    try:
        with identity(RUN_ID):
            yield Backend(own, own.nodes, True, own.states, own.compute, own.erase)
    finally:
        own.close()


def _state_store(cfg: dict[str, Any], folder: Path | None) -> ClientStateStore:
    if cfg["backend"]["state"] == "memory" or folder is None:
        return MemoryStateStore()
    shutil.rmtree(folder, ignore_errors=True)
    return FileStateStore(folder)


def _own_grid(cfg: dict[str, Any], dataset: Dataset, partition: Partition, states: ClientStateStore) -> BaseGrid:
    clients = client_ids(cfg)
    nodes = {client: FIRST_NODE + i for i, client in enumerate(clients)}
    backend = cfg["backend"]
    if backend["name"] == "inline":
        runtime = client_runtime(cfg, simulated_data(dataset, partition, clients), dataset)
        return InlineGrid(nodes, ClientHost(runtime, states), run_id=RUN_ID)
    from fedcl.simulation.ray_grid import RayGrid, WorkerClass

    classes = backend["worker_classes"]
    return RayGrid(
        nodes,
        cfg,
        dataset,
        partition,
        workers=backend["workers"],
        address=backend["address"],
        gpus_per_worker=backend["gpus_per_worker"],
        worker_classes=None if classes is None else [WorkerClass(**kind) for kind in classes],
        client_timeout=backend["client_timeout"],
        run_id=RUN_ID,
        states=states,
    )


def roster(grid: Grid, num_clients: int, *, seconds: float = HELLO_SECONDS) -> dict[str, int]:
    """Wait until ``num_clients`` nodes are there, ask each who it is, and return node by client in canonical order.

    Raises
    ------
    ConfigError
        If too few nodes come in time, or two call themselves the same.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise ConfigError(f"num_clients={num_clients}: only {len(nodes)} nodes came within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    messages = [Message(hello_content(), dst_node_id=node, message_type=MESSAGE_TYPE["hello"]) for node in nodes]
    clients: dict[str, int] = {}
    for reply in grid.send_and_receive(messages, timeout=seconds):
        if reply.has_error():
            raise ConfigError(f"node {reply.metadata.src_node_id} does not answer: {reply.error.reason}")
        client, _, _ = read_hello(reply.content)
        if client in clients:
            raise ConfigError(f"two nodes call themselves client {client!r}")
        clients[client] = reply.metadata.src_node_id
    return {client: clients[client] for client in sorted(clients, key=client_order)}
