"""Which clients take part in a round: by hash, so that leaving one out never moves the others."""

from __future__ import annotations

from collections.abc import Iterable

from fedcl.base.randomness import key


def client_order(client: str) -> tuple[int, str]:
    """Sort key of the canonical client order: "2" before "10", any text after."""
    return (len(client), client) if client.isdigit() else (1 << 30, client)


def select(clients: Iterable[str], count: int | None, *, seed: int, server_round: int) -> list[str]:
    """Return the ``count`` eligible clients with the smallest hash(seed, round, client), in canonical order."""
    eligible = sorted(clients, key=client_order)
    if count is None or count >= len(eligible):
        return eligible
    ranked = sorted(eligible, key=lambda client: (key(seed, server_round, client, "select"), client))
    return sorted(ranked[:count], key=client_order)
