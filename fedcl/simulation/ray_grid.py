"""A Flower grid on Ray actors that live as long as the run.

Messages go out in chunks, the largest first; a record that many messages share crosses into the object store once. The
driver owns order, ids and every client's state, so a worker or a node that dies costs time and nothing else.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedcl.client.state import NEVER, ClientStateStore
from fedcl.data.dataset import Dataset, Partition
from fedcl.messages import ARRAYS, VISIT
from fedcl.simulation.cluster import reserve, start_ray
from fedcl.simulation.compat import CLIENT_CRASHED, NODE_UNAVAILABLE, quiet_environment
from fedcl.simulation.compute import on_workers
from fedcl.simulation.grid import BaseGrid
from fedcl.simulation.jobs import Job, JobQueue
from fedcl.simulation.pool import POLL_SECONDS, Slot, WorkerClass, WorkerPool
from fedcl.simulation.worker import Shared, pack_states, unpack_states

__all__ = ["RayGrid", "WorkerClass", "start_ray"]

IN_FLIGHT = 2  # chunks a worker has: one running, one waiting, so that it never idles while the driver thinks
PIECE = 8  # clients a call: few enough for workers to end a round together, and as many as are well stacked at once
SMALL_BYTES = 1 << 17  # of a model: calls on smaller ones are as few as there are workers
CALLS = 16  # a worker at least in a large round: the fewer there are, the less they cost, and the later ends the last
DEATH_LIMIT = 2  # workers that a client may kill, each running it alone, before it is taken for the cause
LOSS_LIMIT = 8  # workers, dead of whatever cause, that a job may be lost with before it is given up
GET_SECONDS = 60.0  # to read a result that Ray holds ready on this node


class RayGrid(BaseGrid):
    """Clients on persistent Ray workers, one thread each.

    Parameters
    ----------
    base
        Digest of the fixed tensors that every worker's model must have.
    workers
        Number of workers; None takes this machine's cores, or the free ones of a cluster that is joined.
    address
        None starts Ray on this machine, reachable from nowhere else; otherwise an existing cluster's address.
    gpus_per_worker
        CUDA devices, or the fraction of one, that each of the ``workers`` reserves.
    worker_classes
        Workers of several kinds, instead of ``workers`` and ``gpus_per_worker``.
    client_timeout
        Seconds for one client's visit, after which its worker is replaced; None waits for ever.
    """

    def __init__(
        self,
        nodes: Mapping[str, int],
        config: dict[str, Any],
        dataset: Dataset,
        partition: Partition,
        *,
        base: str = "",
        workers: int | None = None,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        worker_classes: Sequence[WorkerClass] | None = None,
        client_timeout: float | None = None,
        run_id: int = 1,
        states: ClientStateStore | None = None,
    ) -> None:
        super().__init__(nodes, run_id=run_id, states=states)
        quiet_environment()
        import ray

        self._ray: Any = ray
        self._client_timeout = client_timeout
        clients = tuple(nodes)
        self._sizes = {client: len(part) for client, part in zip(clients, partition.train, strict=True)}
        self._jobs = JobQueue(self._done.__setitem__)
        self._owns_ray = not ray.is_initialized()
        self._pool: WorkerPool | None = None
        try:
            classes = reserve(address, workers, gpus_per_worker, worker_classes, owned=self._owns_ray)
            # with the paths of the user's own modules
            data = (ray.put(dataset), ray.put(partition), clients, [path for path in sys.path if path], base)
            without_gpu = {**config, "device": "cpu"}  # for a worker that has reserved none
            self._pool = WorkerPool(classes, lambda kind: (config if kind.num_gpus else without_gpu, *data))
            self._pool.wait()
            self.compute = on_workers(self._pool)
        except BaseException:
            self.close()
            raise

    @property
    def _workers(self) -> WorkerPool:
        if self._pool is None:
            raise RuntimeError("the grid is closed")
        return self._pool

    def close(self) -> None:
        """End the workers, and Ray if this grid started it; a cluster that was joined goes on."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._owns_ray:
            self._ray.shutdown()

    def _submit(self, batch: list[tuple[str, RecordDict]]) -> None:
        shared: dict[int, Shared] = {}
        jobs = []
        most = self._most(batch)
        for message_id, content in batch:
            visit = cast(ConfigRecord, content[VISIT])
            clients, committed = cast(list[str], visit["clients"]), cast(list[int], visit["committed"])
            whole = Job(message_id, self._share(content, shared), list(clients), list(committed), 0)
            for job in whole.split(most):
                job.size = sum(self._sizes[client] for client in job.clients)
                jobs.append(job)
        self._jobs.add(jobs)
        self._feed()

    def _most(self, batch: Sequence[tuple[str, RecordDict]]) -> int:
        """Return how many clients a call may have: a call costs as much as training many small models."""
        records = [cast(ArrayRecord, content[ARRAYS]) for _, content in batch[:1] if ARRAYS in content]
        size = sum(4 * math.prod(array.shape) for record in records for array in record.values())
        clients = sum(len(cast(list[str], cast(ConfigRecord, content[VISIT])["clients"])) for _, content in batch)
        share = -(-clients // max(len(self._workers.slots), 1))
        fair = share if 0 < size <= SMALL_BYTES else share // CALLS
        return max(-(-fair // PIECE), 1) * PIECE  # whole blocks, and whole stacks

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
        """Give work to the workers that are up; while there are suspects, only to idle ones and these first."""
        slots = self._workers.ready()
        while slots:
            slot = min(slots, key=lambda slot: len(slot.calls))
            if len(slot.calls) >= (1 if self._jobs.suspects else IN_FLIGHT) or (job := self._jobs.next()) is None:
                return
            self._dispatch(slot, job)

    def _dispatch(self, slot: Slot, job: Job) -> None:
        states = []
        for client, visit in zip(job.clients, job.committed, strict=True):
            if visit != NEVER and visit not in slot.held.get(client, ()) and self.states.has(client, visit):
                states.append((client, visit, self.states.load(client, visit)))
            slot.held[client] = (visit,)  # a set would be four times as large
        if not slot.calls:
            slot.since = time.monotonic()
        slot.calls[slot.actor.run.remote(job.message_id, job.wire, pack_states(states))] = job

    def _progress(self, timeout: float | None) -> None:
        """Wait a moment for whatever comes first, then look after the workers: no wait here is without a bound."""
        self._feed()
        if not self._jobs.open:
            return
        pool = self._workers
        starting = pool.starting()
        flying = {call: slot for slot in pool.ready() for call in slot.calls}
        wait = POLL_SECONDS if timeout is None else min(POLL_SECONDS, max(timeout, 0.0))
        done, _ = self._ray.wait([*flying, *starting], num_returns=1, timeout=wait)
        for call in done:
            if call in starting:
                pool.started(starting[call])
            elif (error := self._receive(flying[call], call)) is not None:
                self._bury(flying[call], error)
        for slot in pool.stranded():
            self._bury(slot, ConnectionError("its node is lost"))
        self._end_overdue()
        pool.check_alive()
        self._feed()

    def _receive(self, slot: Slot, call: Any) -> Exception | None:
        """File a call's result; return why it failed if its worker cannot be used any more."""
        errors = self._ray.exceptions
        try:
            outcome, staged = self._ray.get(call, timeout=GET_SECONDS)
        except errors.RayTaskError as error:
            # anything else is a fault of fedcl: what a client raises comes back as a failure
            lost = (errors.ObjectLostError, errors.GetTimeoutError, errors.OutOfMemoryError, MemoryError)
            if not isinstance(error.cause, lost):
                raise
            return cast(Exception, error.cause)
        except errors.RaySystemError:
            raise  # what was sent cannot be read: another version of the code, not a lost worker
        except errors.RayError as error:
            return cast(Exception, error)
        job = slot.calls.pop(call)
        slot.since = time.monotonic()
        for client, visit, state in unpack_states(staged):
            if client in job.cancelled:
                continue
            self.states.stage(client, visit, state)
            slot.held[client] = (*slot.held.get(client, ()), visit)
        self._jobs.collect(job.message_id, [(c, reply) for c, reply in outcome if c not in job.cancelled])
        return None

    def _cancel(self, clients: frozenset[str]) -> None:
        for slot in self._workers.slots:
            for job in slot.calls.values():
                job.cancelled |= clients & set(job.clients)
            for client in clients:
                slot.held.pop(client, None)
        for message_id in self._jobs.cancel(clients):
            del self._sent[message_id]
        self._clear_workers(sorted(clients))

    def _clear_workers(self, clients: Sequence[str]) -> None:
        """Wait until no worker has a copy of anything of ``clients``; one that is lost meanwhile has none.

        A worker executes calls in order, so it has ended every earlier one.
        """
        waiting = {slot.actor.erase.remote(clients): (slot, slot.actor) for slot in self._workers.ready()}
        errors = self._ray.exceptions
        while waiting:
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
            for call in done:
                slot, actor = waiting.pop(call)
                try:
                    self._ray.get(call, timeout=GET_SECONDS)
                except errors.RayTaskError:
                    raise
                except errors.RayError as error:
                    if slot.actor is actor:
                        self._bury(slot, error)
            for slot in self._workers.stranded():
                self._bury(slot, ConnectionError("its node is lost"))
            self._end_overdue()
            waiting = {call: (slot, actor) for call, (slot, actor) in waiting.items() if slot.actor is actor}
        for slot in self._workers.ready():
            self._salvage(slot)  # results that are ready may hold what is to be dropped

    def _salvage(self, slot: Slot) -> None:
        """File the results that a worker finished before its end, so that the first call left is the one it ran."""
        for call in list(slot.calls):
            done, _ = self._ray.wait([call], timeout=0)
            if not done or self._receive(slot, call) is not None:
                return

    def _bury(self, slot: Slot, error: Exception) -> None:
        """Replace a worker that is lost and repeat what it held, each client of the running call by itself.

        Only a death of the worker itself counts against a client, and only if it ran alone: the loss of a node or a
        connection says nothing of the client.
        """
        self._salvage(slot)
        errors = self._ray.exceptions
        own_death = isinstance(error, (errors.ActorDiedError, errors.OutOfMemoryError, MemoryError))
        own_death = own_death and slot.node in self._workers.nodes()
        alone = any(len(job.clients) == 1 for job in list(slot.calls.values())[:1])
        job = self._replace(slot, error)
        if job is None:
            return
        job.losses += 1
        job.deaths += own_death and alone
        name = type(error).__name__
        if job.deaths >= DEATH_LIMIT:
            self._jobs.give_up(job, CLIENT_CRASHED, f"the worker died with this client {job.deaths} times: {name}")
        elif job.losses >= LOSS_LIMIT:
            self._jobs.give_up(job, NODE_UNAVAILABLE, f"lost with {job.losses} workers in a row: {name}")
        else:
            self._jobs.suspect(job)

    def _replace(self, slot: Slot, why: object) -> Job | None:
        """Replace a worker, queue the calls it had not begun, and return the job that it ran if that still counts."""
        jobs = list(slot.calls.values())
        self._workers.replace(slot, why)
        self._jobs.put_back(jobs[1:])
        return jobs[0] if jobs and jobs[0].cancel(jobs[0].cancelled) else None

    def _end_overdue(self) -> None:
        """Replace workers whose call takes too long; a cohort is repeated one by one to find the client that hangs."""
        limit = self._client_timeout
        if limit is None:
            return
        for slot in self._workers.ready():
            if not slot.overdue(limit):
                continue
            self._salvage(slot)  # it may have finished since
            if not slot.overdue(limit):
                continue
            why = f"no answer within backend.client_timeout={limit:g} s"
            job = self._replace(slot, f"{why} for each client")
            if job is not None and len(job.clients) == 1:
                self._jobs.give_up(job, CLIENT_CRASHED, why)
            elif job is not None:
                self._jobs.suspect(job)
