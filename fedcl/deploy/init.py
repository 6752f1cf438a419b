"""Write everything that a small fleet needs: certificates, keys, commands, units, a folder for each device."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from fedcl import __version__
from fedcl.config.value_rules import ConfigError
from fedcl.deploy.bundle import KEY, TRUSTED, sign, trusted
from fedcl.deploy.certificates import new_authority, new_device_key, new_server_certificate, new_signing_key
from fedcl.deploy.layout import CONTROL_PORT, NODE_PORT, Fleet

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SETTINGS = (
    "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 "
    "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
)
_APP = f"""\
[project]
name = "fedcl-fleet"
version = "{__version__}"
description = "Names the apps of the fedcl that server and devices have installed; carries no code"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedcl"

[tool.flwr.app.components]
serverapp = "fedcl.server_app:app"
clientapp = "fedcl.client_app:app"

[tool.flwr.app.config]
overrides = ""
run = ""
attempt = 0
"""
_CLIENT = """\
# What this device is and has. The server never names a path on it.
client: "{name}"           # the id by which its state is kept; the run's clients are 0, 1, ...
# Its own data, in the words of fedcl run (the run then says data/partition=local), such as
#   data: [data=npz, data.root=/home/pi/samples.npz]
#   data: [data=folder, data.root=/home/pi/images, data.source.size=32]
data: null                 # null: a rehearsal, with this device's part of the data that the run names
state: state               # folder of the client's state
device: auto               # auto, cpu or cuda
threads: 1
max_message_mb: 512        # a larger message is refused
pretrained: null           # file of the run's model.pretrained: needed if a part of that model is frozen
config_dirs: []            # folders with choices of your own, laid out like configs/, that runs may name
"""
_UNIT = """\
[Unit]
Description={what}
After=network-online.target time-sync.target
Wants=network-online.target

[Service]
# where the commands of the environment lie into which fedcl was installed
Environment=PATH={bin}:/usr/local/bin:/usr/bin:/bin
WorkingDirectory={folder}
ExecStart=/bin/sh "{folder}/start.sh"
Restart=always
RestartSec=5
KillMode=control-group

