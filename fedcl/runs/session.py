"""Playing a prepared run in its folder: rounds, checkpoints, status, and what stops it."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fedcl.assembly import make_trackers, make_unlearner
from fedcl.base.interruption import Interruption, interruptible
from fedcl.client.state import NEVER, ClientStateStore, MemoryStateStore
from fedcl.client.unlearner_override import UnlearnerOverride
from fedcl.config.checks import is_local
from fedcl.config.compose import Config
from fedcl.config.value_rules import RunFailed
from fedcl.contracts.requests import Forgotten
from fedcl.data.partition import report as partition_report
from fedcl.results import reading, schema
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.progress import Progress
from fedcl.results.recorder import Recorder
from fedcl.results.summary import summary
from fedcl.results.target import REACHED, TargetAccuracy, TargetReached, was_reached
from fedcl.results.trackers import Trackers
from fedcl.runs.cautions import Columns, cautions, constant_accuracy, right_columns
from fedcl.runs.certification import AfterServing
from fedcl.runs.retrained import make_unlearning
from fedcl.runs.setup import Setup, make_server
from fedcl.server.loop import Server
from fedcl.simulation.backend import FlowerGrid, open_backend
from fedcl.unlearning.submitted import Inbox, alone

Saved = tuple[Any, dict[str, tuple[int, Any]]]


def run_session(
    cfg: Config,
    setup: Setup,
    run_dir: Path,
    *,
    quiet: bool,
    resuming: bool = False,
    grid: FlowerGrid | None = None,
    inbox: Path | None = None,
    own: Config | None = None,
) -> None:
    """Play the rounds that are still to come, writing everything down, and summarise.

    ``inbox`` is the folder that unlearning requests are handed in to (None: the run's). ``own`` is the configuration of
    the run itself where ``cfg`` has another unlearner, for requests that come when it is over.

    Raises
    ------
    ConfigError
        If a run is to be resumed and holds no whole checkpoint.
    KeyboardInterrupt, SystemExit
        If a signal asked to stop: the round is finished and a checkpoint written before.
    """
    if cfg["deterministic"] != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(cfg["deterministic"])
    checkpoints = Checkpoints(run_dir, keep=cfg["checkpoint"]["keep"])
    saved = _load(checkpoints) if resuming else None
    with ExitStack() as stack:
        door = stack.enter_context(ExitStack())  # left last, when STATUS says that the run is over
        offsets = saved[0]["offsets"] if saved is not None else dict.fromkeys(schema.TABLES, 0)
        digests = saved[0].get("digests") if saved is not None else None
        recorder = stack.enter_context(Recorder(run_dir, resume_offsets=offsets if resuming else None, digests=digests))
        stack.enter_context(_status(recorder))
        # Flower tells its server app by a signal that all is over: devices then answer nothing more
        interruption = stack.enter_context(interruptible(at_once=grid is not None))
        left, folder = _left(saved), run_dir / "clients"
        backend = stack.enter_context(
            open_backend(cfg, setup.dataset, setup.partition, grid, folder, resuming=resuming, left=left)
        )
        unlearning = make_unlearning(cfg, setup, backend, run_dir)
        unlearning.queue.inbox = Inbox(inbox or run_dir)
        if own is not None:
            unlearning.unlearner = UnlearnerOverride(make_unlearner(own), unlearning.unlearner)
        rights = right_columns(setup)
        tested = [task for task, right in enumerate(rights) if len(right)]
        target = TargetAccuracy(cfg.get("target_accuracy"), setup.stream.num_tasks, tested)
        recorder.followers.append(target.follow)
        server = make_server(cfg, setup, backend, recorder, unlearning=unlearning)
        trackers = Trackers(make_trackers(cfg), recorder, server.when)
        states = backend.states or MemoryStateStore()
        if saved is not None:
            _restore(server, states, saved)
        else:
            _report_partition(cfg, setup, rights, recorder, quiet)
        progress = stack.enter_context(Progress(quiet=quiet))
        after = _AfterRound(cfg, setup, server, states, recorder, checkpoints, progress, interruption, target, trackers)
        unlearning.certify = served = AfterServing(
            cfg, own or cfg, run_dir, server, unlearning, recorder, after.save_alone
        )
        if saved is not None:
            checkpoints.prune()
            served.purge()
        trackers.start(run_dir, cfg, server.state.next_round)
        stack.push(functools.partial(_end, trackers, run_dir))
        started = time.perf_counter()
        with suppress(TargetReached), _told(run_dir):
            if not was_reached(run_dir):
                server.run(after)
        for last in (False, True):
            if last and inbox is None:  # from here on nobody hands in what no round would find
                door.enter_context(alone(run_dir, quiet=True))
            while server.process_requests(server.state.next_round, ends=True):
                pass  # requests may come in while the last ones are served
        recorder.timing(setup.schedule.num_rounds, "run", time.perf_counter() - started)
        recorder.close()
        recorder.write_summary(summary(run_dir, server.exchange.bytes_up, server.exchange.bytes_down))
        recorder.finalize()


class _AfterRound:
    """What follows each round: a checkpoint where one is due, progress, and the end if a signal asked for it."""

    def __init__(
        self,
        cfg: Config,
        setup: Setup,
        server: Server,
        states: ClientStateStore,
        recorder: Recorder,
        checkpoints: Checkpoints,
        progress: Progress,
        interruption: Interruption,
        target: TargetAccuracy,
        trackers: Trackers,
    ) -> None:
        self._every, self._seconds = cfg["checkpoint"]["every"], cfg["checkpoint"]["min_seconds"]
        self._saved = -math.inf
        self._setup, self._server, self._states = setup, server, states
        self._recorder, self._checkpoints = recorder, checkpoints
        self._progress, self._interruption = progress, interruption
        self._target, self._trackers = target, trackers

    def __call__(self, server_round: int) -> None:
        schedule = self._setup.schedule
        reached = self._target.reached(server_round)
        last = reached is not None or server_round == schedule.num_rounds - 1
        if reached is not None:
            traffic = self._server.exchange.bytes_up + self._server.exchange.bytes_down
            now = self._server.now
            self._recorder.event(REACHED, round=server_round, virtual_time=now, accuracy=reached, bytes=traffic)
        self._trackers.round_over(server_round)
        due = self._every and (server_round + 1) % self._every == 0 and time.monotonic() - self._saved >= self._seconds
        if due or (self._every and last) or self._interruption.signal is not None:
            self._save(server_round)
            self._saved = time.monotonic()
        task = schedule.stage(server_round).index
        self._progress.update(server_round + 1, schedule.num_rounds, task, self._server.measurement.headline)
        if reached is not None:
            raise TargetReached
        if not last:
            self._interruption.raise_if_asked()

    def save_alone(self) -> None:
        """Write a checkpoint of the moment, between two rounds, and delete those before it."""
        if self._every and self._server.state.next_round:  # before the first round there is nothing to go back to
            self._save(self._server.state.next_round - 1, alone=True)

    def _save(self, server_round: int, *, alone: bool = False) -> None:
        state = {"server": self._server.state_dict(), "offsets": self._recorder.flush()}
        state["digests"] = self._recorder.digests()
        committed = self._server.exchange.committed
        kept = {c: v for c, v in committed.items() if v != NEVER and self._states.has(c, v)}
        self._checkpoints.save(server_round, state, kept, self._states.load, alone=alone)


@contextmanager
def _told(run_dir: Path) -> Iterator[None]:
    """Say of a run that cannot go on which one it is, and what can be done with it."""
    try:
        yield
    except RunFailed as error:
        raise RunFailed(
            f"{error}; {run_dir}/{schema.EVENTS}.jsonl names each fault; fedcl resume tries again from the last "
            "checkpoint, other settings need a new run"
        ) from error


def _left(saved: Saved | None) -> frozenset[str]:
    """Return the clients that had left by then."""
    state = {} if saved is None else saved[0]["server"].get("unlearning", {})
    return Forgotten.of(state.get("forgotten", ())).clients


def _report_partition(cfg: Config, setup: Setup, rights: Sequence[Columns], recorder: Recorder, quiet: bool) -> None:
    """Record how the samples were dealt, and say so where some were left out."""
    report = partition_report(setup.partition, setup.dataset.train.y)
    stream = setup.stream
    begin: dict[str, Any] = {"round": -1, "virtual_time": 0.0}
    if setup.notes:
        report["notes"] = list(setup.notes)
    recorder.event(
        "partition",
        **begin,
        **report,
        tasks=[list(stream.train_task(k).classes) for k in range(stream.num_tasks)],
        test_samples=[len(right) for right in rights],
        constant_accuracy=constant_accuracy(stream, rights),
    )
    for text in cautions(cfg, stream, rights):
        recorder.event(schema.WARNING, **begin, text=text)
        if not quiet:
            print(f"fedcl: warning: {text}", file=sys.stderr)
    if report["coverage"] < 1.0 and not quiet and not is_local(cfg):
        print(f"the clients hold {report['coverage']:.1%} of the train samples", file=sys.stderr)


def _end(trackers: Trackers, run_dir: Path, kind: type[BaseException] | None, *rest: object) -> None:
    """Let the trackers end as the run does."""
    stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
    status = "done" if kind is None else "interrupted" if stopped else "failed"
    trackers.finish(reading.summary(run_dir) if kind is None else {}, status)


def _restore(server: Server, states: ClientStateStore, saved: Saved) -> None:
    for client, (visit, state) in saved[1].items():
        states.stage(client, visit, state)
    server.load_state_dict(saved[0]["server"])  # sends what was in flight again, so the states come first


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


def _load(checkpoints: Checkpoints) -> Saved | None:
    """Return the newest checkpoint, or None for a run that was interrupted before its first one."""
    return checkpoints.load() if checkpoints.begun() else None
