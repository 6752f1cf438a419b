"""A partitioner of one's own: the clients that the published code gets from a seed, so that runs can be compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcl.data.dataset import Indices, Partition
from fedcl.data.partition import PartitionInput


def as_published(
    given: PartitionInput,
    *,
    alpha: float,
    train_size: int,
    test_size: int,
    seed: int,
) -> Partition:
    """Draw both halves from the legacy generator, started from ``seed`` for each, which makes the mixtures the same.

    Class c of a client gets int(size q_c + 1/2) samples, the last one what is left, drawn without replacement where
    there are enough. Clients do not know of each other and may share samples. ``given.rng``
    and the meta columns are not used.
    """
    halves = [
        _half(y, size, np.random.RandomState(seed), given.num_clients, given.num_classes, alpha)
        for y, size in ((given.y_train, train_size), (given.y_test, test_size))
    ]
    return Partition(halves[0], halves[1])


def _half(
    y: Indices, size: int, legacy: np.random.RandomState, num_clients: int, num_classes: int, alpha: float
) -> tuple[Indices, ...]:
    members = [np.flatnonzero(y == label) for label in range(num_classes)]
    mixtures: NDArray[np.float64] = legacy.dirichlet(np.repeat(alpha, num_classes), num_clients)
    parts = []
    for mixture in mixtures:
        chosen: list[Indices] = []
        for label, own in enumerate(members):
            left = size - sum(len(piece) for piece in chosen)
            count = max(0, left if label == num_classes - 1 else int(size * mixture[label] + 0.5))
            chosen.append(legacy.choice(own, count, replace=count > len(own)))
        parts.append(np.sort(np.concatenate(chosen)).astype(np.int64))
    return tuple(parts)
