"""From a configuration to objects: the one place that knows which key builds what. Server and workers share it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedcl.base.randomness import key, numpy_generator
from fedcl.client.engines import STEP_HOOKS
from fedcl.client.local_data import PartitionedData
from fedcl.client.local_evaluation import LocalEvaluation
from fedcl.client.lr_schedule import TaskDecay
from fedcl.client.runtime import ClientRuntime
from fedcl.client.session import PluginFactories, check_learner
from fedcl.config.checks import is_local
from fedcl.config.compose import Config
from fedcl.config.instantiate import TARGET_KEY, build, builder, call, is_own
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import LocalTraining, Plugin
from fedcl.contracts.learner import overrides as defines
from fedcl.contracts.strategy import Collaboration, LocalWork, Part, Projection, ServerOptimizer, Staleness
from fedcl.contracts.unlearner import Unlearner
from fedcl.data.assembly import check_halves
from fedcl.data.dataset import Dataset, Indices, Partition
from fedcl.models.budget import TooLarge
from fedcl.models.check import check_network
from fedcl.models.flat import FlatModel
from fedcl.models.networks import build_model
from fedcl.results.trackers import Tracker
from fedcl.scenario.materialise import materialise, retained
from fedcl.scenario.schedule import Synchronous
from fedcl.scenario.task import Schedule, Stream, Task
from fedcl.server.arrivals import Device
from fedcl.server.curriculum import Curriculum
from fedcl.server.flower_strategy import FlowerAdapter
from fedcl.server.folding import Folding
from fedcl.server.statistics import Statistics
from fedcl.server.strategy import Pipeline, check_payloads
from fedcl.server.validation import Expected, uploads
from fedcl.unlearning.planned import planned_requests
from fedcl.unlearning.queue import Bounds, RequestQueue

T = TypeVar("T")
_ROLES: dict[str, type[Part]] = {
    "collaboration": Collaboration,
    "staleness": Staleness,
    "optimizer": ServerOptimizer,
    "projection": Projection,
}
PARTS = tuple(_ROLES)
# hooks by which a plugin makes local training something else than descent on the cross-entropy of the client's samples
_CHANGES_LOSS = (*STEP_HOOKS, "before_round")
_MOST_CLIENTS = 1_000_000  # where clients are more than samples
_MOST_TASKS = 10_000
_MOST_BATCH = 1 << 16


def device_of(cfg: Config) -> torch.device:
    """Return the device of ``device=auto|cpu|cuda``.

    Raises
    ------
    ConfigError
        If CUDA is asked for and there is none.
    """
    if cfg["device"] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device; use auto or cpu")
    use = cfg["device"] == "cuda" or (cfg["device"] == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use else "cpu")


def client_ids(cfg: Config) -> tuple[str, ...]:
    """Return every simulated client's id, in canonical order."""
    return tuple(str(i) for i in range(cfg["num_clients"]))


def load_dataset(cfg: Config) -> Dataset:
    """Load the data source."""
    dataset = _checked(lambda: call(_component(cfg, "data", "source"), at="data.source"))
    return _of_kind(Dataset, dataset, "data.source", cfg["data"]["source"])


def check_dataset(cfg: Config, dataset: Dataset) -> tuple[str, ...]:
    """Return what is to be said of the data, once a run.

    Raises
    ------
    ConfigError
        If a half of them has no samples, or none of some class, or there are less of them than clients or tasks need.
    """
    source, own = cfg["data"]["source"], is_local(cfg)
    limited = source.get("train_limit") is not None or source.get("test_limit") is not None
    said = _checked(lambda: check_halves(dataset, cfg["data"].get("root"), train=not own, limited=limited))
    samples = len(dataset.train)
    tasks = cfg["scenario"].get("num_tasks", 1)
    most = _MOST_TASKS if own else min(samples, _MOST_TASKS)
    if isinstance(tasks, int) and tasks > most:
        raise ConfigError(f"scenario.num_tasks={tasks}: must be at most {most}, there being {samples} train samples")
    batch = cfg["client"]["batch_size"]
    if batch > max(samples, _MOST_BATCH):  # some engines fill up the last batch
        raise ConfigError(f"client.batch_size={batch}: must be at most {max(samples, _MOST_BATCH)}")
    if cfg["num_clients"] > max(samples, _MOST_CLIENTS):
        raise ConfigError(
            f"num_clients={cfg['num_clients']}: must be at most {samples}, the train samples there are, or "
            f"{max(samples, _MOST_CLIENTS)} where clients share samples or bring their own"
        )
    return (*dataset.notes, *said)


