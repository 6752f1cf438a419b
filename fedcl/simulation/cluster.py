"""Ray itself: started on this machine, or an existing cluster that is joined and left as it was."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedcl.config.value_rules import ConfigError
from fedcl.simulation.compat import quiet_environment
from fedcl.simulation.pool import WorkerClass, demand

SETTLE_SECONDS = 0.5  # a cluster's view of its free resources trails behind by less
SETTLE_LIMIT = 10.0
CONNECT_SECONDS = 10.0


def start_ray(
    address: str | None, *, workers: float, gpus: float = 0.0, resources: Mapping[str, float] | None = None
) -> None:
    """Start Ray on this machine, reachable from nowhere else and without a dashboard, or join a cluster.

    Parameters
    ----------
    address
        None starts Ray, even beside another one; ``auto``, ``host:port`` and ``ray://host:port`` join.
    workers
        Cores that a Ray started here has to give, whatever the machine really has.
    gpus
        CUDA devices that its workers ask for together: 0 hides the machine's.
    resources
        Amounts of further resources, by name, that it has to give.

    Raises
    ------
    ConfigError
        If no cluster answers at ``address``.
    """
    import ray

    runtime_env = {"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "runtime_env": runtime_env}
    if address is None:
        own: dict[str, Any] = {} if gpus else {"num_gpus": 0}
        with _loopback_only():
            ray.init(
                address="local",  # without it, Ray would join a cluster that it finds by itself
                num_cpus=max(1, round(workers + 0.499)),
                resources=dict(resources or {}),
                include_dashboard=False,
                **own,
                **common,
            )
        return
    try:
        _check_answers(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
        ray.init(address=address, **common)
    except OSError as error:  # ConnectionError, which Ray raises, is one
        raise ConfigError(f"backend.address={address}: no Ray cluster answers there: {error}") from error


@contextmanager
def local_ray(workers: float, gpus: float = 0.0) -> Iterator[None]:
    """Have Ray on this machine with so many cores and GPUs to give, for several grids at once; end it behind them."""
    quiet_environment()
    import ray

    start_ray(None, workers=workers, gpus=gpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray take the loopback address for this node's: its servers then listen there alone.

    On Linux Ray replaces 127.0.0.1 by an address that others can reach and listens everywhere; where it is not to form
    clusters, as on macOS, it keeps to loopback. Anyone who reaches Ray's ports runs code.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_answers(address: str) -> None:
    """Raise OSError where nobody listens at a ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def free_places(gpus_per_worker: float) -> int:
    """Return for how many workers there is room that nobody has reserved, at least 1, once their number stands still.

    The workers of a run that has just ended still count for a moment.
    """

    def count() -> int:
        free = _ray().available_resources()
        places = int(free.get("CPU", 0.0))
        return min(places, int(free.get("GPU", 0.0) / gpus_per_worker + 1e-6)) if gpus_per_worker else places

    deadline = time.monotonic() + SETTLE_LIMIT
    before = count()
    while time.monotonic() < deadline:
        time.sleep(SETTLE_SECONDS)
        now = count()
        if now == before:
            break
        before = now
    return max(1, before)


def check_fits(demand: Mapping[str, float]) -> None:
    """Refuse workers that ask for more than the whole cluster has: Ray would wait for ever.

    Raises
    ------
    ConfigError
        Naming the resource that is short.
    """
    total = _ray().cluster_resources()
    for name, amount in demand.items():
        if amount > total.get(name, 0.0):
            raise ConfigError(
                f"backend: its workers ask for {amount:g} {name} together, Ray has {total.get(name, 0.0):g}; "
                "change backend.workers, backend.gpus_per_worker or backend.worker_classes"
            )


def reserve(
    address: str | None, workers: int | None, gpus: float, classes: Sequence[WorkerClass] | None, *, owned: bool
) -> Sequence[WorkerClass]:
    """Start or join Ray if the caller is to own it, and return the workers to have; parameters as of ``RayGrid``."""
    if classes is None and (workers is not None or (owned and address is None)):
        classes = [WorkerClass(workers or os.cpu_count() or 1, num_gpus=gpus)]
    if owned:
        asked = demand(classes or ())
        cpus, devices = asked.pop("CPU", 0.0), asked.pop("GPU", 0.0)
        start_ray(address, workers=cpus, gpus=devices, resources=asked)
    if classes is None:
        classes = [WorkerClass(free_places(gpus), num_gpus=gpus)]
    check_fits(demand(classes))
    return classes


def _ray() -> Any:
    import ray  # only partly typed

    return ray
