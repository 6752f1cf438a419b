"""The process that a Ray worker is: one client host, kept for the whole run."""

from __future__ import annotations

import platform
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import RecordDict

from fedcl.base.tree import pack, unpack
from fedcl.client.state import MemoryStateStore
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import State
from fedcl.data.dataset import Dataset, Partition
from fedcl.simulation.compat import quiet_environment
from fedcl.simulation.host import ClientHost, Outcome

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
        self,
        config: dict[str, Any],
        dataset: Dataset,
        partition: Partition,
        clients: tuple[str, ...],
        paths: list[str],
        base: str = "",
    ) -> None:
        torch.set_num_threads(1)
        # the driver decides whether to stop: a client's own KeyboardInterrupt must not look like a person's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        quiet_environment()
        sys.path.extend(path for path in paths if path not in sys.path)
        from fedcl.assembly import client_runtime, make_aggregation  # after the user's own modules can be found
        from fedcl.client.local_data import PartitionedData

        runtime = client_runtime(config, PartitionedData(dataset, partition, clients))
        if runtime.model.base_digest != base:
            raise ConfigError(
                f"model: a worker on {platform.node()} has other fixed tensors than the server: model.pretrained must "
                "be the same file on every node"
            )
        self._data = runtime.data
        self._store = _NotingStore()
        self._host = ClientHost(runtime, self._store, make_aggregation(config, runtime.model, dataset))
        self._records: OrderedDict[str, Any] = OrderedDict()

    def ready(self) -> str:
        """Return the node's id once the worker is built; a worker that cannot be built raises here."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(
        self, message_id: str, wire: dict[str, Any], states: dict[str, tuple[int, Packed]]
    ) -> tuple[Outcome, dict[str, tuple[int, Packed]]]:
        """Run one instruction; return its replies, and the states staged meanwhile."""
        for client, visit, state in unpack_states(states):
            self._store.stage(client, visit, state)
        self._store.noted.clear()
        content = RecordDict({name: self._record(record) for name, record in wire.items()})
        outcome = list(self._host.run(content))
        return outcome, pack_states((c, v, self._store.load(c, v)) for c, v in self._store.noted.items())

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
    """A store that records what is staged, for the driver."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, int] = {}

    def stage(self, client: str, visit: int, state: Any) -> None:
        """Stage and note."""
        super().stage(client, visit, state)
        self.noted[client] = visit


def pack_states(states: Iterable[tuple[str, int, State]]) -> dict[str, tuple[int, Packed]]:
    """Return (client, visit, state) as JSON values and numpy arrays, which cross processes without a copy.

    A state that clients share is packed once, and crosses once.
    """
    packed: dict[int, Packed] = {}
    found = {}
    for client, visit, state in states:
        if id(state) not in packed:
            tree, tensors = pack(state)
            packed[id(state)] = tree, {name: tensor.numpy() for name, tensor in tensors.items()}
        found[client] = visit, packed[id(state)]
    return found


def unpack_states(packed: Mapping[str, tuple[int, Packed]]) -> Iterator[tuple[str, int, State]]:
    """Yield (client, visit, state) again: arrays are copied, and a state without any is shared by those who did."""
    shared: dict[int, State] = {}
    for client, (visit, one) in packed.items():
        tree, arrays = one
        if id(one) in shared:
            yield client, visit, shared[id(one)]
            continue
        state = unpack(tree, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        if not arrays:
            shared[id(one)] = state
        yield client, visit, state
