"""The unlearner, and the queue of the requests that a run plans."""

from __future__ import annotations

from fedcl.assembly.components import checked, component
from fedcl.assembly.data import participants
from fedcl.assembly.settings import Settings
from fedcl.config.checks import is_local
from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.strategy import LocalWork
from fedcl.contracts.unlearner import Unlearner
from fedcl.data.dataset import Dataset
from fedcl.scenario.task import Schedule, Stream
from fedcl.unlearning.queue import Bounds, RequestQueue
from fedcl.unlearning.sources import RequestSource, planned_requests


def make_unlearner(cfg: Config) -> Unlearner:
    """Build the unlearner, which has a half at clients and one at the server."""
    return component(cfg, "unlearner", Unlearner)


def bind(unlearner: Unlearner, work: LocalWork) -> None:
    """Tell an unlearner how clients train; ConfigError if it cannot work with that."""
    checked(unlearner.bind, work)


def make_queue(
    cfg: Config, stream: Stream, schedule: Schedule, dataset: Dataset, *sources: RequestSource, retrains: bool = True
) -> RequestQueue:
    """Build the queue of unlearning requests: those that the configuration plans, then those of ``sources``.

    ``retrains`` says whether retraining is possible here.

    Raises
    ------
    ConfigError
        If a planned one could never be processed.
    """
    unlearner, samples = make_unlearner(cfg), None if is_local(cfg) else len(dataset.train.y)
    scopes = frozenset() if unlearner.retrains and not retrains else unlearner.scopes
    bounds = Bounds(participants(cfg), dataset.num_classes, stream.num_tasks, scopes, samples)
    settings = Settings.of(cfg).unlearning
    planned = planned_requests(settings.requests, schedule)
    if planned.requests and not scopes:
        raise ConfigError("unlearner: retraining needs a simulation; choose another unlearner for devices")
    for place, (_, request) in enumerate(planned.requests):
        why = bounds.refusal(request)
        if why is not None:
            raise ConfigError(f"unlearning.requests[{place}].{why}")
    return RequestQueue(bounds, (planned, *sources), window=settings.window)
