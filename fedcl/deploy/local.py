"""A whole fleet on this machine: a rehearsal over real processes, TLS and keys."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_port
from fedcl.deploy.submit import register, submit
from fedcl.rules import ConfigError


def local(devices: int, overrides: Sequence[str], *, folder: Path | None, insecure: bool, quiet: bool) -> Path:
    """Bring up a SuperLink and SuperNodes on loopback, run, take them down, and return the run's folder.

    ``folder`` is the fleet's, used again if it is one already; None: one that is removed afterwards, while the run's
    own goes under ``runs/``.

    Raises
    ------
    ConfigError
        If the settings are wrong or the run fails.
    """
    if folder is not None:
        fleet = Fleet.load(folder) if (folder / "fleet.yaml").is_file() else _init(folder, devices, insecure)
        if len(fleet.devices) != devices:
            raise ConfigError(f"{folder}: has {len(fleet.devices)} devices; -n {devices}")
        return _run(fleet, overrides, quiet=quiet)
    named = any(text.startswith("run_dir=") for text in overrides)
    with tempfile.TemporaryDirectory(prefix="fedcl-fleet-") as name:
        fleet = _init(Path(name) / "fleet", devices, insecure)
        runs = Path("runs").resolve() / "local" / Path(name).name
        return _run(fleet, overrides if named else [*overrides, f"run_dir={runs}"], quiet=quiet)


def _init(folder: Path, devices: int, insecure: bool) -> Fleet:
    return init(folder, devices=devices, address="127.0.0.1", port=free_port(), insecure=insecure)


def _run(fleet: Fleet, overrides: Sequence[str], *, quiet: bool) -> Path:
    with Processes(fleet) as processes:
        processes.start_server()
        if not fleet.insecure:
            register(fleet)
        for name in fleet.devices:
            processes.start_device(name)
        return submit(fleet, overrides, quiet=quiet)
