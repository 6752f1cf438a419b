"""engine=tune: which engine is fastest for this run's model, learner and clients, found by trying."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fedcl.assembly import client_ids, client_runtime, learner_factories, local_training, make_model
from fedcl.client.engines import stacks
from fedcl.client.local_data import PartitionedData
from fedcl.client.runtime import ClientRuntime
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.config.checks import is_local
from fedcl.config.compose import Config, compose
from fedcl.config.value_rules import ConfigError
from fedcl.messages import Request
from fedcl.runs.setup import Setup
from fedcl.server.aggregation import BLOCK

CHOICES = ("loop", "fused", "stack")
REPEATS = 3


def chosen(
    cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], quiet: bool
) -> tuple[Config, Sequence[str]]:
    """Return a run's configuration and overrides with the fastest engine in place of ``engine=tune``.

    What was measured is printed to standard error. Any other engine is left as it is.

    Raises
    ------
    ConfigError
        If the configuration does not fit the data, or the data are on devices.
    """
    if cfg["engine"] != "tune":
        return cfg, overrides
    if is_local(cfg):
        raise ConfigError("engine=tune: measures on the clients' data, which are on devices here; choose another one")
    seconds = measured(cfg, Setup.of(cfg))
    best = min(seconds, key=seconds.__getitem__)
    if not quiet:
        times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        print(f"engine={best}: processor time of a client's visit: {times}", file=sys.stderr)
    overrides = [*overrides, f"engine={best}"]
    return compose(overrides, config_dirs), overrides


def note_unstacked(cfg: Config, setup: Setup) -> None:
    """Explain on standard error, once a run, why clients are trained one after another although ``engine=stack``."""
    if cfg["engine"] != "stack":
        return
    model = make_model(cfg, setup.dataset, setup.stream, torch.device("cpu"))
    plugins = [build() for build in learner_factories(cfg).values()]
    why = stacks("stack", model, plugins, local_training(cfg))
    if why is None and cfg["evaluation"]["iterations"]:
        why = "evaluation.iterations looks into every step"
    if why is not None:
        print(f"engine=stack: clients are trained one after another, since {why}", file=sys.stderr)


def measured(cfg: Config, setup: Setup) -> dict[str, float]:
    """Return the processor seconds of a client's training in the first task, for each engine that can be used.

    Every engine trains the same clients (up to a block of them), in turn; its fastest run counts.
    """
    runtimes = {name: _runtime({**cfg, "engine": name}, setup) for name in CHOICES}
    runtime = runtimes["stack"]
    plugins = [build() for build in runtime.plugins.values()]
    if stacks("stack", runtime.model, plugins, runtime.training) is not None:
        del runtimes["stack"]
    requests = _requests(setup, runtime)
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(REPEATS + 1):  # the first run warms up
        for name, one in runtimes.items():
            started = time.process_time()
            for reply in one.train(requests, MemoryStateStore()):
                if isinstance(reply, Exception):
                    raise reply
            seconds[name].append(time.process_time() - started)
    return {name: min(times[1:]) / max(len(requests), 1) for name, times in seconds.items()}


def _runtime(cfg: Config, setup: Setup) -> ClientRuntime:
    return client_runtime(cfg, PartitionedData(setup.dataset, setup.partition, client_ids(cfg)))


def _requests(setup: Setup, runtime: ClientRuntime) -> list[Request]:
    task, model, data = setup.stream.train_task(0), runtime.model.vector(), runtime.data
    holding = [client for client in setup.clients if len(data.train(client, task, runtime.model.device))]
    return [Request("train", client, 0, NEVER, 0, 0, task, model=model) for client in holding[:BLOCK]]
