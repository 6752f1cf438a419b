"""The process that a Ray worker is: one client host, kept for the whole run."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.app import RecordDict

from fedcl.client.state import MemoryStateStore
from fedcl.data.dataset import Dataset, Partition
from fedcl.simulation.compat import quiet_environment
from fedcl.simulation.host import ClientHost, Outcome
from fedcl.tree import pack, unpack

Packed = tuple[Any, dict[str, Any]]  # JSON values, and numpy arrays by path

CACHED_RECORDS = 8


class Shared:
    """A record that was put into the object store once and is fetched once by each worker."""

    def __init__(self, key: str, ref: Any) -> None:
        self.key = key
        self.ref = ref


class Worker:
    """Runs instructions one at a time. Its copies of client states are a cache: the driver owns them."""

    def __init__(
        self, config: dict[str, Any], dataset: Dataset, partition: Partition, clients: tuple[str, ...], paths: list[str]
    ) -> None:
        torch.set_num_threads(1)
        quiet_environment()
        sys.path.extend(path for path in paths if path not in sys.path)
        from fedcl.wiring import (  # after the user's own modules can be found
            client_runtime,
            make_folding,
            simulated_data,
        )

        runtime = client_runtime(config, simulated_data(dataset, partition, clients), dataset)
        self._data = runtime.data
        self._store = _NotingStore()
        self._host = ClientHost(runtime, self._store, make_folding(config, runtime.model))
        self._records: OrderedDict[str, Any] = OrderedDict()

    def ready(self) -> str:
        """Return the node's id once the worker is built; a worker that cannot be built raises here."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(
        self, message_id: str, wire: dict[str, Any], states: dict[str, tuple[int, Packed]]
    ) -> tuple[Outcome, dict[str, tuple[int, Packed]]]:
        """Run one instruction; return its replies, and the states staged meanwhile."""
        for client, (visit, (tree, arrays)) in states.items():
            tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            self._store.stage(client, visit, unpack(tree, tensors))
        self._store.noted.clear()
        content = RecordDict({name: self._record(record) for name, record in wire.items()})
        outcome = list(self._host.run(content))
        return outcome, {c: (v, pack_numpy(self._store.load(c, v))) for c, v in self._store.noted.items()}

    def compute(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a pure function for the server."""
        return fn(*args)

    def erase(self, clients: Sequence[str]) -> None:
        """Drop all copies kept here of the states and samples of ``clients``, and every record kept ready."""
        for client in clients:
            self._store.drop(client)
            self._data.drop(client)
        self._store.noted.clear()
        self._records.clear()  # one of them may be a client's own model; those still needed are fetched again

    def _record(self, record: Any) -> Any:
        if not isinstance(record, Shared):
            return record
        import ray

        if record.key not in self._records:
            self._records[record.key] = ray.get(record.ref)
            while len(self._records) > CACHED_RECORDS:
                self._records.popitem(last=False)
        return self._records[record.key]


class _NotingStore(MemoryStateStore):
    """A store that notes what is staged, so that the driver can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, int] = {}

    def stage(self, client: str, visit: int, state: Any) -> None:
        """Stage and note."""
        super().stage(client, visit, state)
        self.noted[client] = visit


def pack_numpy(state: Any) -> Packed:
    """Return a state as JSON values and numpy arrays, which cross processes without a copy."""
    tree, tensors = pack(state)
    return tree, {name: tensor.numpy() for name, tensor in tensors.items()}
