"""Asking a run to forget: checked, handed in, and served at once where no round comes any more."""

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
from fedcl.unlearning import certificate
from fedcl.unlearning.queue import RequestQueue
from fedcl.unlearning.submitted import alone, hand_in, lines

_PAUSE = 0.2  # seconds between two looks at a run that is finishing


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; several kinds at once are refused, but for clients that narrow a request down."""

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
    """Hand a request in to a run, serve it if the run is over, and return lines that say what was done.

    A process that holds the run's folder is at work in it, whatever ``STATUS`` says: while it plays rounds it is handed
    the request, and when these are over it is waited for. Whoever asks the same run meanwhile waits
    (:func:`fedcl.unlearning.submitted.alone`). ``force`` serves also where code or settings have changed since the run.
    ``quiet`` returns the certificate's path. ``trust`` says whose code the folder may run besides fedcl's.

    Raises
    ------
    ConfigError
        If the request can be refused by now; nothing has been written then.
    """
    request = asked.request()
    run = launched(run_dir, trust, checked=False, force=force)
    told = False
    while True:
        with alone(run_dir), ExitStack() as stack:
            status = reading.status(run_dir)
            try:
                stack.enter_context(hold(run_dir))
                status = reading.status(run_dir)
                status = "interrupted" if status == "running" else status  # it was killed
            except Held:
                status = status if status == "done" else "running"
                if status == "done" and not told:
                    print(f"{run_dir}: {holder(run_dir)} is at work there, waiting for it", file=sys.stderr, flush=True)
                    told = True
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
        raise ConfigError(f"{overrides[0]}: another unlearner can serve a run that is over; this one is {status}")
    serving = with_unlearner(run, overrides)
    over = status == "done"
    if over:
        _refuse_over(cfg, serving, run_dir)
    if not force:
        (run.refuse_changes if over else run.refuse_damage)()
    if _answered_before(serving, run_dir, request, status):
        return [f"{request.id}: was asked before, nothing is done again", *_told(run_dir, request)]
    hand_in(run_dir, request, overrides)
    if not over:
        when = "before the next round" if status == "running" else "when the run goes on"
        return [f"{request.id}: handed in, to be served {when} (after a stop: fedcl resume {run_dir})"]
    go_on(run, force=force, quiet=True)
    told = _told(run_dir, request)
    if not told:
        raise RuntimeError(f"{request.id}: was not served; {run_dir / 'events.jsonl'} says why")
    return told[-1:] if quiet else told


def _refuse_over(cfg: Config, serving: Config, run_dir: Path) -> None:
    """Refuse what cannot be done to a run that is over."""
    if cfg["backend"]["name"] == "flower":
        raise ConfigError("backend=flower: its clients are not in reach any more; hand requests in while it runs")
    if not Checkpoints(run_dir).begun():
        raise ConfigError(f"{run_dir}: keeps no checkpoint (checkpoint.every=0), so there is nothing to change")
    if serving is not cfg:
        try:
            UnlearnerOverride(make_unlearner(cfg), make_unlearner(serving))
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _answered_before(cfg: Config, run_dir: Path, request: ForgetRequest, status: str) -> bool:
    """Say whether the very request came before; refuse it where the run would.

    A run that is going on is not looked into: there, what has left meanwhile is refused as an event.
    """
    setup = Setup.of(cfg)
    queue = make_queue(cfg, setup.stream, setup.schedule, setup.dataset)
    forgotten, next_round = Forgotten(), -1
    if status != "running" and Checkpoints(run_dir).begun():
        state = Checkpoints(run_dir).load()[0]["server"]
        next_round = state["next_round"]
        if "unlearning" in state:
            queue.load_state_dict(state["unlearning"]["queue"])
            forgotten = Forgotten.of(state["unlearning"]["forgotten"])
    text = request.to_json()
    before = _seen(queue, run_dir)
    if any(text == one.to_json() for one in before) or text in queue.state_dict()["answered"]:
        return True
    queue.inbox = lambda _: [*((line.request, line.fault) for line in lines(run_dir)), (request, None)]
    why = {one.to_json(): reason for one, reason in queue.take(next_round, forgotten)}[text]
    if why is not None:
        raise ConfigError(why)
    return False


def _seen(queue: RequestQueue, run_dir: Path) -> list[ForgetRequest]:
    """Return the requests that are planned or handed in."""
    return [*(one for _, one in queue.planned), *(line.request for line in lines(run_dir) if line.fault is None)]


def _told(run_dir: Path, request: ForgetRequest) -> list[str]:
    """Return what the certificate of a request says, in a few lines; nothing if there is none."""
    for finding in certificate.read(run_dir):
        content: dict[str, Any] = finding.content
        if content and content["request"]["id"] == request.id:
            remains = [row for row in content["residuals"] if row["outcome"] == "remains"]
            return [
                f"{request.id}: served before round {content['server_round']} by {content['unlearner']['name']}",
                f"guarantee: {content['guarantee']}",
                *(f"remains: {row['part']}: {row['why']}" for row in remains),
                f"cost: {content['cost'].get('seconds', 0.0):.1f} s, {content['cost'].get('bytes', 0.0):.0f} bytes",
                str(run_dir / certificate.FOLDER / finding.name),
            ]
    return []
