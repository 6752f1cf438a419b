"""Runs on a fleet: submitted to its server, watched until they end, resumed after an interruption."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.bundle import KEY, sign
from fedcl.deploy.layout import Fleet, Launch, read_launches, write_launch
from fedcl.deploy.processes import environment, refusal, tail, undisturbed, unreachable
from fedcl.results import reading
from fedcl.simulation.nodes import forget_refusals, write_order

CONNECTION = "fleet"  # the name of the server in server/flwr/config.toml
_STARTED = re.compile(r"run (\d{6,})", re.IGNORECASE)
_ENDED = ("finished",)
_SHOWN = ("round ", "fleet: ", "fedcl: ")  # how lines begin that a user wants to see
BEGIN_SECONDS = 600.0
GIVE_UP_SECONDS = 30.0
LEAVE_SECONDS = 60.0  # Flower's server app asks every 24 s or so whether its run goes on
NOTICE_SECONDS = 100.0  # Flower misses two heartbeats of 30 s before it gives up a ServerApp


class Stopped(BaseException):
    """A signal ended a fleet's run in ``run_dir``; ``cause`` is what the signal raised."""

    def __init__(self, cause: BaseException, fleet: Path, run_dir: Path) -> None:
        super().__init__(str(run_dir))
        self.cause, self.fleet, self.run_dir = cause, fleet, run_dir


def submit(fleet: Fleet, overrides: Sequence[str], *, quiet: bool, config_dirs: Sequence[Path] = ()) -> Path:
    """Run an experiment on the fleet's devices and return its folder.

    ``config_dirs`` are the user's own configuration folders on the server; devices look up the names in theirs.

    Raises
    ------
    ConfigError
        If the settings are wrong, the server cannot be reached, or the run fails.
    """
    from fedcl.config.compose import compose

    clients = [] if any(text.startswith("num_clients=") for text in overrides) else [len(fleet.devices)]
    given = [*overrides, *(f"num_clients={count}" for count in clients)]
    cfg = compose([*given, "backend=flower", "compare_with=null"], config_dirs)
    run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    run_dir = Path(cfg["run_dir"] or fleet.folder / "runs" / f"{cfg['name']}-{run}").resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(
            f"run_dir={run_dir}: must be new or empty; or resume with: fedcl deploy resume {fleet.folder}"
        )
    given = [text for text in given if not text.startswith("run_dir=")]
    launch = Launch(run, str(run_dir))
    settings = {"overrides": shlex.join([*given, f"run_dir={run_dir}"])}
    if config_dirs:
        settings["config_dirs"] = shlex.join(str(folder.resolve()) for folder in config_dirs)
    _run(fleet, launch, settings, quiet=quiet)
    return run_dir


def resume(fleet: Fleet, run_dir: Path | None, *, quiet: bool, config_dirs: Sequence[Path] = ()) -> Path:
    """Go on with a run, the last one unless ``run_dir`` says otherwise, from its last checkpoint; return its folder.

    Raises
    ------
    ConfigError
        If there is none, it is over or still running, or the server cannot be reached.
    """
    launches = read_launches(fleet)
    if run_dir is not None:
        launches = [one for one in launches if Path(one.run_dir) == run_dir.resolve()]
    if not launches:
        raise ConfigError(f"{fleet.folder}: no run to resume")
    launch = launches[-1]
    folder = Path(launch.run_dir)
    if not (folder / "STATUS").is_file():
        raise ConfigError(f"{folder}: the run never began; start it again with: fedcl deploy run {fleet.folder}")
    if _status(folder) == "done":
        raise ConfigError(f"{folder}: the run is done")
    from fedcl.results.launches import Trust, launched  # torch takes longer to import than the refusals above
    from fedcl.results.locking import hold

    with hold(folder):  # the server's process holds it while the run goes on
        given = launched(folder, Trust(tuple(config_dirs))).launch["overrides"]
    refuse_unreachable(fleet)
    if launch.flower_run and _stays_active(fleet, launch.flower_run, quiet=quiet):
        raise ConfigError(f"{folder}: still running; stop it with: flwr stop {launch.flower_run} {CONNECTION}")
    again = replace(launch, attempt=launch.attempt + 1)
    named = shlex.join(str(one.resolve()) for one in config_dirs)
    settings = {"overrides": shlex.join(given), "config_dirs": named, "resume": str(folder)}
    _run(fleet, again, settings, quiet=quiet)
    return folder


def _run(fleet: Fleet, launch: Launch, settings: dict[str, str], *, quiet: bool) -> None:
    """Submit, follow to the end, and raise unless the run is done."""
    from fedcl.client.device import sent_to_devices
    from fedcl.config.compose import path_keys

    refuse_unreachable(fleet)
    sign(fleet.server, fleet.ca / KEY)
    forget_refusals(fleet.server)
    write_launch(fleet, launch)
    write_order(fleet.server, launch.run, settings)
    given, folders = shlex.split(settings["overrides"]), shlex.split(settings.get("config_dirs", ""))
    sent = shlex.join(sent_to_devices(given, path_keys(given, [Path(folder) for folder in folders])))
    texts = {"overrides": sent, "run": launch.run}  # what Flower takes to every device
    lines = [f"{key} = {json.dumps(value)}" for key, value in texts.items()] + [f"attempt = {launch.attempt}"]
    run_config = fleet.server / "run.toml"
    write_atomic(run_config, "\n".join([*lines, ""]))
    log = fleet.folder / "logs" / f"run-{launch.run}.log"
    log.parent.mkdir(exist_ok=True)
    command = ["flwr", "run", str(fleet.server / "app"), CONNECTION, "--run-config", str(run_config), "--stream"]
    before = _status(Path(launch.run_dir))
    try:
        number = _follow(fleet, launch, command, log, quiet=quiet)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise Stopped(stop, fleet.folder, Path(launch.run_dir)) from stop
    status = _status(Path(launch.run_dir))
    if status != "done":
        if status == "" or (status == before and launch.attempt == 0):
            with suppress(ConfigError, subprocess.TimeoutExpired):  # it may have ended by itself
                flwr(fleet, "stop", number, CONNECTION)
            raise ConfigError(f"the run did not begin:\n{tail(log)}")
        hint = f"resume with: fedcl deploy resume {fleet.folder}"
        raise ConfigError(f"the run ended early (Flower's run {number}); {hint}\n{tail(log)}")


