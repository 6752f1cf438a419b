"""A partial sum on the wire: the clients of one block, whose replies were summed where they were made.

Its message holds ``arrays`` with the sums and a table of the members' numbers, ``payload`` with the sums of uploads,
and in ``fedcl`` the block's number, its members and the names of the table's columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedcl.messages import ARRAYS, PAYLOAD, VISIT, Reply, SummedReply, named
from fedcl.messages.arrays import record_tensors, tensors_record

BLOCK, MEMBERS, NAMES = "block", "clients", "names"
TOTAL, WEIGHTS, NUMBERS = "total", "weights", "numbers"


@dataclass(frozen=True, slots=True)
class PartialSum:
    """The sum of the updates of ``clients``, in canonical order, all of the round's block number ``block``.

    ``total`` (P,) float64 is the sum of weight x vector, ``weights`` (T,) float64 the sum of weights for each tensor of
    the model, ``payload`` the sums of uploads by name.
    """

    block: int
    clients: tuple[str, ...]
    total: Tensor
    weights: Tensor
    payload: dict[str, Tensor]


def partial_sum_content(partial: PartialSum, replies: Mapping[str, Reply]) -> RecordDict:
    """Return the content of a block's reply; ``replies`` are its members', by client, each with ``summed``."""
    names = sorted({name for reply in replies.values() for name in reply.metrics})
    rows = []
    for reply in replies.values():
        assert reply.summed is not None
        # metrics are finite: nan marks a client that has no metric of that name
        values = [reply.metrics.get(name, math.nan) for name in names]
        norms = [reply.summed.payload_norms[name] for name in partial.payload]
        rows.append([reply.num_examples, reply.summed.num_bytes, reply.summed.norm, *norms, *values])
    numbers_KN = torch.tensor(rows, dtype=torch.float64)
    content = RecordDict()
    content[ARRAYS] = tensors_record({TOTAL: partial.total, WEIGHTS: partial.weights, NUMBERS: numbers_KN}, live=True)
    content[VISIT] = ConfigRecord({BLOCK: partial.block, MEMBERS: list(replies), NAMES: names})
    if partial.payload:
        content[PAYLOAD] = tensors_record(partial.payload, live=True)
    return content


def is_partial_sum(content: RecordDict) -> bool:
    """Whether a reply is a partial sum."""
    visit = named(content, VISIT, ConfigRecord)
    return visit is not None and BLOCK in visit


def read_partial_sum(content: RecordDict) -> tuple[PartialSum, dict[str, Reply]]:
    """Return the arguments of :func:`partial_sum_content`. Only grids of ours send them: nothing is validated here."""
    visit, tensors = cast(ConfigRecord, content[VISIT]), record_tensors(cast(ArrayRecord, content[ARRAYS]))
    payload = named(content, PAYLOAD, ArrayRecord)
    uploads = record_tensors(payload) if payload is not None else {}
    members, names = cast(list[str], visit[MEMBERS]), cast(list[str], visit[NAMES])
    partial = PartialSum(cast(int, visit[BLOCK]), tuple(members), tensors[TOTAL], tensors[WEIGHTS], uploads)
    replies = {}
    for client, (num_examples, num_bytes, norm, *values) in zip(members, tensors[NUMBERS].tolist(), strict=True):
        norms, values = dict(zip(uploads, values, strict=False)), values[len(uploads) :]
        metrics = {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}
        replies[client] = Reply(int(num_examples), metrics, summed=SummedReply(norm, int(num_bytes), norms))
    return partial, replies
