"""Data and clients: what is loaded, who takes part, and which samples each client holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedcl.assembly.components import checked, node_at, of_kind
from fedcl.assembly.settings import Settings
from fedcl.assembly.training import augmentation
from fedcl.base.randomness import numpy_generator
from fedcl.config.checks import is_local
from fedcl.config.compose import Config
from fedcl.config.instantiate import build, call
from fedcl.config.value_rules import ConfigError
from fedcl.data.assembly import check_halves
from fedcl.data.dataset import Dataset, Indices, Partition
from fedcl.data.parts import PartitionInput

_MOST_CLIENTS = 1_000_000  # where clients are more than samples
_MOST_TASKS = 10_000
_MOST_BATCH = 1 << 16


def load_dataset(cfg: Config) -> Dataset:
    """Load the data source."""
    node, place = node_at(cfg, "data.source"), "data.source"
    source = build(node, at=place, trusted=cfg["trusted_packages"])
    return of_kind(Dataset, checked(call, source, at=place), place, node)


def check_dataset(cfg: Config, dataset: Dataset) -> tuple[str, ...]:
    """Return notes on the data, to be printed once a run.

    Raises
    ------
    ConfigError
        If one half has no samples, or none of some class, or there are fewer samples than clients or tasks need.
    """
    source, own, settings = cfg["data"]["source"], is_local(cfg), Settings.of(cfg)
    limited = source.get("train_limit") is not None or source.get("test_limit") is not None
    notes = checked(check_halves, dataset, cfg["data"].get("root"), train=not own, limited=limited)
    samples = len(dataset.train)
    tasks = cfg["scenario"].get("num_tasks", 1)
    most = _MOST_TASKS if own else min(samples, _MOST_TASKS)
    if isinstance(tasks, int) and tasks > most:
        raise ConfigError(f"scenario.num_tasks={tasks}: must be at most {most}, there being {samples} train samples")
    augment = augmentation(cfg)
    if augment is not None:
        checked(augment.check, dataset.input_shape)
    batch = settings.training.batch_size
    if batch > max(samples, _MOST_BATCH):  # some engines fill up the last batch
        raise ConfigError(f"client.batch_size={batch}: must be at most {max(samples, _MOST_BATCH)}")
    if settings.num_clients > max(samples, _MOST_CLIENTS):
        raise ConfigError(
            f"num_clients={settings.num_clients}: must be at most {samples}, the train samples there are, or "
            f"{max(samples, _MOST_CLIENTS)} where clients share samples or bring their own"
        )
    return (*dataset.notes, *notes)


def split_dataset(cfg: Config, dataset: Dataset) -> Partition:
    """Split the samples among the clients, then leave out what ``exclude`` names: no other client's part changes.

    Raises
    ------
    ConfigError
        If there are too few samples, or ``exclude`` names what does not exist, or everything.
    """
    settings, node, place = Settings.of(cfg), node_at(cfg, "data.partition"), "data.partition"
    train, test, rng = dataset.train, dataset.test, numpy_generator(settings.seed, "partition")
    given = PartitionInput(train.y, test.y, settings.num_clients, dataset.num_classes, rng, train.meta, test.meta)
    found = checked(call, build(node, at=place, trusted=cfg["trusted_packages"]), given, at=place)
    partition = of_kind(Partition, found, place, node)
    excluded = _excluded(settings, dataset)
    if not excluded.any():
        return partition

    def keep(part: Indices) -> Indices:
        return part[~excluded[part]]

    return replace(partition, train=tuple(keep(part) for part in partition.train))


def _excluded(settings: Settings, dataset: Dataset) -> NDArray[np.bool_]:
    """Return which train samples ``exclude`` names."""
    samples, classes = settings.exclude.samples, settings.exclude.classes
    for what, values, count in (("samples", samples, len(dataset.train)), ("classes", classes, dataset.num_classes)):
        beyond = [value for value in values if value >= count]
        if beyond:
            raise ConfigError(f"exclude.{what}={beyond}: must be in 0..{count - 1}")
    excluded = np.isin(dataset.train.y, np.asarray(classes, dtype=np.int64))
    excluded[np.asarray(samples, dtype=np.int64)] = True
    if excluded.all():
        raise ConfigError("exclude.samples, exclude.classes: leave no sample")
    return excluded


def client_ids(cfg: Config) -> tuple[str, ...]:
    """Return every simulated client's id, in canonical order."""
    return tuple(str(i) for i in range(cfg["num_clients"]))


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
