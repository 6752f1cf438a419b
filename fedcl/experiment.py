"""A run from configuration to results: the one place where everything is wired."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fedcl.building import plugin_directories
from fedcl.client.plugin import overrides as defines
from fedcl.client.state import NEVER, MemoryStateStore
from fedcl.config import compose, config_hash, to_yaml
from fedcl.data.dataset import Dataset, Partition
from fedcl.data.partition import report as partition_report
from fedcl.evaluation.evaluator import Evaluator
from fedcl.results import schema
from fedcl.results.checkpoint import CheckpointError, Checkpoints
from fedcl.results.environment import create_run_dir, environment
from fedcl.results.progress import Progress
from fedcl.results.recorder import Recorder, write_atomic
from fedcl.results.report import terminal_report, write_figures
from fedcl.results.run import load
from fedcl.results.summary import add_reference, summary
from fedcl.rules import ConfigError
from fedcl.scenario.schedule import Synchronous
from fedcl.scenario.task import Stream
from fedcl.server.arrivals import Arrivals, VirtualClock, WallClock
from fedcl.server.exchange import Exchange
from fedcl.server.loop import LoopOptions, Server
from fedcl.server.rounds import RoundOptions
from fedcl.simulation.backend import Backend, FlowerGrid, open_backend
from fedcl.wiring import (
    Config,
    device_of,
    learner_factories,
    load_dataset,
    make_devices,
    make_model,
    make_schedule,
    make_steps,
    make_strategy,
    make_stream,
    participants,
    split_dataset,
)

REFERENCE = "reference"


def run(
    cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path], quiet: bool, grid: FlowerGrid | None = None
) -> Path:
    """Run an experiment and, unless ``compare_with`` is null, its reference; return the run's folder.

    Raises
    ------
    ConfigError
        If the configuration does not fit the data; nothing has been written then.
    """
    prepared = _Prepared.of(cfg)
    reference = _reference_config(cfg, overrides, config_dirs)
    if reference is not None:
        _Prepared.of(reference, dataset=prepared.dataset if reference["data"] == cfg["data"] else None)
    run_dir = _create_run_dir(cfg)
    launch = {
        "overrides": list(overrides),
        "config_dirs": [str(Path(folder).resolve()) for folder in config_dirs],
        "plugin_paths": [str(folder) for folder in plugin_directories(config_dirs)],
    }
    _write_launch(cfg, run_dir, launch)
    _play(cfg, prepared, run_dir, quiet, grid=grid)
    _finish(cfg, reference, run_dir, launch, quiet)
    return run_dir


def resume(run_dir: Path, force: bool, quiet: bool) -> Path:
    """Go on with an interrupted run from its last checkpoint; a finished one is only summarised again.

    Raises
    ------
    ConfigError
        If the folder holds no usable checkpoint.
    """
    cfg: Config = yaml.safe_load((run_dir / "config.yaml").read_text())
    launch = json.loads((run_dir / "env.json").read_text())["launch"]
    for folder in launch["plugin_paths"]:
        if folder not in sys.path:
            sys.path.append(folder)
    if (run_dir / "STATUS").read_text().strip() != "done":
        _play(cfg, _Prepared.of(cfg), run_dir, quiet, resuming=True)
    reference = _reference_config(cfg, launch["overrides"], [Path(d) for d in launch["config_dirs"]])
    _finish(cfg, reference, run_dir, launch, quiet)
    return run_dir


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is written: data, parts, tasks and rounds."""

    dataset: Dataset
    partition: Partition
    stream: Stream
    schedule: Synchronous
    clients: tuple[str, ...]

    @classmethod
    def of(cls, cfg: Config, dataset: Dataset | None = None) -> _Prepared:
        """Build it, refusing whatever does not fit together; ``dataset`` saves loading what is loaded already."""
        torch.set_num_threads(1)
        device_of(cfg)
        clients = participants(cfg)
        dataset = dataset or load_dataset(cfg)
        stream = make_stream(cfg, dataset)
        schedule = make_schedule(cfg, stream)
        partition = split_dataset(cfg, dataset)
        model = make_model(cfg, dataset, stream, torch.device("cpu"))
        learner_factories(cfg)
        make_strategy(cfg, model, {client: i for i, client in enumerate(clients)})
        return cls(dataset, partition, stream, schedule, clients)


def _play(
    cfg: Config,
    prepared: _Prepared,
    run_dir: Path,
    quiet: bool,
    resuming: bool = False,
    grid: FlowerGrid | None = None,
) -> None:
    """Play the rounds that are still to come, writing everything down."""
    if cfg["deterministic"] != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(cfg["deterministic"])
    checkpoints = Checkpoints(run_dir, keep=cfg["checkpoint"]["keep"])
    saved = _load_checkpoint(checkpoints) if resuming else None
    with ExitStack() as stack:
        offsets = saved[0]["offsets"] if saved is not None else dict.fromkeys(schema.TABLES, 0)
        recorder = stack.enter_context(Recorder(run_dir, resume_offsets=offsets if resuming else None))
        stack.enter_context(_status(recorder))
        backend = stack.enter_context(open_backend(cfg, prepared.dataset, prepared.partition, grid))
        server = _server(cfg, prepared, backend, recorder)
        states = backend.states or MemoryStateStore()
        if saved is not None:
            for client, (visit, state) in saved[1].items():
                states.stage(client, visit, state)
            server.load_state_dict(saved[0]["server"])  # sends what was in flight again
        else:
            recorder.event("partition", **partition_report(prepared.partition, prepared.dataset.train.y))
        progress = stack.enter_context(Progress(quiet=quiet))

        def after_round(server_round: int) -> None:
            every = cfg["checkpoint"]["every"]
            last = server_round == prepared.schedule.num_rounds - 1
            if every and ((server_round + 1) % every == 0 or last):
                state = {"server": server.state_dict(), "offsets": recorder.flush()}
                kept = {c: v for c, v in server.exchange.committed.items() if v != NEVER and states.has(c, v)}
                checkpoints.save(server_round, state, kept, states.load)
            task = prepared.schedule.position(prepared.clients[0], server_round).task_id
            progress.update(server_round + 1, prepared.schedule.num_rounds, task, server.measurement.headline)

        started = time.perf_counter()
        server.run(after_round)
        recorder.timing(prepared.schedule.num_rounds, "run", time.perf_counter() - started)
        recorder.close()
        recorder.write_summary(summary(run_dir, server.exchange.bytes_up, server.exchange.bytes_down))


