from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.data.dataset import Partition
from fedcl.data.natural import natural_id
from fedcl.data.partition import (
    PartitionInput,
    apportion,
    coverage,
    dirichlet,
    dirichlet_client,
    iid,
    k_classes,
    matching_test,
    report,
    shards,
)

Y_TRAIN = np.repeat(np.arange(10), 60).astype(np.int64)
Y_TEST = np.repeat(np.arange(10), 20).astype(np.int64)


def call(partitioner: Callable[..., Partition], seed: int = 0, num_clients: int = 12, **params: Any) -> Partition:
    rng = np.random.default_rng(seed)
    columns = {name: params.pop(name) for name in ("train_meta", "test_meta") if name in params}
    return partitioner(PartitionInput(Y_TRAIN, Y_TEST, num_clients, 10, rng, **columns), **params)


def ints(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("shares", "total", "caps", "counts"),
    [
        ((5, 3, 2), 10, (99, 99, 99), (5, 3, 2)),
        ((5, 3, 2), 7, (99, 99, 99), (4, 2, 1)),  # 3.5, 2.1, 1.4: the spare one goes to the largest remainder
        ((5, 3, 2), 10, (2, 99, 99), (2, 5, 3)),  # 3 are cut off and split 3:2, 1.8 and 1.2
        ((1, 1, 0), 10, (2, 3, 99), (2, 3, 0)),  # a class without share gets nothing
        ((0, 0), 5, (9, 9), (0, 0)),
        ((1, 2), 0, (9, 9), (0, 0)),
    ],
)
def test_apportion_by_hand(shares: tuple[int, ...], total: int, caps: tuple[int, ...], counts: tuple[int, ...]) -> None:
    assert apportion(ints(*shares), total, ints(*caps)).tolist() == list(counts)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), min_size=1, max_size=8),
    st.integers(0, 200),
)
def test_apportion_never_exceeds_a_cap_and_uses_all_the_room_there_is(
    classes: list[tuple[float, int]], total: int
) -> None:
    shares, caps = np.array([s for s, _ in classes]), ints(*(c for _, c in classes))
    counts = apportion(shares, total, caps)
    room = int(caps[shares > 0].sum())
    assert (counts >= 0).all()
    assert (counts <= caps).all()
    assert counts.sum() == min(total, room)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.lists(st.integers(0, 5), min_size=80, max_size=150),
    st.sampled_from([iid, dirichlet, shards, functools.partial(k_classes, k=6)]),
)
def test_every_sample_goes_to_exactly_one_client(
    seed: int, num_clients: int, labels: list[int], partitioner: Callable[..., Partition]
) -> None:
    y = ints(*labels)
    rng = np.random.default_rng(seed)
    partition = partitioner(PartitionInput(y, y[:30], num_clients, 6, rng))
    assert len(partition.train) == len(partition.test) == num_clients
    assert sorted(np.concatenate(partition.train).tolist()) == list(range(len(y)))
    assert coverage(partition, len(y)) == 1.0
    for part, test in zip(partition.train, partition.test, strict=True):
        assert part.dtype == test.dtype == np.int64
        assert len(part) >= 1
        assert len(np.unique(test)) == len(test)
        assert set(y[:30][test]) <= set(y[part])


@pytest.mark.parametrize("partitioner", [iid, dirichlet, shards, k_classes])
def test_same_seed_same_partition(partitioner: Callable[..., Partition]) -> None:
    first, again, other = call(partitioner, 1), call(partitioner, 1), call(partitioner, 2)
    for half in ("train", "test"):
        pairs = list(zip(getattr(first, half), getattr(again, half), strict=True))
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert any(not np.array_equal(a, b) for a, b in zip(first.train, other.train, strict=True))


def test_iid_parts_are_of_equal_size() -> None:
    assert sorted(len(part) for part in call(iid, num_clients=7).train) == [85] * 2 + [86] * 5