def split_dataset(cfg: Config, dataset: Dataset) -> Partition:
    """Deal the samples to the clients, then leave out what ``exclude`` names: nobody else's part changes.

    Raises
    ------
    ConfigError
        If there is too little to deal, or ``exclude`` names what does not exist, or everything.
    """
    partitioner = _component(cfg, "data", "partition")
    dealt = _checked(
        functools.partial(
            call,
            partitioner,
            dataset.train.y,
            dataset.test.y,
            num_clients=cfg["num_clients"],
            num_classes=dataset.num_classes,
            rng=numpy_generator(cfg["seed"], "partition"),
            train_meta=dataset.train.meta,
            test_meta=dataset.test.meta,
            at="data.partition",
        )
    )
    partition = _of_kind(Partition, dealt, "data.partition", cfg["data"]["partition"])
    gone = _excluded(cfg, dataset)
    if not gone.any():
        return partition

    def keep(part: Indices) -> Indices:
        return part[~gone[part]]

    return replace(partition, train=tuple(keep(part) for part in partition.train))


def _excluded(cfg: Config, dataset: Dataset) -> NDArray[np.bool_]:
    """Return which train samples ``exclude`` names."""
    for what, count in (("samples", len(dataset.train.y)), ("classes", dataset.num_classes)):
        beyond = [value for value in cfg["exclude"][what] if value >= count]
        if beyond:
            raise ConfigError(f"exclude.{what}={beyond}: must be in 0..{count - 1}")
    gone = np.isin(dataset.train.y, np.asarray(cfg["exclude"]["classes"], dtype=np.int64))
    gone[np.asarray(cfg["exclude"]["samples"], dtype=np.int64)] = True
    if gone.all():
        raise ConfigError("exclude.samples, exclude.classes: leave no sample")
    return gone


def participants(cfg: Config) -> tuple[str, ...]:
    """Return the clients that take part: all but those excluded.

    Raises
    ------
    ConfigError
        If ``exclude.clients`` names a client that does not exist, or leaves none.
    """
    excluded = {str(client) for client in cfg["exclude"]["clients"]}
    everybody = client_ids(cfg)
    unknown = excluded - set(everybody)
    if unknown:
        raise ConfigError(f"exclude.clients={sorted(unknown)}: must be in 0..{len(everybody) - 1}")
    left = tuple(client for client in everybody if client not in excluded)
    if not left:
        raise ConfigError("exclude.clients: leaves no client")
    return left


def make_stream(cfg: Config, dataset: Dataset) -> Stream:
    """Build the stream of tasks."""
    stream: Stream = build(
        {key: value for key, value in cfg["scenario"].items() if key != "schedule"},
        at="scenario",
        trusted=cfg["trusted_packages"],
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        seed=cfg["seed"],
    )
    return stream


def make_schedule(cfg: Config, stream: Stream) -> Schedule:
    """Build the schedule of rounds: all clients together unless ``scenario.schedule`` says otherwise."""
    known = {
        "num_tasks": stream.num_tasks,
        "rounds_per_task": cfg["rounds_per_task"],
        "clients": client_ids(cfg),
        "seed": cfg["seed"],
    }
    node = cfg["scenario"].get("schedule")
    if node is None:
        schedule: Schedule = _checked(lambda: Synchronous(**known))
    else:
        schedule = build(node, at="scenario.schedule", trusted=cfg["trusted_packages"], **known)
    return schedule


