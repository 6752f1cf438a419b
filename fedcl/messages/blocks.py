"""A block on the wire: clients of one round whose replies were folded where they were made, and come back as one.

Its reply holds ``arrays`` with the sums, ``payload`` with the sums of uploads, ``metrics`` with one list a name, and in
``fedcl`` who is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcl.messages import ARRAYS, METRICS, NUM_EXAMPLES, PAYLOAD, VISIT, InBlock, Reply, named
from fedcl.messages.arrays import record_tensors, tensors_record

BLOCK, MEMBERS, NORMS, NUM_BYTES = "block", "clients", "norms", "num-bytes"
TOTAL, WEIGHTS = "total", "weights"


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
    members = [(reply, reply.folded) for reply in replies.values() if reply.folded is not None]
    # a sound metric is finite: what is not a number marks a client that has none of the name
    names = sorted({name for reply, _ in members for name in reply.metrics})
    columns = {name: [float(reply.metrics.get(name, math.nan)) for reply, _ in members] for name in names}
    content = RecordDict()
    content[ARRAYS] = tensors_record({TOTAL: sums.total, WEIGHTS: sums.weights}, live=True)
    content[METRICS] = MetricRecord({NUM_EXAMPLES: [reply.num_examples for reply, _ in members], **columns})
    content[VISIT] = ConfigRecord(
        {
            BLOCK: sums.number,
            MEMBERS: list(replies),
            NORMS: [folded.norm for _, folded in members],
            NUM_BYTES: [folded.num_bytes for _, folded in members],
        }
    )
    if sums.payload:
        content[PAYLOAD] = tensors_record(sums.payload, live=True)
    return content


def is_block(content: RecordDict) -> bool:
    """Whether a reply is a block's."""
    visit = named(content, VISIT, ConfigRecord)
    return visit is not None and BLOCK in visit


def read_block(content: RecordDict) -> tuple[BlockSum, dict[str, Reply]]:
    """Return what :func:`block_content` was given. Only a grid of ours sends blocks: nothing is checked here."""
    visit, metrics = cast(ConfigRecord, content[VISIT]), dict(cast(MetricRecord, content[METRICS]))
    tensors = record_tensors(cast(ArrayRecord, content[ARRAYS]))
    payload = named(content, PAYLOAD, ArrayRecord)
    sums = BlockSum(
        cast(int, visit[BLOCK]),
        tensors[TOTAL],
        tensors[WEIGHTS],
        record_tensors(payload) if payload is not None else {},
    )
    sizes = cast(list[int], metrics.pop(NUM_EXAMPLES))
    columns = {name: cast(list[float], column) for name, column in metrics.items()}
    folded = map(InBlock, cast(list[float], visit[NORMS]), cast(list[int], visit[NUM_BYTES]))
    return sums, {
        client: Reply(size, {n: c[place] for n, c in columns.items() if not math.isnan(c[place])}, folded=member)
        for place, (client, size, member) in enumerate(zip(cast(list[str], visit[MEMBERS]), sizes, folded, strict=True))
    }
