"""Which clients share a message: those that train the same task from the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from fedcl.messages import Request
from fedcl.server.aggregation import BLOCK
from fedcl.server.strategy import Outgoing

COHORT = 64  # clients that one message addresses at most: the more of them, the less each of them costs


Recipients = Sequence[tuple[Outgoing, Request]]


def cohorts(recipients: Recipients) -> list[Recipients]:
    """Cut recipients into messages: runs that share model, payload, config and task, of at most :data:`COHORT`.

    A block that is split between two messages cannot be summed where it is made: its replies come back by themselves.
    """
    groups = list(_runs(recipients))
    torn = {a[-1][1].block for a, b in pairwise(groups) if a[-1][1].block == b[0][1].block} - {-1}
    if not torn:
        return groups
    return [
        [(out, replace(request, block=-1) if request.block in torn else request) for out, request in group]
        for group in groups
    ]


def _runs(recipients: Recipients) -> Iterator[Recipients]:
    begin = 0
    for i in range(1, len(recipients) + 1):
        if i == len(recipients) or _ends_before(recipients, begin, i):
            yield recipients[begin:i]
            begin = i


def _ends_before(recipients: Recipients, begin: int, i: int) -> bool:
    """Whether the message that begins at ``begin`` must end before ``i``."""
    if not _alike(recipients[begin], recipients[i]):
        return True
    # at the limit it ends with a block, and one begins within the last places before the limit
    block, before = recipients[i][1].block, recipients[i - 1][1].block
    return i - begin >= COHORT - (BLOCK - 1 if block >= 0 else 0) and (block < 0 or block != before)


def _alike(a: tuple[Outgoing, Request], b: tuple[Outgoing, Request]) -> bool:
    (out_a, request_a), (out_b, request_b) = a, b
    return (
        out_a.model is out_b.model
        and out_a.payload.keys() == out_b.payload.keys()
        and all(tensor is out_b.payload[name] for name, tensor in out_a.payload.items())
        and out_a.config == out_b.config
        and request_a.task == request_b.task
        and request_a.note == request_b.note
        and (request_a.server_round, request_a.version) == (request_b.server_round, request_b.version)
    )
