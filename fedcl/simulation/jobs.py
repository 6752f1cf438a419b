"""What a Ray worker is given to do at once, a message or a part of one, and the queue of what waits for a worker."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import ConfigRecord, RecordDict

from fedcl.messages import BLOCKS, VISIT
from fedcl.simulation.host import Failure, Outcome


@dataclass(eq=False)
class Job:
    """A message, or a part of its clients, on its way to a worker.

    ``losses`` counts the workers that were lost with it, ``deaths`` those of them that certainly died running it and
    nothing else; ``cancelled`` are clients whose result counts no more, though a worker may be running them.
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
        """Return jobs of at most ``most`` clients each; jobs of one client show which of them kills workers."""
        if len(self.clients) <= most:
            return [self]
        jobs = []
        for places in _pieces(self.wire[VISIT], most):
            wire = {**self.wire, VISIT: narrowed(self.wire[VISIT], places)}
            clients, committed = [self.clients[i] for i in places], [self.committed[i] for i in places]
            size = self.size * len(places) // len(self.clients)
            jobs.append(Job(self.message_id, wire, clients, committed, size, self.losses))
        return jobs


class JobQueue:
    """Jobs that wait for a worker, and the replies that have come to each message.

    Jobs that a worker was lost with are suspects: their clients are tried one by one, before all other jobs.
    ``finished`` is called with a message's id and outcome when each of its clients has a reply.
    """

    def __init__(self, finished: Callable[[str, Outcome], None]) -> None:
        self._finished = finished
        self.suspects: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._outcomes: dict[str, dict[str, RecordDict | Failure | None]] = {}

    @property
    def open(self) -> bool:
        """Whether any message has clients without a reply."""
        return bool(self._outcomes)

    def add(self, jobs: Sequence[Job]) -> None:
        """Queue new jobs, the largest first."""
        for job in jobs:
            self._outcomes.setdefault(job.message_id, {}).update(dict.fromkeys(job.clients))
        self._waiting.extend(sorted(jobs, key=lambda job: -job.size))

    def next(self) -> Job | None:
        """Take out the next job, None if there is none."""
        queue = self.suspects or self._waiting
        return queue.popleft() if queue else None

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue jobs again that a lost worker had not begun."""
        self._waiting.extendleft(job for job in jobs if job.cancel(job.cancelled))

    def suspect(self, job: Job) -> None:
        """Queue the clients of a job that a worker was lost with, each by itself."""
        self.suspects.extend(job.split())

    def collect(self, message_id: str, outcome: Outcome) -> None:
        """File replies under their message."""
        outcomes = self._outcomes.get(message_id)
        if outcomes is None:
            return  # all its clients were cancelled
        outcomes.update(outcome)
        if all(reply is not None for reply in outcomes.values()):
            del self._outcomes[message_id]
            self._finished(message_id, [(client, reply) for client, reply in outcomes.items() if reply is not None])

    def give_up(self, job: Job, code: int, reason: str) -> None:
        """File one failure for all clients of a job."""
        self.collect(job.message_id, [(client, Failure(code, reason)) for client in job.clients])

    def cancel(self, clients: frozenset[str]) -> list[str]:
        """Drop everything of ``clients``; return the messages that have no other client."""
        self._waiting = deque(job for job in self._waiting if job.cancel(clients))
        self.suspects = deque(job for job in self.suspects if job.cancel(clients))
        empty = []
        for message_id, outcomes in list(self._outcomes.items()):
            for client in clients & outcomes.keys():
                del outcomes[client]
            if outcomes:
                self.collect(message_id, [])
            else:
                del self._outcomes[message_id]
                empty.append(message_id)
        return empty


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
