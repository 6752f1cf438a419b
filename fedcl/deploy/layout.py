"""The folder of a fleet: which file is where, and ``fleet.yaml``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError

PORT = 8443
CONTROL_PORT = 8444  # on loopback: by it fedcl deploy and its runs reach the server on its own machine
NODE_PORT = 9094  # of the first device's runtime; those after it count on, so that several fit one machine
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]{0,253}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Fleet:
    """A fleet's folder.

    ``address`` and ``port`` are where devices reach the server, ``control_port`` is where this machine alone does;
    ``insecure`` leaves out TLS.
    """

    folder: Path
    address: str
    port: int
    control_port: int
    devices: tuple[str, ...]
    insecure: bool = False

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.address):
            raise ConfigError(f"address={self.address}: must be a host's name or IP address")
        for name in ("port", "control_port"):
            if not 1 <= (port := getattr(self, name)) <= 65535:
                raise ConfigError(f"{name}={port}: must be in 1..65535")
        if self.port == self.control_port:
            raise ConfigError(f"control_port={self.control_port}: must differ from port")

    @property
    def server(self) -> Path:
        """Folder of what the server's machine needs."""
        return self.folder / "server"

    @property
    def ca(self) -> Path:
        """Folder of the certificate authority, which neither server nor devices need."""
        return self.folder / "ca"

    def device(self, name: str) -> Path:
        """Return the folder of what one device needs."""
        return self.folder / "devices" / name

    @property
    def where(self) -> str:
        """Host and port, as Flower's commands take them."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def control(self) -> str:
        """Host and port on loopback, as Flower's commands take them."""
        return f"127.0.0.1:{self.control_port}"

    def save(self) -> None:
        """Write ``fleet.yaml``."""
        raw = {"address": self.address, "port": self.port, "control_port": self.control_port}
        raw |= {"insecure": self.insecure, "devices": list(self.devices)}
        write_atomic(self.folder / "fleet.yaml", yaml.safe_dump(raw, sort_keys=False))

    @classmethod
    def load(cls, folder: Path) -> Fleet:
        """Read a fleet's folder.

        Raises
        ------
        ConfigError
            If it is none.
        """
        file = folder / "fleet.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{folder}: not a fleet's folder, it has no fleet.yaml; create one with: fedcl deploy init DIR"
            )
        try:
            raw = yaml.safe_load(file.read_text(encoding="utf-8"))
            devices = tuple(str(name) for name in raw["devices"])
            if "control_port" not in raw:
                raise ConfigError(f"{file}: made by an older fedcl, whose server admits strangers; make a new fleet")
            ports = int(raw["port"]), int(raw["control_port"])
            return cls(folder.resolve(), str(raw["address"]), *ports, devices, raw["insecure"] is True)
        except ConfigError:
            raise
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file}: damaged: {error!r}") from error


@dataclass(frozen=True)
class Launch:
    """A run submitted to a fleet; ``attempt`` counts its starts, ``flower_run`` is Flower's number of the last one."""

    run: str
    run_dir: str
    attempt: int = 0
    flower_run: str = ""


def read_launches(fleet: Fleet) -> list[Launch]:
    """Return the runs that were submitted from this folder, the oldest first."""
    file = fleet.folder / "launches.json"
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [Launch(**row) for row in rows]


def write_launch(fleet: Fleet, launch: Launch) -> None:
    """Add or replace a run."""
    kept = [old for old in read_launches(fleet) if old.run != launch.run]
    rows = [vars(one) for one in [*kept, launch]]
    write_atomic(fleet.folder / "launches.json", json.dumps(rows, indent=2) + "\n")
