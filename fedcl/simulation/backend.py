"""The grid that ``backend=`` names, opened for one run and closed behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


from fedcl.client.state import MemoryStateStore
from fedcl.data.dataset import Dataset, Partition
from fedcl.simulation.compat import identity, quiet_environment
from fedcl.simulation.grid import BaseGrid, InlineGrid
from fedcl.simulation.host import ClientHost
from fedcl.wiring import client_ids, client_runtime, simulated_data

FIRST_NODE = 2  # Flower's node 1 is the server
RUN_ID = 1


def node_ids(clients: tuple[str, ...]) -> dict[str, int]:
    """Return the node number of each simulated client."""
    return {client: FIRST_NODE + i for i, client in enumerate(clients)}


@contextmanager
def open_backend(cfg: Mapping[str, Any], dataset: Dataset, partition: Partition) -> Iterator[BaseGrid]:
    """Open the grid of ``backend.name`` and close it however the run ends."""
    quiet_environment()
    config = dict(cfg)
    grid = _grid(config, dataset, partition)
    try:
        with identity(RUN_ID):
            yield grid
    finally:
        grid.close()


def _grid(cfg: dict[str, Any], dataset: Dataset, partition: Partition) -> BaseGrid:
    clients = client_ids(cfg)
    nodes = node_ids(clients)
    backend = cfg["backend"]
    if backend["name"] == "inline":
        runtime = client_runtime(cfg, simulated_data(dataset, partition, clients), dataset)
        return InlineGrid(nodes, ClientHost(runtime, MemoryStateStore()), run_id=RUN_ID)
    from fedcl.simulation.ray_grid import RayGrid

    worker_config = cfg if backend["gpus_per_worker"] else {**cfg, "device": "cpu"}
    return RayGrid(
        nodes,
        worker_config,
        dataset,
        partition,
        workers=backend["workers"],
        address=backend["address"],
        gpus_per_worker=backend["gpus_per_worker"],
        run_id=RUN_ID,
    )


