"""What partitioners share: counts from shares, test parts that match train parts, repairs, and a report."""

# N = train samples, K = clients, C = classes
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcl.data.dataset import Indices, Meta, Partition

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PartitionInput:
    """What a partitioner works from: the labels of both halves, the ``meta`` columns beside them, and its draws."""

    y_train: Labels
    y_test: Labels
    num_clients: int
    num_classes: int
    rng: np.random.Generator
    train_meta: Meta | None = None
    test_meta: Meta | None = None


def matching_test(train: tuple[Indices, ...], given: PartitionInput) -> tuple[Indices, ...]:
    """Draw for each client test samples with the label distribution of its train part.

    A client's share of the test half is its share of the train half, at least one sample where it has train samples;
    classes get their counts by largest remainder, and never more than the test half holds. Drawn without replacement
    within a client, independently between clients.
    """
    y_train, y_test = given.y_train, given.y_test
    caps = np.bincount(y_test, minlength=given.num_classes)
    parts = []
    for part in train:
        shares = np.bincount(y_train[part], minlength=given.num_classes)
        size = max(1, round(len(part) * len(y_test) / len(y_train))) if len(part) else 0
        parts.append(draw(y_test, apportion(shares, size, caps), given.rng))
    return tuple(parts)


def apportion(shares: NDArray[Any], total: int, caps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Split ``total`` into counts (C,) in proportion to ``shares`` by largest remainder, none above its cap.

    What a cap cuts off goes to the other classes with a share; the sum is ``total`` unless all of these are full.
    """
    counts = np.zeros(len(shares), np.int64)
    while True:
        weights = np.where(counts < caps, shares, 0).astype(np.float64)
        left = total - int(counts.sum())
        if left == 0 or not weights.any():
            return counts
        ideal = left * (weights / weights.sum())
        step = np.floor(ideal).astype(np.int64)
        order = np.argsort(step - ideal, kind="stable")
        step[order[: left - int(step.sum())]] += 1
        counts = np.minimum(counts + step, caps)


def coverage(partition: Partition, num_samples: int) -> float:
    """Return the share of ``num_samples`` train samples that at least one client holds."""
    return len(np.unique(np.concatenate(partition.train))) / num_samples


def report(partition: Partition, y: Labels) -> dict[str, Any]:
    """Return what a partition of train labels ``y`` (N,) leaves out.

    Keys: ``coverage`` (share of samples held by some client), ``samples_unused``, ``samples_shared`` (held by several
    clients), ``clients_empty`` (positions), ``classes_never_seen`` (labels of ``y`` that no client holds),
    ``samples_moved`` (from the largest clients to those that a draw had left with too little).
    """
    held = np.bincount(np.concatenate(partition.train), minlength=len(y))
    return {
        "coverage": coverage(partition, len(y)),
        "samples_unused": int((held == 0).sum()),
        "samples_shared": int((held > 1).sum()),
        "clients_empty": [client for client, part in enumerate(partition.train) if len(part) == 0],
        "classes_never_seen": np.setdiff1d(y, y[held > 0]).tolist(),
        "samples_moved": partition.moved,
    }


def with_matching_test(parts: list[Indices], given: PartitionInput, *, moved: int = 0) -> Partition:
    """Return the partition with train ``parts``, sorted, and the test parts that match them."""
    train = tuple(np.sort(part).astype(np.int64) for part in parts)
    return Partition(train, matching_test(train, given), moved)


def repair(parts: list[list[int]], min_samples: int, rng: np.random.Generator) -> int:
    """Move samples from the largest parts until every part has ``min_samples``, and return how many were moved.

    It ends after at most K * min_samples moves, if the parts hold that many samples at all.
    """
    sizes = np.array([len(part) for part in parts])
    moved = 0
    for client in np.flatnonzero(sizes < min_samples):
        while sizes[client] < min_samples:
            donor = int(np.argmax(sizes))
            parts[client].append(parts[donor].pop(int(rng.integers(sizes[donor]))))
            sizes[donor] -= 1
            sizes[client] += 1
            moved += 1
    return moved


def draw(y: Labels, counts: NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """Draw ``counts[c]`` samples of each class c without replacement; sorted."""
    drawn = [
        rng.choice(np.flatnonzero(y == label), int(count), replace=False) for label, count in enumerate(counts) if count
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def require_samples(y: Labels, num_clients: int, each: int) -> None:
    """Raise ValueError unless there are clients, and ``each`` samples, or one, for each of them."""
    most = len(y) // max(each, 1)
    if not 1 <= num_clients <= most:
        raise ValueError(
            f"num_clients={num_clients}: must be in [1, {most}], as data.partition gives each client at least "
            f"{max(each, 1)} of {len(y)} train samples"
        )
