"""The client side: plugins, local data, and what runs clients' local rounds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fedcl.assembly.components import checked, of_kind
from fedcl.assembly.model import device_of, make_model
from fedcl.assembly.settings import Settings
from fedcl.assembly.tasks import make_schedule, make_stream
from fedcl.assembly.training import local_rates, local_training
from fedcl.assembly.unlearning import make_unlearner
from fedcl.client.local_data import PartitionedData
from fedcl.client.local_evaluation import LocalEvaluation
from fedcl.client.runtime import ClientRuntime
from fedcl.client.session import PluginFactories, check_learner
from fedcl.config.compose import Config
from fedcl.config.instantiate import builder
from fedcl.contracts.learner import Plugin
from fedcl.server.curriculum import Curriculum


def learner_factories(cfg: Config) -> PluginFactories:
    """Return a builder for each plugin: the learner's own, and the client halves of the strategy's parts."""
    nodes: dict[str, Mapping[str, Any]] = {f"learner.{name}": node for name, node in cfg["learner"].items()}
    for part in ("collaboration", "staleness", "optimizer", "projection"):
        half = cfg["strategy"].get(part, {}).get("client")
        if half is not None:
            nodes[f"strategy.{part}.client"] = half
    factories = {}
    for place, node in nodes.items():
        factories[place] = make = builder(node, at=place, trusted=cfg["trusted_packages"])
        of_kind(Plugin, make(), place, node)
    checked(check_learner, factories)
    return factories


def client_runtime(cfg: Config, data: PartitionedData) -> ClientRuntime:
    """Build what runs clients' local rounds on ``data``, in this process."""
    settings, stream = Settings.of(cfg), make_stream(cfg, data.dataset)
    curriculum, every = Curriculum(stream, make_schedule(cfg, stream)), settings.evaluation.iterations

    def local_evaluation(client: str, server_round: int, plugins: Sequence[Plugin]) -> LocalEvaluation:
        seen = curriculum.schedule.seen(client, server_round)
        tasks = [stream.test_task(task_id, after=seen) for task_id in seen]
        return LocalEvaluation(every=every, tasks=tasks, data=data, plugins=plugins)

    return ClientRuntime(
        unlearner=functools.partial(make_unlearner, cfg),
        model=make_model(cfg, data.dataset, stream, device_of(cfg)),
        plugins=learner_factories(cfg),
        data=data,
        training=local_training(cfg),
        seed=settings.seed,
        num_columns=sum(stream.heads),
        personal_evaluation=settings.evaluation.personal,
        local_evaluation=local_evaluation if every else None,
        lr_schedule=local_rates(cfg, curriculum.schedule),
        engine=settings.engine,
    )