def make_model(cfg: Config, dataset: Dataset, stream: Stream, device: torch.device) -> FlatModel:
    """Build the network with its initial weights, the same in every process."""
    factory = functools.partial(
        build,
        cfg["model"],
        at="model",
        trusted=cfg["trusted_packages"],
        input_shape=dataset.input_shape,
        heads=stream.heads,
    )
    try:
        module = build_model(factory, seed=key(cfg["seed"], "model"))
    except TooLarge as error:
        raise ConfigError(f"{_largest(cfg['model'])}: {error}") from error
    _of_kind(torch.nn.Module, module, "model", cfg["model"])
    model: FlatModel = _checked(functools.partial(FlatModel, module, device=device))
    return model


def check_model(cfg: Config, dataset: Dataset, stream: Stream, model: FlatModel) -> None:
    """Refuse a network of a user's own that would break what every run promises: equal bits, and nothing lost."""
    if is_own(cfg["model"]):
        _checked(lambda: check_network(model, dataset.input_shape, sum(stream.heads)))


def _largest(node: Mapping[str, Any]) -> str:
    """Return ``model.key=value`` of the largest number among a model's settings: the first to look at."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in node.items()}
    sizes = {name: max((size for size in found if type(size) is int), default=0) for name, found in lists.items()}
    name = max(sizes, key=sizes.__getitem__)
    return f"model.{name}={node[name]}"


def learner_factories(cfg: Config) -> PluginFactories:
    """Return a builder for each plugin: the learner's own, and the client halves of the strategy's parts."""
    nodes: dict[str, Mapping[str, Any]] = {f"learner.{name}": node for name, node in cfg["learner"].items()}
    for part in PARTS:
        half = cfg["strategy"].get(part, {}).get("client")
        if half is not None:
            nodes[f"strategy.{part}.client"] = half
    factories = {place: _plugin_factory(cfg, place, node) for place, node in nodes.items()}
    _checked(lambda: check_learner(factories))
    return factories


def _plugin_factory(cfg: Config, place: str, node: Mapping[str, Any]) -> Callable[[], Plugin]:
    make = builder(node, at=place, trusted=cfg["trusted_packages"])
    _of_kind(Plugin, make(), place, node)
    return make


def simulated_data(dataset: Dataset, partition: Partition, clients: tuple[str, ...]) -> PartitionedData:
    """Return the local data of simulated clients."""
    return PartitionedData(dataset, partition, clients)


def local_training(cfg: Config) -> LocalTraining:
    """Return how a client trains."""
    client = cfg["client"]
    how = {key: value for key, value in client["optimizer"].items() if key != "task_decay"}
    # configurations of old have no precision
    return LocalTraining(client["epochs"], client["batch_size"], **how, precision=cfg.get("precision", "float32"))


def task_decay(cfg: Config) -> float:
    """Return the factor by which the learning rate goes down from task to task; configurations of old have none."""
    return float(cfg["client"]["optimizer"].get("task_decay", 1.0))


def _check_one_rate(cfg: Config, parts: Sequence[Part | Unlearner]) -> None:
    """Refuse parts that play local training through with one learning rate where tasks have their own."""
    for part in parts if task_decay(cfg) != 1.0 else ():
        if type(part).bind not in (Part.bind, Unlearner.bind):
            raise ConfigError(
                f"client.optimizer.task_decay={task_decay(cfg)}: must be 1 with {type(part).__name__}, which reckons "
                "with one learning rate"
            )


def client_runtime(cfg: Config, data: PartitionedData, dataset: Dataset) -> ClientRuntime:
    """Build what runs clients' visits, in this process."""
    device = device_of(cfg)
    stream, training = make_stream(cfg, dataset), local_training(cfg)
    curriculum, every = Curriculum(stream, make_schedule(cfg, stream)), cfg["evaluation"]["iterations"]

    def local_evaluation(client: str, server_round: int, plugins: Sequence[Plugin]) -> LocalEvaluation:
        seen = curriculum.schedule.seen(client, server_round)
        tasks = [stream.test_task(task_id, after=seen) for task_id in seen]
        return LocalEvaluation(every=every, tasks=tasks, data=data, plugins=plugins)

    return ClientRuntime(
        unlearner=functools.partial(make_unlearner, cfg),
        model=make_model(cfg, dataset, stream, device),
        plugins=learner_factories(cfg),
        data=data,
        training=training,
        seed=cfg["seed"],
        num_columns=sum(stream.heads),
        personal_evaluation=cfg["evaluation"]["personal"],
        local_evaluation=local_evaluation if every else None,
        lr_schedule=None if task_decay(cfg) == 1.0 else TaskDecay(training.lr, task_decay(cfg), curriculum.schedule),
        engine=cfg["engine"],
    )


