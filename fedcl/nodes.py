"""What the server's folder says of the devices that have joined: whose client each of Flower's nodes is, by its key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fedcl.files import write_atomic

SERVER_FOLDER = "FEDCL_SERVER"  # an environment variable: by it the server names its folder to a run's own process
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
    """Return what tells the client whose key a node has (None: nobody's), or None where keys are not looked at."""
    folder = Path(os.environ.get(SERVER_FOLDER, ""))
    if SERVER_FOLDER not in os.environ or not (folder / _NODES).is_file():
        return None
    return lambda node: _read(folder).get(node)


def _read(folder: Path) -> dict[int, str]:
    found: dict[str, str] = json.loads((folder / _NODES).read_text(encoding="utf-8"))
    return {int(node): client for node, client in found.items()}
