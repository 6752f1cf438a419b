"""Running a run in its folder: rounds, checkpoints, status, and what stops it."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fedcl.assembly import make_trackers
from fedcl.base.interruption import Interruption, interruptible
from fedcl.client.state import ClientStateStore, MemoryStateStore
from fedcl.config.compose import Config
from fedcl.config.value_rules import RunFailed
from fedcl.contracts.requests import Forgotten
from fedcl.results import reading, schema
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.progress import Progress
from fedcl.results.recorder import Recorder
from fedcl.results.summary import summary
from fedcl.results.target import REACHED, TargetAccuracy, TargetReached, was_reached
from fedcl.results.trackers import Trackers
from fedcl.runs.cautions import report_partition, right_columns
from fedcl.runs.saving import Saving
from fedcl.runs.setup import Setup, make_server
from fedcl.runs.unlearning import make_certification, make_unlearning, purge
from fedcl.simulation.backend import Backend, FlowerGrid, open_backend
from fedcl.unlearning.sources import SubmittedRequests, exclusive

Saved = tuple[Any, dict[str, tuple[int, Any]]]


def run_session(
    cfg: Config,
    setup: Setup,
    run_dir: Path,
    *,
    quiet: bool,
    resuming: bool = False,
    grid: FlowerGrid | None = None,
    requests_from: Path | None = None,
    own: Config | None = None,
) -> None:
    """Run the rounds that are still to come, record everything, and write the summary.

    ``requests_from`` is the folder that unlearning requests are submitted to (None: the run's). ``own`` is the
    configuration of the run itself where ``cfg`` has another unlearner, for requests that come when it is over.

    Raises
    ------
    ConfigError
        If a run is to be resumed and holds no complete checkpoint.
    KeyboardInterrupt, SystemExit
        If a signal asked to stop: the round is finished and a checkpoint written before.
    """
    if cfg["deterministic"] != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(cfg["deterministic"])
    checkpoints = Checkpoints(run_dir, keep=cfg["checkpoint"]["keep"])
    saved = _load(checkpoints) if resuming else None
    with ExitStack() as stack:
        lock = stack.enter_context(ExitStack())  # released last, when STATUS says that the run is over
        recorder = stack.enter_context(_recorder(run_dir, saved, resuming=resuming))
        stack.enter_context(_status(recorder))
        # Flower signals its server app that all is over; devices no longer respond then
        interruption = stack.enter_context(interruptible(at_once=grid is not None))
        folder = run_dir / "clients"
        backend = stack.enter_context(
            open_backend(cfg, setup.dataset, setup.partition, grid, folder, resuming=resuming, left=_left(saved))
        )
        session = _Session(cfg, own or cfg, setup, run_dir, requests_from or run_dir, checkpoints, recorder, backend)
        session.begin(saved, quiet=quiet)
        progress = stack.enter_context(Progress(quiet=quiet))
        stack.push(session.end)
        started = time.perf_counter()
        with suppress(TargetReached), _explained(run_dir):
            if not was_reached(run_dir):
                session.server.run(functools.partial(session.after_round, progress, interruption))
        session.process_last_requests()
        if requests_from is None:  # from here on nobody submits what no round would find
            lock.enter_context(exclusive(run_dir, quiet=True))
            session.process_last_requests()
        session.finish(time.perf_counter() - started)


class _Session:
    """A run in its folder: the server with everything that records it.

    ``own`` is the configuration of the run, ``cfg`` the one by which requests are processed.
    """

    def __init__(
        self,
        cfg: Config,
        own: Config,
        setup: Setup,
        run_dir: Path,
        requests_from: Path,
        checkpoints: Checkpoints,
        recorder: Recorder,
        backend: Backend,
    ) -> None:
        self._cfg, self._setup, self._run_dir = cfg, setup, run_dir
        self._checkpoints, self._recorder = checkpoints, recorder
        self._states: ClientStateStore = backend.states or MemoryStateStore()
        self._rights = right_columns(setup)
        tested = [task for task, right in enumerate(self._rights) if len(right)]
        self._target = TargetAccuracy(cfg.get("target_accuracy"), setup.stream.num_tasks, tested)
        recorder.followers.append(self._target.follow)
        every, seconds = cfg["checkpoint"]["every"], cfg["checkpoint"]["min_seconds"]
        self._saving = Saving(checkpoints, recorder, self._states, every, seconds)
        unlearning = make_unlearning(
            cfg,
            setup,
            backend,
            run_dir,
            SubmittedRequests(requests_from),
            own=None if own is cfg else own,
            certify=make_certification(cfg, own, run_dir, self._saving.save_alone),
        )
        self.server = make_server(cfg, setup, backend, recorder, unlearning=unlearning)
        self._trackers = Trackers(make_trackers(cfg), recorder, self.server.when)

    def begin(self, saved: Saved | None, *, quiet: bool) -> None:
        """Go on from the checkpoint ``saved``, or record how the samples were assigned."""
        if saved is None:
            report_partition(self._cfg, self._setup, self._rights, self._recorder, quiet=quiet)
        else:
            for client, (visit, state) in saved[1].items():
                self._states.stage(client, visit, state)
            self.server.load_state_dict(saved[0]["server"])  # sends what was in flight again, so the states come first
            self._checkpoints.prune()
            purge(self._cfg, self._run_dir, self.server)
        self._trackers.start(self._run_dir, self._cfg, self.server.state.next_round)

    def after_round(self, progress: Progress, interruption: Interruption, server_round: int) -> None:
        """Do what follows a round: note a reached target, checkpoint, show progress, end if that was asked for."""
        schedule, server = self._setup.schedule, self.server
        accuracy = self._target.reached(server_round)
        last = accuracy is not None or server_round == schedule.num_rounds - 1
        if accuracy is not None:
            traffic = server.exchange.bytes_up + server.exchange.bytes_down
            now = server.now
            self._recorder.event(REACHED, round=server_round, virtual_time=now, accuracy=accuracy, bytes=traffic)
        self._trackers.round_over(server_round)
        self._saving.after_round(server, server_round, last=last, stopping=interruption.signal is not None)
        task = schedule.stage(server_round).index
        progress.update(server_round + 1, schedule.num_rounds, task, server.measurement.headline)
        if accuracy is not None:
            raise TargetReached
        if not last:
            interruption.raise_if_asked()

    def process_last_requests(self) -> None:
        """Process the requests that no further round would."""
        while self.server.process_requests(self.server.state.next_round, ends=True):
            pass  # more may arrive while these are processed

    def finish(self, seconds: float) -> None:
        """Close the tables of a run that is over, and write its summary."""
        self._recorder.timing(self._setup.schedule.num_rounds, "run", seconds)
        self._recorder.close()
        exchange = self.server.exchange
        self._recorder.write_summary(summary(self._run_dir, exchange.bytes_up, exchange.bytes_down))
        self._recorder.finalize()

    def end(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the trackers end as the run does."""
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        status = "done" if kind is None else "interrupted" if stopped else "failed"
        self._trackers.finish(reading.summary(self._run_dir) if kind is None else {}, status)


def _recorder(run_dir: Path, saved: Saved | None, *, resuming: bool) -> Recorder:
    state = {} if saved is None else saved[0]
    offsets = state.get("offsets", dict.fromkeys(schema.TABLES, 0))
    return Recorder(run_dir, resume_offsets=offsets if resuming else None, digests=state.get("digests"))


@contextmanager
def _explained(run_dir: Path) -> Iterator[None]:
    """Add to the error of a run that cannot go on which run it is, and what can be done."""
    try:
        yield
    except RunFailed as error:
        raise RunFailed(
            f"{error}; {run_dir}/{schema.EVENTS}.jsonl names each fault; fedcl resume tries again from the last "
            "checkpoint, other settings need a new run"
        ) from error


def _left(saved: Saved | None) -> frozenset[str]:
    """Return the clients that have left."""
    state = {} if saved is None else saved[0]["server"].get("unlearning", {})
    return Forgotten.of(state.get("forgotten", ())).clients


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
    """Return the newest checkpoint, or None for a run that was interrupted before it wrote one."""
    return checkpoints.load() if checkpoints.begun() else None
