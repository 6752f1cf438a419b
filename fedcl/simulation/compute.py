"""The server's own heavy arithmetic, done by the workers that otherwise run clients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fedcl.server.state import at_once
from fedcl.simulation.pool import WorkerPool


class Remote(Future[Any]):
    """The result of a call on a worker, fetched when it is asked for; a worker that dies is stood in for here."""

    def __init__(self, ref: Any, again: Callable[[], Future[Any]]) -> None:
        super().__init__()
        self._ref, self._again = ref, again

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result; what ``fn`` raised is raised here."""
        import ray

        try:
            return ray.get(self._ref, timeout=timeout)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError:  # the worker is lost: the function is pure, so it can be repeated
            return self._again().result()


def on_workers(pool: WorkerPool) -> Callable[..., Future[Any]]:
    """Return a function that runs pure functions on the pool's workers, in turn."""
    turn = itertools.count()

    def compute(fn: Callable[..., Any], *args: Any) -> Future[Any]:
        ready = pool.ready()
        if not ready:
            return at_once(fn, *args)
        slot = ready[next(turn) % len(ready)]
        return Remote(slot.actor.compute.remote(fn, args), lambda: at_once(fn, *args))

    return compute
