"""How samples are spread over clients.

Every partitioner is a pure function of a `PartitionInput`; its hyper-parameters are keywords. Parts are sorted. Two
Dirichlet conventions exist and give different federations: :func:`dirichlet` divides each class over the clients,
:func:`dirichlet_client` draws a mixture for each client. Partitioners by meta column and Flower's are in modules of
their own.
"""

# N = train samples, K = clients, C = classes
from __future__ import annotations

import numpy as np

from fedcl.base.memory import free_memory, gib
from fedcl.data.dataset import Indices, Partition
from fedcl.data.parts import (
    PartitionInput,
    apportion,
    coverage,
    draw,
    matching_test,
    repair,
    report,
    require_samples,
    with_matching_test,
)

__all__ = [
    "PartitionInput",
    "apportion",
    "coverage",
    "dirichlet",
    "dirichlet_client",
    "iid",
    "k_classes",
    "local",
    "matching_test",
    "report",
    "shards",
]


def iid(given: PartitionInput) -> Partition:
    """Deal the shuffled samples out in parts whose sizes differ by at most one.

    Raises
    ------
    ValueError
        There are more clients than samples.
    """
    require_samples(given.y_train, given.num_clients, 1)
    parts = np.array_split(given.rng.permutation(len(given.y_train)), given.num_clients)
    return with_matching_test(parts, given)


