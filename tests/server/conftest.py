from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.base.randomness import numpy_generator
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import MemoryStateStore
from fedcl.contracts.learner import LocalTraining, Plugin
from fedcl.data.dataset import ArrayDataset, Dataset, Partition
from fedcl.models.flat import FlatModel
from fedcl.models.networks import MLP, build_model
from fedcl.scenario.schedule import Synchronous
from fedcl.scenario.streams import ClassIncremental
from fedcl.server.arrivals import Arrivals, VirtualClock
from fedcl.server.exchange import Exchange
from fedcl.server.loop import Server
from fedcl.server.rounds import RoundOptions
from fedcl.server.state import LoopOptions
from fedcl.server.strategy import Pipeline, Strategy
from fedcl.simulation.compat import identity
from fedcl.simulation.devices import DeviceProfile
from fedcl.simulation.grid import InlineGrid
from fedcl.simulation.host import ClientHost
from strategies.collaboration.fedavg import FedAvg

CLIENTS = ("0", "1", "2", "3")
NODES = {client: 100 + int(client) for client in CLIENTS}
SEED = 7


@dataclass
class Notes:
    """What a run writes down, kept in lists."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def row(self, **row: Any) -> None:
        self.rows.append(row)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def timing(self, round: int, name: str, seconds: float) -> None:
        assert seconds >= 0


def make_dataset() -> Dataset:
    """Four classes of four features; ten train samples a client, the last client has those of classes 0 and 1 only."""
    rng = numpy_generator("server tests")
    y = np.tile(np.arange(4), 10)
    y[30:] %= 2
    x = (rng.standard_normal((40, 4)) + 2 * np.eye(4)[y]).astype(np.float32)
    half = ArrayDataset(x, y.astype(np.int64))
    return Dataset(half, half, ("a", "b", "c", "d"))


def make_model() -> FlatModel:
    def network() -> MLP:
        return MLP(input_shape=(4,), heads=(4,), hidden=(3,))

    return FlatModel(build_model(network, seed=1))


@dataclass
class System:
    """A whole run in one process: real clients, real messages, four clients in two tasks of two rounds."""

    server: Server
    exchange: Exchange
    grid: InlineGrid
    notes: Notes
    runtime: ClientRuntime
    store: MemoryStateStore

    def run(self) -> System:
        self.server.run(lambda server_round: None)
        return self

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.notes.events if event["kind"] == kind]


Build = Callable[..., System]


@pytest.fixture
def build() -> Iterator[Build]:
    """Return a function that builds a :class:`System`; runtime and host may be replaced by subclasses."""

    def make(
        *,
        strategy: Strategy | None = None,
        plugins: Mapping[str, Callable[[], Plugin]] | None = None,
        runtime_class: type[ClientRuntime] = ClientRuntime,
        host_class: type[ClientHost] = ClientHost,
        cohorts: bool = True,
        device: Callable[[str], DeviceProfile] = lambda client: DeviceProfile(),
        **options: Any,
    ) -> System:
        dataset, model = make_dataset(), make_model()
        parts = tuple(np.arange(10 * k, 10 * k + 10) for k in range(4))
        store = MemoryStateStore()
        runtime = runtime_class(
            model=make_model(),
            plugins=plugins or {},
            data=PartitionedData(dataset, Partition(parts, parts), CLIENTS),
            training=LocalTraining(epochs=1, batch_size=4, lr=0.1),
            seed=SEED,
            num_columns=4,
        )
        grid = InlineGrid(NODES, host_class(runtime, store))
        if strategy is None:
            strategy = Pipeline(collaboration=FedAvg())
            strategy.setup(model.spec)
        notes = Notes()
        exchange = Exchange(
            grid=grid,
            nodes=NODES,
            spec=model.spec,
            log=notes,
            payloads=strategy.payloads,
            cohorts=cohorts,
            commit_state=store.commit,
        )
        stream = ClassIncremental(num_tasks=2, num_classes=4, input_shape=(4,), seed=0)
        rounds = {field.name: options.pop(field.name) for field in fields(RoundOptions) if field.name in options}
        arrivals = Arrivals(exchange, VirtualClock(), SEED, device, lambda client, task: 3)
        server = Server(
            strategy=strategy,
            exchange=exchange,
            arrivals=arrivals,
            schedule=Synchronous(num_tasks=2, rounds_per_task=2),
            stream=stream,
            spec=model.spec,
            initial=model.vector(),
            clients=CLIENTS,
            record=notes,
            options=LoopOptions(rounds=RoundOptions(seed=SEED, **rounds), **options),
        )
        return System(server, exchange, grid, notes, runtime, store)

    torch.set_num_threads(1)
    with identity(1):
        yield make
