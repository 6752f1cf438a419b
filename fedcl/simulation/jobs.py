"""What a Ray worker is given to do at once: a message, or a client's part of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord

from fedcl.messages import VISIT


@dataclass(eq=False)
class Job:
    """A message, or a client's part of one, on its way to a worker.

    ``losses`` counts the workers that were lost with it, ``deaths`` those of them that certainly died running it and
    nothing else.
    """

    message_id: str
    wire: Mapping[str, Any]
    clients: list[str]
    committed: list[int]
    size: int
    losses: int = 0
    deaths: int = 0

    def split(self) -> list[Job]:
        """Return one job for each client, to find out which of them kills workers."""
        if len(self.clients) == 1:
            return [self]
        visit = self.wire[VISIT]
        jobs = []
        for i, (client, committed) in enumerate(zip(self.clients, self.committed, strict=True)):
            alone = {name: visit[name][i : i + 1] for name in ("clients", "visits", "committed", "turns")}
            wire = {**self.wire, VISIT: ConfigRecord({**visit, **alone})}
            size = self.size // len(self.clients)
            jobs.append(Job(self.message_id, wire, [client], [committed], size, self.losses))
        return jobs
