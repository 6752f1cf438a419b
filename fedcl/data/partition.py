"""How samples are spread over clients.

Every partitioner is a pure function ``(y_train, y_test, *, num_clients, num_classes, rng, ...) -> Partition``; its
hyper-parameters are the remaining keywords. Parts are sorted. Two Dirichlet conventions exist and give different
federations: :func:`dirichlet` divides each class over the clients, :func:`dirichlet_client` draws a mixture for each
client.
"""

# N = train samples, K = clients, C = classes
from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcl.data.dataset import Indices, Partition

Labels = NDArray[np.int64]


class Partitioner(Protocol):
    """A partitioner whose hyper-parameters are already bound."""

    def __call__(
        self, y_train: Labels, y_test: Labels, *, num_clients: int, num_classes: int, rng: np.random.Generator
    ) -> Partition:
        """Spread both halves over ``num_clients`` clients."""
        ...


def iid(y_train: Labels, y_test: Labels, *, num_clients: int, num_classes: int, rng: np.random.Generator) -> Partition:
    """Deal the shuffled samples out in parts whose sizes differ by at most one.

    Raises
    ------
    ValueError
        There are more clients than samples.
    """
    _require_samples(y_train, num_clients, 1)
    parts = np.array_split(rng.permutation(len(y_train)), num_clients)
    return _with_matching_test(parts, y_train, y_test, num_classes, rng)