def _server(cfg: Config, prepared: _Prepared, backend: Backend, recorder: Recorder) -> Server:
    model = make_model(cfg, prepared.dataset, prepared.stream, device_of(cfg))
    strategy = make_strategy(cfg, model, backend.nodes)
    exchange = Exchange(
        grid=backend.grid,
        nodes=backend.nodes,
        spec=model.spec,
        log=recorder,
        payloads=strategy.payloads,
        cohorts=backend.cohorts,
        commit_state=backend.states.commit if backend.states is not None else None,
    )
    arrivals = Arrivals(
        exchange,
        WallClock() if backend.states is None else VirtualClock(),
        cfg["seed"],
        make_devices(cfg),
        make_steps(cfg, prepared.dataset, prepared.partition),
    )
    return Server(
        strategy=strategy,
        exchange=exchange,
        arrivals=arrivals,
        schedule=prepared.schedule,
        stream=prepared.stream,
        spec=model.spec,
        initial=model.vector(),
        clients=prepared.clients,
        record=recorder,
        evaluator=Evaluator(prepared.dataset, prepared.stream, model, batch_size=cfg["evaluation"]["batch_size"]),
        options=_loop_options(cfg),
    )


def _loop_options(cfg: Config) -> LoopOptions:
    rounds = RoundOptions(
        seed=cfg["seed"],
        clients_per_round=cfg["clients_per_round"],
        min_replies=cfg["min_replies"],
        retries=cfg["round_retries"],
        **cfg["async"],
    )
    return LoopOptions(
        rounds=rounds,
        evaluate_every=cfg["evaluation"]["every"],
        personal_evaluation=cfg["evaluation"]["personal"],
        boundary_visits=any(defines(build(), "after_task") for build in learner_factories(cfg).values()),
        device=device_of(cfg),
    )


@contextmanager
def _status(recorder: Recorder) -> Iterator[None]:
    """Keep ``STATUS`` true however the run ends."""
    recorder.status("running")
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        recorder.status("interrupted")
        raise
    except BaseException:
        recorder.status("failed")
        raise
    recorder.status("done")


def _finish(cfg: Config, reference: Config | None, run_dir: Path, launch: dict[str, Any], quiet: bool) -> None:
    """Play the reference run if it is still to be played, add it to the summary, draw and print the report."""
    folder = run_dir / REFERENCE
    if reference is not None and not (folder / "summary.json").is_file():
        resuming = (folder / "STATUS").is_file()
        if not resuming:
            folder.mkdir(exist_ok=True)
            _write_launch(reference, folder, launch)
        _play(reference, _Prepared.of(reference), folder, quiet, resuming)
    if reference is not None:
        add_reference(run_dir, folder)
    finished = load(run_dir)
    if cfg["figures"]:
        write_figures(finished)
    if not quiet:
        print(terminal_report(finished))


def _reference_config(cfg: Config, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Config | None:
    """Return the configuration of the run to compare with, or None where there is none or it is this run itself."""
    if cfg["compare_with"] is None:
        return None
    changed = [*overrides, *shlex.split(cfg["compare_with"]), "compare_with=null"]
    reference = compose(changed, config_dirs)
    own = {"compare_with": None, "run_dir": None, "name": ""}
    return None if {**reference, **own} == {**cfg, **own} else reference


def _create_run_dir(cfg: Config) -> Path:
    try:
        return create_run_dir(cfg["run_dir"], cfg["name"], config=to_yaml(cfg), seed=cfg["seed"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _write_launch(cfg: Config, folder: Path, launch: dict[str, Any]) -> None:
    write_atomic(folder / schema.CONFIG, to_yaml(cfg))
    lines = "".join(f"- {json.dumps(override)}\n" for override in launch["overrides"])
    write_atomic(folder / schema.OVERRIDES, lines or "[]\n")
    env = {**environment(cfg["seed"], str(device_of(cfg))), "launch": launch, "config_hash": config_hash(cfg)}
    write_atomic(folder / schema.ENV, json.dumps(env, indent=2) + "\n")


def _load_checkpoint(checkpoints: Checkpoints) -> tuple[Any, dict[str, tuple[int, Any]]] | None:
    """Return the newest checkpoint, or None for a run that was interrupted before its first one."""
    if not checkpoints.folder.is_dir():
        return None
    try:
        return checkpoints.load()
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
