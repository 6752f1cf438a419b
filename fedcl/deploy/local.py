"""A whole fleet on this machine: a rehearsal over real processes, TLS and keys."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedcl.config.compose import compose
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_ports
from fedcl.deploy.submit import Stopped, resume, settle, submit


def local(
    devices: int,
    overrides: Sequence[str],
    *,
    folder: Path | None,
    insecure: bool,
    quiet: bool,
    config_dirs: Sequence[Path] = (),
    going_on: bool = False,
) -> Path:
    """Bring up a SuperLink and SuperNodes on loopback, run, take them down, and return the run's folder.

    ``folder`` is the fleet's, used again if it is one already; None: one that is removed afterwards, unless its run was
    interrupted, while the run's own goes under ``runs/``. A fleet that is made here gives its devices the server's
    ``config_dirs``. ``going_on`` resumes the fleet's last run instead of beginning one.

    Raises
    ------
    ConfigError
        If the settings are wrong or the run fails.
    Stopped
        If a signal ended the run: no process is left.
    """
    if folder is not None:
        there = (folder / "fleet.yaml").is_file()
        if going_on and not there:
            raise ConfigError(f"{folder}: not a fleet's folder; --resume needs the one that was kept with --dir")
        fleet = Fleet.load(folder) if there else _init(folder, devices, insecure, config_dirs)
        if len(fleet.devices) != devices:
            raise ConfigError(f"{folder}: has {len(fleet.devices)} devices; -n {devices}")
        return _run(fleet, overrides, config_dirs, quiet=quiet, going_on=going_on)
    if going_on:
        raise ConfigError("--resume: needs --dir, the folder of the interrupted fleet")
    compose([*overrides, "backend=flower"], config_dirs)  # errors must show before anything is started
    named = any(text.startswith("run_dir=") for text in overrides)
    own = Path(tempfile.mkdtemp(prefix="fedcl-fleet-"))
    keep = False
    try:
        fleet = _init(own / "fleet", devices, insecure, config_dirs)
        runs = Path("runs").resolve() / "local" / own.name
        given = overrides if named else [*overrides, f"run_dir={runs}"]
        return _run(fleet, given, config_dirs, quiet=quiet, going_on=False)
    except Stopped as stop:
        keep = (stop.run_dir / "STATUS").is_file()  # the devices' states are in the fleet's folder
        raise
    finally:
        if not keep:
            shutil.rmtree(own, ignore_errors=True)


def _init(folder: Path, devices: int, insecure: bool, config_dirs: Sequence[Path]) -> Fleet:
    port, control_port = free_ports(2)
    fleet = init(folder, devices=devices, address="127.0.0.1", port=port, control_port=control_port, insecure=insecure)
    folders = json.dumps([str(one.resolve()) for one in config_dirs])
    for name in fleet.devices:
        spec = fleet.device(name) / "client.yaml"
        text = spec.read_text(encoding="utf-8").replace("config_dirs: []", f"config_dirs: {folders}")
        spec.write_text(text, encoding="utf-8")
    return fleet


def _run(fleet: Fleet, overrides: Sequence[str], config_dirs: Sequence[Path], *, quiet: bool, going_on: bool) -> Path:
    def say(line: str) -> None:
        if not quiet:
            print(f"fleet: {line}", file=sys.stderr, flush=True)

    try:
        with Processes(fleet) as processes:
            processes.start_server()
            say(f"server up at {fleet.where}")
            for name in fleet.devices:
                processes.start_device(name)
            say(f"{len(fleet.devices)} devices started; what they say: {fleet.folder / 'logs'}")
            if going_on:
                return resume(fleet, None, quiet=quiet, config_dirs=config_dirs)
            return submit(fleet, overrides, quiet=quiet, config_dirs=config_dirs)
    except Stopped as stop:
        settle(stop.run_dir, seconds=0)
        raise