def dirichlet(
    y_train: Labels,
    y_test: Labels,
    *,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
    alpha: float = 0.5,
    min_samples: int = 1,
) -> Partition:
    """Divide each class c over the clients in proportions p_c ~ Dir(alpha * 1_K) (Hsu et al. 2019, class-wise).

    A draw that leaves a client with fewer than ``min_samples`` is repaired, not repeated: samples picked at random move
    to it, one at a time, each from the client that is then the largest. All samples are used, each by one client.

    Raises
    ------
    ValueError
        ``alpha`` is not positive, or there are fewer than ``num_clients * min_samples`` samples.
    """
    _require_positive("alpha", alpha)
    if min_samples < 0:
        raise ValueError(f"data.partition.min_samples={min_samples}: must be >= 0")
    _require_samples(y_train, num_clients, min_samples)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(y_train == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(piece.tolist())
    _repair(parts, min_samples, rng)
    return _with_matching_test([np.asarray(part, np.int64) for part in parts], y_train, y_test, num_classes, rng)


def _repair(parts: list[list[int]], min_samples: int, rng: np.random.Generator) -> None:
    """Move samples from the largest parts until every part has ``min_samples``; at most K * min_samples moves."""
    sizes = np.array([len(part) for part in parts])
    for client in np.flatnonzero(sizes < min_samples):
        while sizes[client] < min_samples:
            donor = int(np.argmax(sizes))
            parts[client].append(parts[donor].pop(int(rng.integers(sizes[donor]))))
            sizes[donor] -= 1
            sizes[client] += 1


def dirichlet_client(
    y_train: Labels,
    y_test: Labels,
    *,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
    alpha: float = 0.1,
    train_size: int = 500,
    test_size: int = 100,
) -> Partition:
    """Give each client i its own mixture q_i ~ Dir(alpha * 1_C), and train and test parts of fixed size drawn from it.

    FedCAC's setting (Wu et al. 2023, official code: 500 train and 100 test samples, alpha 0.1). A client never holds a
    sample twice. The official code lets clients share train samples; here each class is dealt out like a deck of cards,
    so clients share samples of a class only after all of its samples have been dealt. Samples may remain unused. Test
    parts may overlap between clients. Where a class has too few samples for a client, its other classes fill up.

    Raises
    ------
    ValueError
        ``alpha`` or a size is not positive, or a size exceeds the samples there are.
    """
    _require_positive("alpha", alpha)
    for key, size, available in (("train_size", train_size, len(y_train)), ("test_size", test_size, len(y_test))):
        if not 1 <= size <= available:
            raise ValueError(f"data.partition.{key}={size}: must be in [1, {available}], the samples there are")
    if num_clients < 1:
        raise ValueError(f"num_clients={num_clients}: must be >= 1")
    decks = [rng.permutation(np.flatnonzero(y_train == label)) for label in range(num_classes)]
    dealt = [0] * num_classes
    train_caps, test_caps = (np.bincount(y, minlength=num_classes) for y in (y_train, y_test))
    train, test = [], []
    for _ in range(num_clients):
        # The floor lets classes of negligible share fill up where the others run out.
        mixture = np.maximum(rng.dirichlet(np.full(num_classes, alpha)), 1e-12)
        hand = []
        for label, count in enumerate(apportion(mixture, train_size, train_caps)):
            hand.append(_deal(decks, dealt, label, int(count), rng))
        train.append(np.sort(np.concatenate(hand)))
        test.append(_draw(y_test, apportion(mixture, test_size, test_caps), rng))
    return Partition(tuple(train), tuple(test))


def _deal(decks: list[Indices], dealt: list[int], label: int, count: int, rng: np.random.Generator) -> Indices:
    """Take the next ``count`` samples of a class's deck; a deck that runs out is shuffled and dealt again."""
    deck, start = decks[label], dealt[label]
    hand = deck[start : start + count]
    dealt[label] = start + len(hand)
    if len(hand) == count:
        return hand
    fresh = rng.permutation(deck[~np.isin(deck, hand)])
    # What this hand already holds goes to the bottom of the new deck.
    decks[label] = np.concatenate([fresh, hand])
    dealt[label] = count - len(hand)
    return np.concatenate([hand, fresh[: dealt[label]]])


def shards(
    y_train: Labels,
    y_test: Labels,
    *,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
    shards_per_client: int = 2,
) -> Partition:
    """Sort by label, cut into ``num_clients * shards_per_client`` shards, and deal them out at random.

    McMahan et al. 2017, section 3, and FOT's non-IID setting. Shard sizes differ by at most one, so that all samples
    are used, each by one client.

    Raises
    ------
    ValueError
        There are more shards than samples.
    """
    if shards_per_client < 1:
        raise ValueError(f"data.partition.shards_per_client={shards_per_client}: must be >= 1")
    _require_samples(y_train, num_clients, shards_per_client)
    shuffled = rng.permutation(len(y_train))
    by_label = shuffled[np.argsort(y_train[shuffled], kind="stable")]
    pieces = np.array_split(by_label, num_clients * shards_per_client)
    hands = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    parts = [np.concatenate([pieces[shard] for shard in hand]) for hand in hands]
    return _with_matching_test(parts, y_train, y_test, num_classes, rng)


def matching_test(
    y_train: Labels, y_test: Labels, train: tuple[Indices, ...], *, num_classes: int, rng: np.random.Generator
) -> tuple[Indices, ...]:
    """Draw for each client test samples with the label distribution of its train part.

    A client's share of the test half is its share of the train half, at least one sample where it has train samples;
    classes get their counts by largest remainder, and never more than the test half holds. Drawn without replacement
    within a client, independently between clients.
    """
    caps = np.bincount(y_test, minlength=num_classes)
    parts = []
    for part in train:
        shares = np.bincount(y_train[part], minlength=num_classes)
        size = max(1, round(len(part) * len(y_test) / len(y_train))) if len(part) else 0
        parts.append(_draw(y_test, apportion(shares, size, caps), rng))
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
    clients), ``clients_empty`` (positions), ``classes_never_seen`` (labels of ``y`` that no client holds).
    """
    held = np.bincount(np.concatenate(partition.train), minlength=len(y))
    return {
        "coverage": coverage(partition, len(y)),
        "samples_unused": int((held == 0).sum()),
        "samples_shared": int((held > 1).sum()),
        "clients_empty": [client for client, part in enumerate(partition.train) if len(part) == 0],
        "classes_never_seen": np.setdiff1d(y, y[held > 0]).tolist(),
    }


def _with_matching_test(
    parts: list[Indices], y_train: Labels, y_test: Labels, num_classes: int, rng: np.random.Generator
) -> Partition:
    train = tuple(np.sort(part).astype(np.int64) for part in parts)
    return Partition(train, matching_test(y_train, y_test, train, num_classes=num_classes, rng=rng))


def _draw(y: Labels, counts: NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """Draw ``counts[c]`` samples of each class c without replacement; sorted."""
    drawn = [
        rng.choice(np.flatnonzero(y == label), int(count), replace=False) for label, count in enumerate(counts) if count
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def _require_positive(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"data.partition.{key}={value}: must be > 0")


def _require_samples(y: Labels, num_clients: int, each: int) -> None:
    if num_clients < 1 or num_clients * each > len(y):
        raise ValueError(
            f"num_clients={num_clients}: must be >= 1, and {len(y)} train samples must give each client at least {each}"
        )
