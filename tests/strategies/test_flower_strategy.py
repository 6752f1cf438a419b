from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Krum
from numpy.typing import NDArray

from fedcl import assembly
from fedcl.base.tree import pack, unpack
from fedcl.client.local_data import PartitionedData
from fedcl.client.state import MemoryStateStore
from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.messages import VISIT, Request, visit_record
from fedcl.messages.arrays import FLAT, vector_record
from fedcl.results import load
from fedcl.results.checkpoint import Checkpoints
from fedcl.runs.experiment import resume, run
from fedcl.server.arrivals import Arrivals, VirtualClock
from fedcl.server.exchange import Exchange
from fedcl.server.flower_strategy import FlowerAdapter
from fedcl.server.loop import Server
from fedcl.server.rounds import RoundOptions
from fedcl.server.state import LoopOptions
from fedcl.simulation.backend import open_backend
from fedcl.simulation.compat import identity
from fedcl.simulation.devices import DeviceProfile
from fedcl.simulation.host import ClientHost, Failure

RunExperiment = Callable[..., Path]
ROUNDS = 3
SMALL = ["num_clients=5", "scenario=class_incremental", "rounds_per_task=[2,1]", "scenario.num_tasks=2"]
NODES = {str(i): 2 + i for i in range(5)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Nothing:
    """Takes notes of nothing."""

    def row(self, **row: Any) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        raise AssertionError(f"{kind}: {fields}")

    def timing(self, round: int, name: str, seconds: float) -> None:
        pass


class World:
    """Digits dealt to five clients as two tasks, with our round loop around a strategy of Flower's."""

    def __init__(self, *overrides: str) -> None:
        chosen = ["backend=inline", "strategy=flower_fedavg", *SMALL, *overrides]
        self.cfg = compose(chosen)
        self.dataset = assembly.load_dataset(self.cfg)
        self.partition = assembly.split_dataset(self.cfg, self.dataset)
        self.stream = assembly.make_stream(self.cfg, self.dataset)
        self.schedule = assembly.make_schedule(self.cfg, self.stream)
        self.model = assembly.make_model(self.cfg, self.dataset, self.stream, torch.device("cpu"))
        self.initial = self.model.vector()

    @contextmanager
    def server(self, strategy: Any) -> Iterator[Server]:
        with open_backend(self.cfg, self.dataset, self.partition) as backend:
            stock = FlowerAdapter(strategy, seed=0, nodes=backend.nodes, selected=5)
            stock.setup(self.model.spec)
            exchange = Exchange(backend.grid, backend.nodes, self.model.spec, Nothing(), cohorts=backend.cohorts)
            yield Server(
                strategy=stock,
                exchange=exchange,
                arrivals=Arrivals(exchange, VirtualClock(), 0, lambda client: DeviceProfile(), lambda client, task: 1),
                schedule=self.schedule,
                stream=self.stream,
                spec=self.model.spec,
                initial=self.initial,
                clients=tuple(backend.nodes),
                record=Nothing(),
                options=LoopOptions(rounds=RoundOptions(seed=0)),
            )

    def run(self, strategy: Any) -> list[NDArray[np.float32]]:
        """Return the global model after each round."""
        models = []
        with self.server(strategy) as server:
            server.run(lambda server_round: models.append(server.global_model.numpy().copy()))
        return models

    def host(self) -> ClientHost:
        data = PartitionedData(self.dataset, self.partition, tuple(NODES))
        return ClientHost(assembly.client_runtime(self.cfg, data), MemoryStateStore())


class FlowersSide(Grid):
    """A grid for ``Strategy.start``: adds who, when and which task to each message, and answers in client order."""

    def __init__(self, world: World) -> None:
        self.world, self.host = world, world.host()
        self.exchanges = 0
        self.clients = {node: client for client, node in NODES.items()}

    def get_node_ids(self) -> list[int]:
        return list(NODES.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        if not asked:
            return []  # no evaluation
        server_round = self.exchanges
        self.exchanges += 1
        task = self.world.stream.train_task(self.world.schedule.position("0", server_round).task_id)
        replies = []
        for message in asked:
            client = self.clients[message.metadata.dst_node_id]
            request = Request("train", client, server_round, server_round - 1, server_round, server_round, task)
            content = RecordDict(dict(message.content))
            content[VISIT] = visit_record([request])
            ((_, reply),) = self.host.run(content)
            assert not isinstance(reply, Failure)
            replies.append(Message(reply, reply_to=message))
        return replies

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def start(world: World, strategy: Any) -> list[NDArray[np.float32]]:
    """Let Flower play its own rounds; return the global model after each."""
    models = []

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            models.append(arrays[FLAT].numpy())
        return MetricRecord()

    with identity(1):
        initial = vector_record(world.initial, live=False)
        strategy.start(FlowersSide(world), initial, num_rounds=ROUNDS, evaluate_fn=note)
    return models


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: FedAvg(fraction_train=1.0, fraction_evaluate=0.0),
        lambda: Krum(num_malicious_nodes=1, fraction_evaluate=0.0),
        lambda: FedAvgM(server_learning_rate=1.0, server_momentum=0.5, fraction_evaluate=0.0),
    ],
    ids=["FedAvg", "Krum", "FedAvgM"],
)
def test_our_loop_and_flowers_own_give_the_same_bits(strategy: Callable[[], Any]) -> None:
    world = World()
    ours, flowers = world.run(strategy()), start(world, strategy())
    assert len(ours) == len(flowers) == ROUNDS
    for mine, theirs in zip(ours, flowers, strict=True):
        assert mine.dtype == theirs.dtype == np.float32
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(ours[0], ours[1])


