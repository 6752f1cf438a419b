"""Tasks and rounds: the stream of tasks, who is in which task when, and how long a local round takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fedcl.assembly.components import checked
from fedcl.assembly.data import client_ids
from fedcl.assembly.settings import Settings
from fedcl.config.compose import Config
from fedcl.config.instantiate import build
from fedcl.data.dataset import Dataset, Partition
from fedcl.scenario.materialise import materialise, retained
from fedcl.scenario.schedule import Synchronous
from fedcl.scenario.task import Schedule, Stream, Task


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
    known: dict[str, Any] = {
        "num_tasks": stream.num_tasks,
        "rounds_per_task": cfg["rounds_per_task"],
        "clients": client_ids(cfg),
        "seed": cfg["seed"],
    }
    node = cfg["scenario"].get("schedule")
    if node is None:
        return checked(Synchronous, **known)
    schedule: Schedule = build(node, at="scenario.schedule", trusted=cfg["trusted_packages"], **known)
    return schedule


def make_steps(cfg: Config, dataset: Dataset, partition: Partition) -> Callable[[str, Task], int]:
    """Return how many batches a client computes in a round of a task: its virtual duration is counted in them."""
    parts = dict(zip(client_ids(cfg), partition.train, strict=True))
    training = Settings.of(cfg).training

    @functools.cache
    def steps(client: str, text: str) -> int:
        task = Task.from_json(text)
        held = retained(task, parts[client], dataset.train.y)
        num_examples = len(materialise(task, dataset.train.y[held]))
        return training.epochs * -(-num_examples // training.batch_size)

    return lambda client, task: steps(client, task.to_json())