def make_trackers(cfg: Config) -> dict[str, Tracker]:
    """Build the trackers by name; configurations of old have none."""
    nodes = cfg.get("trackers", {})
    return {name: build(node, at=f"trackers.{name}", trusted=cfg["trusted_packages"]) for name, node in nodes.items()}


def make_unlearner(cfg: Config) -> Unlearner:
    """Build the unlearner, which has a half at clients and one at the server."""
    unlearner = build(cfg["unlearner"], at="unlearner", trusted=cfg["trusted_packages"])
    return _of_kind(Unlearner, unlearner, "unlearner", cfg["unlearner"])


def check_unlearner(cfg: Config, model: FlatModel) -> None:
    """Refuse a model, or a learner, that the unlearner cannot work with."""
    unlearner = make_unlearner(cfg)
    _checked(functools.partial(unlearner.check, model))
    missing = sorted(set(unlearner.takes_apart) - set(make_statistics(cfg, model).names))
    if missing:
        raise ConfigError(
            f"unlearner={type(unlearner).__name__}: takes apart the sums of {', '.join(missing)} that a learner lets "
            f"the server add up; learner={', '.join(cfg['learner'])} has none such"
        )


def make_queue(cfg: Config, stream: Stream, schedule: Schedule, dataset: Dataset) -> RequestQueue:
    """Build the queue of unlearning requests with those that the configuration plans.

    Raises
    ------
    ConfigError
        If one of them could never be served.
    """
    scopes, samples = make_unlearner(cfg).scopes, None if is_local(cfg) else len(dataset.train.y)
    bounds = Bounds(participants(cfg), dataset.num_classes, stream.num_tasks, scopes, samples)
    planned = planned_requests(cfg["unlearning"]["requests"], schedule)
    for place, (_, request) in enumerate(planned):
        why = bounds.refusal(request)
        if why is not None:
            raise ConfigError(f"unlearning.requests[{place}].{why}")
    return RequestQueue(bounds, planned, window=cfg["unlearning"]["window"])


def make_devices(cfg: Config) -> Callable[[str], Device]:
    """Return the device of each client."""
    family = build(
        cfg["devices"],
        at="devices",
        trusted=cfg["trusted_packages"],
        clients=client_ids(cfg),
        seed=cfg["seed"],
    )
    return functools.lru_cache(maxsize=None)(family.profile)