def test_krum_returns_one_clients_model() -> None:
    world = World()
    with world.server(Krum(num_malicious_nodes=1, fraction_evaluate=0.0)) as server:
        returned = {}
        aggregate = server.strategy.aggregate

        def noting(positions: Any, view: Any, running: Any = None) -> Any:
            returned.update({update.client: update.model for update in positions})
            changed = aggregate(positions, view)
            assert any(torch.equal(changed["*"], model) for model in returned.values())
            return changed

        server.strategy.aggregate = noting  # type: ignore[method-assign]
        server.run(lambda server_round: None)
    assert len(returned) == 5


@pytest.mark.parametrize("choice", ["fedavg", "krum", "fedadam"])
def test_a_run_over_a_stream_of_classes(choice: str, run_experiment: RunExperiment) -> None:
    folder = run_experiment(choice, *SMALL, f"strategy=flower_{choice}", "evaluation.personal=true")
    finished = load(folder)
    assert finished.status == "done"
    assert finished.summary["rounds"] == 3
    assert finished.summary["accuracy/average"] > 0.05  # of the classes seen last; nothing here holds on to the first
    events = (folder / "events.jsonl").read_text()
    assert "reply_rejected" not in events
    assert "client_failed" not in events


class Killed(Exception):
    """The run dies here."""


@pytest.mark.parametrize("choice", ["fedavg", "krum", "fedadam"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    choice: str,
    tmp_path: Path,
    run_experiment: RunExperiment,
    metrics_hash: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = [*SMALL, f"strategy=flower_{choice}", "clients_per_round=3", "learner=er", "checkpoint.min_seconds=0"]
    whole = run_experiment("whole", *chosen)
    save = Checkpoints.save

    def dying(self: Checkpoints, server_round: int, *args: Any, **options: Any) -> None:
        save(self, server_round, *args, **options)
        if server_round == 1:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", dying)
        with pytest.raises(Killed):
            run_experiment("cut", *chosen)
    assert load(tmp_path / "cut").status == "failed"
    resume(tmp_path / "cut", force=False, quiet=True)
    assert metrics_hash(tmp_path / "cut") == metrics_hash(whole)


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda: FedAdam(eta=0.05, fraction_evaluate=0.0), ["m_t", "v_t"]),
        (lambda: FedYogi(eta=0.05, fraction_evaluate=0.0), ["m_t", "v_t"]),
        (lambda: FedAvgM(server_momentum=0.9, fraction_evaluate=0.0), ["momentum_vector"]),
    ],
    ids=["FedAdam", "FedYogi", "FedAvgM"],
)
def test_moments_survive_storage(make: Callable[[], Any], moments: list[str]) -> None:
    world = World()
    whole = world.run(make())
    first, second = make(), make()

    class Stop(Exception):
        pass

    def stop(server_round: int) -> None:
        if server_round == 1:
            raise Stop

    with world.server(first) as server:
        with pytest.raises(Stop):
            server.run(stop)
        server.state.next_round = 2
        tree, tensors = pack(server.state_dict())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    models = []
    with world.server(second) as server:
        server.load_state_dict(unpack(tree, kept))
        for name in moments:
            ours, theirs = vars(second)[name], vars(first)[name]
            assert type(ours) is type(theirs)
            arrays = (
                zip(ours.values(), theirs.values(), strict=True)
                if isinstance(ours, dict)
                else zip(ours, theirs, strict=True)
            )
            for mine, saved in arrays:
                assert isinstance(mine, np.ndarray)
                assert np.array_equal(mine, saved)
                assert mine.any()
        server.run(lambda server_round: models.append(server.global_model.numpy().copy()))
    assert np.array_equal(models[-1], whole[-1])
    # without the moments it would have gone elsewhere
    with world.server(make()) as server:
        server.load_state_dict(unpack(tree, kept))
        for name in moments:
            setattr(server.strategy.strategy, name, None)  # type: ignore[attr-defined]
        server.run(lambda server_round: models.append(server.global_model.numpy().copy()))
    assert not np.array_equal(models[-1], whole[-1])


