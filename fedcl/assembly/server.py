"""The server side: the strategy with its model, what it knows of local training, devices and trackers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedcl.assembly.client import learner_factories
from fedcl.assembly.components import checked, component
from fedcl.assembly.data import client_ids, participants
from fedcl.assembly.settings import Settings
from fedcl.assembly.tasks import make_stream
from fedcl.assembly.training import local_training
from fedcl.assembly.unlearning import bind, make_unlearner
from fedcl.client.engines import STEP_HOOKS
from fedcl.config.compose import TARGET_KEY, Config
from fedcl.config.instantiate import build
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.learner import overrides
from fedcl.contracts.statistics import Statistics
from fedcl.contracts.strategy import Collaboration, LocalWork, Part, Projection, ServerOptimizer, Staleness
from fedcl.contracts.unlearner import Unlearner
from fedcl.data.dataset import Dataset
from fedcl.models.flat import FlatModel
from fedcl.results.trackers import Tracker
from fedcl.scenario.task import Schedule, Stream
from fedcl.server.aggregation import Aggregation
from fedcl.server.arrivals import Device
from fedcl.server.flower_strategy import FlowerAdapter
from fedcl.server.strategy import Pipeline, check_payloads
from fedcl.server.validation import Expected, uploads

_ROLES: dict[str, type[Part]] = {
    "collaboration": Collaboration,
    "staleness": Staleness,
    "optimizer": ServerOptimizer,
    "projection": Projection,
}
# hooks by which a plugin makes local training something else than descent on the cross-entropy of the client's samples
_CHANGES_LOSS = (*STEP_HOOKS, "before_round")


def make_strategy(
    cfg: Config, model: FlatModel, nodes: Mapping[str, int], work: LocalWork | None = None
) -> Pipeline | FlowerAdapter:
    """Build the strategy: the pipeline of parts, bound to ``work`` if that is given, or a Flower strategy.

    A strategy has state and knows its ``nodes``, so each server needs its own.
    """
    node, settings = cfg["strategy"], Settings.of(cfg)
    strategy: Pipeline | FlowerAdapter
    if "stock" in node:
        stock = build(node["stock"], at="strategy.stock", trusted=cfg["trusted_packages"])
        selected = min(settings.rounds.clients_per_round or len(nodes), len(participants(cfg)))
        strategy = checked(FlowerAdapter, stock, seed=settings.seed, nodes=nodes, selected=selected)
    else:
        parts: dict[str, Any] = {
            name: component(cfg, f"strategy.{name}.server", role)
            for name, role in _ROLES.items()
            if node.get(name, {}).get("server") is not None
        }
        strategy = checked(Pipeline, **parts)
        _check_one_rate(cfg, settings, [*filter(None, [parts.get("staleness")]), make_unlearner(cfg)])
    checked(strategy.setup, model.spec)
    plugins = [make() for make in learner_factories(cfg).values()]
    for plugin in plugins:
        checked(plugin.check, model)
    checked(check_payloads, strategy.payloads + Statistics(plugins).payloads, plugins)
    if work is not None and isinstance(strategy, Pipeline):
        checked(strategy.bind, work)
    return strategy


def _check_one_rate(cfg: Config, settings: Settings, parts: Sequence[Part | Unlearner]) -> None:
    """Refuse parts that repeat local training with one learning rate, batch by batch, where it has others."""
    part = next((part for part in parts if type(part).bind not in (Part.bind, Unlearner.bind)), None)
    if part is None:
        return
    decay, accumulate = settings.task_decay, settings.training.accumulate
    for holds, fault, assumed in (
        (decay == 1.0, f"client.optimizer.task_decay={decay}: must be 1", "one learning rate"),
        (TARGET_KEY not in cfg["client"]["schedule"], "client/schedule: must be constant", "one learning rate"),
        (accumulate == 1, f"client.accumulate={accumulate}: must be 1", "one batch a step"),
    ):
        if not holds:
            raise ConfigError(f"{fault} with {type(part).__name__}, which assumes {assumed}")


def local_work(
    cfg: Config, model: FlatModel, stream: Stream, schedule: Schedule, input_shape: tuple[int, ...]
) -> LocalWork:
    """Return how clients train, for those parts of the server that repeat it."""
    plugins = [make() for make in learner_factories(cfg).values()]
    plain = not any(overrides(plugin, hook) for plugin in plugins for hook in _CHANGES_LOSS)
    return LocalWork(model, local_training(cfg, model.trainable), stream, input_shape, schedule.num_rounds, plain)


def make_aggregation(cfg: Config, model: FlatModel, dataset: Dataset) -> Aggregation | None:
    """Return how updates are summed where they are made; None if the strategy needs each of them."""
    if "stock" in cfg["strategy"]:
        return None
    settings, strategy = Settings.of(cfg), make_strategy(cfg, model, {})
    evaluated = make_stream(cfg, dataset).num_tasks if settings.evaluation.iterations else 0
    expected = Expected.of("train", model.spec, uploads(strategy.payloads), evaluated)
    return strategy.aggregation(expected, settings.max_update_norm)


def make_statistics(cfg: Config, model: FlatModel) -> Statistics:
    """Build what adds up clients' statistics, where the learner has any."""
    plugins = [make() for make in learner_factories(cfg).values()]
    return Statistics(plugins, model.copy()) if any(plugin.sums for plugin in plugins) else Statistics()


def check_unlearner(cfg: Config, model: FlatModel, work: LocalWork) -> None:
    """Refuse a model, or a learner, that the unlearner cannot work with."""
    unlearner = make_unlearner(cfg)
    checked(unlearner.check, model)
    missing = sorted(set(unlearner.takes_apart) - set(make_statistics(cfg, model).names))
    if missing:
        raise ConfigError(
            f"unlearner={type(unlearner).__name__}: takes apart the sums of {', '.join(missing)}, which a learner lets "
            f"the server add up; learner={', '.join(cfg['learner'])} does not"
        )
    bind(unlearner, work)


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


def make_trackers(cfg: Config) -> dict[str, Tracker]:
    """Build the trackers by name."""
    nodes = cfg["trackers"]
    return {name: build(node, at=f"trackers.{name}", trusted=cfg["trusted_packages"]) for name, node in nodes.items()}
