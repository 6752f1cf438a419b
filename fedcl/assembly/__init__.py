"""From a configuration to objects: the one room that knows which key builds what, for server, workers and devices."""

from __future__ import annotations

from fedcl.assembly.client import client_runtime, learner_factories
from fedcl.assembly.data import check_dataset, client_ids, load_dataset, participants, split_dataset
from fedcl.assembly.model import check_model, device_of, make_model
from fedcl.assembly.server import (
    check_unlearner,
    local_work,
    make_aggregation,
    make_devices,
    make_statistics,
    make_strategy,
    make_trackers,
)
from fedcl.assembly.settings import Settings
from fedcl.assembly.tasks import make_schedule, make_steps, make_stream
from fedcl.assembly.training import local_training
from fedcl.assembly.unlearning import bind, make_queue, make_unlearner

__all__ = [
    "Settings",
    "bind",
    "check_dataset",
    "check_model",
    "check_unlearner",
    "client_ids",
    "client_runtime",
    "device_of",
    "learner_factories",
    "load_dataset",
    "local_training",
    "local_work",
    "make_aggregation",
    "make_devices",
    "make_model",
    "make_queue",
    "make_schedule",
    "make_statistics",
    "make_steps",
    "make_strategy",
    "make_stream",
    "make_trackers",
    "make_unlearner",
    "participants",
    "split_dataset",
]