def _follow(fleet: Fleet, launch: Launch, command: Sequence[str], log: Path, *, quiet: bool) -> str:
    """Write down what the run says until it ends, show how far it is, and return Flower's number of it."""
    number = ""
    env = {**environment(), **flower_environment(fleet)}
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the run in order
        ) as process,
        _starting(process, file) as begun,
    ):
        assert process.stdout is not None  # piped above
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                found = _STARTED.search(line)
                if not number and found:
                    number = found[1]
                    write_launch(fleet, replace(launch, flower_run=number))
                if line.startswith(_SHOWN):
                    begun.set()
                    if not quiet:
                        print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            with undisturbed():
                _stop(fleet, process, number)
            raise
    return number


@contextmanager
def _starting(process: subprocess.Popen[str], log: IO[str]) -> Iterator[threading.Event]:
    """Within this block end ``process`` if the run's own process does not start in time: nobody else would say so."""
    begun, over = threading.Event(), threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + BEGIN_SECONDS
        while time.monotonic() < deadline:
            if begun.is_set() or over.wait(1.0):
                return
        log.write(
            f"the run's process has not started within {BEGIN_SECONDS:.0f} s: Flower starts it again every 30 s where "
            "that was too short; is this machine overloaded? see the server's log\n"
        )
        process.terminate()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield begun
    finally:
        over.set()
        thread.join()


def _stop(fleet: Fleet, process: subprocess.Popen[str], number: str) -> None:
    """End a run that is being followed, on the server too; one that was just handed in is waited for to be known."""
    if not number and process.stdout is not None and process.poll() is None:
        late = threading.Timer(GIVE_UP_SECONDS, process.terminate)
        late.start()
        for line in process.stdout:
            found = _STARTED.search(line)
            if found:
                number = found[1]
                break
        late.cancel()
    process.terminate()
    if number:
        with suppress(ConfigError, subprocess.TimeoutExpired):  # the server may be gone, and the run with it
            flwr(fleet, "stop", number, CONNECTION)


def flower_environment(fleet: Fleet) -> dict[str, str]:
    """Return the settings under which Flower's command line knows this fleet, and stays quiet."""
    return {
        "FLWR_HOME": str(fleet.server / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def flwr(fleet: Fleet, *arguments: str) -> str:
    """Run a command of Flower's and return what it prints.

    Raises
    ------
    ConfigError
        If it fails.
    """
    done = subprocess.run(
        ["flwr", *arguments],
        env={**environment(), **flower_environment(fleet)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        raise ConfigError(f"flwr {' '.join(arguments)}: {(done.stdout + done.stderr).strip()[-800:]}")
    return done.stdout


def _stays_active(fleet: Fleet, number: str, *, quiet: bool) -> bool:
    """Whether a run is alive: one whose ServerApp was killed counts as running until heartbeats are missed."""
    deadline = time.monotonic() + NOTICE_SECONDS
    told = quiet
    while _is_active(fleet, number):
        if time.monotonic() > deadline:
            return True
        if not told:
            print("Flower takes the run for running; waiting until it is sure", file=sys.stderr, flush=True)
            told = True
        time.sleep(2.0)
    return False


def _is_active(fleet: Fleet, number: str) -> bool:
    """Whether Flower still plays a run."""
    answer: dict[str, Any] = json.loads(flwr(fleet, "ls", CONNECTION, "--format", "json"))
    states = {str(row.get("run-id")): str(row.get("status")) for row in answer.get("runs", [])}
    return number in states and not states[number].startswith(_ENDED)


def refuse_unreachable(fleet: Fleet) -> None:
    """Refuse to continue without a server; ConfigError says why it cannot be reached."""
    why = unreachable(fleet) or refusal("127.0.0.1", fleet.control_port, None)
    if why is not None:
        raise ConfigError(f"{why}; start it with: {fleet.server / 'start.sh'}; see also: fedcl deploy check")


def settle(run_dir: Path, *, seconds: float = LEAVE_SECONDS) -> bool:
    """Wait until a run that was stopped has noted so, and return whether it can be gone on with.

    Without ``seconds`` its process is known to have ended, and what it could not note any more is noted here.
    """
    deadline = time.monotonic() + seconds
    while (status := _status(run_dir)) == "running" and time.monotonic() < deadline:
        time.sleep(0.3)
    if status == "running" and seconds == 0:
        write_atomic(run_dir / "STATUS", "interrupted\n")
    return status != ""


def _status(run_dir: Path) -> str:
    said = reading.status(run_dir)
    return "" if said == "unknown" else said