def test_small_alpha_makes_clients_heterogeneous_and_large_alpha_does_not() -> None:
    def largest_share(alpha: float) -> float:
        parts = call(dirichlet, alpha=alpha).train
        return float(np.mean([np.bincount(Y_TRAIN[part]).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.5
    assert largest_share(1000.0) < 0.2


def test_dirichlet_repairs_what_no_redraw_could_mend() -> None:
    # 600 samples for 100 clients at alpha 0.01: a draw in which each has five does not come up.
    partition = call(dirichlet, num_clients=100, alpha=0.01, min_samples=5)
    sizes = [len(part) for part in partition.train]
    assert min(sizes) == 5
    assert sum(sizes) == 600
    assert coverage(partition, 600) == 1.0
    assert report(partition, Y_TRAIN)["samples_moved"] == partition.moved > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_hard_draw_ends_at_once_and_the_report_says_what_it_took(seed: int) -> None:
    # 200 clients at alpha 0.05: redrawing until each has ten samples would go on for ever.
    y = np.repeat(np.arange(10), 600).astype(np.int64)
    rng = np.random.default_rng(seed)
    partition = dirichlet(PartitionInput(y, y[::6], 200, 10, rng), alpha=0.05, min_samples=10)
    found = report(partition, y)
    assert min(len(part) for part in partition.train) == 10
    assert (found["coverage"], found["samples_shared"], found["clients_empty"]) == (1.0, 0, [])
    assert 0 < found["samples_moved"] <= 200 * 10
    easy = dirichlet(PartitionInput(y, y[::6], 5, 10, rng), alpha=100.0, min_samples=10)
    assert report(easy, y)["samples_moved"] == 0


def test_dirichlet_without_minimum_is_left_as_drawn() -> None:
    partition = call(dirichlet, num_clients=100, alpha=0.01, min_samples=0)
    empty = report(partition, Y_TRAIN)["clients_empty"]
    assert empty
    assert all(len(partition.test[client]) == 0 for client in empty)


def test_shards_give_few_classes_to_a_client() -> None:
    partition = call(shards, num_clients=10, shards_per_client=2)
    # 20 shards of 30: each class is exactly two of them.
    assert [len(part) for part in partition.train] == [60] * 10
    assert max(len(np.unique(Y_TRAIN[part])) for part in partition.train) == 2


def test_shards_within_groups_of_classes_give_every_client_its_shards_of_every_group() -> None:
    partition = call(shards, num_clients=10, shards_per_client=2, per_classes=5)
    # 20 shards of 15 in each half of the classes: a class is exactly four of them.
    for part in partition.train:
        held = Y_TRAIN[part]
        assert [int((held < 5).sum()), int((held >= 5).sum())] == [30, 30]
        assert len(np.unique(held[held < 5])) <= 2
    assert coverage(partition, 600) == 1.0
    whole, grouped = call(shards), call(shards, per_classes=10)
    assert all(np.array_equal(a, b) for a, b in zip(whole.train, grouped.train, strict=True))


@pytest.mark.parametrize(("num_clients", "k"), [(5, 2), (12, 2), (7, 3), (40, 1), (3, 10), (100, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_k_classes_a_client_and_none_left_out(num_clients: int, k: int, seed: int) -> None:
    partition = call(k_classes, seed, num_clients, k=k)
    held = [np.unique(Y_TRAIN[part]) for part in partition.train]
    assert [len(classes) for classes in held] == [k] * num_clients
    found = report(partition, Y_TRAIN)
    assert (found["coverage"], found["samples_shared"], found["classes_never_seen"]) == (1.0, 0, [])
    holders = np.bincount(np.concatenate(held), minlength=10)
    assert holders.max() - holders.min() <= 1
    for label in range(10):
        pieces = [int((Y_TRAIN[part] == label).sum()) for part in partition.train if label in Y_TRAIN[part]]
        assert max(pieces) - min(pieces) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 6), st.lists(st.integers(0, 40), min_size=6, max_size=6)
)
def test_k_classes_uses_everything_whatever_the_sizes(seed: int, num_clients: int, k: int, sizes: list[int]) -> None:
    y = np.repeat(np.arange(6), sizes).astype(np.int64)
    present = sum(size > 0 for size in sizes)
    if len(y) < num_clients or not 1 <= k <= present:
        with pytest.raises(ValueError, match=r"num_clients=|data\.partition\.k="):
            k_classes(PartitionInput(y, y, num_clients, 6, np.random.default_rng(seed)), k=k)
        return
    partition = k_classes(PartitionInput(y, y, num_clients, 6, np.random.default_rng(seed)), k=k)
    assert sorted(np.concatenate(partition.train).tolist()) == list(range(len(y)))
    most = max(k, -(-present // num_clients))
    assert all(1 <= len(np.unique(y[part])) <= most for part in partition.train)


def test_natural_clients_hold_all_of_their_speakers_and_nobody_elses() -> None:
    rng = np.random.default_rng(0)
    meta = {"speaker": np.array([f"s{i}" for i in rng.integers(0, 7, 600)])}
    test_meta = {"speaker": np.array([f"s{i}" for i in rng.integers(0, 7, 200)])}
    partition = call(natural_id, num_clients=3, train_meta=meta, test_meta=test_meta)
    speakers = [set(meta["speaker"][part]) for part in partition.train]
    assert sorted(len(own) for own in speakers) == [2, 2, 3]
    assert len(set().union(*speakers)) == 7
    assert coverage(partition, 600) == 1.0
    for part, own in zip(partition.test, speakers, strict=True):
        assert set(test_meta["speaker"][part]) == own
    assert sum(len(part) for part in partition.test) == 200


def test_natural_test_parts_fall_back_on_labels() -> None:
    meta = {"writer": np.arange(600) // 60}  # one class a writer
    for test_meta in (None, {}, {"writer": np.full(200, 99)}):
        partition = call(natural_id, num_clients=10, train_meta=meta, test_meta=test_meta, column="writer")
        for train, test in zip(partition.train, partition.test, strict=True):
            assert set(Y_TEST[test]) == set(Y_TRAIN[train])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"data\.partition\.column=speaker: must be a meta column of the data; there are: none"),
        ({"train_meta": {"writer": Y_TRAIN}}, "there are: writer"),
        ({"train_meta": {"speaker": Y_TRAIN}}, r"num_clients=12: must be in \[1, 10\], the values of speaker"),
    ],
)
def test_natural_ids_that_are_not_there(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(natural_id, **params)


def test_test_parts_follow_the_train_parts() -> None:
    # Client 0 holds 30 of class 0 and 15 of class 1: 45 of 600 train samples, so 15 of the 200 test samples, 10 and 5.
    held = (np.r_[0:30, 60:75].astype(np.int64), np.empty(0, np.int64))
    test, none = matching_test(held, PartitionInput(Y_TRAIN, Y_TEST, 2, 10, np.random.default_rng(0)))
    assert np.bincount(Y_TEST[test]).tolist() == [10, 5]
    assert len(none) == 0


def test_fedcac_setting_has_fixed_sizes_and_one_mixture_for_both_halves() -> None:
    partition = call(dirichlet_client, num_clients=5, alpha=0.5, train_size=100, test_size=50)
    for train, test in zip(partition.train, partition.test, strict=True):
        assert (len(train), len(test)) == (100, 50)
        assert len(np.unique(train)) == 100
        assert len(np.unique(test)) == 50
        uncapped = np.bincount(Y_TRAIN[train], minlength=10) < 40
        if uncapped.all():
            difference = np.bincount(Y_TRAIN[train], minlength=10) / 2 - np.bincount(Y_TEST[test], minlength=10)
            assert np.abs(difference).max() <= 1.5


def test_clients_share_samples_of_a_class_only_once_all_of_it_is_dealt() -> None:
    # Near-uniform mixtures take 10 of each class: six clients of 100 use up all 600 samples, twelve use each twice.
    disjoint = call(dirichlet_client, num_clients=6, alpha=1e9, train_size=100, test_size=50)
    assert coverage(disjoint, 600) == 1.0
    assert report(disjoint, Y_TRAIN)["samples_shared"] == 0
    twice = call(dirichlet_client, num_clients=12, alpha=1e9, train_size=100, test_size=50)
    assert np.bincount(np.concatenate(twice.train)).tolist() == [2] * 600


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 10), st.integers(1, 600), st.integers(1, 9))
def test_fedcac_setting_shares_no_more_than_it_must(seed: int, alpha: float, size: int, num_clients: int) -> None:
    partition = call(dirichlet_client, seed, num_clients, alpha=alpha, train_size=size, test_size=20)
    assert [len(np.unique(part)) for part in partition.train] == [size] * num_clients
    uses = np.bincount(np.concatenate(partition.train), minlength=600).reshape(10, 60)
    # A class is dealt like a deck: no card a second time while another waits for its first.
    assert (uses.max(axis=1) - uses.min(axis=1) <= 1).all()


def test_report_counts_what_is_left_out() -> None:
    partition = Partition((ints(0, 1), ints(1, 2), ints()), (ints(), ints(), ints()))
    y = ints(0, 0, 1, 1, 2)
    assert report(partition, y) == {
        "coverage": 0.6,
        "samples_unused": 2,
        "samples_shared": 1,
        "clients_empty": [2],
        "classes_never_seen": [2],
        "samples_moved": 0,
    }


@pytest.mark.parametrize(
    ("partitioner", "num_clients", "params", "message"),
    [
        (iid, 601, {}, "num_clients=601"),
        (iid, 0, {}, "num_clients=0"),
        (dirichlet, 601, {}, "num_clients=601"),
        (dirichlet, 100, {"min_samples": 7}, "num_clients=100"),
        (shards, 301, {}, "num_clients=301"),
        (shards, 20, {"per_classes": 1, "shards_per_client": 4}, "num_clients=20"),
        (k_classes, 4, {"k": 0}, r"data\.partition\.k=0"),
        (k_classes, 4, {"k": 11}, r"data\.partition\.k=11: must be in \[1, 10\], the classes there are"),
        (k_classes, 601, {"k": 1}, "num_clients=601"),
        (dirichlet_client, 5, {"train_size": 601}, r"data\.partition\.train_size=601: must be in \[1, 600\]"),
        (dirichlet_client, 5, {"test_size": 0}, r"data\.partition\.test_size=0"),
        (dirichlet_client, 0, {}, "num_clients=0"),
    ],
)
def test_bad_parameters_name_their_key(
    partitioner: Callable[..., Partition], num_clients: int, params: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(partitioner, num_clients=num_clients, **params)
