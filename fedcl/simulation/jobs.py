"""What a Ray worker is given to do at once: a message, or a client's part of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import ConfigRecord, RecordDict

from fedcl.messages import BLOCKS, VISIT


@dataclass(eq=False)
class Job:
    """A message, or a client's part of one, on its way to a worker.

    ``losses`` counts the workers that were lost with it, ``deaths`` those of them that certainly died running it and
    nothing else; ``cancelled`` are clients whose result counts no more, though a worker may be at it.
    """

    message_id: str
    wire: Mapping[str, Any]
    clients: list[str]
    committed: list[int]
    size: int
    losses: int = 0
    deaths: int = 0
    cancelled: set[str] = field(default_factory=set)

    def cancel(self, clients: Collection[str]) -> bool:
        """Take ``clients`` out of a job that no worker has; say whether it has any left."""
        stay = [i for i, client in enumerate(self.clients) if client not in clients]
        if len(stay) < len(self.clients):
            # a share of the samples, for the order of jobs alone
            self.size = self.size * len(stay) // len(self.clients)
            self.clients = [self.clients[i] for i in stay]
            self.committed = [self.committed[i] for i in stay]
            self.wire = {**self.wire, VISIT: narrowed(self.wire[VISIT], stay)}
        return bool(stay)

    def split(self, most: int = 1) -> list[Job]:
        """Return jobs of at most ``most`` clients each: one, to find out which of them kills workers."""
        if len(self.clients) <= most:
            return [self]
        jobs = []
        for places in _pieces(self.wire[VISIT], most):
            wire = {**self.wire, VISIT: narrowed(self.wire[VISIT], places)}
            clients, committed = [self.clients[i] for i in places], [self.committed[i] for i in places]
            size = self.size * len(places) // len(self.clients)
            jobs.append(Job(self.message_id, wire, clients, committed, size, self.losses))
        return jobs


def narrowed(visit: ConfigRecord, places: Sequence[int]) -> ConfigRecord:
    """Return the record that addresses the clients at ``places`` only; a block of which some are left out is none."""
    lists = {name: cast(list[Any], visit[name]) for name in ("clients", "visits", "committed", "local_rounds")}
    chosen = {name: [values[i] for i in places] for name, values in lists.items()}
    blocks = cast(list[int], visit.get(BLOCKS, []))
    if blocks:
        whole, left = Counter(blocks), Counter(blocks[i] for i in places)
        chosen[BLOCKS] = [blocks[i] if left[blocks[i]] == whole[blocks[i]] else -1 for i in places]
    return ConfigRecord({**visit, **chosen})


def _pieces(visit: ConfigRecord, most: int) -> Iterator[range]:
    """Cut places into runs of at most ``most``, between blocks where these are no longer than that."""
    blocks = cast(list[int], visit.get(BLOCKS, []))
    begin, total = 0, len(cast(list[str], visit["clients"]))
    while begin < total:
        end = min(begin + most, total)
        if blocks and end < total and blocks[end] >= 0:
            first = end
            while first > begin and blocks[first - 1] == blocks[end]:
                first -= 1
            end = first if first > begin else end
        yield range(begin, end)
        begin = end


def without(content: RecordDict, clients: Collection[str]) -> RecordDict | None:
    """Return an instruction for its other clients, itself if it has none of ``clients``, None if it has no other."""
    visit = cast(ConfigRecord, content[VISIT])
    addressed = cast(list[str], visit["clients"])
    stay = [i for i, client in enumerate(addressed) if client not in clients]
    if len(stay) == len(addressed):
        return content
    return RecordDict({**content, VISIT: narrowed(visit, stay)}) if stay else None
