"""What a run needs before anything is written: data, partition, tasks and rounds, and the server that runs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedcl.assembly import (
    Settings,
    bind,
    check_dataset,
    check_model,
    check_unlearner,
    client_ids,
    device_of,
    learner_factories,
    load_dataset,
    local_work,
    make_devices,
    make_model,
    make_queue,
    make_schedule,
    make_statistics,
    make_steps,
    make_strategy,
    make_stream,
    participants,
    split_dataset,
)
from fedcl.config.compose import Config
from fedcl.contracts.learner import overrides as defines
from fedcl.data.dataset import Dataset, Partition
from fedcl.evaluation.evaluator import Evaluator
from fedcl.models.flat import FlatModel
from fedcl.models.flops import flops
from fedcl.results.recorder import Recorder
from fedcl.scenario.task import Schedule, Stream
from fedcl.server.arrivals import Arrivals, Clock, VirtualClock, WallClock
from fedcl.server.exchange import Exchange
from fedcl.server.flower_strategy import FlowerAdapter
from fedcl.server.loop import Server
from fedcl.server.measurement import Known
from fedcl.server.state import LoopOptions
from fedcl.server.strategy import Pipeline
from fedcl.simulation.backend import Backend
from fedcl.unlearning.service import Unlearning


@dataclass(frozen=True)
class Setup:
    """Data, partition, tasks and rounds of a run."""

    dataset: Dataset
    partition: Partition
    stream: Stream
    schedule: Schedule
    clients: tuple[str, ...]
    notes: tuple[str, ...] = ()  # on the data, for the user

    @classmethod
    def of(cls, cfg: Config, dataset: Dataset | None = None) -> Setup:
        """Build it, and everything that a run builds later, to refuse what does not fit together.

        ``dataset`` saves loading what is loaded already.
        """
        torch.set_num_threads(1)
        device_of(cfg)
        dataset = dataset or load_dataset(cfg)
        notes = check_dataset(cfg, dataset)  # before anything is made for each client or task
        partition = split_dataset(cfg, dataset)
        clients = participants(cfg)
        stream = make_stream(cfg, dataset)
        schedule = make_schedule(cfg, stream)
        model = make_model(cfg, dataset, stream, torch.device("cpu"))
        check_model(cfg, dataset, stream, model)
        work = local_work(cfg, model, stream, schedule, dataset.input_shape)
        make_strategy(cfg, model, {client: i for i, client in enumerate(clients)}, work)
        make_queue(cfg, stream, schedule, dataset)
        make_devices(cfg)
        if cfg["unlearning"]["requests"]:
            check_unlearner(cfg, model, work)
        return cls(dataset, partition, stream, schedule, clients, notes)


def make_server(
    cfg: Config,
    setup: Setup,
    backend: Backend,
    recorder: Recorder,
    *,
    unlearning: Unlearning | None = None,
    evaluate: bool = True,
) -> Server:
    """Build the server over an open backend."""
    settings = Settings.of(cfg)
    model = make_model(cfg, setup.dataset, setup.stream, device_of(cfg))
    work = local_work(cfg, model, setup.stream, setup.schedule, setup.dataset.input_shape)
    strategy = make_strategy(cfg, model, backend.nodes, work)
    if unlearning is not None:
        bind(unlearning.unlearner, work)
    exchange = _exchange(settings, setup, backend, model, strategy, recorder)
    steps = make_steps(cfg, setup.dataset, setup.partition)
    arrivals = Arrivals(exchange, _clock(settings, backend), settings.seed, make_devices(cfg), steps)
    evaluator = Evaluator(setup.dataset, setup.stream, model, batch_size=settings.evaluation.batch_size)
    server = Server(
        strategy=strategy,
        exchange=exchange,
        arrivals=arrivals,
        schedule=setup.schedule,
        stream=setup.stream,
        spec=model.spec,
        initial=model.vector(),
        base_digest=model.base_digest,
        clients=setup.clients,
        record=recorder,
        evaluator=evaluator if evaluate else None,
        options=_loop_options(cfg, settings),
        statistics=make_statistics(cfg, model),
        known=_known(cfg, settings, setup, model),
        compute=backend.compute,
        unlearning=unlearning,
    )
    if backend.listen is not None:
        backend.listen(lambda kind, **fields: recorder.event(kind, **server.when(), **fields))
    return server


def _exchange(
    settings: Settings,
    setup: Setup,
    backend: Backend,
    model: FlatModel,
    strategy: Pipeline | FlowerAdapter,
    recorder: Recorder,
) -> Exchange:
    return Exchange(
        grid=backend.grid,
        nodes=backend.nodes,
        spec=model.spec,
        log=recorder,
        payloads=strategy.payloads,
        cohorts=backend.cohorts,
        commit_state=backend.states.commit if backend.states is not None else None,
        erase=backend.erase,
        release=backend.release,
        max_update_norm=settings.max_update_norm,
        num_tasks=setup.stream.num_tasks if settings.evaluation.iterations else 0,
    )


def _known(cfg: Config, settings: Settings, setup: Setup, model: FlatModel) -> Known:
    """Return what training costs, counted once, and where updates may be late which classes each client holds."""
    forward = flops(model.module, setup.dataset.input_shape)
    # forward, and backward to inputs and to weights: three matrix products of one size
    costs = {"parameters": float(model.num_parameters), "flops_per_sample": 3.0 * forward}
    if model.num_fixed:
        costs["parameters_fixed"] = float(model.num_fixed)
    counts = {}
    if settings.is_late:
        for client, held in zip(client_ids(cfg), setup.partition.train, strict=True):
            labels, sizes = np.unique(setup.dataset.train.y[held], return_counts=True)
            counts[client] = {int(label): int(size) for label, size in zip(labels, sizes, strict=True)}
    return Known(costs, counts)


def _clock(settings: Settings, backend: Backend) -> Clock:
    """Return the clock of the run: the wall's only where real devices are late, so that synchronous runs agree."""
    return WallClock() if settings.is_late and backend.states is None else VirtualClock()


def _loop_options(cfg: Config, settings: Settings) -> LoopOptions:
    return LoopOptions(
        rounds=settings.rounds,
        evaluate_every=settings.evaluation.every,
        personal_evaluation=settings.evaluation.personal,
        boundary_visits=any(defines(build(), "after_task") for build in learner_factories(cfg).values()),
        device=device_of(cfg),
    )
