from __future__ import annotations

from collections import Counter

import pytest

from fedcl.server.selection import client_order, select

CLIENTS = [str(i) for i in range(30)]


def test_canonical_order() -> None:
    assert sorted(["b", "10", "2", "a", "1"], key=client_order) == ["1", "2", "10", "a", "b"]


@pytest.mark.parametrize("count", [None, 30, 31])
def test_everybody_in_canonical_order(count: int | None) -> None:
    assert select(reversed(CLIENTS), count, seed=0, server_round=0) == CLIENTS


def test_the_selection_is_sorted_and_has_the_size_asked_for() -> None:
    chosen = select(CLIENTS, 7, seed=3, server_round=2)
    assert len(chosen) == len(set(chosen)) == 7
    assert chosen == sorted(chosen, key=client_order)


def test_it_depends_on_seed_and_round_only() -> None:
    rounds = {tuple(select(CLIENTS, 7, seed=0, server_round=r)) for r in range(20)}
    assert len(rounds) > 15
    assert select(CLIENTS, 7, seed=0, server_round=4) == select(reversed(CLIENTS), 7, seed=0, server_round=4)
    assert select(CLIENTS, 7, seed=0, server_round=4) != select(CLIENTS, 7, seed=1, server_round=4)


@pytest.mark.parametrize("left_out", ["0", "7", "29"])
def test_leaving_a_client_out_does_not_move_the_others(left_out: str) -> None:
    others = [client for client in CLIENTS if client != left_out]
    replaced = 0
    for server_round in range(60):
        before = set(select(CLIENTS, 10, seed=5, server_round=server_round))
        after = set(select(others, 10, seed=5, server_round=server_round))
        if left_out in before:
            assert len(before - after) == 1  # the one left out; the next in line takes its place
            replaced += 1
        else:
            assert before == after
    assert replaced > 5


def test_everyone_gets_a_turn() -> None:
    turns = Counter(client for r in range(300) for client in select(CLIENTS, 10, seed=1, server_round=r))
    assert min(turns[client] for client in CLIENTS) > 60
    assert max(turns.values()) < 140
