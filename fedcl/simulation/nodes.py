"""What the server's folder says: whose client each of Flower's nodes is, by its key, and what each run is to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fedcl.base.files import write_atomic
from fedcl.config.value_rules import ConfigError

SERVER_FOLDER = "FEDCL_SERVER"  # an environment variable: by it the server names its folder to a run's own process
_ORDERS = "orders"
_REFUSED = "refused.json"
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NODES = "nodes.json"  # Flower's number of a node -> client; not there in a fleet without authentication


def open_nodes(folder: Path, *, bound: bool) -> None:
    """Begin a table in a server's folder, or go on with the one that is there; without ``bound`` there is none."""
    if not bound:
        (folder / _NODES).unlink(missing_ok=True)
    elif not (folder / _NODES).is_file():
        write_atomic(folder / _NODES, "{}")


def bind_node(folder: Path, node: int, client: str) -> None:
    """Note that ``node`` has the key of ``client``; a node that had an earlier key of it is nobody's from now on."""
    known = _read(folder)
    if known.get(node) != client:
        kept = {other: whose for other, whose in known.items() if whose != client} | {node: client}
        write_atomic(folder / _NODES, json.dumps({str(one): whose for one, whose in kept.items()}))


def owners() -> Callable[[int], str | None] | None:
    """Return a function from a node to the client whose key it has (None: no client's); None if keys are not used."""
    folder = Path(os.environ.get(SERVER_FOLDER, ""))
    if SERVER_FOLDER not in os.environ or not (folder / _NODES).is_file():
        return None
    return lambda node: _read(folder).get(node)


def note_refusal(folder: Path, client: str, why: str) -> None:
    """Note in a server's folder why a request of a client's device was refused; the newest of each client is kept."""
    file = folder / _REFUSED
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get(client) != why:
        write_atomic(file, json.dumps({**known, client: why}))


def forget_refusals(folder: Path) -> None:
    """Begin again: what was refused in an earlier run says nothing of this one."""
    (folder / _REFUSED).unlink(missing_ok=True)


def refusals() -> dict[str, str]:
    """Return why requests of clients' devices were refused since the run began."""
    file = Path(os.environ.get(SERVER_FOLDER, "")) / _REFUSED
    if SERVER_FOLDER not in os.environ or not file.is_file():
        return {}
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_order(folder: Path, run: str, settings: Mapping[str, str]) -> None:
    """Write down in a server's folder what a run is to do: its overrides, and folders that only the server knows."""
    (folder / _ORDERS).mkdir(exist_ok=True)
    write_atomic(folder / _ORDERS / f"{run}.json", json.dumps(dict(settings)))


def read_order(folder: Path, run: str) -> dict[str, str]:
    """Return what was written down of a run.

    Raises
    ------
    ConfigError
        If nothing was.
    """
    file = folder / _ORDERS / f"{run}.json"
    if not _RUN.fullmatch(run) or not file.is_file():
        raise ConfigError(f"run={run!r}: this server has no such run; start one with: fedcl deploy run")
    order: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return order


def _read(folder: Path) -> dict[int, str]:
    found: dict[str, str] = json.loads((folder / _NODES).read_text(encoding="utf-8"))
    return {int(node): client for node, client in found.items()}
