"""Asking a run to forget: a request is checked, submitted, and processed at once where no further round comes."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcl.assembly import make_queue, make_unlearner
from fedcl.client.unlearner_override import UnlearnerOverride
from fedcl.config.compose import Config
from fedcl.config.value_rules import ConfigError
from fedcl.contracts.requests import ForgetRequest, Forgotten, Scope
from fedcl.results import reading
from fedcl.results.checkpoint import Checkpoints
from fedcl.results.launches import Launched, Trust, launched
from fedcl.results.locking import Held, hold, holder
from fedcl.runs.experiment import go_on, with_unlearner
from fedcl.runs.setup import Setup
from fedcl.unlearning.certificate import FOLDER
from fedcl.unlearning.sources import exclusive, lines, planned_requests, submit
from fedcl.unlearning.verification import read

_PAUSE = 0.2  # seconds between two looks at a run that is finishing


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: one kind of thing, perhaps with clients that narrow the request down."""

    clients: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()
    id: str | None = None

    def request(self) -> ForgetRequest:
        """Return the request.

        Raises
        ------
        ConfigError
            If it names nothing, or several kinds of things.
        """
        values: dict[Scope, tuple[int, ...]] = {"class": self.classes, "sample": self.samples, "task": self.tasks}
        named: list[Scope] = [scope for scope in values if values[scope]]
        if len(named) > 1 or not (named or self.clients):
            what = "--client ID, or one of --class, --samples and --task, with --client for these clients alone"
            raise ConfigError(f"name what to forget: {what}")
        scope: Scope = named[0] if named else "client"
        name = self.id or f"{scope}-{secrets.token_hex(4)}"
        return ForgetRequest(name, scope, self.clients, self.classes, self.samples, self.tasks)


def forget(
    run_dir: Path,
    asked: Asked,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    quiet: bool = False,
    trust: Trust | None = None,
) -> list[str]:
    """Submit a request to a run, process it if the run is over, and return lines that say what was done.

    A process that holds the run's folder is at work in it, whatever ``STATUS`` says: while it runs rounds it finds the
    request, and after them it is waited for. Other requests to the same run wait meanwhile
    (:func:`fedcl.unlearning.sources.exclusive`). ``force`` ignores changes of code or settings since the run. ``quiet``
    returns only the certificate's path. ``trust`` says whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the request is refused; nothing has been written then.
    """
    request = asked.request()
    run = launched(run_dir, trust, checked=False, force=force)
    waiting = False
    while True:
        with exclusive(run_dir), ExitStack() as stack:
            status = reading.status(run_dir)
            try:
                stack.enter_context(hold(run_dir))
                status = reading.status(run_dir)
                status = "interrupted" if status == "running" else status  # it was killed
            except Held:
                status = status if status == "done" else "running"
                if status == "done" and not waiting:
                    print(f"{run_dir}: {holder(run_dir)} is at work there, waiting for it", file=sys.stderr, flush=True)
                    waiting = True
            else:
                return _forget(run, request, status, overrides, force=force, quiet=quiet)
            if status == "running":
                return _forget(run, request, status, overrides, force=force, quiet=quiet)
        time.sleep(_PAUSE)


def _forget(
    run: Launched, request: ForgetRequest, status: str, overrides: Sequence[str], *, force: bool, quiet: bool
) -> list[str]:
    run_dir, cfg = run.run_dir, run.cfg
    if overrides and status != "done":
        raise ConfigError(f"{overrides[0]}: needs a run that is over; this one is {status}")
    chosen = with_unlearner(run, overrides)
    over = status == "done"
    if over:
        _refuse_over(cfg, chosen, run_dir)
    if not force:
        (run.refuse_changes if over else run.refuse_damage)()
    if _submitted_before(chosen, run_dir, request, status):
        return [f"{request.id}: was submitted before, nothing is done again", *_certified(run_dir, request)]
    submit(run_dir, request, overrides)
    if not over:
        when = "before the next round" if status == "running" else "when the run goes on"
        return [f"{request.id}: submitted, to be processed {when} (after a stop: fedcl resume {run_dir})"]
    go_on(run, force=force, quiet=True)
    certified = _certified(run_dir, request)
    if not certified:
        raise RuntimeError(f"{request.id}: was not processed; {run_dir / 'events.jsonl'} says why")
    return certified[-1:] if quiet else certified


def _refuse_over(cfg: Config, chosen: Config, run_dir: Path) -> None:
    """Refuse what cannot be done to a run that is over."""
    if cfg["backend"]["name"] == "flower":
        raise ConfigError("backend=flower: its clients cannot be reached any more; submit requests while it runs")
    if not Checkpoints(run_dir).begun():
        raise ConfigError(f"{run_dir}: keeps no checkpoint (checkpoint.every=0), so there is nothing to change")
    if chosen is not cfg:
        try:
            UnlearnerOverride(make_unlearner(cfg), make_unlearner(chosen))
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _submitted_before(cfg: Config, run_dir: Path, request: ForgetRequest, status: str) -> bool:
    """Whether the same request came before; refuse it where the run would.

    A running run is not looked into: it refuses by an event what names clients that have left meanwhile.
    """
    setup, submitted = Setup.of(cfg), lines(run_dir)
    planned = planned_requests(cfg["unlearning"]["requests"], setup.schedule).requests
    if request in [*(one for _, one in planned), *(line.request for line in submitted if line.fault is None)]:
        return True
    found = [*((line.request, line.fault) for line in submitted), (request, None)]
    queue = make_queue(cfg, setup.stream, setup.schedule, setup.dataset, lambda _: found)
    forgotten, next_round = Forgotten(), -1
    if status != "running" and Checkpoints(run_dir).begun():
        state = Checkpoints(run_dir).load()[0]["server"]
        next_round = state["next_round"]
        if "unlearning" in state:
            queue.load_state_dict(state["unlearning"]["queue"])
            forgotten = Forgotten.of(state["unlearning"]["forgotten"])
    if queue.knows(request):
        return True
    why = dict(queue.take(next_round, forgotten))[request]
    if why is not None:
        raise ConfigError(why)
    return False


def _certified(run_dir: Path, request: ForgetRequest) -> list[str]:
    """Return what the certificate of a request says, in a few lines; nothing if there is none."""
    for finding in read(run_dir):
        content: dict[str, Any] = finding.content
        if content and content["request"]["id"] == request.id:
            retained = [row for row in content["erasure"] if row["outcome"] == "retained"]
            return [
                f"{request.id}: processed before round {content['server_round']} by {content['unlearner']['name']}",
                f"guarantee: {content['guarantee']}",
                *(f"retained: {row['part']}: {row['why']}" for row in retained),
                f"cost: {content['cost'].get('seconds', 0.0):.1f} s, {content['cost'].get('bytes', 0.0):.0f} bytes",
                str(run_dir / FOLDER / finding.name),
            ]
    return []
