"""A block on the wire: clients of one round whose replies were folded where they were made, and come back as one.

Its reply holds ``arrays`` with the sums and a table of the members' numbers, ``payload`` with the sums of uploads, and
in ``fedcl`` who is in it and what the table's columns are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedcl.messages import ARRAYS, PAYLOAD, VISIT, InBlock, Reply, named
from fedcl.messages.arrays import record_tensors, tensors_record

BLOCK, MEMBERS, NAMES = "block", "clients", "names"
TOTAL, WEIGHTS, NUMBERS = "total", "weights", "numbers"


@dataclass(frozen=True, slots=True)
class BlockSum:
    """The sums over one block: ``total`` (P,) and ``weights`` by tensor (T,), float64, and of uploads by name.

    ``number`` says which of the round's blocks it is.
    """

    number: int
    total: Tensor
    weights: Tensor
    payload: dict[str, Tensor]


def block_content(sums: BlockSum, replies: Mapping[str, Reply]) -> RecordDict:
    """Return the content of a block's reply; each of ``replies``, by client, has been folded."""
    names = sorted({name for reply in replies.values() for name in reply.metrics})
    rows = []
    for reply in replies.values():
        assert reply.folded is not None
        # a sound metric is finite: what is not a number marks a client that has none of the name
        values = [reply.metrics.get(name, math.nan) for name in names]
        norms = [reply.folded.payload[name] for name in sums.payload]
        rows.append([reply.num_examples, reply.folded.num_bytes, reply.folded.norm, *norms, *values])
    numbers_KN = torch.tensor(rows, dtype=torch.float64)
    content = RecordDict()
    content[ARRAYS] = tensors_record({TOTAL: sums.total, WEIGHTS: sums.weights, NUMBERS: numbers_KN}, live=True)
    content[VISIT] = ConfigRecord({BLOCK: sums.number, MEMBERS: list(replies), NAMES: names})
    if sums.payload:
        content[PAYLOAD] = tensors_record(sums.payload, live=True)
    return content


def is_block(content: RecordDict) -> bool:
    """Whether a reply is a block's."""
    visit = named(content, VISIT, ConfigRecord)
    return visit is not None and BLOCK in visit


def read_block(content: RecordDict) -> tuple[BlockSum, dict[str, Reply]]:
    """Return what :func:`block_content` was given. Only a grid of ours sends blocks: nothing is checked here."""
    visit, tensors = cast(ConfigRecord, content[VISIT]), record_tensors(cast(ArrayRecord, content[ARRAYS]))
    payload = named(content, PAYLOAD, ArrayRecord)
    uploads = record_tensors(payload) if payload is not None else {}
    sums = BlockSum(cast(int, visit[BLOCK]), tensors[TOTAL], tensors[WEIGHTS], uploads)
    replies, names = {}, cast(list[str], visit[NAMES])
    for client, row in zip(cast(list[str], visit[MEMBERS]), tensors[NUMBERS].tolist(), strict=True):
        size, num_bytes, norm, *values = row
        norms = dict(zip(uploads, values, strict=False))
        values = values[len(norms) :]
        metrics = {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}
        replies[client] = Reply(int(size), metrics, folded=InBlock(norm, int(num_bytes), norms))
    return sums, replies