def make_steps(cfg: Config, dataset: Dataset, partition: Partition) -> Callable[[str, Task], int]:
    """Return how many optimizer steps a client's visit takes in a task: what its virtual duration is counted in."""
    parts = dict(zip(client_ids(cfg), partition.train, strict=True))
    client = cfg["client"]

    @functools.cache
    def steps(name: str, task: str) -> int:
        asked = Task.from_json(task)
        held = retained(asked, parts[name], dataset.train.y)
        num_examples = len(materialise(asked, dataset.train.y[held]))
        return int(client["epochs"]) * -(-num_examples // int(client["batch_size"]))

    return lambda name, task: steps(name, task.to_json())


def make_strategy(cfg: Config, model: FlatModel, nodes: Mapping[str, int]) -> Pipeline | FlowerAdapter:
    """Build the strategy: the pipeline of parts, or a stock Flower strategy."""
    node = cfg["strategy"]
    strategy: Pipeline | FlowerAdapter
    if "stock" in node:
        stock = build(node["stock"], at="strategy.stock", trusted=cfg["trusted_packages"])
        selected = min(cfg["clients_per_round"] or len(nodes), len(participants(cfg)))
        strategy = _checked(lambda: FlowerAdapter(stock, seed=cfg["seed"], nodes=nodes, selected=selected))
    else:
        parts = {
            part: _part(cfg, part, node[part]["server"])
            for part in PARTS
            if node.get(part, {}).get("server") is not None
        }
        strategy = _checked(lambda: Pipeline(**parts))
        _check_one_rate(cfg, [*(part for name, part in parts.items() if name == "staleness"), make_unlearner(cfg)])
    _checked(lambda: strategy.setup(model.spec))
    plugins = [make() for make in learner_factories(cfg).values()]
    for plugin in plugins:
        _checked(functools.partial(plugin.check, model))
    _checked(lambda: check_payloads(strategy.payloads + Statistics(plugins).payloads, plugins))
    return strategy


def _part(cfg: Config, name: str, node: Mapping[str, Any]) -> Any:
    place = f"strategy.{name}.server"
    return _of_kind(_ROLES[name], build(node, at=place, trusted=cfg["trusted_packages"]), place, node)


def probed_tasks(cfg: Config, stream: Stream) -> int:
    """Return of how many tasks clients may report their accuracy while they train: none unless the run asks for it."""
    return stream.num_tasks if cfg["evaluation"]["iterations"] else 0


def make_folding(cfg: Config, model: FlatModel, dataset: Dataset) -> Folding | None:
    """Return how replies can be folded where they are made, None where the strategy needs each of them."""
    if "stock" in cfg["strategy"]:
        return None
    strategy, num_tasks = make_strategy(cfg, model, {}), probed_tasks(cfg, make_stream(cfg, dataset))
    return strategy.folding(
        Expected.of("train", model.spec, uploads(strategy.payloads), num_tasks), cfg["max_update_norm"]
    )


def make_statistics(cfg: Config, model: FlatModel) -> Statistics:
    """Build what adds up clients' statistics, where the learner has any."""
    plugins = [make() for make in learner_factories(cfg).values()]
    return Statistics(plugins, model.copy()) if any(plugin.sums for plugin in plugins) else Statistics()


def local_work(
    cfg: Config, model: FlatModel, stream: Stream, schedule: Schedule, input_shape: tuple[int, ...]
) -> LocalWork:
    """Return how clients train, for those parts of the server that play it through."""
    plugins = [make() for make in learner_factories(cfg).values()]
    plain = not any(defines(plugin, hook) for plugin in plugins for hook in _CHANGES_LOSS)
    return LocalWork(model, local_training(cfg), stream, input_shape, schedule.num_rounds, plain)


def bind(part: Pipeline | FlowerAdapter | Unlearner, work: LocalWork) -> None:
    """Tell a strategy's parts, or an unlearner, how clients train; what they cannot work with is the user's to mend."""
    if not isinstance(part, FlowerAdapter):
        _checked(lambda: part.bind(work))


def _of_kind(kind: type[T], made: Any, place: str, node: Mapping[str, Any]) -> T:
    """Return what a component's code has made, if it is of the kind that stands in this place."""
    if not isinstance(made, kind):
        raise ConfigError(
            f"{place}.{TARGET_KEY}={node[TARGET_KEY]}: gives a {type(made).__name__}, must be a {kind.__name__}"
        )
    return made


def _component(cfg: Config, *path: str) -> Any:
    node: Any = cfg
    for name in path:
        node = node[name]
    return build(node, at=".".join(path), trusted=cfg["trusted_packages"])


def _checked(fn: Any) -> Any:
    """Call ``fn``; what it refuses with a ValueError is the user's to mend."""
    try:
        return fn()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
