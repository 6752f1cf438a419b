from __future__ import annotations

import pytest
import torch

from fedcl.base.tree import clone, equal
from fedcl.client.state import NEVER, MemoryStateStore


def test_a_client_never_visited_has_an_empty_state() -> None:
    assert MemoryStateStore().load("a", NEVER) == {}


def test_staged_beside_committed_until_the_server_decides() -> None:
    store = MemoryStateStore()
    store.stage("a", 0, {"n": 0})
    store.commit("a", 0)
    store.stage("a", 1, {"n": 1})
    store.stage("a", 2, {"n": 2})
    assert [store.load("a", visit)["n"] for visit in (0, 1, 2)] == [0, 1, 2]
    store.commit("a", 1)
    assert store.load("a", 1) == {"n": 1}
    for gone in (0, 2):
        assert not store.has("a", gone)
        with pytest.raises(KeyError):
            store.load("a", gone)


def test_a_retry_replaces_what_the_first_try_staged() -> None:
    store = MemoryStateStore()
    store.stage("a", 3, {"n": 1})
    store.stage("a", 3, {"n": 2})
    store.commit("a", 3)
    assert store.load("a", 3) == {"n": 2}


def test_committing_twice_changes_nothing() -> None:
    store = MemoryStateStore()
    store.stage("a", 0, {"n": 0})
    store.commit("a", 0)
    store.stage("a", 1, {"n": 1})
    store.commit("a", 0)  # the server says again what it last accepted: visit 1 was rejected
    assert store.load("a", 0) == {"n": 0}
    assert not store.has("a", 1)


def test_committing_a_visit_that_is_not_here_drops_what_is_outdated() -> None:
    store = MemoryStateStore()
    store.stage("a", 0, {"n": 0})
    store.commit("a", 5)
    assert not store.has("a", 0)
    store.commit("b", 0)
    assert not store.has("b", 0)


def test_clients_do_not_share_and_can_be_dropped() -> None:
    store = MemoryStateStore()
    store.stage("a", 0, {"n": 0})
    store.stage("b", 0, {"n": 9})
    store.drop("a")
    assert not store.has("a", 0)
    assert store.has("a", NEVER)
    assert store.load("b", 0) == {"n": 9}


def test_a_clone_shares_no_tensor_and_goes_where_it_is_told(device: torch.device) -> None:
    tree = {"a": torch.ones(2), "b": [torch.zeros(1), 3], "c": "x"}
    for copied in (clone(tree), clone(tree, torch.device("cpu"))):
        assert equal(copied, tree)
        copied["a"].add_(1.0)
        copied["b"][0].add_(1.0)
        assert tree["a"].tolist() == [1.0, 1.0]
        assert tree["b"][0].tolist() == [0.0]
    assert clone(tree, device)["a"].device.type == device.type
