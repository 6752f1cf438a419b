"""A Flower grid on Ray actors that live as long as the run.

Messages go out in chunks, the largest first; a record that many messages share crosses into the object store once. The
driver owns order, ids and every client's state, so a worker that dies costs time and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedcl.client.state import NEVER
from fedcl.data.dataset import Dataset, Partition
from fedcl.messages import VISIT
from fedcl.simulation.compat import CLIENT_CRASHED, quiet_environment
from fedcl.simulation.grid import BaseGrid
from fedcl.simulation.host import Failure, Outcome
from fedcl.simulation.worker import Shared, Worker, pack_numpy
from fedcl.tree import unpack

IN_FLIGHT = 2  # chunks a worker has: one running, one waiting, so that it never idles while the driver thinks
LOST_LIMIT = 2  # deaths of a worker that a message may witness alone before it is taken for their cause
POLL_SECONDS = 1.0


@dataclass
class Job:
    """A message, or a client's part of one, on its way to a worker; ``deaths`` counts workers that died with it."""

    message_id: str
    wire: dict[str, Any]
    clients: list[str]
    committed: list[int]
    size: int
    deaths: int = 0

    def split(self) -> list[Job]:
        """Return one job for each client, to find out which of them kills workers."""
        visit = self.wire[VISIT]
        jobs = []
        for i, (client, committed) in enumerate(zip(self.clients, self.committed, strict=True)):
            alone = {name: visit[name][i : i + 1] for name in ("clients", "visits", "committed")}
            wire = {**self.wire, VISIT: ConfigRecord({**visit, **alone})}
            jobs.append(Job(self.message_id, wire, [client], [committed], self.size // len(self.clients), self.deaths))
        return jobs


@dataclass
class Slot:
    """One worker: its actor, the visits it caches for each client, and the calls it is busy with."""

    actor: Any
    held: dict[str, set[int]] = field(default_factory=dict)
    calls: int = 0


class RayGrid(BaseGrid):
    """Clients on persistent Ray workers, one thread each.

    Parameters
    ----------
    workers
        Number of workers; None takes the number of cores.
    address
        None starts Ray on this machine, reachable from nowhere else; otherwise an existing cluster's address.
    sizes
        Samples a client holds: the estimate by which the largest chunks go first.
    """

    def __init__(
        self,
        nodes: Mapping[str, int],
        config: dict[str, Any],
        dataset: Dataset,
        partition: Partition,
        *,
        workers: int | None = None,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        run_id: int = 1,
    ) -> None:
        super().__init__(nodes, run_id=run_id)
        quiet_environment()
        import ray

        self._ray = ray
        count = workers or os.cpu_count() or 1
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray(address, workers=count)
        clients = tuple(nodes)
        self._sizes = {client: len(part) for client, part in zip(clients, partition.train, strict=True)}
        # workers get their device from the driver's choice only where they may use one
        self._arguments = (config, ray.put(dataset), ray.put(partition), clients, _user_paths())
        self._actor_class = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0)
        self._slots = [self._spawn() for _ in range(count)]
        self._wait_until_ready(self._slots)
        self._queue: deque[Job] = deque()
        self._flying: dict[Any, tuple[Slot, Job]] = {}
        self._outcomes: dict[str, dict[str, RecordDict | Failure | None]] = {}

    def _spawn(self) -> Slot:
        return Slot(self._actor_class.remote(*self._arguments))

    def _wait_until_ready(self, slots: Sequence[Slot]) -> None:
        """Raise here, with the worker's own traceback, what keeps a worker from being built."""
        self._ray.get([slot.actor.ready.remote() for slot in slots])

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []
        if self._owns_ray:
            self._ray.shutdown()

    def _submit(self, batch: list[tuple[str, RecordDict]]) -> None:
        shared: dict[int, Shared] = {}
        jobs = []
        for message_id, content in batch:
            visit = content.config_records[VISIT]
            clients, committed = cast(list[str], visit["clients"]), cast(list[int], visit["committed"])
            size = sum(self._sizes[client] for client in clients)
            jobs.append(Job(message_id, self._share(content, shared), list(clients), list(committed), size))
            self._outcomes[message_id] = dict.fromkeys(clients)
        self._queue.extend(sorted(jobs, key=lambda job: -job.size))
        self._feed()

    def _share(self, content: RecordDict, shared: dict[int, Shared]) -> dict[str, Any]:
        """Replace array records by references, the same record always by the same one."""
        wire: dict[str, Any] = {}
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                if id(record) not in shared:
                    ref = self._ray.put(record)
                    shared[id(record)] = Shared(ref.hex(), ref)
                wire[name] = shared[id(record)]
            else:
                wire[name] = record
        return wire

    def _feed(self) -> None:
        while self._queue:
            slot = min(self._slots, key=lambda slot: slot.calls)
            # a suspect travels alone, so that its death is its own
            if slot.calls >= (1 if self._queue[0].deaths else IN_FLIGHT):
                return
            self._dispatch(slot, self._queue.popleft())

    def _dispatch(self, slot: Slot, job: Job) -> None:
        states = {}
        for client, visit in zip(job.clients, job.committed, strict=True):
            if visit != NEVER and visit not in slot.held.get(client, ()) and self.states.has(client, visit):
                states[client] = (visit, pack_numpy(self.states.load(client, visit)))
            slot.held[client] = {visit}
        ref = slot.actor.run.remote(job.message_id, job.wire, states)
        slot.calls += 1
        self._flying[ref] = (slot, job)

    def _progress(self, timeout: float | None) -> None:
        self._feed()
        if not self._flying:
            return
        wait = POLL_SECONDS if timeout is None else min(POLL_SECONDS, max(timeout, 0.0))
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=wait)
        for ref in ready:
            slot, job = self._flying[ref]
            try:
                outcome, staged = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError:
                raise  # a fault of fedcl: what a client raises comes back as a failure
            except self._ray.exceptions.RayError as error:
                self._bury(slot, error)
                break
            del self._flying[ref]
            slot.calls -= 1
            for client, (visit, (tree, arrays)) in staged.items():
                tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
                self.states.stage(client, visit, unpack(tree, tensors))
                slot.held.setdefault(client, set()).add(visit)
            self._collect(job.message_id, outcome)
        self._feed()

    def _collect(self, message_id: str, outcome: Outcome) -> None:
        """File replies under their message, which is done when each of its clients has one."""
        outcomes = self._outcomes[message_id]
        outcomes.update(outcome)
        if all(reply is not None for reply in outcomes.values()):
            del self._outcomes[message_id]
            self._done[message_id] = [(client, reply) for client, reply in outcomes.items() if reply is not None]

    def _bury(self, slot: Slot, error: Exception) -> None:
        """Replace a dead worker and try again what it held, each client by itself."""
        lost = [(ref, job) for ref, (owner, job) in self._flying.items() if owner is slot]
        for position, (ref, job) in enumerate(lost):
            del self._flying[ref]
            if position == 0:  # calls run in order: only the first can have been running
                job.deaths += 1
            if job.deaths >= LOST_LIMIT and len(job.clients) == 1:
                reason = f"the worker died with this client {job.deaths} times: {type(error).__name__}"
                self._collect(job.message_id, [(job.clients[0], Failure(CLIENT_CRASHED, reason))])
            else:
                self._queue.extend(job.split() if job.deaths else [job])
        self._ray.kill(slot.actor)
        slot.actor, slot.held, slot.calls = self._spawn().actor, {}, 0
        self._wait_until_ready([slot])


def _user_paths() -> list[str]:
    """Return the entries of sys.path that a worker lacks: the user's folder and configuration folders."""
    return [path for path in sys.path if path]


def start_ray(address: str | None, *, workers: int) -> None:
    """Start Ray on this machine, reachable from nowhere else and without a dashboard, or join a cluster."""
    import ray

    runtime_env = {"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "runtime_env": runtime_env}
    if address is not None:
        ray.init(address=address, **common)
    else:
        ray.init(num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **common)