def dirichlet(
    given: PartitionInput,
    *,
    alpha: float = 0.5,
    min_samples: int = 1,
) -> Partition:
    """Divide each class c over the clients in proportions p_c ~ Dir(alpha * 1_K) (Hsu et al. 2019, class-wise).

    A draw that leaves a client with fewer than ``min_samples`` is repaired, not repeated: samples picked at random move
    to it, one at a time, each from the client that is then the largest. All samples are used, each by one client.

    Raises
    ------
    ValueError
        There are fewer than ``num_clients * min_samples`` samples.
    """
    require_samples(given.y_train, given.num_clients, min_samples)
    parts: list[list[int]] = [[] for _ in range(given.num_clients)]
    for label in range(given.num_classes):
        members = given.rng.permutation(np.flatnonzero(given.y_train == label))
        shares = given.rng.dirichlet(np.full(given.num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(piece.tolist())
    moved = repair(parts, min_samples, given.rng)
    drawn = [np.asarray(part, np.int64) for part in parts]
    return with_matching_test(drawn, given, moved=moved)


def dirichlet_client(
    given: PartitionInput,
    *,
    alpha: float = 0.1,
    train_size: int = 500,
    test_size: int = 100,
) -> Partition:
    """Give each client i its own mixture q_i ~ Dir(alpha * 1_C), and train and test parts of fixed size drawn from it.

    FedCAC's setting (Wu et al. 2023, official code: 500 train and 100 test samples, alpha 0.1). A client never holds a
    sample twice. The official code lets clients share train samples; here each class is dealt like a deck of cards,
    so clients share samples of a class only after all of its samples have been dealt. Samples may remain unused. Test
    parts may overlap between clients. Where a class has too few samples for a client, its other classes fill up.

    Raises
    ------
    ValueError
        ``alpha`` or a size is not positive, or a size exceeds the samples there are.
    """
    y_train, y_test = given.y_train, given.y_test
    for key, size, available in (("train_size", train_size, len(y_train)), ("test_size", test_size, len(y_test))):
        if not 1 <= size <= available:
            raise ValueError(f"data.partition.{key}={size}: must be in [1, {available}], the samples there are")
    if given.num_clients < 1:
        raise ValueError(f"num_clients={given.num_clients}: must be >= 1")
    need, free = 8 * given.num_clients * (train_size + test_size), free_memory()
    if need > free:
        raise ValueError(
            f"num_clients={given.num_clients}: with data.partition.train_size={train_size} and test_size={test_size}, "
            f"the positions of all parts would take {gib(need)}; this machine has {gib(free)} free"
        )
    decks = [given.rng.permutation(np.flatnonzero(y_train == label)) for label in range(given.num_classes)]
    dealt = [0] * given.num_classes
    train_caps, test_caps = (np.bincount(y, minlength=given.num_classes) for y in (y_train, y_test))
    train, test = [], []
    for _ in range(given.num_clients):
        # The floor lets classes of negligible share fill up where the others run out.
        mixture = np.maximum(given.rng.dirichlet(np.full(given.num_classes, alpha)), 1e-12)
        hand = []
        for label, count in enumerate(apportion(mixture, train_size, train_caps)):
            hand.append(_deal(decks, dealt, label, int(count), given.rng))
        train.append(np.sort(np.concatenate(hand)))
        test.append(draw(y_test, apportion(mixture, test_size, test_caps), given.rng))
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
    given: PartitionInput,
    *,
    shards_per_client: int = 2,
    per_classes: int | None = None,
) -> Partition:
    """Sort by label, cut into ``num_clients * shards_per_client`` shards, and deal them out at random.

    McMahan et al. 2017, section 3. Shard sizes differ by at most one, so that all samples are used, each by one client.
    With ``per_classes``, that is done for each group of so many consecutive classes by itself: where tasks are these
    groups, every client has its shards of every task, as in FOT's non-IID setting (Bakman et al. 2024, official code).

    Raises
    ------
    ValueError
        There are more shards than samples, in a group or overall.
    """
    shuffled = given.rng.permutation(len(given.y_train))
    by_label = shuffled[np.argsort(given.y_train[shuffled], kind="stable")]
    groups = given.y_train[by_label] // (per_classes or given.num_classes)
    parts: list[list[Indices]] = [[] for _ in range(given.num_clients)]
    for group in np.unique(groups):
        members = by_label[groups == group]
        require_samples(members, given.num_clients, shards_per_client)
        pieces = np.array_split(members, given.num_clients * shards_per_client)
        hands = given.rng.permutation(len(pieces)).reshape(given.num_clients, shards_per_client)
        for part, hand in zip(parts, hands, strict=True):
            part.extend(pieces[shard] for shard in hand)
    return with_matching_test([np.concatenate(part) for part in parts], given)


def k_classes(
    given: PartitionInput,
    *,
    k: int = 2,
) -> Partition:
    """Give each client ``k`` classes, and divide each class evenly over its holders ("pathological" heterogeneity).

    Classes get holders as evenly as it goes, never more than they have samples, so that no class is left out, all
    samples are used, each by one client, and every client has some. Where clients are too few to hold all classes, they
    hold more than ``k``; where samples are too few for so many holders, clients hold fewer.

    Raises
    ------
    ValueError
        ``k`` exceeds the classes there are, or there are more clients than samples.
    """
    require_samples(given.y_train, given.num_clients, 1)
    sizes = np.bincount(given.y_train, minlength=given.num_classes)
    present = int((sizes > 0).sum())
    if not 1 <= k <= present:
        raise ValueError(f"data.partition.k={k}: must be in [1, {present}], the classes there are")
    places = max(given.num_clients * k, present)
    order = given.rng.permutation(given.num_classes)  # which classes get a holder more than the others
    left = np.zeros(given.num_classes, np.int64)
    left[order] = apportion((sizes[order] > 0).astype(np.int64), places, np.minimum(sizes[order], given.num_clients))
    holders: list[list[int]] = [[] for _ in range(given.num_classes)]
    for turn, client in enumerate(given.rng.permutation(given.num_clients)):
        hand = -(-int(left.sum()) // (given.num_clients - turn))
        # The classes with most places left: taking others could leave places that no client may take.
        for label in np.lexsort((given.rng.random(given.num_classes), -left))[:hand]:
            holders[label].append(int(client))
            left[label] -= 1
    parts: list[list[Indices]] = [[] for _ in range(given.num_clients)]
    for label, owners in enumerate(holders):
        members = given.rng.permutation(np.flatnonzero(given.y_train == label))
        for client, piece in zip(owners, np.array_split(members, max(len(owners), 1)), strict=False):
            parts[client].append(piece)
    return with_matching_test([np.concatenate(part) for part in parts], given)


def local(given: PartitionInput) -> Partition:
    """Deal nothing: each client is a device that brings its own samples, of which the server knows none."""
    nothing = tuple(np.empty(0, np.int64) for _ in range(given.num_clients))
    return Partition(nothing, nothing)