def test_a_strategy_that_keeps_its_own_copy_of_the_model_sees_an_edit() -> None:
    world = World()
    edited = torch.zeros_like(world.initial)
    with world.server(FedAvgM(server_learning_rate=1e-6, server_momentum=0.9, fraction_evaluate=0.0)) as server:

        def edit(server_round: int) -> None:
            if server_round == 1:
                server.edit({"*": edited})

        server.run(edit)
        assert float(server.global_model.abs().max()) < 1e-3  # a tiny step from the edited model, not from its own


def test_replies_whose_metrics_differ_are_aggregated_by_what_they_share(run_experiment: RunExperiment) -> None:
    # some clients hold so little that they have no test samples of a task: they report no accuracy of their own
    folder = run_experiment(
        "run",
        *SMALL,
        "strategy=flower_fedavg",
        "evaluation.personal=true",
        "num_clients=20",
        "data.partition.alpha=0.1",
    )
    metrics = load(folder).metrics
    assert load(folder).status == "done"
    assert len(metrics[metrics.phase == "received"]) < len(
        metrics[(metrics.phase == "train") & (metrics.name == "loss")]
    )


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["strategy.stock.min_available_nodes=6"], r"strategy\.stock\.min_available_nodes=6: must be <= 5"),
        (
            ["strategy.stock.min_train_nodes=3", "clients_per_round=2"],
            r"strategy\.stock\.min_train_nodes=3: must be <= 2",
        ),
        (
            ["strategy.stock.min_train_nodes=4", "exclude.clients=['0','1']"],
            r"strategy\.stock\.min_train_nodes=4: must be <= 3",
        ),
        (["strategy.stock._target_=flwr.app.RecordDict"], "RecordDict"),
    ],
)
def test_a_strategy_that_could_never_start_is_refused_before_the_run(
    overrides: list[str], names: str, tmp_path: Path
) -> None:
    chosen = ["backend=inline", "compare_with=null", *SMALL, "strategy=flower_fedavg", *overrides]
    with pytest.raises(ConfigError, match=names):
        run(compose([*chosen, f"run_dir={tmp_path / 'run'}"]), chosen, [], quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_no_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="ConfigRecord is not a flwr"):
        FlowerAdapter(ConfigRecord(), seed=0, nodes=NODES, selected=5)


def test_a_strategy_that_needs_more_of_its_clients_is_refused() -> None:
    with (
        World().server(FedProx(proximal_mu=0.1, fraction_evaluate=0.0)) as server,
        pytest.raises(ConfigError, match="proximal-mu"),
    ):
        server.run(lambda server_round: None)


def test_a_plugin_that_uploads_is_refused_with_a_stock_strategy(run_experiment: RunExperiment, tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "drift.yaml").write_text(
        "# Uploads.\ndrift:\n  _target_: clients.strategies.scaffold.Scaffold\n"
    )
    with pytest.raises(ConfigError, match="Scaffold exchanges 'control'"):
        run_experiment("run", *SMALL, "strategy=flower_fedavg", "learner=drift", config_dirs=[tmp_path])


def test_flowers_sampling_leaves_pythons_random_stream_alone() -> None:
    import random

    world = World()
    random.seed(5)
    first = world.run(FedAvg(fraction_train=0.5, fraction_evaluate=0.0))
    drawn = random.random()
    random.seed(5)
    assert random.random() == drawn
    random.seed(6)
    second = world.run(FedAvg(fraction_train=0.5, fraction_evaluate=0.0))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
