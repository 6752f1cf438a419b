"""A whole fleet on this machine: a rehearsal over real processes, TLS and keys."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedcl.deploy.init import init
from fedcl.deploy.layout import Fleet
from fedcl.deploy.processes import Processes, free_ports
from fedcl.deploy.submit import submit
from fedcl.rules import ConfigError


def local(
    devices: int,
    overrides: Sequence[str],
    *,
    folder: Path | None,
    insecure: bool,
    quiet: bool,
    config_dirs: Sequence[Path] = (),
) -> Path:
    """Bring up a SuperLink and SuperNodes on loopback, run, take them down, and return the run's folder.

    ``folder`` is the fleet's, used again if it is one already; None: one that is removed afterwards, while the run's
    own goes under ``runs/``. A fleet that is made here gives its devices the server's ``config_dirs``.

    Raises
    ------
    ConfigError
        If the settings are wrong or the run fails.
    """
    if folder is not None:
        there = (folder / "fleet.yaml").is_file()
        fleet = Fleet.load(folder) if there else _init(folder, devices, insecure, config_dirs)
        if len(fleet.devices) != devices:
            raise ConfigError(f"{folder}: has {len(fleet.devices)} devices; -n {devices}")
        return _run(fleet, overrides, config_dirs, quiet=quiet)
    named = any(text.startswith("run_dir=") for text in overrides)
    with tempfile.TemporaryDirectory(prefix="fedcl-fleet-") as name:
        fleet = _init(Path(name) / "fleet", devices, insecure, config_dirs)
        runs = Path("runs").resolve() / "local" / Path(name).name
        given = overrides if named else [*overrides, f"run_dir={runs}"]
        return _run(fleet, given, config_dirs, quiet=quiet)


def _init(folder: Path, devices: int, insecure: bool, config_dirs: Sequence[Path]) -> Fleet:
    port, control_port = free_ports(2)
    fleet = init(folder, devices=devices, address="127.0.0.1", port=port, control_port=control_port, insecure=insecure)
    folders = json.dumps([str(one.resolve()) for one in config_dirs])
    for name in fleet.devices:
        spec = fleet.device(name) / "client.yaml"
        text = spec.read_text(encoding="utf-8").replace("config_dirs: []", f"config_dirs: {folders}")
        spec.write_text(text, encoding="utf-8")
    return fleet


def _run(fleet: Fleet, overrides: Sequence[str], config_dirs: Sequence[Path], *, quiet: bool) -> Path:
    with Processes(fleet) as processes:
        processes.start_server()
        for name in fleet.devices:
            processes.start_device(name)
        return submit(fleet, overrides, quiet=quiet, config_dirs=config_dirs)