[Install]
WantedBy=multi-user.target
"""
_DOCKERFILE = """\
FROM python:3.11-slim
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "fedcl=={version}"
WORKDIR /fleet
"""


def init(
    folder: Path,
    *,
    devices: int,
    address: str,
    port: int,
    control_port: int = CONTROL_PORT,
    insecure: bool = False,
    own_certificates: bool = False,
) -> Fleet:
    """Write a fleet's folder and return it.

    Raises
    ------
    ConfigError
        If the folder holds something already, or there is no device to write for.
    """
    if devices < 1:
        raise ConfigError(f"--devices {devices}: must be at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: must be new or empty")
    names = tuple(str(i) for i in range(devices))
    fleet = Fleet(folder.resolve(), address, port, control_port, names, insecure)
    for path in (fleet.server / "keys", fleet.server / "flwr", *map(fleet.device, fleet.devices)):
        path.mkdir(parents=True)
    fleet.ca.mkdir(mode=0o700)
    if not insecure:
        _write_certificates(fleet, own=own_certificates)
    _write_server(fleet)
    public = new_signing_key(fleet.ca / KEY)
    sign(fleet.server, fleet.ca / KEY)
    for name in fleet.devices:
        (fleet.device(name) / TRUSTED).write_text(trusted(public))
    for place, name in enumerate(fleet.devices):
        _write_device(fleet, name, NODE_PORT + place)
    _write_compose(fleet)
    fleet.save()
    return fleet


def _write_certificates(fleet: Fleet, *, own: bool) -> None:
    if not own:
        new_authority(fleet.ca / "ca.key", fleet.ca / "ca.crt")
        new_server_certificate(fleet.ca, fleet.server / "server.key", fleet.server / "server.crt", fleet.address)
        for place in (fleet.server, *map(fleet.device, fleet.devices)):
            shutil.copy(fleet.ca / "ca.crt", place / "ca.crt")
    for name in fleet.devices:
        new_device_key(fleet.device(name) / "key", fleet.server / "keys" / f"{name}.pub")


def server_command(fleet: Fleet) -> list[str]:
    """Return the command that starts the server, to be run in its folder."""
    everywhere = "::" if ":" in fleet.address else "0.0.0.0"
    host = ("::1" if ":" in fleet.address else "127.0.0.1") if fleet.address in _LOOPBACK else everywhere
    ports = ["--port", str(fleet.port), "--control-port", str(fleet.control_port)]
    insecure = ["--insecure"] if fleet.insecure else []
    return ["python", "-m", "fedcl.deploy.superlink", "--host", host, *ports, *insecure]


def supernode_command(fleet: Fleet) -> list[str]:
    """Return the command that starts a device, to be run in its folder, but for its port and ``--node-config``."""
    secure = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "key"]
    return [
        "flower-supernode",
        *(["--insecure"] if fleet.insecure else secure),
        *("--superlink", fleet.where, "--trusted-entities", TRUSTED, "--host", "127.0.0.1"),
    ]


def _script(path: Path, command: str) -> None:
    lines = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1', f"export {_SETTINGS}", 'export FLWR_HOME="$PWD/flwr"']
    path.write_text("\n".join([*lines, f"exec {command}", ""]))
    path.chmod(0o755)


def _write_server(fleet: Fleet) -> None:
    _script(fleet.server / "start.sh", shlex.join(server_command(fleet)))
    write_app(fleet.server / "app")
    lines = ["[superlink]", 'default = "fleet"', "", "[superlink.fleet]", f'address = "{fleet.control}"']
    (fleet.server / "flwr" / "config.toml").write_text("\n".join([*lines, "insecure = true", ""]))  # on loopback
    here, folder = (str(one).replace("%", "%%") for one in (Path(sys.executable).parent, fleet.server))
    unit = _UNIT.format(what="fedcl server (Flower SuperLink)", folder=folder, bin=here)
    (fleet.server / "fedcl-server.service").write_text(unit)


def write_app(folder: Path) -> None:
    """Write the app that Flower packs and sends to devices: two small files that name fedcl's own."""
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(_APP)
    (folder / "README.md").write_text("Names the apps of an installed fedcl.\n")


def _write_device(fleet: Fleet, name: str, port: int) -> None:
    folder = fleet.device(name)
    (folder / "client.yaml").write_text(_CLIENT.format(name=name))
    rest = f'--port "${{FEDCL_NODE_PORT:-{port}}}" --node-config "spec=\\"$PWD/client.yaml\\""'
    _script(folder / "start.sh", f"{shlex.join(supernode_command(fleet))} {rest}")
    unit = _UNIT.format(
        what=f"fedcl device {name} (Flower SuperNode)", folder="/opt/fedcl/device", bin="/opt/fedcl/bin"
    )
    (folder / "fedcl-device.service").write_text(unit)


def _write_compose(fleet: Fleet) -> None:
    """Write a Compose file in which every container runs the very ``start.sh`` of its folder."""
    lines = ["# Server and devices as containers that share the host's network.", "services:"]
    folders = {"server": "server", **{f"device-{name}": f"devices/{name}" for name in fleet.devices}}
    for service, folder in folders.items():
        lines += [f"  {service}:", "    build: .", "    network_mode: host", "    restart: unless-stopped"]
        runs = f", './runs:{fleet.folder}/runs'" if service == "server" else ""  # where `fedcl deploy run` reads them
        lines += [f"    volumes: ['./{folder}:/fleet'{runs}]", "    command: ['/bin/sh', '/fleet/start.sh']"]
    (fleet.folder / "compose.yaml").write_text("\n".join([*lines, ""]))
    (fleet.folder / "Dockerfile").write_text(_DOCKERFILE.format(version=__version__))
