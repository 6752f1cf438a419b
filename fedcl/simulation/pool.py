"""The workers of a Ray grid: where they run, whether they live, and what takes a dead one's place."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fedcl.config.value_rules import ConfigError
from fedcl.simulation.jobs import Job
from fedcl.simulation.worker import Worker

POLL_SECONDS = 1.0
LIVENESS_SECONDS = 2.0  # between two looks at which nodes are alive
START_SECONDS = 300.0  # for a worker to be placed, to import its libraries and to build its client side
START_LIMIT = 3  # workers of one slot that may die in a row before they are built

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerClass:
    """Workers alike: how many, and what each reserves on its node; ``num_gpus`` may be a fraction of one."""

    count: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Slot:
    """The place of a worker, which is replaced when it dies.

    ``starting`` is the call that returns once the worker is built, None from then on. ``held`` are the message numbers
    of the states that it caches, by client, ``calls`` what it was given, in order, so that only the first can be
    running, and ``since`` the earliest time at which that one began.
    """

    kind: WorkerClass
    actor: Any
    starting: Any
    asked: float
    node: str = ""
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[Any, Job] = field(default_factory=dict)
    since: float = 0.0
    failed_starts: int = 0

    def overdue(self, limit: float) -> bool:
        """Whether the running call has taken longer than ``limit`` seconds for each of its clients."""
        running = next(iter(self.calls.values()), None)
        return running is not None and time.monotonic() - self.since > limit * len(running.clients)


class WorkerPool:
    """Persistent workers on the nodes of a Ray cluster.

    A dead worker is replaced, and its slot is left out until the new one is built; without capacity for it, its actor
    waits for a node while the others work.

    Parameters
    ----------
    classes
        What workers to start.
    arguments
        Returns, for a class, the arguments of its :class:`~fedcl.simulation.worker.Worker`.
    """

    def __init__(self, classes: Sequence[WorkerClass], arguments: Callable[[WorkerClass], tuple[Any, ...]]) -> None:
        import ray

        self._ray: Any = ray
        self._arguments = {id(kind): arguments(kind) for kind in classes}
        self._checked = time.monotonic()
        self.slots = [self._place(kind) for kind in classes for _ in range(kind.count)]

    def _place(self, kind: WorkerClass) -> Slot:
        actor, starting = self._spawn(kind)
        return Slot(kind, actor, starting, time.monotonic())

    def _spawn(self, kind: WorkerClass) -> tuple[Any, Any]:
        # never restarted by Ray: a new worker would lack the clients' states, which the driver sends
        options = {
            "num_cpus": kind.num_cpus,
            "num_gpus": kind.num_gpus,
            "resources": dict(kind.resources),
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,
        }
        actor = self._ray.remote(Worker).options(**options).remote(*self._arguments[id(kind)])
        return actor, actor.ready.remote()

    def ready(self) -> list[Slot]:
        """Return the slots whose worker is built."""
        return [slot for slot in self.slots if slot.starting is None]

    def starting(self) -> dict[Any, Slot]:
        """Return the slots whose worker is not built yet, by the call that returns when it is."""
        return {slot.starting: slot for slot in self.slots if slot.starting is not None}

    def wait(self) -> None:
        """Wait until every worker is built.

        Raises
        ------
        ConfigError
            If the cluster cannot place them all in time.
        """
        while starting := self.starting():
            done, _ = self._ray.wait(list(starting), num_returns=1, timeout=POLL_SECONDS)
            for call in done:
                self.started(starting[call])
            late = [slot for slot in starting.values() if time.monotonic() - slot.asked > START_SECONDS]
            if not done and late:
                raise ConfigError(
                    f"backend: {len(late)} of {len(self.slots)} workers were not up within {START_SECONDS:.0f} s; "
                    f"free in the cluster: {self._ray.available_resources()}"
                )

    def started(self, slot: Slot) -> None:
        """Mark a worker that has been built as ready, or start another if it died on the way.

        Raises
        ------
        ray.exceptions.RayError
            With the worker's own traceback, if its class or its client side cannot be built.
        RuntimeError
            If one worker after another dies before it is built.
        """
        errors = self._ray.exceptions
        try:
            slot.node = self._ray.get(slot.starting, timeout=START_SECONDS)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise
            slot.failed_starts += 1
            if slot.failed_starts >= START_LIMIT:
                raise RuntimeError(
                    f"{START_LIMIT} workers in a row died while they started, the last with: {error}"
                ) from error
            self.replace(slot, error)
        else:
            slot.starting, slot.failed_starts = None, 0

    def replace(self, slot: Slot, why: object) -> None:
        """End the slot's worker, dead or not, and start another; the caller moves its calls."""
        log.warning("a worker on node %s is replaced: %s", slot.node[:8] or "?", str(why).strip().splitlines()[0])
        self._ray.kill(slot.actor)
        slot.actor, slot.starting = self._spawn(slot.kind)
        slot.asked, slot.node, slot.held, slot.calls = time.monotonic(), "", {}, {}

    def nodes(self) -> set[str]:
        """Return the ids of the nodes that Ray holds alive."""
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}

    def stranded(self) -> list[Slot]:
        """Return the slots whose node is lost; looks every few seconds only.

        A result on a lost node never comes, and the call for it need not fail.
        """
        if time.monotonic() - self._checked < LIVENESS_SECONDS:
            return []
        self._checked = time.monotonic()
        alive = self.nodes()
        return [slot for slot in self.ready() if slot.node not in alive]

    def check_alive(self) -> None:
        """Refuse to wait if no worker is left.

        Raises
        ------
        RuntimeError
            If every worker is lost and no new one has come up in time.
        """
        if self.ready() or not self.slots:
            return
        if all(time.monotonic() - slot.asked > START_SECONDS for slot in self.slots):
            raise RuntimeError(f"every worker was lost, and no new one came up within {START_SECONDS:.0f} s")

    def close(self) -> None:
        """End the workers, and nothing else of the cluster."""
        for slot in self.slots:
            self._ray.kill(slot.actor)
        self.slots = []


def demand(classes: Sequence[WorkerClass]) -> dict[str, float]:
    """Return what all workers together reserve, by Ray's name of the resource."""
    total: Counter[str] = Counter()
    for kind in classes:
        for name, amount in {"CPU": kind.num_cpus, "GPU": kind.num_gpus, **kind.resources}.items():
            total[name] += cast(int, kind.count * amount)
    return {name: float(amount) for name, amount in total.items() if amount}
